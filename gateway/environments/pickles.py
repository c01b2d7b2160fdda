"""Scans a pickle without executing anything: its globals, its short texts, its byte code.

Takes a bounded amount of time and memory for the pickles of a package, whatever they claim to be. cloudpickle
and dill write byte code for functions and classes that they store by value; it runs only on the minor version
of Python that wrote it. Must not know flavors.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from loaders import opcodes, scan

SUFFIXES: Final = frozenset(
    {".pkl", ".pickle", ".cloudpickle", ".joblib", ".statsmodels", ".dill", ".pth", ".pt"}
)
_COMPRESSED: Final[dict[str, Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_MAX_TEXT: Final = 200
_MAX_TEXTS: Final = 20_000
_TEXTS: Final = frozenset(
    {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINSTRING", "STRING"}
)
_MAKERS: Final = frozenset(
    {
        "_make_function", "_make_skel_func", "_fill_function", "_create_code", "_create_function",
        "_make_cell_set_template_code",
    }
)  # fmt: skip
"""The functions that cloudpickle and dill call to make a function from its code."""
_MARKS: Final = tuple(name.encode() for name in ("CodeType", *sorted(_MAKERS)))


@dataclass(frozen=True, slots=True)
class Named:
    """`globals`: (module, name) of everything that unpickling would import. `texts`: its short texts.
    `byte_code`: whether it holds code by value. `whole`: it was read to its end without a gap."""

    globals: frozenset[tuple[str, str]]
    texts: frozenset[str]
    byte_code: bool
    whole: bool


_UNREADABLE: Final = Named(frozenset(), frozenset(), True, False)
"""Of a file that cannot be read: taken for the worse."""


def is_pickle(name: str) -> bool:
    """Returns True if loaders unpickle a file of this name."""
    suffixes = Path(name).suffixes
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in SUFFIXES


@dataclass(slots=True)
class Budget:
    """What the scan of all pickles of one package may take: `operations`, bytes `unpacked` from compressed
    files, and `names` and texts that are kept."""

    operations: int = 10 * scan.MOST_OPERATIONS
    unpacked: int = 4 * scan.MOST_BYTES
    names: int = 100_000


class _Exhausted(ValueError):
    """The budget is used up."""


def read(file: Path, budget: Budget | None = None) -> Named:
    """Scans a file; in a zip archive (as torch writes), scans all its pickles. Takes from `budget`. Raises
    OSError."""
    budget = Budget() if budget is None else budget
    try:
        with opcodes.opened(file) as handle:
            if zipfile.is_zipfile(handle):
                return _archived(handle, budget)
            unpacked = _COMPRESSED.get(file.suffix)
            if unpacked is None:
                return _read(lambda: _rewound(handle), budget)
        return _read(lambda: _Unpacked(unpacked(file, "rb"), budget), budget)
    except (*opcodes.DAMAGED, lzma.LZMAError):
        return _UNREADABLE
    except OSError as error:
        if not opcodes.damaged(error):
            raise
        return _UNREADABLE


def _archived(handle: IO[bytes], budget: Budget) -> Named:
    with opcodes.archived(handle) as archive:
        members = [name for name in archive.namelist() if is_pickle(name)]
        return _together(
            [_read(lambda name=name: _Unpacked(archive.open(name), budget), budget) for name in members]  # type: ignore[misc]
        )


def _rewound(handle: IO[bytes]) -> AbstractContextManager[opcodes.Readable]:
    handle.seek(0)
    return nullcontext(handle)


def _read(opened: Callable[[], AbstractContextManager[opcodes.Readable]], budget: Budget) -> Named:
    with opened() as handle:
        named = _scanned(handle, budget)
    if not named.whole and not named.byte_code:
        with opened() as handle:
            if _marked(handle):
                return Named(named.globals, named.texts, True, False)
    return named


class _Unpacked(io.BufferedIOBase):
    """A compressed file that gives no more bytes than the budget has, and a file's share of it."""

    def __init__(self, handle: IO[bytes], budget: Budget) -> None:
        self._handle = handle
        self._budget = budget
        self._left = scan.MOST_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        return self._counted(self._handle.read(-1 if size is None else size))

    def readline(self, size: int | None = -1, /) -> bytes:
        return self._counted(self._handle.readline(-1 if size is None else size))

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        self._budget.unpacked -= len(data)
        if min(self._left, self._budget.unpacked) < 0:
            raise _Exhausted("the file is too large once it is unpacked")
        return data

    def close(self) -> None:
        self._handle.close()
        super().close()


def _scanned(handle: opcodes.Readable, budget: Budget) -> Named:
    found: set[tuple[str, str]] = set()
    texts: set[str] = set()
    memo: dict[int, str] = {}
    memoized = 0
    last: str | None = None  # the text on top of the stack, if it is one
    recent: list[str | None] = [None, None]  # the last two pushed values
    whole = True
    try:
        for step, (name, argument) in enumerate(_operations(handle)):
            budget.operations -= 1
            if step >= scan.MOST_OPERATIONS or budget.operations < 0 or budget.names < 0:
                whole = False
                break
            if name in _TEXTS:
                last = argument if isinstance(argument, str) and len(argument) <= _MAX_TEXT else None
                recent = [recent[1], last]
                if last is not None and len(texts) < _MAX_TEXTS and last not in texts:
                    texts.add(last)
                    budget.names -= 1
            elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
                place = memoized if name == "MEMOIZE" else int(argument)
                memoized += 1
                if last is None:
                    memo.pop(place, None)
                else:
                    memo[place] = last
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                last = memo.get(int(argument))
                recent = [recent[1], last]
            elif name in ("GLOBAL", "INST", "STACK_GLOBAL"):
                module, attribute = recent
                if name != "STACK_GLOBAL":
                    module, _, attribute = str(argument or "").partition(" ")
                if not module or attribute is None or len(module) + len(attribute) > 2 * _MAX_TEXT:
                    whole = False
                elif (module, attribute) not in found:
                    found.add((module, attribute))
                    budget.names -= 1
                last = None
            elif name not in ("FRAME", "PROTO", "MARK"):
                last = None
    except (*opcodes.DAMAGED, lzma.LZMAError):
        whole = False  # not a pickle, or one with raw data in it, as joblib writes
    return Named(frozenset(found), frozenset(texts), _holds_code(found, texts), whole)


def _operations(handle: opcodes.Readable) -> Iterator[tuple[str, Any]]:
    """The instructions of all pickles in a file, one after the other."""
    yield from opcodes.operations(handle)
    while (following := handle.read(1)) == b"\x80":
        yield from opcodes.operations(handle, following)


def _holds_code(found: Iterable[tuple[str, str]], texts: set[str]) -> bool:
    names = {name for _, name in found}
    if names & _MAKERS or ("types", "CodeType") in found or ("marshal", "loads") in found:
        return True
    return "_builtin_type" in names and "CodeType" in texts


def _marked(handle: opcodes.Readable) -> bool:
    """Whether a file that could not be read to its end contains a mark of byte code, or is too large to
    search."""
    tail = b""
    try:
        while block := handle.read(1 << 20):
            # In pieces, because a search holds the interpreter's lock.
            if any(mark in tail + block for mark in _MARKS):
                return True
            tail = block[-64:]
    except _Exhausted:
        return True
    return False


def _together(parts: list[Named]) -> Named:
    return Named(
        frozenset().union(*(part.globals for part in parts)),
        frozenset().union(*(part.texts for part in parts)),
        any(part.byte_code for part in parts),
        all(part.whole for part in parts),
    )
