"""Locks on named files, which threads and processes of one machine share. The kernel frees the lock of a
process that ends, however it ends. Must not know what a file stands for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path


def shared(path: Path) -> int:
    """A descriptor with a lock that others can hold too; close it to give the lock back. Waits for a holder
    of the exclusive lock. Raises OSError."""
    return _locked(path, fcntl.LOCK_SH)


@contextlib.contextmanager
def alone(path: Path, waits: Callable[[], None] | None = None) -> Iterator[int]:
    """Holds a lock that only one thread or process at a time can hold, and yields the descriptor of its file.
    `waits` is called if another one holds it. Raises OSError."""
    held = None
    if waits is not None:
        try:
            held = _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waits()
    if held is None:
        held = _locked(path, fcntl.LOCK_EX)
    try:
        yield held
    finally:
        os.close(held)


@contextlib.contextmanager
def at_once(path: Path) -> Iterator[None]:
    """The same without waiting: raises BlockingIOError if another one holds the lock, and OSError."""
    held = _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield
    finally:
        os.close(held)


def _locked(path: Path, how: int) -> int:
    """A descriptor with a lock on the current file of this name, never on a removed one."""
    while True:
        try:
            held = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if error.errno != errno.EROFS or how & fcntl.LOCK_EX:
                raise
            held = os.open(path, os.O_RDONLY)  # what is on a read-only disk can be used
        try:
            fcntl.flock(held, how)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(held), os.stat(path)):
                    return held
        except BaseException:
            os.close(held)
            raise
        os.close(held)
