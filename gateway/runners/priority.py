"""The priority of model processes for whose answers no caller waits: they give way to others.

Must not know models, versions or why no caller waits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from typing import Final

from gateway.runners.memory import PROC, descendants

#: Processes keep their priority for this time after a caller has used them, in seconds.
QUIET: Final = 1.0


class Background:
    """Lowers the priority of processes, with their threads and children, until `restore`. `lowered`: whether
    they give way now."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.lowered = False
        self._pids: tuple[int, ...] = ()
        self._clock = clock
        self._came_first = float("-inf")

    def give_way(self, pids: Collection[int], *, used: bool) -> None:
        """Lowers these processes, and restores others; none: restores all. `used`: a call of them is under
        way. Those that callers use, or used a moment ago, stay as they are."""
        if pids and not self.lowered and (used or self._clock() - self._came_first < QUIET):
            return
        self.lowered = bool(pids)
        self.lower(pids)

    def come_first(self) -> None:
        """Restores the priority: a caller waits for an answer."""
        self._came_first = self._clock()
        self.give_way((), used=True)

    def lower(self, pids: Collection[int]) -> None:
        """Lowers these processes, and restores others that were lowered. Cheap if they are the same."""
        if tuple(pids) == self._pids:
            return
        self.restore()
        self._pids = tuple(pids)
        policy = giving_way()
        if policy is not None:
            for task in _tasks(self._pids):
                with suppress(OSError):  # it has ended, or belongs to another user
                    if os.sched_getscheduler(task) == os.SCHED_OTHER:
                        os.sched_setscheduler(task, policy, os.sched_param(0))

    def restore(self) -> None:
        pids, self._pids = self._pids, ()
        policy = giving_way()
        for _ in range(2 if policy is not None else 0):  # a thread may have started another one meanwhile
            for task in _tasks(pids):
                with suppress(OSError):
                    if os.sched_getscheduler(task) == policy:
                        os.sched_setscheduler(task, os.SCHED_OTHER, os.sched_param(0))


def giving_way() -> int | None:
    """`SCHED_BATCH`, which does not interrupt others when it wakes up, and which a task may leave again. Not
    `SCHED_IDLE`: on a busy machine such a process gets no processor at all, and a healthy version would look
    as if it hung. None without such policies."""
    if not hasattr(os, "SCHED_BATCH") or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return None
    return os.SCHED_BATCH


def _tasks(pids: Collection[int]) -> Iterator[int]:
    for pid in pids:
        for process in (pid, *descendants(pid)[0]):
            with suppress(OSError):
                yield from map(int, os.listdir(PROC / str(process) / "task"))
