"""Reads the instructions of a pickle one by one, without executing any, in bounded memory.

An argument may claim any length: one that is longer than a name can be is skipped, not read. Also bounds what
a zip archive makes the standard library read at once. Must not know what the instructions mean.
"""

from __future__ import annotations

import io
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path
    from typing import TypeAlias

Readable: TypeAlias = "IO[bytes] | io.BufferedIOBase"

MOST_ARGUMENT: Final = 1 << 16
"""The bytes of the longest argument that is read."""
MOST_DIRECTORY: Final = 2 << 20
"""The bytes of the longest list of members of an archive. In memory it takes some 15 times that."""

#: The bytes of the largest file that is read at once.
_SMALL: Final = 1 << 20

#: What the standard library raises for bytes that are not what they claim to be. OSError: see `damaged`.
DAMAGED: Final = (
    ValueError, EOFError, LookupError, AssertionError, OverflowError, MemoryError, RuntimeError, TypeError,
    struct.error, zlib.error, zipfile.BadZipFile, zipfile.LargeZipFile,
)  # fmt: skip

_WIDTHS: Final = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_NAMES: Final = frozenset({"GLOBAL", "INST"})


def opened(file: Path) -> IO[bytes]:
    """A regular file to read; a small one is read at once. Raises OSError."""
    with open(file, "rb", buffering=0) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size <= _SMALL:
            return io.BytesIO(handle.read(size))
    return open(file, "rb")


def operations(handle: Readable, first: bytes = b"") -> Iterator[tuple[str, Any]]:
    """Yields (name, argument) of each instruction of one pickle, to its STOP. The argument is None if there
    is none or if it is longer than `MOST_ARGUMENT`. `first`: the first byte, if it has been read already.
    Raises ValueError and others of DAMAGED for what is not a pickle."""
    read = handle.read
    while True:
        code, first = first or read(1), b""
        known = _OPCODES.get(code)
        if known is None:
            raise ValueError(f"unknown instruction {code!r}" if code else "no STOP at the end")
        name, argument = known
        yield name, None if argument is None else argument(handle)
        if name == "STOP":
            return


def _reader(opcode: pickletools.OpcodeInfo) -> Callable[[Readable], Any] | None:
    """Reads the argument of an instruction. What is decoded here is decoded as `pickletools` does; it decodes
    the others, and says what is wrong."""
    if opcode.arg is None:
        return None
    slow = opcode.arg.reader
    if opcode.arg.n == pickletools.UP_TO_NEWLINE:
        return partial(_lines, 2 if opcode.name in _NAMES else 1, slow)
    if opcode.arg.n >= 0:
        return partial(_fixed, opcode.arg.n, _FIXED.get(opcode.arg.name), slow)
    return partial(_counted, _WIDTHS[opcode.arg.n], opcode.arg.name in _UNICODE, slow)


def _lines(count: int, slow: Callable[[IO[bytes]], Any], handle: Readable) -> Any:
    lines = [_line(handle) for _ in range(count)]
    return None if None in lines else slow(io.BytesIO(b"".join(map(bytes, lines))))  # type: ignore[arg-type]


def _fixed(
    size: int, fast: Callable[[bytes], Any] | None, slow: Callable[[IO[bytes]], Any], handle: Readable
) -> Any:
    data = handle.read(size)
    return slow(io.BytesIO(data)) if fast is None or len(data) != size else fast(data)


def _counted(width: int, unicode: bool, slow: Callable[[IO[bytes]], Any], handle: Readable) -> Any:
    prefix = handle.read(width)
    size = int.from_bytes(prefix, "little")
    if size > MOST_ARGUMENT:
        _skip(handle, size)
        return None
    data = handle.read(size)
    if unicode and len(data) == size and len(prefix) == width:
        return str(data, "utf-8", "surrogatepass")
    return slow(io.BytesIO(prefix + data))


def _line(handle: Readable) -> bytes | None:
    """A line with its end; None if it is too long."""
    line = handle.readline(MOST_ARGUMENT)
    whole = line.endswith(b"\n") or len(line) < MOST_ARGUMENT
    if whole:
        return line
    while len(line) == MOST_ARGUMENT and not line.endswith(b"\n"):
        line = handle.readline(MOST_ARGUMENT)
    return None


def _skip(handle: Readable, size: int) -> None:
    if handle.seekable() and isinstance(handle, (io.BufferedReader, io.BytesIO)):
        # One byte is read, because a seek beyond the end does not fail.
        handle.seek(size - 1, io.SEEK_CUR)
        size = 1
    while size:
        block = handle.read(min(size, MOST_ARGUMENT))
        if not block:
            raise EOFError("an argument is longer than the file")
        size -= len(block)


_FIXED: Final[dict[str, Callable[[bytes], Any]]] = {
    "uint1": lambda data: data[0],
    "uint2": lambda data: int.from_bytes(data, "little"),
    "uint4": lambda data: int.from_bytes(data, "little"),
    "int4": lambda data: int.from_bytes(data, "little", signed=True),
}
_UNICODE: Final = frozenset({"unicodestring1", "unicodestring4", "unicodestring8"})
_OPCODES: Final = {
    opcode.code.encode("latin-1"): (opcode.name, _reader(opcode)) for opcode in pickletools.opcodes
}


class _Narrow:
    """A file of which no more than `MOST_DIRECTORY` bytes are read at once: zipfile reads the list of members
    in one piece, as long as the archive says."""

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle = handle
        self.seek = handle.seek
        self.tell = handle.tell
        self.seekable = handle.seekable
        self.close = handle.close

    def read(self, size: int = -1) -> bytes:
        found = self._handle.read(min(size, MOST_DIRECTORY + 1) if size >= 0 else MOST_DIRECTORY + 1)
        if len(found) > MOST_DIRECTORY:
            raise zipfile.BadZipFile("its list of members is too long")
        return found


def archived(handle: IO[bytes]) -> zipfile.ZipFile:
    """The zip archive in an open file. Raises BadZipFile and others of DAMAGED, and OSError."""
    return zipfile.ZipFile(_Narrow(handle))


def damaged(error: OSError) -> bool:
    """Returns True if an OSError tells of the bytes in a compressed file, not of the disk."""
    return error.errno is None
