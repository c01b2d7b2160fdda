"""The composition root: builds every part of a gateway from its settings, starts and stops them in order.

`Gateway` is all that lives on one event loop; sockets, signals and the process are `gateway.server`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from functools import partial

from gateway import cgroup, environments, events, logs, spans
from gateway.access import Access
from gateway.artifacts.cache import Artifacts
from gateway.artifacts.packages import Packages, formats
from gateway.artifacts.sources import sources_for
from gateway.capture.recorder import Recorder
from gateway.capture.store import CaptureStore
from gateway.environments.choose import Chooser
from gateway.gauges import expose
from gateway.http.connections import Connections
from gateway.http.parts import Parts
from gateway.metrics import Metrics, count
from gateway.names import parse_short
from gateway.notify import Notifier
from gateway.otlpmetrics import OtlpMetrics
from gateway.peers import Peers
from gateway.persistence import Persistence
from gateway.pools import Pools
from gateway.registries.base import Registry
from gateway.registries.feedback import Feedback
from gateway.registries.first_read import first_read
from gateway.registries.listed import ListedModels, Subset
from gateway.registries.watcher import Watch
from gateway.rollouts.aliases import Aliases
from gateway.rollouts.gates import Gates
from gateway.rollouts.policy import policy_of
from gateway.rollouts.preload import LISTING_INTERVAL, LOOK_AGAIN, Preload
from gateway.rollouts.promotions import Promotions
from gateway.rollouts.replay import Replays
from gateway.rollouts.residency import Residency
from gateway.runners.packs import Packs
from gateway.runners.placement import Placement
from gateway.runners.zygote import Zygotes
from gateway.service import Service
from gateway.serving.eviction import MIN_RESIDENCY, POLICIES
from gateway.serving.governor import Governor
from gateway.serving.ledger import Ledger
from gateway.serving.manager import CAPACITY_WAIT, Manager
from gateway.serving.preparation import Preparation
from gateway.serving.servable import Options, Servable
from gateway.serving.warmup import WarmUps
from gateway.settings import Settings
from gateway.upkeep import Background, Upkeep
from gateway.usage import Usage
from gateway.views import Views

log = logging.getLogger("gateway")


class Gateway:
    """All live state of one gateway. Made on a running event loop; `start` reads the registry."""

    def __init__(self, settings: Settings, registry: Registry) -> None:
        self.settings = settings
        self.registry = registry
        self.draining = self._refusing = False
        self._pools = Pools()
        self.access = Access(settings, self._pools.disk)
        self.metrics = Metrics()
        io = self._pools.registry
        self._persistence = Persistence(settings.state_dir, registry, pack_bytes=settings.pack_bytes)
        self._feedback = Feedback(
            registry, io, take=lambda snapshot: self.watch.take(snapshot, "registry"),
            status=settings.mlflow_status,
        )  # fmt: skip
        sources = sources_for(registry.target, settings.artifact_sources, [settings.registry])
        self.environments = environments.store(settings)
        self._artifacts = Artifacts(settings.cache_dir, settings.disk_limit, sources, self.environments)
        chooser = Chooser(settings, self.environments, self._pools.builds, trim=self._artifacts.trim)
        self._packages = Packages(
            self._artifacts, self._pools.fetches, self._pools.disk, policy=formats(settings),
            measured=self._persistence.measurement, accepted=self._persistence.accepted,
            scanned=self._persistence.scanned, remembered=self._persistence.digest,
            remember=self._persistence.save_digest, lasting=registry.lasting, examine=chooser.examine,
        )  # fmt: skip
        self._preparation = Preparation(
            chooser,
            lambda version: self._persistence.served_before(version, self.aliases.snapshot),
            # Hints reach clients, who must not see a path of this machine.
            (lambda version: "DIRECTORY") if isinstance(registry, ListedModels) else None,
        )
        self.spans = spans.begin(os.environ)
        traced = self.spans is not None
        self._zygotes = Zygotes(sink=lambda line: log.info("zygote: %s", line), timed=traced)
        self._packs = Packs(self._zygotes)
        self._placement = Placement(
            settings, self._zygotes, lambda *news: self._upkeep.observe(*news), packs=self._packs,
            teams=self.access.teams_of,
        )  # fmt: skip
        self.ledger: Ledger[Servable] = Ledger(
            settings.memory_limit, policy=POLICIES[settings.eviction], min_residency=MIN_RESIDENCY
        )
        self.manager = Manager(
            self.ledger,
            prepare=self._packages.get, open_runner=self._placement.open,
            with_runtime=self._preparation.with_runtime,
            options=partial(Options.of, settings, traced=traced, warm_ups=WarmUps(self._pools.disk)),
            measured=self._persistence.save_measurement, emit=self._emit, dispatched=self.metrics.batch,
            clock=time.monotonic, max_concurrent_loads=settings.max_concurrent_loads,
            capacity_wait=min(CAPACITY_WAIT, settings.cold_wait),
            **({} if self.spans is None else {"traced": self.spans.load}),
        )  # fmt: skip
        gates = Gates(
            self.manager, prepare=self._packages.get, policy=lambda model: policy_of(settings, model)
        )
        self.recorder = Recorder(
            CaptureStore(settings.state_dir, registry.identity), settings.state_dir, self._pools.disk,
            capture=settings.capture_of, counted=self.metrics.captured,
        )  # fmt: skip
        self.aliases = Aliases(
            self.manager,
            gates,
            memory=self._persistence.aliases,
            default_alias=settings.default_alias,
            max_waiting=settings.max_queue,
            emit=self._emit,
            found_out=self._feedback.record,
            counted=self.metrics.rollout_request,
            grace=lambda name: (settings.for_model(name).rollout or settings.rollout).grace,
            replays=Replays(self.recorder.store, self.manager, self._pools.disk, captured=settings.captures),
        )
        self.watch = Watch(
            registry, io, interval=settings.poll_interval or registry.poll_interval, apply=self.aliases.apply,
            remember=self._persistence.save_snapshot, in_use=self.aliases.names_in_use, forget=self._forget,
            emit=self._emit,
        )  # fmt: skip
        default_model = settings.default_model
        self.service = Service(
            self.aliases, self.manager, cold_wait=settings.cold_wait, emit=self._emit,
            default_model=None if default_model is None else parse_short(default_model),
            stopping=lambda: self._refusing, find=self.watch.find, recorder=self.recorder,
        )  # fmt: skip
        self.promotions = Promotions(
            self.aliases, self.manager, registry, io, ask=self.watch.ask, take=self.watch.take,
            quiet=lambda version: self._packages.get(version, remember=False),
        )  # fmt: skip
        # Peers pass on only those verdicts that the registry cannot hold.
        self.peers = Peers.of(
            settings, io, say=lambda: self.aliases.standings(verdicts=not registry.writable),
            hear=self.aliases.hear,
        )  # fmt: skip
        again = LISTING_INTERVAL if registry.partial else LOOK_AGAIN
        named = () if registry.partial or isinstance(registry, ListedModels | Subset) else settings.models
        preload = Preload.parsed(settings.preload, settings.default_alias, again=again, named=named)
        self.residency = Residency(self.aliases, self.manager, self.watch, registry, io, pending=preload)
        self.views = Views(
            self.aliases, self.manager, self.watch, registry, io, trials=self.promotions.trials,
            prepare=self._packages.get, fetching=self._packages.fetching, preload=preload, peers=self.peers,
        )  # fmt: skip
        self.connections = Connections(settings.max_connections)
        self.usage = Usage(self.manager, self.metrics, self._persistence.usage)
        self.parts = Parts.of(
            settings, self.service, self.views, self.promotions, self.residency, self.watch, self.metrics,
            self.recorder, access=self.access, usage=self.usage, peers=self.peers, spans=self.spans,
            draining=lambda: self.draining,
        )  # fmt: skip
        self._governor = Governor(
            cgroup.memory_usage,
            self._zygotes.read_memory,
            self.manager.readings,
            self.manager.stop,
            report=lambda text: self._emit(events.MemoryShort(text)),
        )
        self._upkeep = Upkeep(self.manager, self._zygotes, self._packs, self._artifacts, io, self._emit)
        self._notifier = Notifier(
            settings.notify, self._persistence.outbox, self._persistence.writer, self._pools.disk,
            counted=self.metrics.notified,
        )  # fmt: skip
        self._listeners: tuple[events.Emit, ...] = (
            partial(count, self.metrics),
            self.parts.feed.publish,
            self._feedback.notice,
            logs.EventLog(),
            self._upkeep.notice,
            self.aliases.notice,
            self._notifier.notice,
            *([] if self.peers is None else [self.peers.notice]),
        )
        self._background = Background()
        expose(self.metrics, self.manager, self.views, self.watch, self.connections, self._upkeep, self.peers)

    async def start(self) -> None:
        """Reads the registry, or its remembered content, and starts the background work. Raises RegistryError
        as `first_read` does."""
        loop = asyncio.get_running_loop()
        remembered = partial(loop.run_in_executor, self._pools.registry, self._persistence.last_snapshot)
        await first_read(self.registry, self.watch, remembered)
        self.metrics.vitals.start(loop)
        if self.peers is not None:
            self._background.start(peers=self.peers.run)
            await self.peers.meet()
        self._background.start(
            watch=self.watch.run,
            preload=self.residency.preload,
            unused=self.residency.name_unused,
            upkeep=self._upkeep.run,
            governor=self._governor.run,
            capture=self.recorder.run,
            access=self.access.run,
            usage=self.usage.run,
            notify=self._notifier.run,
            otlp=OtlpMetrics(self.metrics, os.environ).run,
        )

    def refuse(self) -> None:
        """No new work from now on."""
        self.draining = self._refusing = True
        self.manager.stop_loading()

    async def stop(self) -> None:
        """Ends everything; requests in flight should have ended."""
        self.refuse()
        self._upkeep.close()
        self.metrics.vitals.stop()
        await self._background.stop()
        await self.usage.close()
        await self.parts.large_bodies.close()
        await self.aliases.close()
        await self.manager.close()
        await self._packs.close()
        await self._zygotes.close()
        await self.recorder.close()
        await self._persistence.close()
        if self.spans is not None:
            await self.spans.close()
        await asyncio.to_thread(self.access.audit.close)
        self.registry.close()
        self._pools.close()

    def _emit(self, event: events.Event) -> None:
        """Passes an event to metrics, event stream, registry, log and upkeep."""
        for listener in self._listeners:
            listener(event)

    def _forget(self, names: set[str]) -> None:
        self.aliases.forget(names)
        self._feedback.forget(names)
