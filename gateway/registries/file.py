"""The registry file: read by content, written under a lock with an atomic rename.

Each read opens the file, so an editor's rename, a write in place and the symlink swap of a ConfigMap all take
effect. It reads the content only if the file's size, times or inode have changed, or are too recent to be
trusted. A write changes only the necessary entries, and keeps comments and order (in JSON order and
indentation). Model directories are copied to `models/NAME/VERSION` next to the file. Must not know running
models.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final
from urllib.parse import unquote

from filelock import FileLock, Timeout

from gateway.names import Reference, check_alias, check_name
from gateway.registries import document
from gateway.registries.base import (
    Alias,
    Model,
    Move,
    Observation,
    RegistryError,
    RegistryInvalid,
    RegistryMissing,
    RegistryReadOnly,
    RegistryUnavailable,
    Snapshot,
    Version,
)
from gateway.registries.halves import Whole
from gateway.registries.resolution import find_alias, resolve
from gateway.registries.store import (
    MAX_BYTES,
    STORE,
    Collected,
    collect,
    copy_package,
    directory_of,
    next_number,
)
from gateway.staging import (
    Staging,
    sweep,
    sync_directory,
)

log = logging.getLogger("gateway.registries.file")

LOCK_SECONDS: Final = 30.0
# A file younger than this may still be being written in place: half of a document can be a valid one.
STABLE_SECONDS: Final = 0.05
_STABLE_READS: Final = 40
#: After this time without a write, another push treats a push's copy as abandoned, if no lock tells more.
STALE_SECONDS: Final = 3600.0
# The times of a file are as coarse as its file system makes them: 2 s at worst. What was written longer ago
# than this when it was read cannot be written once more without another time.
TRUSTED_SECONDS: Final = 3.0
# Read all the same after this long: for file systems whose times cannot be relied on at all.
REREAD_SECONDS: Final = 60.0


class FileRegistry(Whole):
    """A registry file, YAML or (by its ending `.json`) JSON. See `Registry` for what the methods do.

    `create`: `add_version` makes a file that does not exist. `now`, `pause` and `clock` are
    arguments for tests.
    """

    poll_interval = 1.0
    longest_pause = 2.0  # reading a file is cheap

    def __init__(
        self,
        target: str,
        *,
        create: bool = False,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        pause: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        path = unquote(target.removeprefix("file://")) if target.startswith("file://") else target
        self._path = Path(os.path.abspath(os.path.expanduser(path)))
        self._form: document.Form = "json" if self._path.suffix.lower() == ".json" else "yaml"
        self._create = create
        self._now = now
        self._pause = pause
        self._clock = clock
        self._last: Snapshot | None = None
        self._refused: tuple[str, list[tuple[str, str]]] | None = None
        #: A state of the file, its content in that state, and until when (monotonic) that is valid.
        self._looked: tuple[tuple[Any, ...], Snapshot, float] | None = None
        self._lock = threading.Lock()  # around the reader
        self.target = str(self._path)
        self._reader = document.Reader(self._form, self.target)
        real = self._real()
        self.identity = f"file:{os.path.realpath(real.parent)}/{real.name}"

    def __repr__(self) -> str:
        return f"<FileRegistry {self.target}>"

    @property
    def writable(self) -> bool:
        return self.why_not_writable() is None

    def read(self) -> Snapshot:
        looked = self._looked
        before, times = self._state()
        if looked is not None and looked[0] == before and self._clock() < looked[2]:
            return looked[1]
        at = time.time()
        snapshot = self._snapshot(self._stable())
        rested = all(abs(at - written) > TRUSTED_SECONDS for written in times)
        trusted = rested and self._state()[0] == before
        self._looked = (before, snapshot, self._clock() + REREAD_SECONDS) if trusted else None
        return snapshot

    def _state(self) -> tuple[tuple[Any, ...], tuple[float, float]]:
        """The values that change whenever the file does, and its times (unix seconds). Opens the file,
        because a network file system updates its view only then."""
        with self._opened() as file:
            status = os.fstat(file.fileno())
        times = (status.st_mtime_ns, status.st_ctime_ns)
        state = (str(self._real()), status.st_dev, status.st_ino, status.st_size, *times)
        return state, (status.st_mtime, status.st_ctime)

    def move(self, move: Move) -> Snapshot:
        check_alias(move.alias)
        with self._writing():
            content = self._content()
            snapshot = self._snapshot(content)
            resolve(snapshot, Reference(move.name, version=move.version))
            current = snapshot.models[move.name].aliases.get(move.alias)
            return self._put_alias(content, snapshot, move.name, move.alias, current, move.applied(current))

    def record(self, observation: Observation) -> Snapshot | None:
        if self.why_not_writable() is not None:
            return None
        with self._writing():
            content = self._content()
            snapshot = self._snapshot(content)
            model = snapshot.models.get(observation.name)
            current = None if model is None else model.aliases.get(observation.alias)
            new = observation.applied(current)
            if new is None:
                return snapshot
            return self._put_alias(content, snapshot, observation.name, observation.alias, current, new)

    def _put_alias(
        self, content: bytes, snapshot: Snapshot, name: str, alias: str, current: Alias | None, new: Alias
    ) -> Snapshot:
        changes = _alias_changes(name, alias, current, new)
        return self._write(content, changes) if changes else snapshot

    def delete_alias(self, name: str, alias: str) -> Snapshot:
        with self._writing():
            content = self._content()
            find_alias(self._snapshot(content), name, alias)
            return self._write(content, [(("models", name, "aliases", alias), None)])

    def add_version(
        self,
        name: str,
        package: str,
        digest: str,
        *,
        tags: Mapping[str, str] | None = None,
        alias: str | None = None,
    ) -> Version:
        check_name(name)
        if alias is not None:
            check_alias(alias)
        if (reason := self.why_not_writable()) is not None:
            raise RegistryReadOnly(reason)
        if not self._create and not self._path.exists():
            raise RegistryUnavailable(f"{self.target} does not exist")
        base = self._real().parent
        if base.is_relative_to(os.path.realpath(package)):
            raise RegistryError(
                f"{package} holds the registry {self.target}, which would become a part of the version: "
                "push a directory that holds only the model"
            )
        if not base.exists():
            log.warning("making the directory %s for a new registry, %s", base, self._path.name)
        store = base / STORE
        try:
            store.mkdir(parents=True, exist_ok=True)
            sweep(store, STALE_SECONDS)
            with Staging(store) as staged:
                # Copy before taking the lock: a large model must not delay a promotion.
                known = self._with_digest(name, digest)
                if known is None:
                    copy_package(package, staged.path, digest)
                with self._writing():
                    return self._enter(name, staged, store, digest, tags or {}, alias, package)
        except OSError as error:
            raise RegistryUnavailable(f"cannot write {store}: {error.strerror or error}") from error

    def collect(
        self, older_than: float, *, delete: bool = False, now: Callable[[], float] = time.time
    ) -> Collected:
        """The files in the store that no version uses and that have not changed for `older_than` seconds;
        `delete` removes them. Raises RegistryError."""
        # Directories set aside are removed after the lock is released, so that no writer waits for it.
        with contextlib.ExitStack() as aside, self._writing():
            models = self._snapshot(self._content()).models
            real = self._real()
            return collect(real, models.values(), aside if delete else None, older_than, now())

    def close(self) -> None:
        """Does nothing: no resource is held between calls."""

    def _enter(
        self,
        name: str,
        staged: Staging,
        store: Path,
        digest: str,
        tags: Mapping[str, str],
        alias: str | None,
        package: str,
    ) -> Version:
        """Gives the staged copy the next number and writes its entry, under the lock."""
        content = self._content() if self._path.exists() else None
        models = {} if content is None else self._snapshot(content).models
        model = models.get(name, Model(name, {}, {}))
        version = next((v for v in model.versions.values() if v.digest == digest), None)
        changes: list[tuple[Sequence[str], Any]] = []
        if version is None:
            directory = store / directory_of(name)
            directory.mkdir(exist_ok=True)
            number = str(next_number(model, directory))
            if not any(staged.path.iterdir()):
                # The equal version was removed meanwhile.
                copy_package(package, staged.path, digest)
            # The files first, then the entry: a crash between the two leaves a directory without an
            # entry, whose number is not used again, and never an entry without its files.
            staged.publish(directory / number)
            source = f"{STORE}/{directory.name}/{number}"
            created = self._now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            entry: dict[str, Any] = {"source": source, "digest": digest, "created": created}
            if tags:
                entry["tags"] = {str(key): str(value) for key, value in tags.items()}
            changes.append((("models", name, "versions", number), entry))
            tags = entry.get("tags", {})
            version = Version(name, number, str(directory / number), digest, created, tags)
        if alias is not None:
            current = model.aliases.get(alias)
            changes += _alias_changes(
                name, alias, current, Move(name, alias, version.version).applied(current)
            )
        if changes:
            snapshot = self._write(content, changes)
            return snapshot.models[name].versions[version.version]
        return version

    def _with_digest(self, name: str, digest: str) -> Version | None:
        if not self._path.exists():
            return None
        model = self._snapshot(self._content()).models.get(name)
        return next((v for v in model.versions.values() if v.digest == digest), None) if model else None

    # -- reading

    def _content(self) -> bytes:
        with self._opened() as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise RegistryUnavailable(f"{self.target} is larger than {MAX_BYTES} bytes")
        return content

    @contextlib.contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        try:
            # Open without blocking: a pipe or an endless device must not block the reader.
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as file:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise RegistryUnavailable(f"{self.target} is not a regular file")
                yield file
        except FileNotFoundError:
            raise RegistryMissing(f"{self.target} does not exist", self.target) from None
        except IsADirectoryError:
            hint = "name the registry file in it, such as registry.yaml"
            raise RegistryMissing(f"{self.target} is a directory: {hint}") from None
        except OSError as error:
            raise RegistryUnavailable(f"{self.target} cannot be read: {error.strerror or error}") from error

    def _stable(self) -> bytes:
        """The content. Reads a recently changed file until two reads are equal."""
        content = self._content()
        last = self._last
        if last is not None and last.stamp == self._stamp(content):
            return content
        for _ in range(_STABLE_READS):
            with contextlib.suppress(OSError):  # gone between the two: the next read says so
                if abs(time.time() - self._path.stat().st_mtime) > STABLE_SECONDS:
                    return content
            self._pause(STABLE_SECONDS)
            again = self._content()
            if again == content:
                return content
            content = again
        raise RegistryUnavailable(f"{self.target} changes continuously")

    def _snapshot(self, content: bytes) -> Snapshot:
        stamp = self._stamp(content)
        with self._lock:
            if self._refused is not None and self._refused[0] == stamp:
                raise RegistryInvalid(self.target, self._refused[1])  # no need to read it once more
            last = self._last
            if last is None or last.stamp != stamp:
                try:
                    models = self._reader.read(content, str(self._real().parent))
                except RegistryInvalid as error:
                    self._refused = (stamp, error.problems)
                    raise
                self._last = last = Snapshot(models, stamp)
            self._refused = None
            return last

    def _stamp(self, content: bytes) -> str:
        return hashlib.sha256(os.fsencode(self._real().parent) + b"\0" + content).hexdigest()

    def _real(self) -> Path:
        """The file that the path leads to. Does not follow the links of a ConfigMap's mount: they change with
        every update, and the files next to it stay where the mount is."""
        path = self._path
        for _ in range(40):
            try:
                target = os.readlink(path)
            except OSError:
                break
            if target.startswith("..") and target.split("/")[0] != "..":
                break
            path = Path(os.path.normpath(path.parent / target))
        return path

    # -- writing

    def why_not_writable(self) -> str | None:
        real = self._real()
        with contextlib.suppress(OSError):
            if real.is_symlink():
                return f"{self.target} is mounted from a ConfigMap: change it there"
        try:
            mode = real.stat().st_mode
        except FileNotFoundError:
            parent = next(p for p in real.parents if p.exists())
            return None if os.access(parent, os.W_OK) else f"{parent} cannot be written by this user"
        except OSError as error:
            return f"{self.target}: {error.strerror or error}"
        # root may write every file; a file without any write permission is meant to stay unchanged.
        if not mode & 0o222 or not os.access(real, os.W_OK):
            return f"{self.target} is read-only here: change it where it comes from, or make it writable"
        if not os.access(real.parent, os.W_OK):
            return f"the directory of {self.target} is read-only here: change the file where it comes from"
        return None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Allows one writer at a time, over all processes."""
        if (reason := self.why_not_writable()) is not None:
            raise RegistryReadOnly(reason)
        real = self._real()
        if not real.parent.is_dir():
            raise RegistryUnavailable(f"{self.target} does not exist")
        lock = FileLock(real.parent / f".{real.name}.lock", timeout=LOCK_SECONDS)
        try:
            lock.acquire()
        except Timeout:
            seconds = f"{LOCK_SECONDS:.0f} s"
            raise RegistryUnavailable(
                f"{self.target}: {lock.lock_file} has been held for {seconds}"
            ) from None
        except OSError as error:
            raise RegistryReadOnly(f"{self.target} cannot be locked: {error.strerror or error}") from error
        try:
            with contextlib.suppress(OSError):  # a new registry, or the lock of another user
                _share(lock.lock_file, real.stat())
            yield
        finally:
            lock.release()

    def _write(self, content: bytes | None, changes: Sequence[tuple[Sequence[str], Any]]) -> Snapshot:
        """Applies the changes to the content, and replaces the file. Readers see either all changes or
        none."""
        base = str(self._real().parent)
        with self._lock:
            new, kept = self._reader.changed(content, base, changes)
            try:
                models = self._reader.read(new, base)
            except RegistryInvalid as error:
                raise RegistryError(f"not written, because after the change {error}") from error
        if not kept:
            log.warning("%s could not be edited in place: it was rewritten without comments", self.target)
        self._replace(new)
        self._last = last = Snapshot(models, self._stamp(new))
        return last

    def _replace(self, content: bytes) -> None:
        real = self._real()
        for garbage in real.parent.glob(f".{real.name}.*.tmp"):
            garbage.unlink(missing_ok=True)  # from a killed writer: this process holds the lock
        temporary = real.parent / f".{real.name}.{uuid.uuid4().hex}.tmp"
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                with contextlib.suppress(FileNotFoundError):  # a new file has the mode of the umask
                    _keep_owner_and_mode(handle, real.stat())
                view = memoryview(content)
                while view:
                    view = view[os.write(handle, view) :]
                os.fsync(handle)
            finally:
                os.close(handle)
            os.replace(temporary, real)
            sync_directory(real.parent)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno in (errno.EBUSY, errno.EROFS):
                reason = f"{error.strerror}; mount its directory, not only the file"
                raise RegistryReadOnly(f"{self.target} cannot be replaced: {reason}") from error
            raise RegistryUnavailable(f"{self.target} cannot be written: {error.strerror}") from error


