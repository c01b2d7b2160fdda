"""Lists the files of a package in a directory.

The same rule holds for the digest, for copies and for uploads: regular files, and links to regular files
inside, without `__pycache__` and MLflow's `registered_model_meta`. Other links are refused; pipes and devices
are skipped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from loaders.compat.pythons import is_below

MAX_FILES: Final = 100_000
# MLflow writes this file into downloaded copies, and Python writes this directory. Neither is an artifact.
_IGNORED_AT_ROOT: Final = frozenset({"registered_model_meta"})
_IGNORED_DIRECTORIES: Final = frozenset({"__pycache__"})
#: The fewest bytes that are read at once.
_LEAST: Final = 1 << 12
_CONTROL: Final = re.compile(r"[\x00-\x1f]")


class PackageError(Exception):
    """A directory is not a usable model package. `place` is a key of `MLmodel` or a file's path in the
    package. The message contains no path of this machine, so clients may see it."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(f"{place}: {problem}")
        self.place = place
        self.problem = problem


def package_files(root: Path) -> list[tuple[str, Path, int]]:
    """Returns (path in the package, file, bytes) of all its files, sorted. Raises PackageError."""
    return [(relative, Path(place), size) for relative, place, size in listed(root.resolve())]


def listed(root: Path) -> list[tuple[str, str, int]]:
    """Returns the same, with the files as text: each is `root`, as it is given, and the path in the package.
    Raises PackageError."""
    return [(relative, place, status.st_size) for relative, place, status in with_status(root)]


def with_status(root: Path) -> list[tuple[str, str, os.stat_result]]:
    """Returns the same, with all that the system says of a file. Raises PackageError."""
    return sorted((relative, entry.path, entry.stat()) for relative, entry in _files(root))


def names(root: Path) -> list[tuple[str, str]]:
    """Returns (path in the package, file) of all its files, sorted. Raises PackageError."""
    return sorted((relative, entry.path) for relative, entry in _files(root))


def whole(file: Path, most: int) -> bytes | None:
    """Returns all bytes of a file; None if they are more than `most`. Raises OSError."""
    with open(file, "rb", buffering=0) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > most:
            return None
        found = b""
        while block := handle.read(min(max(size, _LEAST), most) + 1):
            found += block
            if len(found) > most:
                return None
        return found


def is_part(relative: str) -> bool:
    """Returns True if a file at this path in a package belongs to the package."""
    parts = relative.split("/")
    return relative not in _IGNORED_AT_ROOT and not _IGNORED_DIRECTORIES.intersection(parts[:-1])


def _files(root: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    count = 0
    for relative, entry in _entries(str(root)):
        if _CONTROL.search(relative):
            raise PackageError(repr(relative), "a file's name must hold no control characters")
        if entry.is_symlink():
            _check_link(relative, entry, root.resolve())
        if entry.is_file():
            count += 1
            yield relative, entry
        if count > MAX_FILES:
            raise PackageError("the package", f"holds more than {MAX_FILES:,} files")


def _entries(root: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    pending = [("", root)]
    while pending:
        above, directory = pending.pop()
        with os.scandir(directory) as entries:
            for entry in entries:
                relative = above + entry.name
                if entry.is_dir(follow_symlinks=False):
                    if entry.name not in _IGNORED_DIRECTORIES:
                        pending.append((f"{relative}/", entry.path))
                elif is_part(relative):
                    yield relative, entry


def _check_link(relative: str, entry: os.DirEntry[str], root: Path) -> None:
    try:
        target = Path(entry.path).resolve(strict=True)
    except (OSError, RuntimeError):
        raise PackageError(relative, "is a link that leads nowhere") from None
    if not is_below(target, root):
        raise PackageError(relative, "is a link that leaves the package")
    if target.is_dir():
        raise PackageError(relative, "is a link to a directory")
