"""Loads and unloads versions for an operator: load, unload and preload.

A load works like a request: the alias's gates, then a lease. Knows references, aliases and the manager; must
not know a protocol. Raises Problem.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from gateway.errors import Problem, pathless
from gateway.names import Reference
from gateway.registries.base import Registry, RegistryError, Snapshot, Version

if TYPE_CHECKING:
    from gateway.registries.watcher import Watch
    from gateway.rollouts.alias import LiveAlias
    from gateway.rollouts.aliases import Aliases
    from gateway.rollouts.preload import Preload
    from gateway.serving.manager import Lease, Manager
    from gateway.serving.servable import Servable

T = TypeVar("T")

#: How long `?wait=true` waits, in seconds.
LONGEST_WAIT = 600.0


class Residency:
    """`pending`: what must be loaded before the gateway is ready. Its patterns are matched against the whole
    registry, which is read through `io`."""

    def __init__(
        self,
        aliases: Aliases,
        manager: Manager,
        watch: Watch,
        registry: Registry,
        io: Executor,
        *,
        pending: Preload,
    ) -> None:
        self._aliases = aliases
        self._manager = manager
        self._watch = watch
        self._registry = registry
        self._io = io
        self._pending = pending
        self._needed: set[asyncio.Task[None]] = set()

    async def load(self, reference: Reference, *, wait: bool = True) -> tuple[Version, Servable] | LiveAlias:
        """Loads the version of a reference, as a request would, and forgets an earlier failure. Returns the
        version and its servable. Without `wait`, an alias without a version in service is returned itself:
        its gates have begun."""
        await self._watch.ensure(reference, self._aliases.snapshot)
        version, found = self._aliases.target(reference)
        if version is None and found is not None:
            if found.desired is not None:
                self._manager.retry(found.desired)
            if not wait:
                self._aliases.begin(found)
                return found
            version = await self._aliases.wait_until_served(found, LONGEST_WAIT)
        assert version is not None
        self._manager.retry(version)
        lease = self._manager.lease(version)
        if not wait:
            needed = asyncio.ensure_future(self._until_loaded(lease))
            self._needed.add(needed)
            needed.add_done_callback(self._needed.discard)
            return version, lease.servable
        try:
            await self._manager.ready(lease, LONGEST_WAIT)
            return version, lease.servable
        finally:
            lease.release()

    async def _until_loaded(self, lease: Lease) -> None:
        """Keeps a lease until the load has ended. A load without one gets no memory of other models."""
        try:
            with suppress(Problem):  # the version's view says why it failed
                await self._manager.ready(lease, LONGEST_WAIT)
        finally:
            lease.release()

    async def unload(
        self, reference: Reference, *, wait: bool = True
    ) -> tuple[Version | None, Servable | None]:
        """Evicts the version of a reference when its leases have ended; the next request loads it again.
        Returns the version (None if the reference points to none) and its servable."""
        version, _ = self._aliases.meant(reference)
        if version is None:
            return None, None
        servable = self._manager.retire(version, "unloaded")
        if servable is not None and wait:
            try:
                async with asyncio.timeout(LONGEST_WAIT):
                    await servable.gone.wait()
            except TimeoutError:
                raise Problem("DEADLINE_EXCEEDED", f"{version} still answers requests") from None
        return version, servable

    async def preload(self) -> None:
        """Loads the versions that readiness waits for."""
        await self._pending.run(self._for_patterns, self.load)

    async def name_unused(self) -> None:
        """Names settings for models that do not exist."""
        await self._pending.unused.run(self._for_patterns)

    async def _for_patterns(self) -> Snapshot:
        """The snapshot for matching patterns: all names of the registry."""
        if not self._registry.partial:
            if not self._watch.seen:
                raise Problem("REGISTRY_UNAVAILABLE", "the registry has not been read yet")
            return self._aliases.snapshot
        try:
            return await self._blocking(self._registry.listing)
        except RegistryError as error:
            raise Problem("REGISTRY_UNAVAILABLE", pathless(str(error))) from None

    async def _blocking(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._io, function)
