"""The contract of sources: the errors, the list of a version's files, and how they are copied.

Sources are plain classes that satisfy `Source`: a local directory, a file system of fsspec, an MLflow
server's proxy. Must not know digests, or where the files go.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Protocol, TypeAlias

from gateway.registries.base import Version
from loaders.files import MAX_FILES

File: TypeAlias = "tuple[str, str, int | None]"
"""(path within the package, the source's own name of it, bytes; None: not announced)."""

Progress: TypeAlias = Callable[[int, int | None], None]
"""Called with the bytes received and the total (None: unknown), from any thread."""

Room: TypeAlias = Callable[[int], None]
"""Called with the bytes of a file of unknown size, before they are written. Raises ArtifactError if the cache
has no space for them."""

PeerCheck: TypeAlias = "Callable[[str, Iterable[str]], None]"
"""Called with a host and the addresses that a connection to it would use or uses, before anything is sent.
Raises NotAllowed for one that may not be asked."""

#: Seconds within which a store says what a version's files are.
LISTING_SECONDS: Final = 15.0
#: Seconds between two words of a download's progress.
_TOLD_EACH: Final = 0.1
#: The mode of a file in the cache.
READ_ONLY: Final = 0o444
#: How deep the directories of a source may lie in each other.
MAX_DEPTH: Final = 32


class ArtifactError(Exception):
    """A version's files are not available. `public` is safe to show to clients: it names no path and no
    address. The exception's own text is for operators and the log."""

    def __init__(self, public: str, detail: str | None = None) -> None:
        super().__init__(f"{public}: {detail}" if detail else public)
        self.public = public


class NotAllowed(ArtifactError):
    """The operator's rules refuse the source."""


class DigestMismatch(ArtifactError):
    """The files are not those that the digest stands for. `found`: their digest."""

    def __init__(self, public: str, found: str) -> None:
        super().__init__(public)
        self.found = found


class Unreachable(ArtifactError):
    """The source did not answer: nothing may be concluded from it about the files."""


class Source(Protocol):
    def files(self, version: Version) -> list[File]:
        """All files of the package. Raises ArtifactError, OSError."""

    def copy(
        self, version: Version, files: list[File], to: Path, *, room: Room, meter: Meter
    ) -> dict[str, str]:
        """Puts them into the directory `to`. Files with announced bytes have their space already; for others
        it asks `room`. What comes is added to `meter`. Returns the SHA-256 of files that were read through
        meanwhile, by their paths within the package. Raises ArtifactError, OSError."""


class Meter:
    """Adds up what comes, in any thread, and tells `progress` now and then: first of nothing, and last of
    all of it."""

    def __init__(
        self,
        files: list[File],
        progress: Progress | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        sizes = [size for _, _, size in files]
        self._total = None if None in sizes else sum(size or 0 for size in sizes)
        self._progress = progress
        self._clock = clock
        self._lock = threading.Lock()
        self._bytes = 0
        self._told = -_TOLD_EACH
        self.add(0)

    def add(self, count: int) -> None:
        """So many bytes came; fewer than none where they have to come once more."""
        if self._progress is None:
            return
        with self._lock:
            self._bytes += count
            now = self._clock()
            if now - self._told < _TOLD_EACH and self._bytes != self._total:
                return
            self._told = now
            # A library may repeat a part by itself: never report more than the total.
            so_far = self._bytes if self._total is None else min(self._bytes, self._total)
            self._progress(so_far, self._total)


def checked_list(version: Version, found: list[File]) -> list[File]:
    if not found:
        raise ArtifactError(f"the source of {version} holds no files", version.source)
    if len(found) > MAX_FILES:
        raise ArtifactError(f"the source of {version} holds more than {MAX_FILES:,} files")
    return sorted(found, key=lambda file: file[0])


def stays_inside(relative: str) -> bool:
    return not any(part in ("", ".", "..") or "\0" in part for part in relative.split("/"))


def target_of(to: Path, relative: str) -> Path:
    """The place of a file in the directory `to`, which exists; makes the directories between."""
    target = to / relative
    if "/" in relative:
        target.parent.mkdir(parents=True, exist_ok=True)
    return target
