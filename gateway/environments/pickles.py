"""Scans a pickle without executing anything: its globals, its short texts, its byte code.

`pickletools` lists the instructions of a pickle and executes none. cloudpickle and dill write byte code for
functions and classes that they store by value; it runs only on the minor version of Python that wrote it.
Must not know flavors.
"""

from __future__ import annotations

import bz2
import gzip
import itertools
import lzma
import mmap
import pickletools
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

SUFFIXES: Final = frozenset(
    {".pkl", ".pickle", ".cloudpickle", ".joblib", ".statsmodels", ".dill", ".pth", ".pt"}
)
_COMPRESSED: Final[dict[str, Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_MAX_STEPS: Final = 3_000_000
_MAX_TEXT: Final = 200
_MAX_TEXTS: Final = 20_000
_MAX_LOOKED: Final = 1 << 30
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


def is_pickle(name: str) -> bool:
    """Returns True if loaders unpickle a file of this name."""
    suffixes = Path(name).suffixes
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in SUFFIXES


def read(file: Path) -> Named:
    """Scans a file; in a zip archive (as torch writes), scans all its pickles. Raises OSError."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            parts = []
            for name in archive.namelist():
                if is_pickle(name):
                    with archive.open(name) as member:
                        parts.append(_scanned(member))
        return _together(parts)
    opened = _COMPRESSED.get(file.suffix, open)
    with opened(file, "rb") as handle:
        named = _scanned(handle)
    if not named.whole and not named.byte_code and _marked(file, opened):
        return Named(named.globals, named.texts, True, False)
    return named


def _scanned(handle: IO[bytes]) -> Named:
    found: set[tuple[str, str]] = set()
    texts: set[str] = set()
    memo: dict[int, str | None] = {}
    last: str | None = None  # the text on top of the stack, if it is one
    recent: list[str | None] = [None, None]  # the last two pushed values
    whole = True
    try:
        for step, (op, argument, _) in enumerate(_operations(handle)):
            if step >= _MAX_STEPS:
                whole = False
                break
            name = op.name
            if name in _TEXTS:
                last = argument if isinstance(argument, str) else None
                recent = [recent[1], last]
                if last is not None and len(last) <= _MAX_TEXT and len(texts) < _MAX_TEXTS:
                    texts.add(last)
            elif name == "MEMOIZE":
                memo[len(memo)] = last
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[int(argument)] = last
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                last = memo.get(int(argument))
                recent = [recent[1], last]
            elif name in ("GLOBAL", "INST"):
                module, _, attribute = str(argument).partition(" ")
                found.add((module, attribute))
                last = None
            elif name == "STACK_GLOBAL":
                if recent[0] is None or recent[1] is None:
                    whole = False
                else:
                    found.add((recent[0], recent[1]))
                last = None
            elif name not in ("FRAME", "PROTO", "MARK"):
                last = None
    except (
        ValueError,
        EOFError,
        UnicodeError,
        lzma.LZMAError,
        zipfile.BadZipFile,
        MemoryError,
        OverflowError,
    ):
        whole = False  # not a pickle, or one with raw data in it, as joblib writes
    return Named(frozenset(found), frozenset(texts), _holds_code(found, texts), whole)


def _operations(handle: IO[bytes]) -> Iterator[tuple[Any, Any, int | None]]:
    """The instructions of all pickles in a file, one after the other."""
    yield from pickletools.genops(handle)
    rest: Any
    while True:
        following = handle.read(1)
        if following != b"\x80":
            return
        rest = _Rest(following, handle)
        yield from pickletools.genops(rest)


class _Rest:
    """A file whose first byte has been read already."""

    def __init__(self, first: bytes, handle: IO[bytes]) -> None:
        self._first = first
        self._handle = handle

    def read(self, size: int) -> bytes:
        first, self._first = self._first[:size], self._first[size:]
        return first + self._handle.read(size - len(first))

    def readline(self) -> bytes:
        first, self._first = self._first, b""
        return first + self._handle.readline()


def _holds_code(found: Iterable[tuple[str, str]], texts: set[str]) -> bool:
    names = {name for _, name in found}
    if names & _MAKERS or ("types", "CodeType") in found or ("marshal", "loads") in found:
        return True
    return "_builtin_type" in names and "CodeType" in texts


def _marked(file: Path, opened: Any) -> bool:
    """Whether a file that could not be read to its end contains a mark of byte code."""
    if opened is open:
        with file.open("rb") as handle:
            if not file.stat().st_size:
                return False
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return any(data.find(mark) >= 0 for mark in _MARKS)
    with opened(file, "rb") as handle:
        tail = b""
        for _ in itertools.takewhile(lambda n: n < _MAX_LOOKED, itertools.count(0, 1 << 20)):
            block = handle.read(1 << 20)
            if not block:
                return False
            if any(mark in tail + block for mark in _MARKS):
                return True
            tail = block[-64:]
    return True  # too large to search: assume that it does


def _together(parts: list[Named]) -> Named:
    return Named(
        frozenset().union(*(part.globals for part in parts)),
        frozenset().union(*(part.texts for part in parts)),
        any(part.byte_code for part in parts),
        all(part.whole for part in parts),
    )
