"""Periodic work, about once a second and after each load: measures memory, checks model processes, unloads
idle models, and publishes events about processes.

The ledger decides which models must be unloaded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import TYPE_CHECKING

from gateway import events
from gateway.runners.heap import Heap
from gateway.runners.unconfined import Unconfined

if TYPE_CHECKING:
    from gateway.artifacts.cache import Artifacts
    from gateway.artifacts.packages import Prepared
    from gateway.runners.packs import Packs
    from gateway.runners.zygote import Zygotes
    from gateway.serving.manager import Manager

log = logging.getLogger("gateway")

MEASURE_INTERVAL = 1.0
#: The size of the cache is measured once per this many intervals.
DISK_INTERVAL = 10
#: If memory is short, a zygote without model processes ends after this time, in seconds.
UNUSED = 5.0


class Upkeep:
    """Runs the periodic work. `disk_bytes`: the last measured size of the artifact cache."""

    def __init__(
        self,
        manager: Manager,
        zygotes: Zygotes,
        packs: Packs,
        artifacts: Artifacts,
        io: Executor,
        emit: events.Emit,
    ) -> None:
        self._emit = emit
        self._manager = manager
        self._zygotes = zygotes
        self._packs = packs
        self._artifacts = artifacts
        self._io = io
        self._heap = Heap()
        self._unconfined = Unconfined()
        self.disk_bytes = 0
        self._told = False

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self.disk_bytes = await loop.run_in_executor(self._io, self._artifacts.bytes)
            for _ in range(DISK_INTERVAL):
                await asyncio.sleep(MEASURE_INTERVAL)
                await self._zygotes.read_memory()
                self._packs.tend()
                if self._manager.remeasure(self._zygotes.bytes + self._packs.overhead):
                    self._packs.end_empty()
                    await self._zygotes.retire_idle(idle=UNUSED)
                self._tell_excess(self._manager.ledger.excess)
                self._manager.retire_idle()
                self._manager.tend()
                self._zygotes.tend()

    def _tell_excess(self, excess: int) -> None:
        """Warns once while the limit has no room for the processes that models share."""
        if excess and not self._told:
            limit = self._manager.ledger.limit
            log.warning(
                "memory_limit (%d bytes) is too low: the processes that models are forked from or share take "
                "%d bytes more than it has room for; raise it to at least %d bytes",
                limit,
                excess,
                limit + excess,
            )
        self._told = excess > 0

    def notice(self, event: events.Event) -> None:
        """After a load, freezes the heap soon, and publishes which confinement the model lacks."""
        if not isinstance(event, events.Loaded):
            return
        self._heap.freeze_soon()
        for servable in reversed(self._manager):
            if (servable.version.name, servable.version.version) == (event.model, event.version):
                if servable.runner is not None:
                    self._unconfined.check(servable.runner.status().get("confinement", {}))
                break

    def observe(self, prepared: Prepared, what: str, reason: str) -> None:
        """Publishes an event about a version's processes. A version whose processes end repeatedly goes into
        quarantine."""
        version = prepared.version
        if what in ("stuck", "moving"):
            self._emit(events.Stuck(version.name, version.version, reason))
        elif what == "restarted":
            self._emit(events.Restarted(version.name, version.version))
        else:
            self._emit(events.Crashed(version.name, version.version, what, reason))
            self._manager.ended(version, reason)
        if what == "quarantined":
            self._manager.quarantine(version, reason)

    def close(self) -> None:
        self._heap.close()


class Background:
    """Tasks that run as long as the gateway runs."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, **work: Callable[[], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        self._tasks += [loop.create_task(_kept_going(name, one), name=name) for name, one in work.items()]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _kept_going(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Runs background work; logs an unexpected failure and starts the work again."""
    while True:
        try:
            await work()
        except Exception:
            log.exception("%s failed; restarting it", name)
            await asyncio.sleep(MEASURE_INTERVAL)
        else:
            return
