"""The composition root: builds every part of a gateway from its settings, starts and stops them in order.

`Gateway` is everything that lives on one event loop. Sockets, signals and the process are the
affair of `gateway.server`.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from gateway import cgroup, environments, events, logs
from gateway.artifacts.cache import ArtifactError, Artifacts
from gateway.artifacts.packages import Packages, Prepared, formats
from gateway.artifacts.sources import sources_for
from gateway.environments.choose import Chooser
from gateway.http.auth import Access, control_key
from gateway.http.connections import Connections, descriptors
from gateway.http.feed import Feed
from gateway.http.large import LargeBodies
from gateway.http.parts import Parts
from gateway.metrics import Metrics
from gateway.names import parse_short
from gateway.registries.base import (
    Entries,
    Finding,
    Registry,
    RegistryError,
    RegistryMissing,
    RegistryUnavailable,
    Snapshot,
    Version,
)
from gateway.registries.watcher import Watch
from gateway.rollouts.aliases import Aliases
from gateway.rollouts.gates import Gates
from gateway.rollouts.operations import Operations
from gateway.rollouts.policy import policy_of
from gateway.rollouts.preload import Preload
from gateway.rollouts.promotions import Promotions
from gateway.runners.inline import settle_heap
from gateway.runners.packs import Packs
from gateway.runners.placement import Placement
from gateway.runners.zygote import Zygotes
from gateway.service import Service
from gateway.serving.eviction import POLICIES
from gateway.serving.governor import Governor
from gateway.serving.ledger import Ledger
from gateway.serving.manager import Manager
from gateway.serving.preparation import Preparation
from gateway.serving.servable import Options, Servable
from gateway.state import AliasMemory, State
from loaders import scan

if TYPE_CHECKING:
    from gateway.settings import Settings
    from loaders.package import Package

log = logging.getLogger("gateway")

#: A model younger than this, in seconds, is not evicted: loading it anew at once would serve nobody.
MIN_RESIDENCY = 0.1
CAPACITY_WAIT = 5.0
IO_THREADS = 8
FETCH_THREADS = 4
DISK_THREADS = 4
BUILD_THREADS = 4
IO_THREAD = "io"
MEASURE_INTERVAL = 1.0
#: How long after a load the heap is settled, and how long it is then left alone, in seconds.
SETTLE_AFTER, SETTLE_INTERVAL = 1.0, 60.0
#: The disk is looked at once in so many of them.
DISK_INTERVAL = 10
#: How long the start waits for the registry's first answer, in seconds, before it goes on without.
FIRST_READ = 2.0


class Gateway:
    """All live state of one gateway. Made on a running event loop; `start` reads the registry."""

    def __init__(self, settings: Settings, registry: Registry) -> None:
        self.settings = settings
        self.registry = registry
        self.draining = False
        self._refusing = False
        self._disk_bytes = 0
        self._settling: asyncio.TimerHandle | None = None
        self._settled_at = -SETTLE_INTERVAL
        self._unconfined: set[str] = set()
        self.access = Access(settings.admin_key_file or control_key(settings.state_dir))
        self.metrics = Metrics()
        self.feed = Feed()
        self._say = logs.EventLog()
        self._io = ThreadPoolExecutor(IO_THREADS, thread_name_prefix=IO_THREAD)
        # Downloads may take long or hang: they must not stand in the way of the registry, or of what is here.
        self._fetches = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix=IO_THREAD)
        self._disk = ThreadPoolExecutor(DISK_THREADS, thread_name_prefix=IO_THREAD)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="state")
        self._state = State(settings.state_dir)
        self._told: dict[tuple[str, str], tuple[str, str]] = {}
        sources = sources_for(registry.target, settings.artifact_sources, [settings.registry])
        self._artifacts = Artifacts(settings.cache_dir, settings.disk_limit, sources)
        self._builds = ThreadPoolExecutor(BUILD_THREADS, thread_name_prefix=IO_THREAD)
        self.environments = environments.store(settings)
        chooser = Chooser(settings, self.environments, self._builds)
        self._packages = Packages(
            self._artifacts,
            self._fetches,
            self._disk,
            policy=formats(settings),
            measured=self._measurement,
            scanned=self._scanned,
            remembered=self._earlier_digest,
            remember=self._remember_digest,
            lasting=registry.lasting,
            examine=chooser.examine,
        )
        self._preparation = Preparation(chooser, self._served_before)
        self._zygotes = Zygotes(sink=lambda line: log.info("zygote: %s", line))
        self._packs = Packs(self._zygotes)
        self._placement = Placement(settings, self._zygotes, self._observe, packs=self._packs)
        self.ledger: Ledger[Servable] = Ledger(
            settings.memory_limit, policy=POLICIES[settings.eviction], min_residency=MIN_RESIDENCY
        )
        self.manager = Manager(
            self.ledger,
            prepare=self._packages.get,
            open_runner=self._placement.open,
            settle=self._preparation.settle,
            options=lambda name: Options.of(settings, name),
            measured=self._remember_measurement,
            emit=self._emit,
            clock=time.monotonic,
            max_concurrent_loads=settings.max_concurrent_loads,
            capacity_wait=min(CAPACITY_WAIT, settings.cold_wait),
        )
        self._memory = AliasMemory(self._state, registry.identity, self._write_behind)
        gates = Gates(
            self.manager, prepare=self._packages.get, policy=lambda model: policy_of(settings, model)
        )
        self.aliases = Aliases(
            self.manager,
            gates,
            memory=self._memory,
            default_alias=settings.default_alias,
            max_waiting=settings.max_queue,
            emit=self._emit,
            found_out=self._record,
            counted=self.metrics.rollout_request,
            grace=lambda name: (settings.for_model(name).rollout or settings.rollout).grace,
        )
        self.watch = Watch(
            registry,
            self._io,
            interval=settings.poll_interval or registry.poll_interval,
            apply=self.aliases.apply,
            remember=self._remember_snapshot,
            in_use=self._in_use,
            forget=self._forget,
            emit=self._emit,
        )
        default_model = settings.default_model
        self.service = Service(
            self.aliases,
            self.manager,
            default_model=None if default_model is None else parse_short(default_model),
            cold_wait=settings.cold_wait,
            emit=self._emit,
            stopping=lambda: self._refusing,
            find=self.watch.find,
        )
        self.promotions = Promotions(
            self.aliases,
            self.manager,
            registry,
            self._io,
            ask=self.watch.ask,
            take=self.watch.take,
            quiet=lambda version: self._packages.get(version, remember=False),
        )
        self.operations = Operations(
            self.aliases,
            self.manager,
            self.promotions,
            self.watch,
            registry,
            self._io,
            prepare=self._packages.get,
            fetching=self._packages.fetching,
            preload=Preload.parsed(settings.preload, settings.default_alias),
        )
        self.connections = Connections(settings.max_connections)
        self.large_bodies = LargeBodies(settings.max_inflight_bytes)
        self._governor = Governor(
            cgroup.memory_usage,
            self.manager.readings,
            self.manager.stop,
            report=lambda text: self._emit(events.MemoryShort(text)),
        )
        self._tasks: list[asyncio.Task[Any]] = []
        self._expose()

    @property
    def parts(self) -> Parts:
        """What the HTTP layer is built from."""
        return Parts(
            self.service,
            self.operations,
            self.access,
            self.metrics,
            self.settings,
            self.large_bodies,
            lambda: self.draining,
            self.feed,
        )

    async def start(self) -> None:
        """Reads the registry, or takes what it said last, and begins to follow it. A registry that does not
        answer now is asked again and again; the gateway is not ready meanwhile. Raises RegistryError for one
        that cannot be used: a file that does not exist, a document that is not valid."""
        remembered = None
        if self.registry.partial:
            remembered = await self._blocking(lambda: self._state.snapshot(self.registry.identity))
            if remembered is not None:
                self.registry.resume(Snapshot(Entries(remembered.entries), remembered.stamp))
        looking = self.watch.looking(quiet=True)
        await asyncio.wait({looking}, timeout=FIRST_READ)
        if not self.watch.seen:
            if remembered is None:
                remembered = await self._blocking(lambda: self._state.snapshot(self.registry.identity))
            failure = self.watch.failure
            if remembered is not None:
                age = time.time() - remembered.seen
                why = failure or f"no answer within {FIRST_READ:.0f} s"
                log.warning("the registry cannot be read (%s): using its content of %.0f s ago", why, age)
                last = Snapshot(Entries(remembered.entries), remembered.stamp)
                self.watch.take(last, "registry", age=age)
            elif failure is not None and (
                isinstance(failure, RegistryMissing) or not isinstance(failure, RegistryUnavailable)
            ):
                raise failure
            else:
                why = failure or f"no answer within {FIRST_READ:.0f} s"
                log.error("the registry cannot be read (%s): not ready until it can; asking again", why)
        loop = asyncio.get_running_loop()
        # Large bodies are parsed, enforced and encoded in a thread, one at a time: each holds the interpreter
        # for long, and several together would leave the loop no turn.
        loop.set_default_executor(ThreadPoolExecutor(1, thread_name_prefix="large"))
        self.metrics.lag.start(loop)
        for name, work in {
            "watch": self.watch.run,
            "preload": self.operations.preloading,
            "measure": self._measure,
            "governor": self._governor.run,
        }.items():
            self._tasks.append(loop.create_task(_kept_going(name, work), name=name))

    def refuse(self) -> None:
        """No new work from now on."""
        self.draining = self._refusing = True
        self.manager.stop_loading()

    async def stop(self) -> None:
        """Ends everything; requests in flight should have ended."""
        self.refuse()
        if self._settling is not None:
            self._settling.cancel()
        self.metrics.lag.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.large_bodies.close()
        await self.aliases.close()
        await self.manager.close()
        await self._packs.close()
        await self._zygotes.close()
        await asyncio.to_thread(self._writer.shutdown)
        self._state.close()
        self.registry.close()
        self._io.shutdown(wait=False, cancel_futures=True)
        self._fetches.shutdown(wait=False, cancel_futures=True)
        self._disk.shutdown(wait=False, cancel_futures=True)
        self._builds.shutdown(wait=False, cancel_futures=True)

    # How a version becomes something that runs.

    async def _measure(self) -> None:
        while True:
            self._disk_bytes = await self._blocking(self._artifacts.bytes)
            for _ in range(DISK_INTERVAL):
                await asyncio.sleep(MEASURE_INTERVAL)
                self._packs.tend()
                self.manager.remeasure(self._zygotes.bytes + self._packs.overhead)
                self.manager.retire_idle()
                self.manager.tend()
                self._zygotes.tend_orphans()

    def _observe(self, prepared: Prepared, what: str, reason: str) -> None:
        """What happened to a version's processes."""
        version = prepared.version
        if what in ("stuck", "moving"):
            self._emit(events.Stuck(version.name, version.version, reason))
        elif what == "restarted":
            self._emit(events.Restarted(version.name, version.version))
        else:
            self._emit(events.Crashed(version.name, version.version, what, reason))
        if what == "quarantined":
            self.manager.quarantine(version, reason)

    # What is remembered, behind the back of the loop.

    def _write_behind(self, write: Callable[[], None]) -> None:
        def attempt() -> None:
            try:
                write()
            except sqlite3.Error as error:
                # The state makes a restart better; a full disk must not stop serving.
                log.error("the state could not be written: %s", error)
            except Exception:
                log.exception("the state could not be written")

        self._writer.submit(attempt)

    def _remember_snapshot(self, snapshot: Snapshot) -> None:
        identity = self.registry.identity
        self._write_behind(lambda: self._state.save_snapshot(identity, snapshot.stamp, snapshot.entries()))

    def _in_use(self) -> set[str]:
        return {servable.version.name for servable in self.manager} | self.aliases.busy()

    def _forget(self, names: set[str]) -> None:
        self.aliases.forget(names)
        self._told = {alias: told for alias, told in self._told.items() if alias[0] not in names}

    def _served_before(self, version: Version) -> bool:
        """Known from the state, or as the last good one of the registry."""
        if self._memory.served(version.name, version.version):
            return True
        model = self.aliases.snapshot.models.get(version.name)
        return model is not None and any(a.last_good == version.version for a in model.aliases.values())

    def _measurement(self, digest: str) -> tuple[int | None, float] | None:
        try:
            return self._state.measurement(digest)
        except sqlite3.Error:
            log.exception("the state could not be read")
            return None  # an estimate does, until the kernel says

    def _scanned(self, digest: str, package: Package) -> scan.Verdict:
        """What its files execute, from the state where they were scanned before."""
        try:
            known = self._state.scan(digest, scan.EDITION)
        except sqlite3.Error:
            log.exception("the state could not be read")
            known = None
        if known is not None:
            return scan.Verdict(*known)
        found = scan.package(package, self.settings.pack_bytes)
        self._write_behind(lambda: self._state.save_scan(digest, scan.EDITION, found.harmless, found.reason))
        return found

    def _tell_owner(self, event: events.Event) -> None:
        """Writes into the registry that a version was refused, and once it serves after all. Each said once:
        a refusal is tried again and again."""
        if not self.settings.mlflow_status:
            return
        record = self.registry.record_status
        match event:
            case events.SwapRefused(name, alias, version, reason):
                if self._told.get((name, alias)) != (version, reason):
                    self._told[name, alias] = (version, reason)
                    self._io.submit(record, name, alias, version, f"refused: {reason}")
            case events.RolloutChanged(name, alias, version, _, phase, why) if phase in (
                "rolled_back",
                "aborted",
            ):
                self._told[name, alias] = (version, why or "")
                self._io.submit(record, name, alias, version, f"rolled back: {why}")
            case events.Swapped(name, alias, version):
                told = self._told.pop((name, alias), None)
                if told is not None and told[0] == version:
                    self._io.submit(record, name, alias, version, "serving")
            case _:
                pass

    def _record(self, finding: Finding) -> None:
        """Writes into the registry what every gateway should know. A registry that cannot be written, or does
        not answer now, is no reason to stop: this gateway knows it."""

        def record() -> None:
            try:
                snapshot = self.registry.record(finding)
            except RegistryError as error:
                log.warning("%s@%s: not written to the registry: %s", finding.name, finding.alias, error)
            else:
                if snapshot is not None:
                    loop.call_soon_threadsafe(self.watch.take, snapshot, "registry")

        loop = asyncio.get_running_loop()
        self._io.submit(copy_context().run, record)

    def _earlier_digest(self, version: Version) -> str | None:
        """What its files were at their first fetch, of a registry whose versions never change; at their last,
        of another."""
        try:
            return self._state.digest(self.registry.identity, version.name, version.version, version.source)
        except sqlite3.Error as error:
            # Not to be passed over: what was fetched first is what the others must match.
            raise ArtifactError("the gateway's state could not be read", str(error)) from error

    def _remember_digest(self, version: Version, digest: str) -> None:
        identity, first = self.registry.identity, self.registry.lasting
        self._write_behind(
            lambda: self._state.save_digest(
                identity, version.name, version.version, version.source, digest, first=first
            )
        )
        self.registry.record_digest(version, digest)

    def _remember_measurement(self, prepared: Prepared, size: int | None, seconds: float) -> None:
        self._write_behind(lambda: self._state.save_measurement(prepared.digest, size, seconds))

    async def _blocking(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._io, function)

    # What happened, counted and said.

    def _emit(self, event: events.Event) -> None:
        count(self.metrics, event)
        self.feed.publish(event)
        self._tell_owner(event)
        self._say(event)
        if isinstance(event, events.Loaded):
            self._say_what_is_not_confined(event)
            self._settle_heap_soon()

    def _settle_heap_soon(self) -> None:
        """What a model brought into this process stays until it is unloaded: the collector need not walk it
        again and again while requests wait. Telling it so takes a full collection first, so it is done a
        moment after a load, and rarely."""
        if self._settling is None:
            wait = max(SETTLE_AFTER, self._settled_at + SETTLE_INTERVAL - time.monotonic())
            self._settling = asyncio.get_running_loop().call_later(wait, self._settle_heap)

    def _settle_heap(self) -> None:
        self._settling = None
        self._settled_at = time.monotonic()
        asyncio.get_running_loop().run_in_executor(None, settle_heap)

    def _say_what_is_not_confined(self, event: events.Loaded) -> None:
        """Once for each measure that the kernel, or the place of the files, does not allow."""
        for servable in self.manager:
            if (servable.version.name, servable.version.version) != (event.model, event.version):
                continue
            status = {} if servable.runner is None else servable.runner.status()
            for measure, held in status.get("confinement", {}).items():
                chosen = held.startswith("not changed") and not held.startswith("not changed: another user")
                lacking = held.startswith("not ") and not chosen
                if lacking and measure not in self._unconfined:
                    self._unconfined.add(measure)
                    log.warning("models are confined less than they could be: %s: %s", measure, held)

    def _expose(self) -> None:
        self.metrics.watch(
            memory=self.operations.memory,
            models=lambda: {
                (s.version.name, s.version.version): self.ledger[s].bytes
                for s in self.manager
                if s in self.ledger
            },
            mismatches=lambda: [
                (s.version.name, s.version.version)
                for s in self.manager
                if s.mismatch is not None and s in self.ledger
            ],
            queue=self._queues,
            aliases=self.operations.alias_states,
            rollouts=self.operations.rollout_phases,
            stuck=self.manager.stuck,
            disk=lambda: self._disk_bytes,
            registry_age=self.watch.age,
            connections=lambda: (self.connections.open, self.connections.most),
            descriptors=descriptors,
        )

    def _queues(self) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for servable in self.manager:
            if servable in self.ledger:
                queued, leased = found.get(servable.version.name, (0, 0))
                leases = self.ledger[servable].leases
                found[servable.version.name] = (queued + servable.queued, leased + leases)
        return found


