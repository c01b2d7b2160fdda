"""The priority of model processes that nobody waits for: they get a processor when nothing else wants it.

Must not know models, versions or why nobody waits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import cache

from gateway.runners.memory import PROC, descendants


class Background:
    """Lowers the priority of processes, with their threads and children, until `restore`."""

    def __init__(self) -> None:
        self._pids: tuple[int, ...] = ()

    def lower(self, pids: Collection[int]) -> None:
        """Lowers these processes, and restores others that were lowered. Cheap if they are the same."""
        if tuple(pids) == self._pids:
            return
        self.restore()
        self._pids = tuple(pids)
        policy = lowest()
        if policy is not None:
            for task in _tasks(self._pids):
                with suppress(OSError):  # it has ended, or belongs to another user
                    if os.sched_getscheduler(task) == os.SCHED_OTHER:
                        os.sched_setscheduler(task, policy, os.sched_param(0))

    def restore(self) -> None:
        pids, self._pids = self._pids, ()
        policy = lowest()
        for _ in range(2 if policy is not None else 0):  # a thread may have started another one meanwhile
            for task in _tasks(pids):
                with suppress(OSError):
                    if os.sched_getscheduler(task) == policy:
                        os.sched_setscheduler(task, os.SCHED_OTHER, os.sched_param(0))


@cache
def lowest() -> int | None:
    """The lowest scheduling policy that a task here can leave again. `SCHED_IDLE` runs only when a processor
    is free, but leaving it needs RLIMIT_NICE of 20 or CAP_SYS_NICE; a thread tries that. Otherwise
    `SCHED_BATCH`, which does not interrupt others when it wakes up. None without such policies."""
    if not hasattr(os, "SCHED_IDLE") or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return None
    returned: list[bool] = []

    def try_it() -> None:
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
            returned.append(True)

    thread = threading.Thread(target=try_it, name="priority")
    thread.start()
    thread.join()
    return os.SCHED_IDLE if returned else os.SCHED_BATCH


def _tasks(pids: Collection[int]) -> Iterator[int]:
    for pid in pids:
        for process in (pid, *descendants(pid)[0]):
            with suppress(OSError):
                yield from map(int, os.listdir(PROC / str(process) / "task"))