def _alias_changes(
    name: str, alias: str, current: Alias | None, new: Alias
) -> list[tuple[Sequence[str], Any]]:
    """The changes to the document that make an alias the `new` one; none if it is that already."""
    if new == current:
        return []
    path = ("models", name, "aliases", alias)
    value = new.to_json()
    if current is None or isinstance(value, str) or isinstance(current.to_json(), str):
        return [(path, value)]
    # A mapping stays one, key by key, so that what the user keeps in it (`x-` keys, comments) stays too.
    old = current.to_json()
    assert isinstance(old, dict)
    keys = dict.fromkeys((*value, *old))
    return [((*path, key), value.get(key)) for key in keys if value.get(key) != old.get(key)]


def _share(lock_file: str, like: os.stat_result) -> None:
    """Lets all who may write the registry take its lock. Follows no link: another user of the directory may
    have put one in the place of the file."""
    handle = os.open(lock_file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            _keep_owner_and_mode(handle, like, 0o666)
    finally:
        os.close(handle)


def _keep_owner_and_mode(file: int, like: os.stat_result, mask: int = 0o7777) -> None:
    """Gives an open file, by its descriptor, the owner, the group and the mode of another one, as far as this
    user may: all who could read and write that one can do so afterwards. Raises OSError."""
    mine = os.fstat(file)
    if (mine.st_uid, mine.st_gid) != (like.st_uid, like.st_gid):
        try:
            os.fchown(file, like.st_uid, like.st_gid)
        except PermissionError:
            # Only root can change a file's owner; otherwise the new file belongs to this user, as with any
            # editor. Its group can be any group of this user.
            with contextlib.suppress(PermissionError):
                os.fchown(file, -1, like.st_gid)
    os.fchmod(file, like.st_mode & mask)
