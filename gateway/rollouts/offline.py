"""Promotions without a running gateway: the same parts, built for a single command.

The facts about an alias come from the registry, and from the durable state if this machine has one. Nothing
is served, and the state is only read. Knows settings and how the parts fit together; must not know the
command line.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gateway import environments
from gateway.aliasmemory import AliasMemory
from gateway.artifacts.cache import Artifacts
from gateway.artifacts.packages import Packages, formats
from gateway.artifacts.sources import sources_for
from gateway.capture.store import CaptureStore
from gateway.environments.choose import Chooser
from gateway.names import Reference
from gateway.registries.listed import ListedModels
from gateway.rollouts.aliases import Aliases
from gateway.rollouts.gates import Gates
from gateway.rollouts.policy import policy_of
from gateway.rollouts.promotions import Promotions
from gateway.rollouts.replay import Replays
from gateway.runners.placement import Placement
from gateway.runners.zygote import Zygotes
from gateway.serving.ledger import Ledger
from gateway.serving.manager import Manager
from gateway.serving.preparation import Preparation
from gateway.serving.servable import Options, Servable
from gateway.state import Served, State

if TYPE_CHECKING:
    from gateway.artifacts.packages import Prepared
    from gateway.environments.build import Store
    from gateway.registries.base import Registry, Version
    from gateway.settings import Settings


@dataclass(frozen=True, slots=True)
class Workshop:
    """The parts of a gateway that serve nothing: packages are read, environments built, models loaded and let
    go. `with_runtime` finds the environment of a package, `placement` its process."""

    packages: Packages
    chooser: Chooser
    store: Store
    with_runtime: Callable[..., Awaitable[Prepared]]
    placement: Placement
    manager: Manager
    gates: Gates
    io: ThreadPoolExecutor
    state: State | None


@asynccontextmanager
async def workshop(settings: Settings, registry: Registry) -> AsyncIterator[Workshop]:
    """Put together for a single command."""
    with ThreadPoolExecutor(4) as io:
        state = State(settings.state_dir) if (settings.state_dir / "state.db").is_file() else None
        sources = sources_for(registry.target, settings.artifact_sources, [settings.registry])

        def remembered(version: Version) -> str | None:
            if state is None:
                return None
            return state.digest(registry.identity, version.name, version.version, version.source)

        def remember(version: Version, digest: str) -> None:
            if state is not None:
                name, number = version.name, version.version
                state.save_digest(registry.identity, name, number, version.source, digest)
            registry.record_digest(version, digest)

        store = environments.store(settings)
        artifacts = Artifacts(settings.cache_dir, settings.disk_limit, sources, store)
        chooser = Chooser(settings, store, io, trim=artifacts.trim)
        packages = Packages(
            artifacts,
            io,
            io,
            policy=formats(settings),
            remembered=remembered,
            remember=remember,
            lasting=registry.lasting,
            examine=chooser.examine,
        )
        zygotes = Zygotes()
        placement = Placement(settings, zygotes, lambda prepared, what, reason: None)
        ledger: Ledger[Servable] = Ledger(settings.memory_limit)
        reference = (lambda version: version.source) if isinstance(registry, ListedModels) else None
        with_runtime = Preparation(chooser, reference=reference).with_runtime
        manager = Manager(
            ledger,
            prepare=packages.get,
            open_runner=placement.open,
            with_runtime=with_runtime,
            options=lambda name: Options.of(settings, name),
            clock=time.monotonic,
        )
        gates = Gates(manager, prepare=packages.get, policy=lambda model: policy_of(settings, model))
        try:
            yield Workshop(packages, chooser, store, with_runtime, placement, manager, gates, io, state)
        finally:
            await manager.close()
            await zygotes.close()
            if state is not None:
                state.close()


@asynccontextmanager
async def offline(
    settings: Settings, registry: Registry, told: Callable[[str, float], None] = lambda check, seconds: None
) -> AsyncIterator[Promotions]:
    """Promotions that run their gates in this process. `told` is called for each finished check, with its
    seconds. Raises what the registry raises."""
    async with workshop(settings, registry) as parts:
        memory = (
            _Nothing()
            if parts.state is None
            else AliasMemory(parts.state, registry.identity, lambda write: None)
        )
        store = CaptureStore(settings.state_dir, registry.identity)
        replays = None
        if parts.state is not None:  # for dry runs: the requests that a gateway of this machine has captured
            replays = Replays(store, parts.manager, parts.io, captured=settings.captures)
        aliases = Aliases(
            parts.manager, parts.gates, memory=memory, default_alias=settings.default_alias, replays=replays
        )

        async def ask(reference: Reference) -> None:
            loop = asyncio.get_running_loop()
            aliases.apply(await loop.run_in_executor(parts.io, registry.find, reference))

        try:
            yield Promotions(
                aliases, parts.manager, registry, parts.io, ask=ask, take=lambda snapshot, moved_by: None,
                quiet=lambda version: parts.packages.get(version, remember=False), told=told,
            )  # fmt: skip
        finally:
            await aliases.close()
            store.close()


class _Nothing:
    """The memory of a machine without a state."""

    def last_good(self, name: str, alias: str) -> None:
        return None

    def history(self, name: str, alias: str) -> list[Served]:
        return []

    def save_last_good(self, name: str, alias: str, version: str) -> None: ...

    def rollout(self, name: str, alias: str) -> None:
        return None

    def rollouts(self) -> dict[tuple[str, str], dict[str, Any]]:
        return {}

    def save_rollout(self, name: str, alias: str, course: dict[str, Any] | None) -> None: ...

    def begin_serving(self, name: str, alias: str, served: Served) -> None: ...

    def end_serving(self, name: str, alias: str, ended: float, reason: str) -> None: ...
