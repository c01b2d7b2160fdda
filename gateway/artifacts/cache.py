"""The artifact cache: model directories on the local disk, stored under the digest of their content.

Layout of the cache directory, which several gateways may share:
    sha256-<hex>/       a package, read-only, complete as soon as it is visible
    sha256-<hex>.lock   its size in bytes; held shared while the package is in use, exclusively while it is
                        removed; its modification time is the package's last use
    .fetch-<2 hex>.lock held while a process fetches a source, so that the others find it fetched
    .room.lock          the bytes that were ever reserved here; held while space is made, and while a package
                        is published
    .incoming-…         a fetch in progress; `gateway.staging` removes what killed processes left

Finding a package waits for no other process. Knows versions and digests. Executes nothing, and reads a
package's files only to hash them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import math
import os
import re
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeAlias

from gateway import namedlock
from gateway.artifacts.base import ArtifactError, DigestMismatch, Meter, Progress, Room, Unreachable
from gateway.artifacts.sources import Sources
from gateway.registries.base import Version
from gateway.staging import Staging, notes, sweep
from loaders import package as packages
from loaders.files import with_status

log = logging.getLogger("gateway.artifacts")

Fingerprint: TypeAlias = "tuple[tuple[str, int, int, int, int], ...]"
"""(path, inode, bytes, modification time, change time) of each file of an entry; times in ns."""

#: Space for files of unknown size is reserved in about so many steps. A full cache removes one such step of
#: small packages more than it needs, so that the next fetches need not look at all packages again.
_STEPS: Final = 64
#: Seconds after which the packages are counted again although there is space.
COUNT_AGAIN: Final = 10.0
_ENTRY = re.compile(r"sha256-[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class _Count:
    """The size of all packages, those under way included, when so many bytes had ever been `reserved`. Good
    `until` then."""

    until: float
    reserved: int
    bytes: int


@dataclass(frozen=True, eq=False)
class Local:
    """A package in the cache. While this object exists, the package is in use and cannot be removed. `digest`
    is the digest of its files, `bytes` their size."""

    path: Path
    digest: str
    bytes: int


class Beside(Protocol):
    """Other files that count towards the disk limit: environments."""

    def bytes(self) -> int: ...
    def idle(self) -> list[tuple[float, str]]:
        """(last use, key) of what may go, unless somebody uses it."""
        ...

    def free(self, key: str) -> bool:
        """Removes an entry that is not in use, and what only it kept. Returns False if it is in use."""
        ...

    def tidy(self) -> None:
        """Removes everything that is not needed now."""
        ...


class Artifacts:
    """The cache under `cache_dir`. Together with the environments (`beside`) it takes at most `disk_limit`
    bytes; the least recently used entry of both is removed first. `clock` gives monotonic seconds."""

    def __init__(
        self,
        cache_dir: Path,
        disk_limit: int,
        sources: Sources | None = None,
        beside: Beside | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sources = sources or Sources()
        self._root = Path(os.path.abspath(cache_dir))
        self._limit = disk_limit
        self._beside = beside
        self._clock = clock
        #: For the holder of `.room.lock`.
        self._count = _Count(-math.inf, 0, 0)
        #: By digest: the inode, size and times of the files when they were last hashed.
        self._verified: dict[str, Fingerprint] = {}
        #: By name: the size of an entry, which never changes.
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()
        self._root.mkdir(parents=True, exist_ok=True)
        if not os.access(self._root, os.W_OK):
            log.error("cannot write the cache in %s: only models that it holds can be loaded", self._root)
        sweep(self._root)

    def __repr__(self) -> str:
        return f"<Artifacts {self.bytes() / 1e6:.0f}/{self._limit / 1e6:.0f} MB in {self._root}>"

    def find(self, version: Version) -> Local | None:
        """The package if it is in the cache, else None. Reads only the disk. Raises ArtifactError."""
        self._sources.check(version)
        try:
            return None if version.digest is None else self._found(version.digest)
        except OSError as error:
            raise _failed(version, error, self._root) from error

    def fetch(self, version: Version, progress: Progress | None = None) -> Local:
        """The files of a version, verified against its digest if it has one. Blocks. Raises ArtifactError.
        Calls `progress` with the bytes received, at most ten times a second; never if the cache has the
        files.

        Fetches a version without a digest each time, because its source may have changed; the digest of the
        fetched files then gives the entry of the cache.
        """
        self._sources.check(version)
        try:
            if not os.path.isdir(self._root):  # an operator may remove it to free the disk
                self._root.mkdir(parents=True, exist_ok=True)
            if version.digest is not None and (local := self._found(version.digest)) is not None:
                return local
            source = hashlib.sha256((version.digest or version.source).encode("utf-8", "surrogatepass"))
            with namedlock.alone(self._root / f".fetch-{source.hexdigest()[:2]}.lock"):
                if version.digest is not None and (local := self._found(version.digest)) is not None:
                    return local
                return self._fetch(version, progress)
        except OSError as error:
            raise _failed(version, error, self._root) from error

    def bytes(self) -> int:
        """The size of all packages in the cache and of the environments; 0 if it cannot be read."""
        with contextlib.suppress(OSError):
            return sum(self._own(self._names()).values()) + self._beside_bytes()
        return 0

    def trim(self) -> None:
        """Enforces the limit after an environment has grown. Keeps what is in use."""
        with namedlock.alone(self._root / ".room.lock"):
            self._make_room(0, os.listdir(self._root))

    # -- Entries

    def _found(self, digest: str) -> Local | None:
        """The entry, in use from now on; None if it does not exist. Hashes it the first time that this
        process uses it, and again when a file has another inode, size or time."""
        name = _name(digest)
        path = self._root / name
        if not os.path.isdir(path):
            return None
        with contextlib.ExitStack() as use:
            held = self._hold(name)
            use.callback(os.close, held)
            if not os.path.isdir(path):  # removed before this process held the lock
                return None
            now = _fingerprint(path)
            with self._lock:
                verified = self._verified.get(digest)
            if verified != now:
                found = _digest_or_none(path)
                if found != digest:
                    log.warning("the cached package %s is damaged (%s): fetching it again", path, found)
                    use.close()
                    self._remove(name)
                    return None
                with self._lock:
                    self._verified[digest] = now
            with _unless_read_only():
                os.utime(held)
            local = Local(path, digest, self._size(name, held))
            weakref.finalize(local, use.pop_all().close)
            return local

    def _hold(self, name: str) -> int:
        """A descriptor that holds the entry's lock shared, on the current lock file."""
        return namedlock.shared(self._root / f"{name}.lock")

    def _size(self, name: str, held: int) -> int:
        if size := _number(held):
            return size
        size = packages.files_bytes(self._root / name)
        with _unless_read_only():
            os.pwrite(held, str(size).encode(), 0)
        return size

    def _own(self, names: Sequence[str]) -> dict[str, int]:
        """The size of each package among these names. Reads the size of an entry once: a fetch must not cost
        more the more packages there are."""
        sizes = {name: self._sizes.get(name) or self._size_of(name) for name in filter(_ENTRY.match, names)}
        self._sizes = sizes.copy()  # other threads add to it
        return sizes

    def _beside_bytes(self) -> int:
        return 0 if self._beside is None else self._beside.bytes()

    def _names(self) -> list[str]:
        return os.listdir(self._root) if self._root.is_dir() else []

    def _size_of(self, name: str) -> int:
        """The size of an entry that may not be in use; 0 if it was removed meanwhile."""
        with contextlib.suppress(OSError), open(self._root / f"{name}.lock", "rb", buffering=0) as mark:
            if size := _number(mark.fileno()):
                return size
        with contextlib.suppress(OSError, packages.PackageError):  # its lock file is lost
            return packages.files_bytes(self._root / name)
        return 0

    def _last_use(self, name: str) -> float:
        with contextlib.suppress(OSError):
            return os.stat(f"{self._root}{os.sep}{name}.lock").st_mtime
        return 0.0

    # -- Fetching

    def _fetch(self, version: Version, progress: Progress | None) -> Local:
        source = self._sources.open(version)
        files = source.files(version)
        total = sum(size or 0 for _, _, size in files)
        if total > self._limit:
            sizes = f"{total / 1e6:.0f} MB, the disk limit is {self._limit / 1e6:.0f} MB"
            raise ArtifactError(f"the files of {version} do not fit in the cache: {sizes}")
        with self._room(version, total) as (staged, room):
            meter = Meter(files, progress)
            hashed = source.copy(version, files, staged.path, room=room, meter=meter)
            try:
                came = with_status(staged.path)
                listing = [(name, file, status.st_size) for name, file, status in came]
                digest = packages.digest_of(listing, hashed)
            except packages.PackageError as error:
                raise ArtifactError(f"the files of {version} cannot be used: {error}") from error
            if version.digest is not None and digest != version.digest:
                told = f"the registry has {version.digest}, the files have {digest}"
                raise DigestMismatch(f"digest mismatch of {version}: {told}", digest)
            size = sum(status.st_size for _, _, status in came)
            grown = 0 if any(size is None for _, _, size in files) else max(0, size - total)
            return self._published(version, staged, digest, size, grown, _read_only(staged.path, came))

    def _published(
        self, version: Version, staged: Staging, digest: str, size: int, grown: int, files: Fingerprint
    ) -> Local:
        """The entry with this content: the staged files, or those that another process published before.
        `grown`: the bytes that were not reserved, of files that grew while they were copied."""
        name = _name(digest)
        for _ in range(3):
            if (local := self._found(digest)) is not None:
                return local
            with contextlib.ExitStack() as use:
                held = self._hold(name)
                use.callback(os.close, held)
                try:
                    os.ftruncate(held, 0)
                    os.pwrite(held, str(size).encode(), 0)
                    # Hold the lock: a count in between would find the package in neither place.
                    with namedlock.alone(self._root / ".room.lock") as lock:
                        if grown:
                            _set_number(lock, _number(lock) + grown)
                        # After a loss of power the next process hashes it, and fetches what is damaged.
                        staged.publish(self._root / name, lasting=False)
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                        raise
                    continue
                with self._lock:
                    self._verified[digest] = files
                self._sizes[name] = size
                local = Local(self._root / name, digest, size)
                weakref.finalize(local, use.pop_all().close)
                return local
        raise ArtifactError(
            f"the files of {version} cannot be cached", f"{self._root / name} is damaged and in use"
        )

    @contextlib.contextmanager
    def _room(self, version: Version, needed: int) -> Iterator[tuple[Staging, Room]]:
        """Yields a directory to fetch into when `needed` bytes fit in the cache, and what reserves more. More
        space is an empty directory for each step, because the name of the first one is in use."""
        with contextlib.ExitStack() as held:
            staged = held.enter_context(self._reserved(version, needed))
            asked = left = 0

            def room(count: int) -> None:
                nonlocal asked, left
                asked += count
                if needed + asked > self._limit:
                    raise ArtifactError(f"the files of {version} do not fit in the cache")
                if count > left:
                    step = max(count - left, min(self._limit // _STEPS, self._limit - needed - asked))
                    held.enter_context(self._reserved(version, step, needed + asked - count + left))
                    left += step
                left -= count

            yield staged, room

    def _reserved(self, version: Version, needed: int, held: int = 0) -> Staging:
        """A new directory that reserves `needed` bytes, in addition to `held` ones for the same files: other
        fetches count the number in its name. Raises ArtifactError."""
        with namedlock.alone(self._root / ".room.lock") as lock:
            reserved = _number(lock)
            own, beside = self._at_most(reserved), self._beside_bytes()
            if own is None or own + beside + needed > self._limit:
                own, beside = self._make_room(needed, sweep(self._root))
                self._count = _Count(self._clock() + COUNT_AGAIN, reserved, own)
            if own + beside + needed > self._limit:
                used = own + beside - held
                sizes = f"{(held + needed) / 1e6:.0f} MB are needed and {used / 1e6:.0f} MB in use"
                raise ArtifactError(
                    f"the cache has no space for {version}: {sizes} of {self._limit / 1e6:.0f} MB"
                )
            _set_number(lock, reserved + needed)
            return Staging(self._root, str(needed))

    def _at_most(self, reserved: int) -> int | None:
        """The most that the packages can take: what was counted, and what all gateways with this cache have
        reserved since. None: they must be counted. A count reads the names of all packages."""
        count = self._count
        good = self._clock() < count.until and count.reserved <= reserved
        return count.bytes + reserved - count.reserved if good else None

    def _make_room(self, needed: int, names: Sequence[str]) -> tuple[int, int]:
        """Removes what was used longest ago until `needed` bytes fit, and returns the bytes of packages, and
        those of environments, then. `names`: all that is in the cache's directory. For the holder of
        `.room.lock`."""
        sizes = self._own(names)
        own = sum(sizes.values())
        own += sum(int(note) for note in notes(names) if note.isdecimal())
        beside = self._beside_bytes()
        if own + beside + needed <= self._limit:
            return own, beside
        going: list[tuple[float, str, int | None]] = [
            (self._last_use(name), name, size) for name, size in sizes.items()
        ]
        if self._beside is not None:
            going += [(used, key, None) for used, key in self._beside.idle()]
        for _, name, size in sorted(going, key=lambda one: one[:2]):
            lacking = own + beside + needed - self._limit
            if lacking <= 0 and (size is None or size > self._limit // _STEPS + lacking):
                return own, beside
            if size is not None:
                if self._remove(name):
                    own -= size
                elif lacking <= 0:
                    return own, beside
            elif self._beside is not None and self._beside.free(name):
                beside = self._beside.bytes()
        if self._beside is not None and own + beside + needed > self._limit:
            self._beside.tidy()
            beside = self._beside.bytes()
        return own, beside

    def _remove(self, name: str) -> bool:
        """Removes an entry. Returns False if it is in use."""
        mark = self._root / f"{name}.lock"
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(namedlock.at_once(mark))
            except OSError:
                return False
            # Rename it first, so that no reader finds half of it; `sweep` removes directories of this name.
            gone = Staging(self._root)
            with gone:
                path = self._root / name
                if path.is_dir():
                    os.chmod(path, 0o700)
                    os.rename(path, gone.path / name)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(mark)
        with self._lock:
            self._verified.pop(_digest_of(name), None)
        return True


@contextlib.contextmanager
def _unless_read_only() -> Iterator[None]:
    """Ignores errors of a read-only disk, for writes that the cache can do without."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EBADF):
            raise


def _number(descriptor: int) -> int:
    """The number at the beginning of a file; 0 if there is none."""
    with contextlib.suppress(ValueError):
        return int(os.pread(descriptor, 32, 0))
    return 0


def _set_number(descriptor: int, number: int) -> None:
    os.pwrite(descriptor, b"%020d" % number, 0)


def _read_only(path: Path, files: list[tuple[str, str, os.stat_result]]) -> Fingerprint:
    """Makes a directory with these files read-only. Returns what tells of a later change."""
    found = []
    directories = {str(path)}
    for relative, file, status in files:
        mode = stat.S_IMODE(status.st_mode)
        if mode != (least := mode & 0o555 | 0o400):
            os.chmod(file, least)
            status = os.lstat(file)
        found.append(_state(relative, status))
        while (above := os.path.dirname(file)) not in directories:
            directories.add(above)
            file = above
    for directory in directories:
        os.chmod(directory, 0o555)
    return tuple(sorted(found))


def _fingerprint(path: Path) -> Fingerprint:
    """The values that change whenever a file of an entry changes: cheap, one `stat` per file."""
    return tuple(
        sorted(
            _state(relative, entry.stat(follow_symlinks=False))
            for relative, entry in _entries(str(path))
            if not entry.is_dir(follow_symlinks=False)
        )
    )


def _state(relative: str, status: os.stat_result) -> tuple[str, int, int, int, int]:
    return relative, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _entries(root: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """All that is below a directory, with its path there. What is in a directory that cannot be read is left
    out."""
    pending = [("", root)]
    while pending:
        above, directory = pending.pop()
        try:
            with os.scandir(directory) as found:
                entries = list(found)
        except OSError:
            continue
        for entry in entries:
            relative = above + entry.name
            yield relative, entry
            if entry.is_dir(follow_symlinks=False):
                pending.append((f"{relative}/", entry.path))


def _digest_or_none(path: Path) -> str | None:
    try:
        return packages.digest(path)
    except (OSError, packages.PackageError):
        return None


def _failed(version: Version, error: OSError, cache: Path) -> ArtifactError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ArtifactError(f"the files of {version} do not fit on the disk of cache_dir", str(error))
    if error.errno in (errno.EROFS, errno.EACCES) and str(error.filename).startswith(f"{cache}{os.sep}"):
        return ArtifactError(f"cannot write the files of {version} to cache_dir", str(error))
    problem = f"cannot read the files of {version}"
    if isinstance(error, FileNotFoundError):
        return ArtifactError(f"{problem}: they do not exist", f"{version.source}: {error}")
    kind = ArtifactError if isinstance(error, PermissionError) else Unreachable
    return kind(f"{problem}: {error.strerror or type(error).__name__}", f"{version.source}: {error}")


def _name(digest: str) -> str:
    return digest.replace(":", "-", 1)


def _digest_of(name: str) -> str:
    return name.replace("-", ":", 1)
