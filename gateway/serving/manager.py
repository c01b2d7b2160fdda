"""Holds all servables. Callers share one load. A lease is counted before the first await. The ledger decides
when to free memory.

The manager carries out the decisions of `Ledger.plan` and requests the transitions of servables. It knows
versions, but must not know aliases: an alias reports the version that it serves and the loads that it no
longer wants. Everything runs on the event loop, so there are no locks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gateway.errors import Problem
from gateway.events import Emit, Event, Loaded, LoadFailed, Unloaded, Warned
from gateway.runners.base import FAILURES, Runner
from gateway.serving.failures import Failures, explained
from gateway.serving.governor import Reading
from gateway.serving.ledger import Ledger
from gateway.serving.room import Eviction, Room, Slot
from gateway.serving.servable import Options, Phase, Servable, Status, Step, WithRuntime
from gateway.serving.spares import Spares

if TYPE_CHECKING:
    from gateway.artifacts.packages import Prepared
    from gateway.registries.base import Version

#: Maximum seconds for which a load waits for memory.
CAPACITY_WAIT = 5.0
#: Maximum seconds for which a load may continue after the gateway is told to stop.
STOP_GRACE = 5.0


@dataclass(slots=True, eq=False)
class Lease:
    """The right to use a servable. A servable with a lease is never closed. A lease that pins also keeps it
    open for new requests: it does not drain to make room for others."""

    servable: Servable
    _manager: Manager
    _pins: bool = False

    def release(self) -> None:
        """Returns the lease. Call exactly once."""
        self._manager._release(self.servable, self._pins)


class Manager:
    """`prepare`, `with_runtime`, `open_runner` and `options` make a running model from a version.
    `dispatched(name, rows)` is called for each call of a model. `capacity_wait`: the seconds that a load
    waits for memory. `traced` is called for each load that has ended, in the context of its request."""

    def __init__(
        self,
        ledger: Ledger[Servable],
        *,
        prepare: Callable[[Version], Awaitable[Prepared]],
        open_runner: Callable[[Prepared], Runner],
        with_runtime: WithRuntime | None = None,
        options: Callable[[str], Options] = lambda name: Options(),
        measured: Callable[[Prepared, int | None, float], None] = lambda *load: None,
        emit: Emit = lambda event: None,
        dispatched: Callable[[str, int], None] = lambda model, rows: None,
        clock: Callable[[], float],
        max_concurrent_loads: int = 2,
        capacity_wait: float = 5.0,
        traced: Callable[[Servable], None] = lambda servable: None,
    ) -> None:
        self.ledger = ledger
        self._traced = traced
        self._prepare = prepare
        self._open_runner = open_runner
        self._with_runtime = with_runtime
        self._options = options
        self._measured = measured
        self._emit = emit
        self._dispatched = dispatched
        self._clock = clock
        self._slots = asyncio.Semaphore(max_concurrent_loads)
        self._servables: dict[Version, Servable] = {}
        self._leaving: set[Servable] = set()
        self._served: set[Version] = set()
        self._loads: dict[Servable, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._failures = Failures(clock)
        self._room = Room(
            ledger,
            clock=clock,
            capacity_wait=capacity_wait,
            evict=lambda servable, why: self._close(servable, "evicted", why),
            drain=lambda version: self.retire(version, "evicted"),
            end=lambda one: one is self.find(one.version) and self.retire(one.version, "unneeded"),
            give_up_spares=lambda: self._spares.give_up(),
        )
        self._spares = Spares(ledger, self._room.carry_out_plan)
        self._load_seconds = 1.0
        self._stop_timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Manager {len(self._servables)} servables, {len(self._leaving)} leaving, {self.ledger!r}>"

    def __iter__(self) -> Iterator[Servable]:
        """Yields every servable, leaving ones first: of two of a version the later one counts."""
        yield from self._leaving
        yield from self._servables.values()

    def __reversed__(self) -> Iterator[Servable]:
        """Yields every servable that does not leave, the newest first."""
        return reversed(self._servables.values())

    def find(self, version: Version) -> Servable | None:
        return self._servables.get(version)

    def is_ready(self, version: Version) -> bool:
        servable = self._servables.get(version)
        return servable is not None and servable.status is Status.READY

    def failure(self, version: Version) -> Problem | None:
        return self._failures.find(version)

    def failures(self) -> list[tuple[Version, Problem]]:
        """The versions that failed lately and are not loaded."""
        return [one for one in self._failures.items() if one[0] not in self._servables]

    def held(self, version: Version) -> list[Servable]:
        """Returns the servables with memory for a version: the leaving ones, and the current one last."""
        held = [servable for servable in self._leaving if servable.version == version]
        return [*held, self._servables[version]] if version in self._servables else held

    def eviction(self, version: Version) -> Eviction | None:
        """Returns the last eviction of a version, or None."""
        return self._room.eviction(version)

    # Leases.

    def lease(
        self, version: Version, prepared: Prepared | None = None, *, pin: bool = False, dry_run: bool = False
    ) -> Lease:
        """Counts the caller at once. Starts the load if none is running, from `prepared` if it is given.
        `pin`: see `Lease`. `dry_run`: a load for dry runs only is not counted, measured or published. Raises
        the Problem of a version that failed and must not be loaded again yet."""
        servable = self._servables.get(version)
        if servable is None:
            servable = self._begin(version, prepared)
            servable.dry_run = dry_run
        elif servable.dry_run and not dry_run:
            servable.dry_run = False
            if servable.announce is not None:
                servable.announce()
        servable.abandoned = False
        self.ledger.lease(servable)
        if pin:
            self.ledger.pin(servable)
        return Lease(servable, self, pin)

    async def ready(self, lease: Lease, timeout: float | None = None) -> Servable:
        """Waits until the leased servable can answer, and returns it. Raises the load's Problem, or
        MODEL_LOADING after `timeout` seconds. The load continues then, and also when a caller leaves, as long
        as there is memory for it."""
        servable = lease.servable
        task = self._loads.get(servable)
        if servable.status is Status.LOADING and task is not None:
            await asyncio.wait({task}, timeout=timeout)
        if servable.problem is not None:
            raise servable.problem.again()
        if servable.status is Status.LOADING:
            raise Problem(
                "MODEL_LOADING",
                f"{servable.version} is still loading",
                retry_after=self.expected_load_seconds(servable),
            )
        return servable

    def expected_load_seconds(self, servable: Servable | None = None) -> float:
        """Returns the seconds of a load, from the last load of these files, else from recent loads."""
        prepared = None if servable is None else servable.prepared
        known = None if prepared is None else prepared.load_seconds
        return max(1.0, self._load_seconds if known is None else known)

    def retry(self, version: Version) -> None:
        """Forgets the failure of a version, because the operator requests another attempt now."""
        self._failures.forget(version)

    def _release(self, servable: Servable, pins: bool) -> None:
        try:
            others_wait = self.ledger.release(servable, self._clock())
        except KeyError:
            return  # the load failed during this lease; its account is gone
        if pins:
            self.ledger.unpin(servable)
        if servable.retiring is not None:
            self._close_if_unused(servable, servable.retiring)
        elif servable.abandoned:
            self._cancel_if_unwanted(servable)
        elif others_wait:
            self._room.carry_out_plan()

    # Loading.

    def check(self, version: Version) -> None:
        """Raises the Problem of a version that failed and must not be loaded again yet."""
        self._failures.check(version)

    def failed(self, version: Version, problem: Problem) -> None:
        """Remembers that a version cannot be loaded: one attempt per pause, not per request."""
        self._failures.remember(version, problem)

    def _begin(self, version: Version, prepared: Prepared | None) -> Servable:
        self.check(version)
        servable = self._servables[version] = Servable(version, self._options(version.name))
        self.ledger.open(servable, self._clock(), version).serving = version in self._served
        task = asyncio.get_running_loop().create_task(self._load(servable, prepared), name=f"load {version}")
        self._loads[servable] = task
        task.add_done_callback(lambda _: self._load_ended(servable))
        return servable

    def _load_ended(self, servable: Servable) -> None:
        """Runs after every load. A load that was cancelled, even before its first step, ends here."""
        del self._loads[servable]
        self._traced(servable)
        if servable.status is not Status.LOADING:
            return
        version, why = servable.version, servable.retiring
        if why is None:
            message = f"{version} was not loaded: the gateway is stopping"
            self._drop(servable, Problem("SHUTTING_DOWN", message, retry_after=1))
        else:
            message = f"{version} was {why} while it was loading; the next request loads it"
            self._drop(servable, Problem("MODEL_LOADING", message, retry_after=1))
            self._say(servable, Unloaded(version.name, version.version, why))
        self._room.carry_out_plan()

    def _say(self, servable: Servable, event: Event) -> None:
        """Publishes an event, except about a load for dry runs only."""
        if not servable.dry_run:
            self._emit(event)

    async def _load(self, servable: Servable, prepared: Prepared | None) -> None:
        version = servable.version
        started = self._clock()
        waited = 0.0

        def dispatched(rows: int) -> None:
            if not servable.dry_run:
                self._dispatched(version.name, rows)

        async def reserve(wanted: int) -> None:
            nonlocal waited
            began = self._clock()
            await self._room.reserve(servable, wanted)
            waited += self._clock() - began

        try:
            await servable.prepare(self._prepare, prepared, self._with_runtime)
            # A slow store must not block other loads: only work on this machine takes a slot.
            async with Slot(self._slots):
                started = servable.began = self._clock()
                measured = await servable.load(reserve, self._open_runner, dispatched)
        except Problem as problem:
            self._fail(servable, problem, self._clock() - started)
            return
        except FAILURES as error:
            during = "on its own example" if servable.phase is Phase.WARMING else "when it was loaded"
            failed = explained(version, during, error, servable.prepared)
            self._fail(servable, failed, self._clock() - started, getattr(error, "trace", ""))
            return
        except Exception as error:
            # A bug here must not leave callers waiting for an ended load.
            unforeseen = Problem("MODEL_UNAVAILABLE", f"{version} cannot be loaded: {type(error).__name__}")
            self._fail(servable, unforeseen, self._clock() - started)
            raise
        seconds = self._clock() - started
        # What loading it again costs. Its wait for memory would make it look costly when memory is short.
        cost = seconds - waited
        self.ledger.loaded(servable, self._clock(), measured, cost)
        if servable.options.pin:
            self.ledger.pin(servable)
        self._failures.forget(version)

        def announce() -> None:
            servable.announce = None
            self._load_seconds += 0.3 * (seconds - self._load_seconds)
            if servable.prepared is not None:
                peak = 0 if servable.runner is None else servable.runner.load_peak
                self._measured(servable.prepared, None if measured is None else max(measured, peak), cost)
            self._emit(Loaded(version.name, version.version, seconds, self.ledger[servable].bytes))
            for warning in servable.warnings:
                self._emit(Warned(version.name, version.version, warning))

        if servable.dry_run:
            servable.announce = announce
        else:
            announce()
        if servable.retiring is not None:
            self._close_if_unused(servable, servable.retiring)
        self._room.carry_out_plan()

    def _fail(self, servable: Servable, problem: Problem, seconds: float, trace: str = "") -> None:
        version = servable.version
        self.failed(version, problem)
        self._drop(servable, problem)
        failed = LoadFailed(version.name, version.version, seconds, problem.code, problem.message, trace)
        self._say(servable, failed)
        self._room.carry_out_plan()

    def _drop(self, servable: Servable, problem: Problem) -> None:
        """Ends a servable that never served. Callers with a lease receive `problem`."""
        servable.fail(problem)
        if self._servables.get(servable.version) is servable:
            del self._servables[servable.version]
        self._leaving.discard(servable)
        self.ledger.drop(servable)
        servable.gone.set()

    # Processes.

    def remeasure(self, shared: int) -> bool:
        """Updates the ledger with the kernel's current values, for every measurable model and for shared
        memory. Returns True if a load was refused since the last call because of shared memory.

        A model that grew evicts others. If no model can be evicted, its account stays below the real value,
        and the governor handles the difference."""
        self.ledger.share(shared)
        for servable in list(self._servables.values()):
            runner = servable.runner
            measured = (
                None if runner is None or servable.status is not Status.READY else runner.measured_bytes
            )
            if measured is None or self._room.waits(servable):
                continue
            self.ledger.shrink(servable, measured)
            if not self.ledger.ask(servable, min(measured, self.ledger.limit)):
                self._room.carry_out_plan()
                if servable in self.ledger and self.ledger.waits(servable):
                    self.ledger.withdraw(servable)
        self._room.carry_out_plan()
        return self._room.was_crowded()

    def tend(self) -> None:
        """Checks the processes of all models. Call about once a second."""
        for servable in self:
            if servable.runner is not None:
                servable.runner.tend()
        self._spares.tend(list(self._servables.values()))

    def ended(self, version: Version, reason: str) -> None:
        """Records why a process of a version ended. The version's view shows it until the next failure."""
        servable = self._servables.get(version)
        if servable is not None:
            servable.recent.ended(reason)

    def stuck(self) -> dict[str, int]:
        """Returns, by model, the number of its versions with a stuck process, zeros included."""
        found: dict[str, int] = {}
        for servable in self:
            is_stuck = servable.runner is not None and servable.runner.stuck is not None
            found[servable.version.name] = found.get(servable.version.name, 0) + is_stuck
        return found

    def readings(self) -> list[Reading]:
        """Returns the recent and the granted memory of every model that runs in processes."""
        found = []
        for servable in self:
            measured = None if servable.runner is None else servable.runner.recent_bytes()
            account = self.ledger.find(servable)
            if measured is not None and account is not None:
                found.append(Reading(servable, measured, account.bytes))
        return found

    def stop(self, key: Hashable, reason: str) -> None:
        """Ends the processes of one of `readings`, like a crash."""
        for servable in list(self):
            if servable is key and servable.runner is not None:
                servable.runner.stop(reason)

    def retire_idle(self) -> None:
        """Unloads models without requests for their `idle_ttl`."""
        now = self._clock()
        for servable in list(self._servables.values()):
            ttl = servable.options.idle_ttl
            if ttl is None or servable.status is not Status.READY:
                continue
            account = self.ledger[servable]
            if not account.leases and now - account.last_used >= ttl:
                self.retire(servable.version, "idle")

    def quarantine(self, version: Version, reason: str) -> None:
        """Quarantines a version that crashes repeatedly: no new load before the longest pause ends."""
        problem = Problem("MODEL_UNAVAILABLE", f"{version} is in quarantine: {reason}")
        self._failures.quarantine(version, problem)
        self.retire(version, "quarantined")

    # Leaving.

    def retire(self, version: Version, reason: str) -> Servable | None:
        """Ends a servable once its leases have ended, or its load at once. A new request loads it again.
        Returns the servable, whose `gone` is set when its memory is free, or None if there is none."""
        servable = self._servables.pop(version, None)
        if servable is None:
            return None
        servable.retiring = reason
        self._leaving.add(servable)
        self.ledger[servable].draining = True
        if servable.status is Status.LOADING:
            self._loads[servable].cancel()
        else:
            servable.move(Step.RETIRE)
            self._close_if_unused(servable, reason)
        return servable

    def abandon(self, version: Version) -> None:
        """Marks a version that no alias wants any more. A running load ends as soon as no request waits for
        it. A loaded version stays."""
        servable = self._servables.get(version)
        if servable is not None and servable.status is Status.LOADING:
            servable.abandoned = True
            self._cancel_if_unwanted(servable)

    def _cancel_if_unwanted(self, servable: Servable) -> None:
        if servable.status is not Status.LOADING:
            servable.abandoned = False
        elif not self.ledger[servable].leases:
            self.retire(servable.version, "superseded")

    def serves(self, version: Version, serving: bool) -> None:
        """Records whether an alias serves this version, loaded or not. An unwanted load does not evict it."""
        (self._served.add if serving else self._served.discard)(version)
        if (servable := self._servables.get(version)) is not None:
            self.ledger[servable].serving = serving
            if serving:
                servable.give_way(False)

    def retire_unused(self, version: Version, reason: str) -> None:
        """Unloads a version if it is not in use."""
        servable = self._servables.get(version)
        if servable is not None and not self.ledger[servable].leases:
            self.retire(version, reason)

    def linger(self, version: Version, lingering: bool) -> None:
        """Marks a replaced version as the first victim under memory pressure, or removes the mark."""
        servable = self._servables.get(version)
        if servable is not None:
            self.ledger[servable].lingering = lingering

    def _close_if_unused(self, servable: Servable, reason: str) -> None:
        account = self.ledger[servable]
        if account.leases == 0 and servable.phase in (Phase.SERVING, Phase.DRAINING):
            self._close(servable, reason)

    def _close(self, servable: Servable, reason: str, why: str = "") -> None:
        if self._servables.get(servable.version) is servable:
            del self._servables[servable.version]
        self._leaving.add(servable)
        servable.move(Step.CLOSE)
        servable.retiring = None
        self.ledger.begin_close(servable)
        version, eviction = servable.version, self._room.eviction(servable.version)
        unloaded = Unloaded(version.name, version.version, reason, why)
        if reason == "evicted" and eviction is not None:
            idle = self._clock() - self.ledger[servable].last_used
            unloaded = replace(unloaded, idle=idle, asking=eviction.model)
        task = asyncio.get_running_loop().create_task(self._finish_close(servable, unloaded))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _finish_close(self, servable: Servable, unloaded: Unloaded) -> None:
        try:
            await servable.close()
        finally:
            self._leaving.discard(servable)
            self.ledger.closed(servable)
            servable.gone.set()
            self._say(servable, unloaded)
            self._room.carry_out_plan()

    def stop_loading(self) -> None:
        """Prepares the gateway's stop: cancels loads that take more than `STOP_GRACE` seconds, and tells
        their callers to try another replica."""
        if self._stop_timer is None and self._loads:
            self._stop_timer = asyncio.get_running_loop().call_later(STOP_GRACE, self._cancel_loads)

    def _cancel_loads(self) -> None:
        for task in list(self._loads.values()):
            task.cancel()

    async def close(self) -> None:
        """Cancels loads and closes everything; requests in flight should have ended."""
        self._room.close()
        if self._stop_timer is not None:
            self._stop_timer.cancel()
        self._cancel_loads()
        if self._loads:
            await asyncio.wait(list(self._loads.values()))
        for servable in [*self._servables.values(), *self._leaving]:
            if servable in self.ledger:
                self._close_if_unused(servable, "shutdown")
        await self._spares.close()
        if self._closing:
            await asyncio.wait(set(self._closing))
