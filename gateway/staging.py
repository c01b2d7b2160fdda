"""A directory that is being filled: invisible until it is whole, and swept away if its maker dies.

Used where model directories are kept: the store of a file registry and the artifact cache. Knows how to copy
files, and nothing of packages, registries or digests.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

PREFIX = ".incoming-"

#: The bytes of a file that is copied through memory. A larger one may share its blocks with the copy.
SMALL: Final = 1 << 20

_LEAST: Final = 1 << 16
_CANNOT_CLONE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


class Staging:
    """A new directory in `parent` under a name that readers ignore. Its lock lasts as long as the process
    that made it, so that `sweep` removes only abandoned ones. `note` becomes part of its name."""

    def __init__(self, parent: Path, note: str = "0") -> None:
        while True:
            self.path = parent / f"{PREFIX}{uuid.uuid4().hex}-{note}"
            os.mkdir(self.path)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if self.path.exists():  # a sweeper may have taken it between the two
                break
            os.close(self._lock)
        self._published = False

    def publish(self, target: Path, *, lasting: bool = True) -> None:
        """Makes the directory visible as `target`, which must not exist. `lasting`: its name survives a loss
        of power, which takes the disk milliseconds. Raises OSError."""
        os.rename(self.path, target)
        self._published = True
        if lasting:
            sync_directory(target.parent)

    def close(self) -> None:
        """Removes what was not published."""
        if not self._published:
            remove_tree(self.path)
        os.close(self._lock)

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def notes(names: Iterable[str]) -> list[str]:
    """The notes of those of these names that are directories under way, of dead makers too."""
    return [name.rpartition("-")[2] for name in names if name.startswith(PREFIX)]


def sweep(parent: Path, older_than: float = 0.0) -> list[str]:
    """Removes the directories in `parent` whose makers are dead, and in which nothing changed for
    `older_than` seconds. Returns the names of all else in `parent`. An age is for places that other machines
    share: not every network file system shows here a lock that was taken there."""
    try:
        names = os.listdir(parent)
    except FileNotFoundError:
        return []
    gone = set()
    for name in names:
        if not name.startswith(PREFIX):
            continue
        path = parent / name
        try:
            if older_than and time.time() - changed(path) < older_than:
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # gone meanwhile, or another user's
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_tree(path)
            gone.add(name)
        except OSError:
            continue  # its maker lives, or it is another user's: not ours to remove
        finally:
            os.close(lock)
    return [name for name in names if name not in gone] if gone else names


def is_held(path: Path) -> bool:
    """Whether the maker of such a directory lives, as far as this machine can tell."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # another user's: not ours to judge
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def changed(path: Path) -> float:
    """When anything in a directory, or itself, last changed, in unix seconds. Of a file's two times the later
    one: a copy may keep the first, and no program can set the second."""
    latest = 0.0
    for directory, _, files in os.walk(path):
        for name in (".", *files):
            try:
                status = os.lstat(os.path.join(directory, name))
            except FileNotFoundError:
                continue
            latest = max(latest, status.st_mtime, status.st_ctime)
    return latest


class Copied(NamedTuple):
    """`bytes`: how many were written. `sha256`: theirs, in hexadecimal; None: they were not read."""

    bytes: int
    sha256: str | None


def copy_file(source: str, target: str, within: str | None = None, mode: int = 0o666) -> Copied:
    """Copies one file's bytes to a new file of this mode. Where the file system can, the copy of a large file
    shares the blocks of the original until either is written (never a hard link: an edit of the original in
    place must not reach the copy). `within`: a directory, without links in its path, that the file must lie
    in although a link may take its place meanwhile. Raises OSError."""
    # A pipe does not make its opener wait.
    from_ = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(from_)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), source)
        if within is not None and not (stat.S_ISREG(status.st_mode) and _lies_in(from_, within)):
            raise OSError(errno.ELOOP, "a link leads elsewhere", source)
        to = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            if status.st_size > SMALL and _cloned(from_, to):
                return Copied(os.fstat(to).st_size, None)
            return _written(from_, to, status.st_size)
        finally:
            os.close(to)
    finally:
        os.close(from_)


def _written(source: int, target: int, expected: int) -> Copied:
    """Copies what is read, to its end: the file may change meanwhile. `expected`: its bytes before."""
    hashed = hashlib.sha256()
    size = 0
    step = min(max(expected + 1, _LEAST), SMALL)
    while block := os.read(source, step):
        hashed.update(block)
        size += len(block)
        left = memoryview(block)
        while left:
            left = left[os.write(target, left) :]
    return Copied(size, hashed.hexdigest())


def _lies_in(descriptor: int, directory: str) -> bool:
    """Whether an open file is below a directory, or the given path is that of the file. Where the system does
    not tell its place, the check of its name before it was opened must do."""
    try:
        place = os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return True
    return place == directory or place.startswith(os.path.join(directory, ""))


def _cloned(source: int, target: int) -> bool:
    """Whether the kernel copied the file; it clones the blocks where the file system can."""
    if not hasattr(os, "copy_file_range"):
        return False
    copied = 0
    while True:
        try:
            count = os.copy_file_range(source, target, 1 << 30)
        except OSError as error:
            if copied == 0 and error.errno in _CANNOT_CLONE:
                return False
            raise
        copied += count
        if count == 0:
            # Some virtual file systems answer 0 for files that are not empty.
            return copied > 0 or os.fstat(source).st_size == 0


def remove_tree(path: Path) -> None:
    """Removes a directory, read-only ones in it included; a missing directory is not an error."""
    for directory, _, _ in os.walk(path):
        os.chmod(directory, 0o700)
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        if path.exists():
            raise


def sync_tree(path: Path) -> None:
    """Makes all files below a directory survive a loss of power."""
    for directory, _, files in os.walk(path):
        for name in files:
            handle = os.open(os.path.join(directory, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_directory(Path(directory))


def sync_directory(path: Path) -> None:
    """Makes the names in a directory survive a loss of power."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
