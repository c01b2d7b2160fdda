"""Measures the disk space of the temporary files of a model's processes.

Knows directories and process ids; must not know models. What measures blocks, so a thread calls it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Final

from gateway.runners.memory import PROC, descendants
from loaders.worker import temporary

#: The default limit for a model: this many bytes, and at most this share of the disk.
MOST, SHARE = 4 << 30, 0.25
_OPEN_FILES: Final = 4096
#: The files of a process without calls are measured at each so-many-th look.
_IDLE_LOOKS: Final = 4


def default_limit() -> int:
    """The bytes that a model process may keep without a setting."""
    return min(MOST, int(shutil.disk_usage(tempfile.gettempdir()).total * SHARE))


class Watch:
    """Watches the files of one process, on the event loop. `measure` measures them in a thread. `above` is
    called with the reason when they take more than `limit` bytes. `bytes`: their size at the last
    measurement."""

    def __init__(self, limit: int, measure: Callable[[], Future[int]], above: Callable[[str], None]) -> None:
        self.bytes = 0
        self._limit = limit
        self._measure = measure
        self._above = above
        self._measuring: asyncio.Future[int] | None = None
        self._looks = 0
        self._calls = -1

    def look(self, busy: bool, calls: int) -> None:
        """Starts a measurement, one at a time; without a call since the last one, only at each
        `_IDLE_LOOKS`th look. `busy`: a call is running. `calls`: how many have ended."""
        if self._measuring is not None:
            return
        self._looks += 1
        if not busy and calls == self._calls and self._looks < _IDLE_LOOKS:
            return
        self._looks, self._calls = 0, calls
        self._measuring = asyncio.wrap_future(self._measure())
        self._measuring.add_done_callback(self._measured)

    def _measured(self, measuring: asyncio.Future[int]) -> None:
        self._measuring = None
        if measuring.cancelled() or measuring.exception() is not None:
            return
        self.bytes = measuring.result()
        if self.bytes > self._limit:
            self._above(f"the model's temporary files take more than {self._limit} bytes, its limit (disk)")


def used(pid: int, directory: str, enough: int) -> int:
    """The bytes of a directory, and of deleted files on its file system that the process and its children
    hold open; those of other users only if the gateway is root. Stops counting above `enough`."""
    total = temporary.used(directory, enough)
    return total if total > enough else total + _deleted(pid, directory)


def _deleted(pid: int, directory: str) -> int:
    found: dict[int, int] = {}
    left = _OPEN_FILES
    with suppress(OSError):
        device = os.stat(directory).st_dev
        children, _ = descendants(pid)
        for process in (pid, *children):
            with suppress(OSError):
                place = PROC / str(process) / "fd"
                names = os.listdir(place)[:left]
                left -= len(names)
                for name in names:
                    with suppress(OSError):
                        seen = os.stat(place / name)
                        if not seen.st_nlink and seen.st_dev == device and stat.S_ISREG(seen.st_mode):
                            found[seen.st_ino] = seen.st_blocks * 512
    return sum(found.values())
