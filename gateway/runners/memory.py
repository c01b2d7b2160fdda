"""The memory of a model's processes, as the kernel counts it.

Reads an open `smaps_rollup` that the model process itself has passed over. So it works for a process of
another user, and for one that is closed to others. The model's child processes count with it, and so do the
files in its `/dev/shm`. Must not know models.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
#: So many processes and threads of one model are looked at, and so many processes exactly.
_MOST_TASKS: Final = 4096
_EXACTLY: Final = 64
#: A look that took more than `_LONG` seconds of CPU time is not repeated for so many times as long: a model
#: that makes it slow must not take the time of all others.
_LONG: Final = 0.01
_REST: Final = 20
#: The age up to which a reading is recent, in seconds: more than the time between two refreshes in a thread.
RECENT: Final = 3.0
#: The seconds after which a process of unchanged size is read again: they double while the figures stay.
_FIRST_REST: Final = 2.0
_LONGEST_REST: Final = 16.0
#: Figures stay if they differ by less than this part.
_STAYS: Final = 1 / 64
PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `private`: would be free if it ended. `resident`: with everything it shares. `anonymous`:
    without files, shared or not. `proportional`: with its part of the shared memory."""

    private: int = 0
    resident: int = 0
    anonymous: int = 0
    proportional: int = 0


class Footprint:
    """The memory of a model process, of its child processes, and of its `/dev/shm`. Takes over the
    descriptors. `pid` None: only that process. `shared_memory`: a descriptor of its own `/dev/shm`, -1 if it
    has none. `tasks`: the number of its processes and threads at the last reading, as far as they were
    counted.

    A reading takes milliseconds, because the kernel looks at every page. So a thread calls `refresh`, which
    reads only where it is necessary, and the event loop uses `recent` where it can. Everything else is called
    on the event loop."""

    def __init__(
        self,
        descriptor: int,
        pid: int | None = None,
        shared_memory: int = -1,
        *,
        cost: Callable[[], float] = time.thread_time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._descriptor = descriptor
        self._pid = pid
        self._shared_memory = shared_memory
        self._cost = cost
        self._clock = clock
        self._last = Memory()
        self._read_again = self._bound_again = float("-inf")
        self._bound = 0
        self._read_at = self._seen_at = self._due = float("-inf")
        self._rest = _FIRST_REST
        self._size: int | None = None
        self._reading = threading.Lock()
        self._closing = False
        self.tasks = 0

    def read(self) -> Memory:
        """The current figures (takes some microseconds per resident megabyte). Returns the last ones after
        its end, and for a while after a slow reading.

        Memory shared by a model and its children is divided among them. A child that cannot be inspected
        counts fully.
        """
        try:
            with self._reading:
                began_at = self._clock()
                if self._descriptor >= 0 and self._clock() >= self._read_again:
                    began = self._cost()
                    with suppress(ProcessLookupError):  # it has ended
                        self._last = self._look()
                    self._read_again = self._after(began)
                self._read_at = self._seen_at = began_at
        finally:
            if self._closing:
                self._give_back()
        return self._last

    def _look(self) -> Memory:
        own = parse(os.pread(self._descriptor, 4096, 0))
        others = _of_children(self._children())
        shared = self._in_shared_memory()
        return Memory(
            private=(own.private if others is None else own.proportional + others) + shared,
            resident=own.resident,
            anonymous=own.anonymous,
            proportional=own.proportional,
        )

    def refresh(self) -> None:
        """Reads again if the figures may have changed. Otherwise the last ones count as recent.

        A process whose resident bytes stay is read more and more rarely, but at least every `_LONGEST_REST`
        seconds: a page that it shared and wrote to becomes private, and the resident bytes stay."""
        now = self._clock()
        size = None if self._pid is None else self.upper_bound()
        same = size is not None and size == self._size
        if now < self._read_again or (same and now < self._due):
            self._seen_at = now
            return
        before = self._last.private
        stayed = abs(self.read().private - before) <= _STAYS * before and same
        self._rest = min(2 * self._rest, _LONGEST_REST) if stayed else _FIRST_REST
        self._size, self._due = size, now + self._rest

    def expire(self) -> None:
        """The process did something that may have made shared memory its own: the next `refresh` reads."""
        self._due = float("-inf")

    def recent(self, since: float = float("-inf")) -> Memory:
        """The figures that were read or refreshed at most `RECENT` seconds ago, and read after `since`, a
        time of `time.monotonic`; reads if there are none."""
        recent = self._clock() - self._seen_at <= RECENT and self._read_at > since
        return self._last if recent else self.read()

    def upper_bound(self) -> int:
        """A value never below `read().private`, in a few microseconds per process; 0 after its end."""
        if self._pid is None or self._closing:
            return 0
        if self._clock() >= self._bound_again:
            began = self._cost()
            pids = (self._pid, *self._children())
            self._bound = sum(resident(pid) for pid in pids) + self._in_shared_memory()
            self._bound_again = self._after(began)
        return self._bound

    def _after(self, began: float) -> float:
        spent = self._cost() - began
        return self._clock() + (_REST * spent if spent > _LONG else 0.0)

    def close(self) -> None:
        """Gives the descriptors back. Does not wait for a thread that reads: it does so when it has read."""
        self._closing = True
        if not self._reading.locked():
            self._give_back()

    def _give_back(self) -> None:
        with self._reading:
            descriptors = self._descriptor, self._shared_memory
            self._descriptor = self._shared_memory = -1
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)

    def _children(self) -> list[int]:
        if self._pid is None:
            return []
        found, self.tasks = descendants(self._pid)
        return found

    def _in_shared_memory(self) -> int:
        if self._shared_memory < 0:
            return 0
        found = os.statvfs(self._shared_memory)
        return (found.f_blocks - found.f_bfree) * found.f_frsize


