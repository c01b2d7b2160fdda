"""The facts that a gateway remembers across restarts: connects the registry's content, digests and
measurements to the tables of `gateway.state`. Writes run in order on their own thread, so that the event loop
never waits for the disk. Must not know model processes, rules of aliases or HTTP."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cachetools import LRUCache

from gateway.aliasmemory import AliasMemory
from gateway.artifacts.base import ArtifactError
from gateway.outbox import Outbox
from gateway.state import LastSnapshot, State
from gateway.usagememory import UsageMemory
from loaders import scan

if TYPE_CHECKING:
    from gateway.artifacts.packages import Prepared
    from gateway.registries.base import Registry, Snapshot, Version
    from loaders.package import Package
    from loaders.signature import Signature

log = logging.getLogger("gateway")

#: Seconds that a write waits for others: the load of a model makes several, and a transaction costs more than
#: what it writes.
_GATHERED: Final = 0.05
#: The most writes in a transaction: reads wait for it.
_AT_ONCE: Final = 100
#: So many signatures of models that were loaded are kept, and so many results of scans in memory.
_KEPT = 1000
#: So many measurements of loads are kept in memory.
_MEASURED = 10_000
#: Loads below this many seconds do not differ enough to be written again.
_QUICK = 0.1


class Persistence:
    """The part of the state under `directory` that belongs to `registry`. `pack_bytes`: the largest package
    that is scanned for a pack. Raises OSError as `State` does."""

    def __init__(self, directory: Path, registry: Registry, *, pack_bytes: int) -> None:
        self._pack_bytes = pack_bytes
        self._registry = registry
        self._state = State(directory)
        #: Written by the event loop, read by any thread.
        self._accepted: dict[str, Signature] = {}
        #: The last loads, by digest, None if there was none; any thread uses it.
        self._measured: LRUCache[str, tuple[int | None, float] | None] = LRUCache(_MEASURED)
        #: What the state has of them, or will have.
        self._stored: LRUCache[str, tuple[int | None, float]] = LRUCache(_MEASURED)
        #: What loading executes, by digest; any thread uses it.
        self._scanned: LRUCache[str, scan.Verdict] = LRUCache(_KEPT)
        self._lock = threading.Lock()
        #: Writes in order, and whether they wait for others.
        self._waiting: list[Callable[[], None]] = []
        self._urgent = threading.Event()
        self._closing = False
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="state")
        self.writer = self._writer
        self.outbox = Outbox(self._state, registry.identity)
        self.usage = UsageMemory(self._state, registry.identity, self._write_behind)
        self.aliases = AliasMemory(self._state, registry.identity, self._write_behind)

    def last_snapshot(self) -> LastSnapshot | None:
        """The registry's last valid content. Blocks."""
        return self._state.snapshot(self._registry.identity)

    def save_snapshot(self, snapshot: Snapshot) -> None:
        identity = self._registry.identity
        self._write_behind(lambda: self._state.save_snapshot(identity, snapshot.stamp, snapshot.entries()))

    def served_before(self, version: Version, snapshot: Snapshot) -> bool:
        """Whether the version has served: here, or as the last good version of an alias in the registry."""
        if self.aliases.served(version.name, version.version):
            return True
        model = snapshot.models.get(version.name)
        return model is not None and any(a.last_good == version.version for a in model.aliases.values())

    def digest(self, version: Version) -> str | None:
        """The digest of the version's first download; of its last download where the registry can change a
        version. Raises ArtifactError when the state cannot be read."""
        try:
            return self._state.digest(self._registry.identity, version.name, version.version, version.source)
        except sqlite3.Error as error:
            # Do not ignore this: later downloads must match the first one.
            raise ArtifactError("the gateway cannot read its state", str(error)) from error

    def save_digest(self, version: Version, digest: str) -> None:
        """Keeps the digest here, and in the registry where that stores digests."""
        identity, first = self._registry.identity, self._registry.lasting
        self._write_behind(
            lambda: self._state.save_digest(
                identity, version.name, version.version, version.source, digest, first=first
            ),
            urgent=True,
        )
        self._registry.record_digest(version, digest)

    def measurement(self, digest: str) -> tuple[int | None, float] | None:
        """(bytes, load seconds) of the last load of these files. None: unknown, the caller estimates. Reads
        the disk the first time only."""
        with self._lock:
            if digest in self._measured:
                return self._measured[digest]
        known = None
        try:
            known = self._state.measurement(digest)
        except sqlite3.Error:
            log.exception("cannot read the state")
        with self._lock:
            if known is not None:
                self._stored.setdefault(digest, known)
            return self._measured.setdefault(digest, known)

    def scanned(self, digest: str, package: Package, remember: bool) -> scan.Verdict:
        """Returns what loading the files executes; scans files that were not scanned before.
        `remember`: what it finds is kept."""
        with self._lock:
            seen = self._scanned.get(digest)
        if seen is not None:
            return seen
        try:
            known = self._state.scan(digest, scan.EDITION)
        except sqlite3.Error:
            log.exception("cannot read the state")
            known = None
        found = scan.package(package, self._pack_bytes) if known is None else scan.Verdict(*known)
        if remember:
            with self._lock:
                self._scanned[digest] = found
        if remember and known is None:
            self._write_behind(
                lambda: self._state.save_scan(digest, scan.EDITION, found.harmless, found.reason)
            )
        return found

    def accepted(self, digest: str) -> Signature | None:
        """The signature that a load of these files showed, since this start."""
        return self._accepted.get(digest)

    def save_measurement(self, prepared: Prepared, size: int | None, seconds: float) -> None:
        """Keeps the bytes and seconds of a load. Writes only what is new: what is evicted often is loaded
        often."""
        if prepared.accepted is not None:
            while len(self._accepted) >= _KEPT:
                del self._accepted[next(iter(self._accepted))]
            self._accepted[prepared.digest] = prepared.accepted
        digest = prepared.digest
        with self._lock:
            last, stored = self._measured.get(digest), self._stored.get(digest)
            now = (last[0] if last is not None and size is None else size), seconds
            self._measured[digest] = now
            if stored is not None and _alike(stored, now):
                return
            self._stored[digest] = now
        self._write_behind(lambda: self._state.save_measurement(digest, size, seconds))

    async def close(self) -> None:
        """Completes all pending writes."""
        with self._lock:
            self._closing = True
            self._urgent.set()
        await asyncio.to_thread(self._writer.shutdown)
        self._state.close()

    def _write_behind(self, write: Callable[[], None], urgent: bool = False) -> None:
        """`urgent`: it must not be lost, and what waits before it is written with it."""
        with self._lock:
            self._waiting.append(write)
            if urgent:
                self._urgent.set()
            if len(self._waiting) == 1:
                try:
                    self._writer.submit(self._write_waiting)
                except RuntimeError:  # it is closed
                    self._waiting.clear()
                    raise

    def _write_waiting(self) -> None:
        self._urgent.wait(_GATHERED)
        with self._lock:
            writes, self._waiting = self._waiting, []
            if not self._closing:
                self._urgent.clear()
        for i in range(0, len(writes), _AT_ONCE):
            self._write(writes[i : i + _AT_ONCE])

    def _write(self, writes: list[Callable[[], None]]) -> None:
        if len(writes) > 1:
            try:
                self._state.together(writes)
                return
            except Exception as error:  # noqa: BLE001 - one write must not take the others with it
                log.debug("writing the state one by one: %s", error)
        for write in writes:
            try:
                write()
            except sqlite3.Error as error:
                # The state only speeds up a restart: a full disk must not stop serving.
                log.error("cannot write the state: %s", error)
            except Exception:
                log.exception("cannot write the state")


def _alike(stored: tuple[int | None, float], now: tuple[int | None, float]) -> bool:
    """Whether two measurements, in bytes and seconds, do not differ enough to be written again."""
    (size, seconds), (new_size, new_seconds) = stored, now
    quick = max(seconds, new_seconds) < _QUICK
    if not quick and not seconds / 2 <= new_seconds <= seconds * 2:
        return False
    return new_size is None or (size is not None and abs(new_size - size) <= size / 20)
