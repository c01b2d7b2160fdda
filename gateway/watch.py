"""The registry, looked at again and again: what it says goes to the aliases, what it fails to say does not.

A registry that cannot be read, or that is not valid, changes nothing: the last valid snapshot stays.
Knows no member of the registry family and nothing of what the snapshot is used for.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from gateway.errors import Problem
from gateway.events import Emit, RegistryFailed, RegistryRead
from gateway.registries.base import Registry, RegistryError, Snapshot

#: A poll comes up to this share early, so that a fleet does not ask in step.
JITTER = 0.2


class Watch:
    """`apply` is given every changed snapshot and who moved it; `remember` saves it for a restart."""

    def __init__(
        self,
        registry: Registry,
        io: Executor,
        *,
        interval: float,
        apply: Callable[[Snapshot, str], None],
        remember: Callable[[Snapshot], None],
        emit: Emit = lambda event: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._io = io
        self._interval = interval
        self._apply = apply
        self._remember = remember
        self._emit = emit
        self._clock = clock
        self._stamp: str | None = None
        self._read_at: float | None = None
        self._error: str | None = None
        self._looking: asyncio.Task[None] | None = None
        self._writes = 0

    @property
    def seen(self) -> bool:
        """Whether there is a snapshot to serve from, fresh or remembered."""
        return self._stamp is not None

    def age(self) -> float | None:
        """Seconds since the registry was last read with success."""
        return None if self._read_at is None else self._clock() - self._read_at

    def status(self) -> dict[str, Any]:
        age = self.age()
        return {
            "target": self._registry.target,
            "age_seconds": None if age is None else round(age, 3),
            "error": self._error,
        }

    def take(self, snapshot: Snapshot, moved_by: str) -> None:
        """A snapshot that came another way: from a write, or from what was remembered at the start."""
        self._writes += 1
        self._take(snapshot, moved_by)

    def _take(self, snapshot: Snapshot, moved_by: str) -> None:
        changed = snapshot.stamp != self._stamp
        self._stamp = snapshot.stamp
        if changed:
            self._apply(snapshot, moved_by)
            self._remember(snapshot)

    async def look(self) -> None:
        """Reads the registry now; simultaneous callers share one read. Raises REGISTRY_UNAVAILABLE."""
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._look())
        await asyncio.wait({self._looking})
        if self._error is not None:
            raise Problem("REGISTRY_UNAVAILABLE", self._error, retry_after=self._interval)

    async def _look(self) -> None:
        try:
            while True:
                writes = self._writes
                snapshot = await asyncio.get_running_loop().run_in_executor(self._io, self._registry.read)
                if writes == self._writes:
                    break
                # Something newer came while this was read: what was read may be older than that.
        except RegistryError as error:
            if str(error) != self._error:
                self._emit(RegistryFailed(str(error)))
            self._error = str(error)
        else:
            self._read_at = self._clock()
            self._error = None
            self._emit(RegistryRead(len(snapshot.models), snapshot.stamp != self._stamp))
            self._take(snapshot, "registry")
        finally:
            self._looking = None

    async def run(self) -> None:
        """Looks forever, a little early each time."""
        while True:
            await asyncio.sleep(self._interval * random.uniform(1 - JITTER, 1.0))
            try:
                await self.look()
            except Problem:
                continue  # said by the event; the next look may do better
