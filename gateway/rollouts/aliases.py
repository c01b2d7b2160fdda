"""Aliases: which version the registry wants, which one answers here, which one has proved itself; and the
reconciler that makes them agree.

Three facts, never mixed. *desired* is what the registry says. *serving* is what requests get. *last
good* is the version that has answered last; it survives restarts. One reconciler per alias moves
serving towards desired: a swap, a rollback, an outage and a restart all work this way.

    desired moves ──► generation + 1 ──► gates (fetch, digest, format, signature, load, warm-up)
                                           │ refused: serving stays, error shown, try again later
                                           ▼
                         generation unchanged? ──no──► drop what was loaded, start over
                                           │ yes
                                           ▼
                                   serving = desired        (one assignment)

An alias whose model is not loaded moves lazily: the first request takes it through the same gates. What one
gateway finds out (a refusal, the last good version) is written where the registry can be written, so that
every gateway knows it; `found_out` passes it on.

All of it runs on the event loop. This module knows versions and leases; it must not know HTTP, processes
or files.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from cachetools import LRUCache

from gateway import backoff
from gateway.errors import Problem
from gateway.events import AliasDeleted, Emit, Swapped, SwapRefused
from gateway.names import Reference
from gateway.quantities import utc
from gateway.registries import base
from gateway.registries.base import Finding, Snapshot, Version, find_alias, resolve
from gateway.rollouts import records
from gateway.rollouts.alias import STOPPED, Alias, Attempt, Memory
from gateway.rollouts.conductor import Conductor, TakenBack
from gateway.rollouts.gates import Gates, Passed
from gateway.rollouts.lingering import Lingering
from gateway.rollouts.records import Record
from gateway.serving.manager import Lease, Manager
from gateway.state import HISTORY_KEPT, Served

log = logging.getLogger("gateway.aliases")

#: Refused promotions of aliases that do not exist and deleted aliases: so many are remembered.
ATTEMPTS_KEPT = 1000
#: A load that ended so was stopped from outside: the version was not refused.
_INTERRUPTED = frozenset({"MODEL_LOADING", "SHUTTING_DOWN"})


class Target(NamedTuple):
    """What a reference stands for now. `version` None: the alias must be settled first."""

    version: Version | None
    alias: Alias | None


class Aliases:
    """`gates` decide about versions; `found_out` passes on what every gateway should know; `grace`: seconds
    for which a deleted alias of a model goes on answering; `counted` hears of the arm of each request during
    a rollout."""

    def __init__(
        self,
        manager: Manager,
        gates: Gates,
        *,
        memory: Memory,
        counted: Callable[[str, str, str], None] = lambda name, alias, arm: None,
        clock: Callable[[], float] = time.monotonic,
        default_alias: Sequence[str] = ("champion",),
        max_waiting: int = 1000,
        emit: Emit = lambda event: None,
        found_out: Callable[[Finding], None] = lambda finding: None,
        grace: Callable[[str], float] = lambda name: 0.0,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.gates = gates
        self.conductor = Conductor(
            manager, memory, policy=gates.policy, emit=emit, counted=counted, wall=wall, clock=clock
        )
        self._interrupted = set(self.conductor.under_way())
        self._manager = manager
        self._memory = memory
        self._default_alias = tuple(default_alias)
        self._max_waiting = max_waiting
        self._emit = emit
        self._found_out = found_out
        self._grace = grace
        self._wall = wall
        self._aliases: dict[tuple[str, str], Alias] = {}
        self._snapshot = Snapshot({}, "")
        self._lingering = Lingering(manager, self._in_use)
        self._deleted: dict[tuple[str, str], asyncio.TimerHandle] = {}
        self._attempts: LRUCache[tuple[str, str], Attempt] = LRUCache(ATTEMPTS_KEPT)
        self._chance = random.Random()

    def __iter__(self) -> Iterator[Alias]:
        """The aliases that were used here; the others cost nothing."""
        return iter(self._aliases.values())

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    def find(self, name: str, alias: str) -> Alias | None:
        return self._aliases.get((name, alias))

    def view(self, name: str, alias: str) -> Alias | None:
        """The alias as it stands here, also one that was not used since the start: a copy, which is not
        followed. None where the registry has no such alias."""
        found = self._aliases.get((name, alias))
        model = self._snapshot.models.get(name)
        if found is not None or model is None or alias not in model.aliases:
            return found
        seen = records.seen(model, alias, self._memory, self._wall())
        entry = model.aliases[alias]
        seen.error = records.want(seen, model, entry, self.conductor.verdict(name, alias, entry))
        seen.phase = "unloaded" if seen.error is None else self._stopped(seen)
        return seen

    @staticmethod
    def _stopped(found: Alias) -> str:
        """The phase of an alias whose version is not to serve."""
        return "refused" if found.verdict is None else found.verdict.outcome

    def attempts(self) -> list[Attempt]:
        """What was tried with aliases that do not exist (any more)."""
        return [self._attempts[key] for key in sorted(self._attempts) if self.view(*key) is None]

    def attempt(self, name: str, alias: str) -> Attempt | None:
        return self._attempts.get((name, alias))

    def _entry(self, name: str, alias: str) -> tuple[base.Model | None, base.Alias | None]:
        model = self._snapshot.models.get(name)
        return model, None if model is None else model.aliases.get(alias)

    def record(self, name: str, alias: str, *, again: bool = False) -> Record:
        """See `records.record_of`."""
        model = self._snapshot.models.get(name) or base.Model(name, {}, {})
        history = self._memory.history(name, alias)
        return records.record_of(model, alias, self.view(name, alias), history, again=again)

    def earlier(self, name: str, alias: str) -> str | None:
        """The version that a rollback goes to. Raises NotInRegistry."""
        return records.earlier(find_alias(self._snapshot, name, alias), self._memory.history(name, alias))

    # What a request needs.

    def target(self, reference: Reference) -> Target:
        """What a reference stands for now: a dictionary read on the hot path. Raises Problem 404."""
        if reference.alias is not None:
            found = self.open(reference.name, reference.alias)
        elif reference.version is not None or reference.latest or reference.model_id or reference.run_id:
            return Target(resolve(self._snapshot, reference), None)
        else:
            found = self._open_default(reference.name)
        serving = found.serving
        if serving is not None and (serving is found.desired or self._manager.is_ready(serving)):
            return Target(serving, found)
        return Target(None, found)

    def meant(self, reference: Reference) -> tuple[Version | None, Alias | None]:
        """The version that a reference stands for, loaded or not, and its alias. Raises Problem 404."""
        version, found = self.target(reference)
        return version or (None if found is None else found.serving or found.desired), found

    async def settle(self, found: Alias, timeout: float | None) -> Version:
        """The version that answers for an alias whose model is not loaded: desired if it passes its gates,
        else the one that served before. Raises Problem."""
        attempt = self._start(found)
        if not attempt.done():
            if found.waiting >= self._max_waiting:
                wait = self._manager.expected_load_seconds()
                message = f"{found.name} is loading: its queue is full (max_queue: {self._max_waiting})"
                raise Problem("OVERLOADED", message, retry_after=wait)
            found.waiting += 1
            try:
                await asyncio.wait({attempt}, timeout=timeout)
            finally:
                found.waiting -= 1
        if not attempt.done():
            message = f"{found.name}@{found.alias} is still loading"
            raise Problem("MODEL_LOADING", message, retry_after=self._manager.expected_load_seconds())
        if found.desired is None:
            raise Problem("ALIAS_NOT_FOUND", f"the alias {found.alias} of {found.name} was deleted")
        if found.serving is None and found.refusal is not None and found.refusal.code in _INTERRUPTED:
            raise found.refusal.again()
        if found.serving is None and found.last_good is not None and found.last_good != found.desired:
            self._serve(found, found.last_good, moved_by="fallback")
        if found.serving is not None:
            return found.serving
        if found.refusal is not None and found.refusal.code == "ROLLOUT_REFUSED":
            raise Problem("MODEL_UNAVAILABLE", found.refusal.message, retry_after=backoff.LONGEST)
        if found.refusal is not None:
            raise found.refusal.again()
        raise Problem("MODEL_UNAVAILABLE", f"{found.name}@{found.alias} cannot be served", retry_after=1)

    def begin(self, found: Alias) -> None:
        """Starts what the first request would start, without waiting for it."""
        self._start(found)

    async def served(self, found: Alias, target: Version, timeout: float) -> None:
        """Returns when `target` is the serving version, or its first step begins. Raises Problem if it is
        refused or overtaken, or MODEL_LOADING after `timeout` seconds."""
        while found.serving != target and not found.in_steps:
            if found.desired != target:
                message = (
                    f"{found.name}@{found.alias} was moved to version {_number(found.desired)} meanwhile"
                )
                raise Problem("ROLLOUT_REFUSED", message)
            attempt = self._start(found)
            await asyncio.wait({attempt}, timeout=timeout)
            if not attempt.done():
                raise Problem("MODEL_LOADING", f"{target} is still loading", retry_after=1)
            if found.serving != target and found.desired == target and found.refusal is not None:
                raise Problem("ROLLOUT_REFUSED", found.refusal.message, details=found.refusal.details)

    def answered(self, found: Alias, version: Version) -> None:
        """A version has answered a request: it has proved itself."""
        if found.last_good is not version and found.serving is version:
            found.last_good = version
            self._memory.save_last_good(found.name, found.alias, version.version)
            _, entry = self._entry(found.name, found.alias)
            if entry is not None and entry.last_good not in (None, version.version):
                self._found_out(Finding(found.name, found.alias, version.version, version.version))

    # What the registry says.

    def apply(self, snapshot: Snapshot, moved_by: str = "registry") -> None:
        """Takes a new snapshot: aliases that moved start moving here, those that are gone end."""
        self._snapshot = snapshot
        for found in list(self._aliases.values()):
            self._take(found, moved_by)
        wanted = {version for found in self for version in (found.serving, found.desired, found.last_good)}
        for servable in list(self._manager):
            version = servable.version
            model = snapshot.models.get(version.name)
            registered = None if model is None else model.versions.get(version.version)
            if registered != version and version not in wanted and servable.retiring is None:
                self._manager.retire(version, "removed")
        for name, alias in list(self._interrupted):
            if name in snapshot.models and alias in snapshot.models[name].aliases:
                # What a restart interrupted goes on, whether somebody asks or not.
                self._interrupted.discard((name, alias))
                self._start(self.open(name, alias))

    def open(self, name: str, alias: str, moved_by: str = "registry") -> Alias:
        """The alias, from now on followed; `moved_by` says who made it, if it is new here. Raises
        NotInRegistry."""
        found = self._aliases.get((name, alias))
        if found is None:
            find_alias(self._snapshot, name, alias)
            found = records.seen(self._snapshot.models[name], alias, self._memory, self._wall())
            found.moved_by = moved_by
            self._aliases[name, alias] = found
            self._attempts.pop((name, alias), None)
            self._take(found, "registry")
        return found

    def _open_default(self, name: str) -> Alias:
        for alias in self._default_alias:
            found = self._aliases.get((name, alias))
            if found is not None:
                return found
            model = self._snapshot.models.get(name)
            if model is not None and alias in model.aliases:
                return self.open(name, alias)
        return self.open(name, self._default_alias[0])

    def _take(self, found: Alias, moved_by: str) -> None:
        model, entry = self._entry(found.name, found.alias)
        if model is None or entry is None:
            self._end_after_grace(found, moved_by)
            return
        if (timer := self._deleted.pop((found.name, found.alias), None)) is not None:
            timer.cancel()
            log.info("%s@%s is in the registry again", found.name, found.alias)
            self._show(found, "serving" if found.serving is not None else "unloaded")
        if found.last_good is None and entry.last_good is not None:
            found.last_good = model.versions.get(entry.last_good)
        before = (found.desired, found.forced, found.verdict)
        own = self.conductor.verdict(found.name, found.alias, entry)
        error = records.want(found, model, entry, own)
        if (found.desired, found.forced, found.verdict) == before:
            return
        if before[0] is not None:
            found.generation += 1
            found.moved_by = moved_by
        if found.verdict is None:
            found.refusal = None
        if error is not None and found.serving != found.desired:
            self._show(found, self._stopped(found), error)
        elif found.phase in STOPPED:
            self._show(found, "unloaded" if found.serving is None else "loading")
        self._renew_attempt(found)
        found.moved.set()
        ready = [v is not None and self._manager.is_ready(v) for v in (found.serving, found.goal)]
        if found.task is None and any(ready):
            self._start(found)

    def busy(self) -> set[str]:
        """The names of which a version is on its way, be it loaded yet or not."""
        return {found.name for found in self if found.attempt is not None and not found.attempt.done()}

    def forget(self, names: Collection[str]) -> None:
        """Stops following these names until they are used again. Nothing of them is loaded, and nothing has
        happened to them: their history continues."""
        for found in list(self):
            if found.name in names:
                self._drop(found)

    def _drop(self, found: Alias) -> None:
        del self._aliases[found.name, found.alias]
        found.generation += 1
        found.desired = None
        if found.serving is not None and not any(found.serving == other.serving for other in self):
            self._manager.serves(found.serving, False)
        found.moved.set()  # its reconciler ends

    def _end_after_grace(self, found: Alias, moved_by: str) -> None:
        """The registry has no such alias any more: it ends here now, or after the grace period."""
        key = (found.name, found.alias)
        if key in self._deleted:
            return
        grace = 0.0 if moved_by == "delete" or found.serving is None else self._grace(found.name)
        what = "model" if found.name not in self._snapshot.models else "alias"
        message = f"the {what} is no longer in the registry"
        self._emit(AliasDeleted(found.name, found.alias, _number(found.serving), message, grace))
        if found.rollout is not None:  # what serves goes on; nothing replaces it any more
            found.generation += 1
            found.desired = found.serving
            found.moved.set()
        if grace:
            self._show(found, "deleted", f"{message}; it answers for up to {grace:.0f} s more")
            loop = asyncio.get_running_loop()
            self._deleted[key] = loop.call_later(grace, self._end, found, message)
        else:
            self._end(found, message)

    def _end(self, found: Alias, message: str) -> None:
        key = (found.name, found.alias)
        self._deleted.pop(key, None)
        self._drop(found)
        self._attempts[key] = Attempt(*key, None, "deleted", message, self._wall())
        if found.serving is not None:
            self._memory.end_serving(found.name, found.alias, self._wall(), "the alias was deleted")
            self._let_linger(found.serving)

    # The reconciler.

    def _start(self, found: Alias) -> asyncio.Future[None]:
        """Makes sure the reconciler runs. Returns the end of its present attempt (done while it pauses)."""
        if found.task is None:
            self._renew_attempt(found)
            loop = asyncio.get_running_loop()
            found.task = loop.create_task(
                self._reconcile(found), name=f"reconcile {found.name}@{found.alias}"
            )
        assert found.attempt is not None
        return found.attempt

    async def _reconcile(self, found: Alias) -> None:
        """Moves serving towards desired until they agree, or nothing is loaded that a refusal could spare."""
        refusals_in_a_row = 0
        try:
            while (target := found.goal) is not None and found.serving != target:
                generation = found.generation
                found.moved.clear()
                self._renew_attempt(found)
                refusal = await self._attempt(found, target, generation)
                if generation != found.generation:
                    refusals_in_a_row = 0
                    continue  # overtaken: whoever waits, waits for the newer move
                self._end_attempt(found)
                if refusal is None:
                    continue
                interrupted = refusal.code in _INTERRUPTED
                if found.serving is None and (found.last_good is None or interrupted):
                    return  # nothing answers meanwhile: the next request tries again
                refusals_in_a_row += 1
                await self._pause(found, refusal, refusals_in_a_row)
            if found.serving is not None and found.serving == found.desired and found.phase != "deleted":
                self._show(found, "serving")
        finally:
            found.task = None
            self._end_attempt(found)

    async def _attempt(self, found: Alias, target: Version, generation: int) -> Problem | None:
        """One try to make `target` the serving version. Returns the refusal, None if it was not refused."""
        self._show(found, "loading", found.error)
        # The version in service is held until its replacement serves.
        held = await self._held(found, target)
        if generation != found.generation:
            if held is not None:
                held.release()
            return None
        try:
            passed = await self._checked_unless_moved(found, target)
        except Problem as problem:
            if generation == found.generation:
                if problem.code in _INTERRUPTED:
                    found.refusal = problem  # for those who wait; nothing is wrong with the version
                    self._show(found, "unloaded" if found.serving is None else "serving")
                else:
                    self._refused(found, target, problem)
            return problem
        except Exception:
            # A bug must not end the reconciler: what serves goes on serving, and it is tried again.
            log.exception("%s could not be tried", target)
            unforeseen = Problem("MODEL_UNAVAILABLE", f"{target} cannot be loaded: the gateway failed")
            if generation == found.generation:
                self._refused(found, target, unforeseen)
            return unforeseen
        else:
            if passed is None:
                return None  # overtaken
            try:
                if held is not None and self._in_steps(found, target):
                    taken_back = await self._conducted(found, target)
                    if taken_back is not None:
                        return taken_back
                if generation == found.generation:
                    self._serve(found, target, moved_by=found.moved_by)
                else:
                    self._let_linger(target)
            finally:
                passed.lease.release()
            return None
        finally:
            if held is not None:
                held.release()

    def _in_steps(self, found: Alias, target: Version) -> bool:
        model, _ = self._entry(found.name, found.alias)
        return model is not None and self.conductor.wanted(found, model, target)

    async def _held(self, found: Alias, target: Version) -> Lease | None:
        """A lease that keeps the version in service, None where there is none. Before steps it must be there
        to be compared with, and to answer: after a restart it is loaded first, and serves."""
        serving = found.serving
        if serving is not None and self._manager.is_ready(serving):
            return self._manager.lease(serving, pin=True)
        service = serving or found.last_good
        if service is None or not self._in_steps(found, target):
            return None
        try:
            held = self._manager.lease(service, pin=True)
        except Problem:
            return None  # it cannot be loaded: nothing is left to compare with
        try:
            await self._manager.ready(held)
        except BaseException as error:
            held.release()
            if isinstance(error, Problem):
                return None
            raise
        if found.serving is None and target == found.desired:
            self._serve(found, service, moved_by="fallback")
            self._show(found, "loading")
            self._end_attempt(found)
        return held

    async def _conducted(self, found: Alias, target: Version) -> TakenBack | None:
        """Takes a version that passed its gates through its steps. Requests are answered meanwhile."""
        self._end_attempt(found)
        taken_back = await self.conductor.run(
            found,
            lambda: self._snapshot.models.get(found.name),
            target,
            lambda phase: self._show(found, phase),
        )
        if taken_back is not None:
            self._refused(found, target, taken_back, taken_back.outcome, taken_back.reason)
            if not any(target == other.serving for other in self):
                self._manager.retire(target, "rolled back")
        return taken_back

    async def _checked_unless_moved(self, found: Alias, target: Version) -> Passed | None:
        """Runs the gates; gives up as soon as the alias moves: None then. The load ends
        too, unless it is still wanted."""
        record = self.record(found.name, found.alias)
        checking = asyncio.ensure_future(self.gates.check(target, record, force=found.forced))
        moving = asyncio.ensure_future(found.moved.wait())
        try:
            await asyncio.wait({checking, moving}, return_when=asyncio.FIRST_COMPLETED)
            if not checking.done():
                checking.cancel()
                await asyncio.wait({checking})
                if checking.cancelled() or checking.exception() is not None:
                    if not any(target in (other.desired, other.serving) for other in self):
                        self._manager.abandon(target)
                    return None
            return checking.result()
        finally:
            moving.cancel()
            if not checking.done():
                checking.cancel()

    def _serve(self, found: Alias, version: Version, moved_by: str) -> None:
        """The swap."""
        previous, found.serving = found.serving, version
        if version == found.desired:
            found.desired = version
        found.refusal = None if version is found.desired else found.refusal
        now = self._wall()
        if version is found.desired:
            self._show(found, "serving")
        else:
            self._show(found, self._stopped(found), found.error)
        if not (
            found.history and found.history[-1].version == version.version and found.history[-1].ended is None
        ):
            self._end_history(found, now, f"replaced by {version.version}")
            served = Served(version.version, now, moved_by)
            found.history.append(served)
            del found.history[:-HISTORY_KEPT]
            self._memory.begin_serving(found.name, found.alias, served)
        self._lingering.end(version)
        self._manager.serves(version, True)
        if previous is not None:
            self._let_linger(previous)
        if found.unproven:
            log.info(
                "%s@%s serves version %s unproven: no version is known to have served before it",
                found.name,
                found.alias,
                version.version,
            )
        number = None if previous is None else previous.version
        self._emit(Swapped(found.name, found.alias, version.version, number, moved_by))

    def _end_history(self, found: Alias, now: float, reason: str) -> None:
        if found.history and found.history[-1].ended is None:
            last = found.history[-1]
            found.history[-1] = Served(last.version, last.started, last.moved_by, now, reason)
            self._memory.end_serving(found.name, found.alias, now, reason)

    def refuse(
        self, name: str, alias: str, target: Version, problem: Problem, outcome: str = "refused"
    ) -> None:
        """A promotion through the gateway was refused, or a version rolled back; serving and desired stay."""
        if outcome == "refused":
            self._emit(SwapRefused(name, alias, target.version, problem.message))
        found = self._aliases.get((name, alias))
        if found is None and self.view(name, alias) is not None:
            found = self.open(name, alias)
        if found is not None:
            self._show(found, outcome, problem.message)
        else:
            self._attempts[name, alias] = Attempt(
                name, alias, target.version, "refused", problem.message, self._wall()
            )

    def _refused(
        self,
        found: Alias,
        target: Version,
        problem: Problem,
        outcome: str = "refused",
        reason: str | None = None,
    ) -> None:
        """The version that the registry wants was refused here, or rolled back: other gateways should know.
        `reason`: without the version, None where the problem's message is all there is."""
        found.refusal = problem
        self.refuse(found.name, found.alias, target, problem, outcome)
        good = _number(found.serving or found.last_good)
        verdict = None
        if problem.code == "ROLLOUT_REFUSED" and found.verdict is None:
            at = utc(self._wall())
            verdict = base.Verdict(target.version, outcome, reason or problem.message, at)
        if verdict is not None or good is not None:
            self._found_out(Finding(found.name, found.alias, target.version, good, verdict))

    async def _pause(self, found: Alias, refusal: Problem, refusals_in_a_row: int) -> None:
        """Waits until it is worth trying again, or the alias moves. A signature refuses every time."""
        pause = max(backoff.pause(refusals_in_a_row, chance=self._chance), refusal.retry_after or 0.0)
        final = refusal.code == "ROLLOUT_REFUSED"
        waiter = asyncio.ensure_future(found.moved.wait())
        await asyncio.wait({waiter}, timeout=None if final else pause)
        waiter.cancel()

    def clear_error(self, found: Alias) -> None:
        """The operator asked again for what the registry says already: try at once, and forget the error."""
        if found.rollout is not None:
            return
        if found.verdict is not None and self._entry(found.name, found.alias)[1] is not None:
            model, entry = self._entry(found.name, found.alias)
            assert model is not None
            assert entry is not None
            records.want(found, model, entry, self.conductor.verdict(found.name, found.alias, entry))
        if found.desired is not None:
            self._manager.retry(found.desired)
        self._show(found, "serving" if found.serving is not None else "unloaded")
        found.refusal = None
        if found.diverged:
            self._renew_attempt(found)
            found.generation += 1
            found.moved.set()
            self._start(found)

    def _renew_attempt(self, found: Alias) -> None:
        if found.attempt is None or found.attempt.done():
            found.attempt = asyncio.get_running_loop().create_future()

    def _end_attempt(self, found: Alias) -> None:
        if found.attempt is not None and not found.attempt.done():
            found.attempt.set_result(None)

    def _show(self, found: Alias, phase: str, error: str | None = None) -> None:
        if phase != found.phase:
            found.since = self._wall()
        found.phase, found.error = phase, error

    def _let_linger(self, version: Version) -> None:
        if not any(version == found.serving for found in self):
            self._manager.serves(version, False)
        self._lingering.begin(version)

    def _in_use(self, version: Version) -> bool:
        return any(version in (found.serving, found.desired) for found in self)

    async def close(self) -> None:
        self._lingering.close()
        for timer in self._deleted.values():
            timer.cancel()
        tasks = [found.task for found in self if found.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _number(version: Version | None) -> str | None:
    return None if version is None else version.version
