"""What a model's processes really take of the machine's memory, as the kernel counts it.

Reads an open `smaps_rollup` that the model process itself handed over, so that it works for a process of
another user and for one that is closed to others. What the model starts counts with it, and so does what lies
in its `/dev/shm`. Knows no models.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_MOST_PROCESSES: Final = 4096
PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `private`: what would be free if it ended; `resident`: with what it shares; `anonymous`: without
    files, shared or not; `proportional`: with its share of what it shares."""

    private: int = 0
    resident: int = 0
    anonymous: int = 0
    proportional: int = 0


class Footprint:
    """The figures of a model process, of the processes that it started, and of its `/dev/shm`. Takes over the
    descriptors. `pid` None: of that one process alone; `shared_memory`: a directory of its own `/dev/shm`, -1
    where it has none."""

    def __init__(self, descriptor: int, pid: int | None = None, shared_memory: int = -1) -> None:
        self._descriptor = descriptor
        self._pid = pid
        self._shared_memory = shared_memory
        self._last = Memory()

    def read(self) -> Memory:
        """The present figures (some microseconds per resident megabyte); the last ones once it has ended.

        Memory that a model shares with its children is counted by each one's share of it; a child that may
        not be looked into counts whole.
        """
        if self._descriptor >= 0:
            with suppress(ProcessLookupError):  # it has ended
                own = parse(os.pread(self._descriptor, 4096, 0))
                others = [_of_child(pid) for pid in self._children()]
                shared = self._in_shared_memory()
                self._last = Memory(
                    private=(own.proportional if others else own.private) + sum(others) + shared,
                    resident=own.resident,
                    anonymous=own.anonymous,
                    proportional=own.proportional,
                )
        return self._last

    def upper_bound(self) -> int:
        """Never less than `read().private`, in a few microseconds for each process; 0 once it has ended."""
        if self._pid is None or self._descriptor < 0:
            return 0
        pids = (self._pid, *self._children())
        return sum(resident(pid) for pid in pids) + self._in_shared_memory()

    def close(self) -> None:
        for descriptor in (self._descriptor, self._shared_memory):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._shared_memory = -1

    def _children(self) -> list[int]:
        return [] if self._pid is None else descendants(self._pid)

    def _in_shared_memory(self) -> int:
        if self._shared_memory < 0:
            return 0
        found = os.statvfs(self._shared_memory)
        return (found.f_blocks - found.f_bfree) * found.f_frsize


def own(proc: Path = PROC) -> int:
    """Private bytes of this process itself; 0 where the kernel does not say. Some milliseconds."""
    try:
        return parse((proc / "self" / "smaps_rollup").read_bytes()).private
    except OSError:
        return 0


def trim() -> None:
    """Hands back to the kernel what this process has freed, where its C library can."""
    if sys.platform == "linux" and (trimmed := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trimmed(0)


def parse(rollup: bytes) -> Memory:
    """The content of a `smaps_rollup`."""
    fields: dict[bytes, int] = {}
    for line in rollup.splitlines()[1:]:
        name, _, rest = line.partition(b":")
        number, _, unit = rest.strip().partition(b" ")
        if unit == b"kB":
            fields[name] = int(number) * 1024
    private = sum(fields.get(name, 0) for name in (b"Private_Clean", b"Private_Dirty", b"Private_Hugetlb"))
    return Memory(private, fields.get(b"Rss", 0), fields.get(b"Anonymous", 0), fields.get(b"Pss", 0))


def descendants(pid: int, proc: Path = PROC) -> list[int]:
    """The processes that a model process started and those that they started. Orphans among them come to the
    model process, so that none leaves this tree."""
    found: list[int] = []
    above = [pid]
    while above and len(found) < _MOST_PROCESSES:
        above = [child for parent in above for child in _children_of(parent, proc)]
        found += above
    return found


def _children_of(pid: int, proc: Path) -> list[int]:
    try:
        tasks = os.listdir(proc / str(pid) / "task")
    except OSError:  # it has ended
        return []
    found = []
    for task in tasks:
        with suppress(OSError):
            listed = (proc / str(pid) / "task" / task / "children").read_bytes()
            found += [int(child) for child in listed.split()]
    return found


def _of_child(pid: int, proc: Path = PROC) -> int:
    try:
        return parse((proc / str(pid) / "smaps_rollup").read_bytes()).proportional
    except OSError:  # it has ended, or may not be looked into
        return _anonymous(pid, proc)


def _anonymous(pid: int, proc: Path) -> int:
    """Resident bytes that belong to no file."""
    try:
        _, resident_pages, file_pages, *_ = (proc / str(pid) / "statm").read_bytes().split()
    except (OSError, ValueError):
        return 0
    return max(0, int(resident_pages) - int(file_pages)) * _PAGE


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
