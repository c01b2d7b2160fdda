"""Measures the disk space of the temporary files of a model's processes.

Knows directories and process ids; must not know models. Blocks, so call it from a thread.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from contextlib import suppress
from typing import Final

from gateway.runners.memory import PROC, descendants
from loaders.worker import temporary

#: The default limit for a model: this many bytes, and at most this share of the disk.
MOST, SHARE = 4 << 30, 0.25
_OPEN_FILES: Final = 4096


def default_limit() -> int:
    """The bytes that a model process may keep without a setting."""
    return min(MOST, int(shutil.disk_usage(tempfile.gettempdir()).total * SHARE))


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
