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
from collections.abc import Iterator
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
_OPCODES: Final = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
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
    while True:
        code, first = first or handle.read(1), b""
        opcode = _OPCODES.get(code)
        if opcode is None:
            raise ValueError(f"unknown instruction {code!r}" if code else "no STOP at the end")
        yield opcode.name, None if opcode.arg is None else _argument(opcode, handle)
        if opcode.name == "STOP":
            return


def _argument(opcode: pickletools.OpcodeInfo, handle: Readable) -> Any:
    assert opcode.arg is not None
    if opcode.arg.n == pickletools.UP_TO_NEWLINE:
        lines = [_line(handle) for _ in range(2 if opcode.name in _NAMES else 1)]
        return None if None in lines else opcode.arg.reader(io.BytesIO(b"".join(map(bytes, lines))))  # type: ignore[arg-type]
    if opcode.arg.n >= 0:
        return opcode.arg.reader(io.BytesIO(handle.read(opcode.arg.n)))
    prefix = handle.read(_WIDTHS[opcode.arg.n])
    size = int.from_bytes(prefix, "little")
    if size > MOST_ARGUMENT:
        _skip(handle, size)
        return None
    return opcode.arg.reader(io.BytesIO(prefix + handle.read(size)))


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