def own(proc: Path = PROC) -> int:
    """The private bytes of this process; 0 if the kernel does not tell. Takes some milliseconds."""
    try:
        return parse((proc / "self" / "smaps_rollup").read_bytes()).private
    except OSError:
        return 0


def trim() -> None:
    """Returns freed memory of this process to the kernel, if its C library can."""
    if sys.platform == "linux" and (trimmed := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trimmed(0)


def parse(rollup: bytes) -> Memory:
    """Parses a `smaps_rollup`."""
    fields: dict[bytes, int] = {}
    for line in rollup.splitlines()[1:]:
        name, _, rest = line.partition(b":")
        number, _, unit = rest.strip().partition(b" ")
        if unit == b"kB":
            fields[name] = int(number) * 1024
    private = sum(fields.get(name, 0) for name in (b"Private_Clean", b"Private_Dirty", b"Private_Hugetlb"))
    return Memory(private, fields.get(b"Rss", 0), fields.get(b"Anonymous", 0), fields.get(b"Pss", 0))


def descendants(pid: int, proc: Path = PROC) -> tuple[list[int], int]:
    """All descendants of a model process, and the number of their tasks (threads): all, or a few more than
    the most that are counted. Their orphans are reparented to the model process, so that none leaves this
    tree."""
    found: list[int] = []
    seen, waiting = 0, [pid]
    while waiting and seen <= _MOST_TASKS:
        parent = waiting.pop()
        try:
            tasks = os.listdir(proc / str(parent) / "task")
        except OSError:  # it has ended
            continue
        seen += len(tasks)
        for task in tasks[:_MOST_TASKS]:
            with suppress(OSError):
                listed = (proc / str(parent) / "task" / task / "children").read_bytes()
                waiting += [int(child) for child in listed.split()]
                found += [int(child) for child in listed.split()]
    return found[:_MOST_TASKS], seen


def _of_children(pids: list[int]) -> int | None:
    """What they take by their shares, None where there are none. Of many, the largest are looked into, and
    each other one counts as the smallest of those."""
    if not pids:
        return None
    if len(pids) > _EXACTLY:
        pids = sorted(pids, key=resident, reverse=True)
    exact = [_of_child(pid) for pid in pids[:_EXACTLY]]
    return sum(exact) + min(exact) * max(0, len(pids) - _EXACTLY)


def _of_child(pid: int, proc: Path = PROC) -> int:
    try:
        return parse((proc / str(pid) / "smaps_rollup").read_bytes()).proportional
    except OSError:  # it has ended, or may not be looked into
        return _anonymous(pid, proc)


def _anonymous(pid: int, proc: Path) -> int:
    """The resident bytes without files."""
    try:
        _, resident_pages, file_pages, *_ = (proc / str(pid) / "statm").read_bytes().split()
    except (OSError, ValueError):
        return 0
    return max(0, int(resident_pages) - int(file_pages)) * _PAGE


def resident(pid: int, proc: Path = PROC) -> int:
    """The resident bytes with shared memory, in a few microseconds; 0 after the end of the process."""
    try:
        return int((proc / str(pid) / "statm").read_bytes().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def peak(pid: int, proc: Path = PROC) -> int:
    """The peak resident bytes; 0 after the end of the process."""
    try:
        status = (proc / str(pid) / "status").read_text("ascii", "replace")
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
