"""Measures and removes the temporary directories of model processes, in any state.

A model may leave directories nested thousands deep, without permissions, or with links to other places.
Measuring and removal need no recursion and no long paths. Both hold a few descriptors and never follow a
link. Standard library only.
"""

from __future__ import annotations

import os
import random
import stat
import tempfile
from contextlib import suppress
from typing import Final

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PATH = getattr(os, "O_PATH", os.O_RDONLY)


#: Minimum bytes counted per entry: empty files and directories take space too.
ENTRY: Final = 4096


#: The directory where the gateway links files that its packs may read.
PACKS: Final = "packs"


def make(scratch: str) -> str:
    """Makes a new directory for one model process."""
    return tempfile.mkdtemp(prefix="model-", dir=scratch)


def used(path: str, enough: int) -> int:
    """Returns the bytes on disk of everything below a directory; counting stops above `enough`. A model may
    move directories during the count. A missed directory is found next time, because the order differs."""
    try:
        root = _open(path, None)
    except OSError:
        return 0
    seen: set[tuple[int, int]] = set()
    here = os.dup(root)
    total, names = _measured(here, seen, enough)
    above = [(_identity(here), names)]
    try:
        while total <= enough:
            names = above[-1][1]
            if names:
                try:
                    below = _open(names.pop(), here)
                except OSError:
                    continue
                os.close(here)
                here = below
                more, names = _measured(here, seen, enough - total)
                total += more
                above.append((_identity(here), names))
                continue
            above.pop()
            if not above:
                break
            try:
                up = os.open("..", _DIRECTORY, dir_fd=here)
            except OSError:
                up = os.dup(root)
            os.close(here)
            here = up
            if _identity(here) != above[-1][0]:  # the model moved it
                os.close(here)
                here = os.dup(root)
                del above[1:]
    finally:
        os.close(here)
        os.close(root)
    return total


def _measured(directory: int, seen: set[tuple[int, int]], enough: int) -> tuple[int, list[str]]:
    """Returns the bytes of the files in a directory, and its directories in any order."""
    total, names = 0, []
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(found.st_mode):
                    names.append(entry.name)
                elif found.st_nlink > 1:
                    if (found.st_dev, found.st_ino) in seen:
                        continue
                    seen.add((found.st_dev, found.st_ino))
                total += max(ENTRY, found.st_blocks * 512)
            if total > enough:
                break
    random.shuffle(names)
    return total, names


def _identity(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


def remove(path: str) -> bool:
    """Removes a directory and everything below it, as far as possible. Returns True if it is gone.

    Nested directories are first moved up to `path` itself, so that each is emptied at the same depth.
    """
    try:
        root = _open(path, None)
    except OSError:
        return not os.path.lexists(path)
    try:
        # A random name, which the model cannot have used already.
        flat, moved, pending = f".removing-{os.urandom(8).hex()}", 0, [""]
        while pending:
            name = pending.pop()
            try:
                here = root if not name else _open(name, root)
            except OSError:
                continue
            try:
                for entry in _entries(here):
                    if _remove_file(entry, here):
                        continue
                    if here == root:
                        pending.append(entry)
                        continue
                    moved += 1
                    with suppress(OSError):
                        _open_up(entry, here)
                        os.rename(entry, f"{flat}-{moved}", src_dir_fd=here, dst_dir_fd=root)
                        pending.append(f"{flat}-{moved}")
            finally:
                if here != root:
                    os.close(here)
            if name:
                with suppress(OSError):
                    os.rmdir(name, dir_fd=root)
    finally:
        os.close(root)
    with suppress(OSError):
        os.rmdir(path)
    return not os.path.lexists(path)


def _entries(directory: int) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _remove_file(name: str, directory: int) -> bool:
    """Removes a file. Returns False if it is a directory."""
    try:
        os.unlink(name, dir_fd=directory)
    except OSError:
        try:
            return not stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
        except OSError:
            return True
    return True


def _open(name: str, parent: int | None) -> int:
    _open_up(name, parent)
    return os.open(name, _DIRECTORY, dir_fd=parent)


def _open_up(name: str, parent: int | None) -> None:
    """Opens a directory's permissions for this process, because the model may have removed them."""
    descriptor = os.open(name, _PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) & stat.S_IRWXU != stat.S_IRWXU:
            with suppress(OSError):
                os.chmod(f"/proc/self/fd/{descriptor}", stat.S_IRWXU)
    finally:
        os.close(descriptor)