async def _kept_going(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Background work that no bug of its own may end unseen."""
    while True:
        try:
            await work()
        except Exception:
            log.exception("%s failed; it goes on", name)
            await asyncio.sleep(MEASURE_INTERVAL)
        else:
            return


def count(metrics: Metrics, event: events.Event) -> None:
    """Gives an event to the metric that counts it."""
    match event:
        case events.Dispatched():
            metrics.batch(event.model, event.rows)
        case events.Loaded():
            metrics.load(event.model, "success", event.seconds)
        case events.LoadFailed():
            metrics.load(event.model, "failure", event.seconds)
        case events.Unloaded():
            metrics.unload(event.model, event.reason)
            metrics.forget(event.model, event.version)
        case events.Swapped():
            metrics.swap(event.model, event.alias, "success")
        case events.SwapRefused():
            metrics.swap(event.model, event.alias, "refused")
        case events.RolloutChanged() if event.phase in ("rolled_back", "aborted"):
            metrics.swap(event.model, event.alias, "rolled_back")
        case events.AliasDeleted():
            metrics.swap(event.model, event.alias, "deleted")
        case events.Crashed() if event.what in ("crashed", "timeout", "stopped"):
            metrics.crash(event.model)
        case events.InputRefused():
            for problem in event.problems:
                metrics.rejection(problem)
        case events.RegistryFailed():
            metrics.registry_error()
        case events.MemoryShort():
            metrics.memory_short()
        case _:
            pass
