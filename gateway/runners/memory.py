"""What a process really takes of the machine's memory, as the kernel counts it.

Reads an open `smaps_rollup` that the process itself handed over, so that it works for a process of
another user and for one that is closed to others. Knows no models.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `private`: what would be free if the process ended; `resident`: with what it shares;
    `anonymous`: without files, shared or not."""

    private: int = 0
    resident: int = 0
    anonymous: int = 0


class Footprint:
    """The figures of one process. Takes over the descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._last = Memory()

    def read(self) -> Memory:
        """The present figures (some microseconds per resident megabyte); the last ones once it has ended."""
        if self._descriptor >= 0:
            with suppress(ProcessLookupError):  # it has ended
                self._last = parse(os.pread(self._descriptor, 4096, 0))
        return self._last

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def parse(rollup: bytes) -> Memory:
    """The content of a `smaps_rollup`."""
    fields: dict[bytes, int] = {}
    for line in rollup.splitlines()[1:]:
        name, _, rest = line.partition(b":")
        number, _, unit = rest.strip().partition(b" ")
        if unit == b"kB":
            fields[name] = int(number) * 1024
    private = sum(fields.get(name, 0) for name in (b"Private_Clean", b"Private_Dirty", b"Private_Hugetlb"))
    return Memory(private, fields.get(b"Rss", 0), fields.get(b"Anonymous", 0))


def resident(pid: int, proc: Path = PROC) -> int:
    """Resident bytes, shared ones included, in a few microseconds; 0 once the process has ended."""
    try:
        return int((proc / str(pid) / "statm").read_bytes().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def peak(pid: int, proc: Path = PROC) -> int:
    """The most that was ever resident, in bytes; 0 once the process has ended."""
    try:
        status = (proc / str(pid) / "status").read_text("ascii", "replace")
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
