"""Temporary directories of model processes, and their removal when a model left them in any state.

A model may leave directories nested thousands deep, without permissions, or with links to elsewhere. Removal
takes neither recursion nor long paths, holds two descriptors, and never follows a link. Standard library
only.
"""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from typing import Final

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PATH = getattr(os, "O_PATH", os.O_RDONLY)


#: Where the gateway links what its packs may read.
PACKS: Final = "packs"


def make(scratch: str) -> str:
    """A new directory for one model process."""
    return tempfile.mkdtemp(prefix="model-", dir=scratch)


def remove(path: str) -> bool:
    """Removes a directory and all that is below it. Whether it is gone; what cannot be removed stays.

    Directories inside directories are first moved up to `path` itself: so each is emptied at the same depth.
    """
    try:
        root = _open(path, None)
    except OSError:
        return not os.path.lexists(path)
    try:
        # A name that the model could not foresee, and so did not take.
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
    """False if it is a directory."""
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
    """Gives this process all rights on a directory: the model may have taken them away."""
    descriptor = os.open(name, _PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) & stat.S_IRWXU != stat.S_IRWXU:
            with suppress(OSError):
                os.chmod(f"/proc/self/fd/{descriptor}", stat.S_IRWXU)
    finally:
        os.close(descriptor)
