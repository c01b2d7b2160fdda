"""Aliases: the desired version of each alias, the version that serves, and the last good version.

These three facts are never mixed. *desired* is the version in the registry. *serving* is the version that
answers requests. *last good* is the last version that has answered; it survives restarts. One reconciler per
alias moves serving towards desired (`rollouts.reconciler`): a swap, a rollback, an outage and a restart all
work this way.

Order of the methods: for requests, for the registry, for operators and promotions, for peers.

An alias whose model is not loaded moves lazily: the first request takes it through the gates. A finding of
one gateway (a refusal, the last good version) is written to the registry if possible, so that every gateway
knows it; `found_out` publishes it.

Everything runs on the event loop. This module knows versions and leases; it must not know HTTP, processes or
files.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from cachetools import LRUCache

from gateway import backoff
from gateway.errors import Problem, overloaded
from gateway.events import AliasDeleted, Crashed, Emit, Event, SwapRefused
from gateway.names import Reference
from gateway.registries import base
from gateway.registries.base import Observation, Snapshot, Version
from gateway.registries.resolution import find_alias, resolve
from gateway.rollouts import records
from gateway.rollouts.alias import STOPPED, Attempt, LiveAlias, number
from gateway.rollouts.conductor import Conductor
from gateway.rollouts.gates import Gates
from gateway.rollouts.memory import Courses, Memory
from gateway.rollouts.orders import Orders
from gateway.rollouts.reconciler import INTERRUPTED, Reconciler
from gateway.rollouts.records import Record
from gateway.rollouts.replay import Replays
from gateway.rollouts.verdicts import Standing, Verdicts
from gateway.serving.admission import LOADING_FULL
from gateway.serving.manager import Manager

log = logging.getLogger("gateway.aliases")

#: The most refused promotions of missing aliases, and deleted aliases, that are remembered.
ATTEMPTS_KEPT = 1000


class Target(NamedTuple):
    """The current target of a reference. `version` None: the alias must be served first."""

    version: Version | None
    alias: LiveAlias | None


def _mover(entry: base.Alias, moved_by: str) -> str:
    """Returns what moved an alias. The registry marks each rollback, those of other gateways too."""
    return records.ROLLBACK if entry.back else moved_by


class Aliases:
    """`gates` decide about versions. `found_out` publishes findings that every gateway should know. `grace`:
    the seconds for which a deleted alias of a model continues to answer. `counted` is called with the arm of
    each request during a rollout. `replays` lets a candidate answer captured requests."""

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
        found_out: Callable[[Observation], None] = lambda observation: None,
        grace: Callable[[str], float] = lambda name: 0.0,
        replays: Replays | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.gates = gates
        courses = Courses(memory, wall)
        self.verdicts = Verdicts(memory, courses, digest=self._digest, wall=wall, clock=clock)
        self.conductor = Conductor(
            manager, courses, policy=gates.policy, emit=emit, counted=counted, replays=replays,
            wall=wall, clock=clock,
        )  # fmt: skip
        self._interrupted = set(self.conductor.courses.under_way())
        self._manager = manager
        self._memory = memory
        self._default_alias = tuple(default_alias)
        self._max_waiting = max_waiting
        self._emit = emit
        self._found_out = found_out
        self._grace = grace
        self._wall = wall
        self._aliases: dict[tuple[str, str], LiveAlias] = {}
        self._snapshot = Snapshot({}, "")
        self._reconciler = Reconciler(
            manager,
            gates,
            self.conductor,
            memory,
            all_aliases=self._aliases.values,
            model=lambda name: self._snapshot.models.get(name),
            record=self.record,
            emit=emit,
            found_out=self._found,
            wall=wall,
        )
        self.orders = Orders(
            self.conductor, self._reconciler, model=lambda name: self._snapshot.models.get(name), wall=wall
        )
        self._deleted: dict[tuple[str, str], asyncio.TimerHandle] = {}
        self._announced: dict[tuple[str, str], tuple[str, str]] = {}
        self._attempts: LRUCache[tuple[str, str], Attempt] = LRUCache(ATTEMPTS_KEPT)

    def __iter__(self) -> Iterator[LiveAlias]:
        """The aliases that were used here; unused aliases cost nothing."""
        return iter(self._aliases.values())

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    def find(self, name: str, alias: str) -> LiveAlias | None:
        return self._aliases.get((name, alias))

    def view(self, name: str, alias: str) -> LiveAlias | None:
        """The state of an alias here. For an alias that was not used since the start, a copy that is not
        followed. None if the registry has no such alias."""
        found = self._aliases.get((name, alias))
        model = self._snapshot.models.get(name)
        if found is not None or model is None or alias not in model.aliases:
            return found
        own = self.verdicts.of(model, alias)
        seen = self._seen(model, alias)
        seen.error = records.want(seen, model, model.aliases[alias], own)
        seen.phase = "unloaded" if seen.error is None else seen.stopped
        return seen

    def _seen(self, model: base.Model, alias: str) -> LiveAlias:
        """An alias that was not used here yet."""
        seen = records.seen(model, alias, self._memory, self._wall())
        if seen.last_good is None and (good := self.verdicts.good(model.name, alias)) is not None:
            seen.last_good = model.versions.get(good)
        return seen

    def attempts(self) -> list[Attempt]:
        """The last attempts on aliases that do not exist or no longer exist."""
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
        find_alias(self._snapshot, name, alias)
        return records.earlier(self.record(name, alias), alias, self._memory.history(name, alias))

    # For requests.

    def target(self, reference: Reference) -> Target:
        """The current target of a reference: a dictionary read on the hot path. Raises Problem 404."""
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

    def meant(self, reference: Reference) -> tuple[Version | None, LiveAlias | None]:
        """The version of a reference, loaded or not, and its alias. Raises Problem 404."""
        version, found = self.target(reference)
        return version or (None if found is None else found.serving or found.desired), found

    async def wait_until_served(self, found: LiveAlias, timeout: float | None) -> Version:
        """The version that answers for an alias whose model is not loaded: the desired one if it passes its
        gates, else the one that served before. Raises Problem."""
        attempt = self._reconciler.start(found)
        if not attempt.done():
            if found.waiting >= self._max_waiting:
                wait = self._manager.expected_load_seconds()
                raise overloaded(found.name, LOADING_FULL, wait)
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
        if found.serving is None and found.refusal is not None and found.refusal.code in INTERRUPTED:
            raise found.refusal.again()
        if found.serving is None and found.last_good is not None and found.last_good != found.desired:
            self._reconciler.serve(found, found.last_good, moved_by="fallback")
        if found.serving is not None:
            return found.serving
        if found.refusal is not None and found.refusal.code == "ROLLOUT_REFUSED":
            raise Problem("MODEL_UNAVAILABLE", found.refusal.message, retry_after=backoff.LONGEST)
        if found.refusal is not None:
            raise found.refusal.again()
        raise Problem("MODEL_UNAVAILABLE", f"{found.name}@{found.alias} cannot be served", retry_after=1)

    def begin(self, found: LiveAlias) -> None:
        """Starts the load that the first request would start, without waiting for it."""
        self._reconciler.start(found)

    async def served(self, found: LiveAlias, target: Version, timeout: float) -> None:
        """Returns when `target` serves, or its first step begins. Raises Problem if it is refused or
        superseded, or MODEL_LOADING after `timeout` seconds."""
        while found.serving != target and not found.in_steps:
            if found.desired != target:
                now = number(found.desired)
                went = "deleted" if now is None else f"moved to version {now}"
                message = f"{found.name}@{found.alias} was {went} meanwhile"
                raise Problem("ROLLOUT_REFUSED", message)
            attempt = self._reconciler.start(found)
            await asyncio.wait({attempt}, timeout=timeout)
            if not attempt.done():
                raise Problem("MODEL_LOADING", f"{target} is still loading", retry_after=1)
            if found.serving != target and found.desired == target and found.refusal is not None:
                raise Problem("ROLLOUT_REFUSED", found.refusal.message, details=found.refusal.details)

    def answered(self, found: LiveAlias, version: Version) -> None:
        """A version has answered a request: it has proved itself."""
        if found.last_good is not version and found.serving is version and found.rollout is None:
            found.last_good = version
            self._memory.save_last_good(found.name, found.alias, version.version)
            _, entry = self._entry(found.name, found.alias)
            if entry is not None and entry.last_good not in (None, version.version):
                self._found_out(Observation(found.name, found.alias, version.version, version.version))

    def notice(self, event: Event) -> None:
        """A process of a version ended: a new version whose processes end again and again is taken back. One
        that did not answer in time has not crashed: the guards count its requests."""
        if isinstance(event, Crashed) and event.what in ("crashed", "quarantined"):
            final = event.what == "quarantined"
            self._reconciler.ended(event.model, event.version, event.reason, final=final)

    # For the registry.

    @contextmanager
    def announced(self, name: str, alias: str, version: str, moved_by: str) -> Iterator[None]:
        """While a move is written. A poll may read the new entry before its writer applies it: the move is
        still the writer's then."""
        self._announced[name, alias] = version, moved_by
        try:
            yield
        finally:
            self._announced.pop((name, alias), None)

    def apply(self, snapshot: Snapshot, moved_by: str = "registry") -> None:
        """Applies a new snapshot: moves the aliases that changed, and ends those that were deleted."""
        self._snapshot = snapshot
        self.verdicts.look(snapshot)
        for observation in self.verdicts.unsaid(snapshot):
            self._found_out(observation)
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
                # Continue an interrupted rollout, even without a request.
                self._interrupted.discard((name, alias))
                self._reconciler.start(self.open(name, alias))

    def open(self, name: str, alias: str, moved_by: str = "registry") -> LiveAlias:
        """The alias, which is followed from now on. `moved_by`: who created it, if it is new here. Raises
        NotInRegistry."""
        found = self._aliases.get((name, alias))
        if found is None:
            find_alias(self._snapshot, name, alias)
            found = self._seen(self._snapshot.models[name], alias)
            found.moved_by = _mover(self._snapshot.models[name].aliases[alias], moved_by)
            self._aliases[name, alias] = found
            self._attempts.pop((name, alias), None)
            self._take(found, "registry")
        return found

    def _open_default(self, name: str) -> LiveAlias:
        for alias in self._default_alias:
            found = self._aliases.get((name, alias))
            if found is not None:
                return found
            model = self._snapshot.models.get(name)
            if model is not None and alias in model.aliases:
                return self.open(name, alias)
        return self.open(name, self._default_alias[0])

    def _take(self, found: LiveAlias, moved_by: str) -> None:
        model, entry = self._entry(found.name, found.alias)
        if model is None or entry is None:
            self._end_after_grace(found, moved_by)
            return
        if (timer := self._deleted.pop((found.name, found.alias), None)) is not None:
            timer.cancel()
            log.info("%s@%s is in the registry again", found.name, found.alias)
            found.show(self._wall(), self.conductor.settled(found))
        good = entry.last_good or self.verdicts.good(found.name, found.alias)
        if found.last_good is None and good is not None:
            found.last_good = model.versions.get(good)
        if model.rollout != found.said:
            found.said = model.rollout
            if found.serving is not None:
                self.conductor.records(found, model, found.serving)
        before = (found.desired, found.forced, found.verdict)
        if before[0] is not None and before[0].version != entry.version:
            self.verdicts.left(found.name, found.alias, before[0].version)
            self.conductor.courses.left(found.name, found.alias, before[0].version)
        own = self.verdicts.of(model, found.alias)
        if own is not None and (found.last_good is None or found.last_good.version == own.version):
            # A peer took back what has answered here; it names a version that is good.
            good = self._memory.last_good(found.name, found.alias)
            found.last_good = None if good is None else model.versions.get(good)
        error = records.want(found, model, entry, own)
        if (found.desired, found.forced, found.verdict) == before:
            return
        if before[0] is not None:
            found.generation += 1
            version, writer = self._announced.get((found.name, found.alias), ("", ""))
            found.moved_by = _mover(entry, writer if version == entry.version else moved_by)
        if found.verdict is None:
            found.refusal = None
        if error is not None and found.serving != found.desired:
            found.show(self._wall(), found.stopped, error)
        elif error is not None:
            found.error = error  # it still serves, until the version before is ready
        elif found.phase in STOPPED:
            found.show(self._wall(), "unloaded" if found.serving is None else "loading")
        found.renew_attempt()
        found.moved.set()
        ready = [v is not None and self._manager.is_ready(v) for v in (found.serving, found.goal)]
        if found.task is None and any(ready):
            self._reconciler.start(found)

    def busy(self) -> set[str]:
        """The names with a version that is moving, loaded or not."""
        return {found.name for found in self if found.attempt is not None and not found.attempt.done()}

    def names_in_use(self) -> set[str]:
        """The names with a version that is loaded or moving."""
        return {servable.version.name for servable in self._manager} | self.busy()

    def forget(self, names: Collection[str]) -> None:
        """Stops following these names until they are used again. They have no loaded version, and their
        history continues."""
        for found in list(self):
            if found.name in names:
                self._drop(found)

    def _drop(self, found: LiveAlias) -> None:
        del self._aliases[found.name, found.alias]
        found.generation += 1
        found.desired = None
        if found.serving is not None and not any(found.serving == other.serving for other in self):
            self._manager.serves(found.serving, False)
        found.moved.set()  # its reconciler ends

    def _end_after_grace(self, found: LiveAlias, moved_by: str) -> None:
        """Ends an alias that the registry no longer has, now or after the grace period."""
        key = (found.name, found.alias)
        if key in self._deleted:
            return
        grace = 0.0 if moved_by == "delete" or found.serving is None else self._grace(found.name)
        what = "model" if found.name not in self._snapshot.models else "alias"
        message = f"the {what} is no longer in the registry"
        self._emit(AliasDeleted(found.name, found.alias, number(found.serving), message, grace))
        if found.rollout is not None:  # the serving version continues; the candidate must not replace it
            found.generation += 1
            found.desired = found.serving
            found.moved.set()
        if grace:
            found.show(self._wall(), "deleted", f"{message}; it continues to answer for {grace:.0f} s")
            loop = asyncio.get_running_loop()
            self._deleted[key] = loop.call_later(grace, self._end, found, message)
        else:
            self._end(found, message)

    def _end(self, found: LiveAlias, message: str) -> None:
        key = (found.name, found.alias)
        self._deleted.pop(key, None)
        self._drop(found)
        self._attempts[key] = Attempt(*key, None, "deleted", message, self._wall())
        if found.serving is not None:
            self._memory.end_serving(found.name, found.alias, self._wall(), "the alias was deleted")
            self._reconciler.let_linger(found.serving)

    def refuse(self, name: str, alias: str, target: Version, problem: Problem) -> None:
        """Records a refused promotion through the gateway; serving and desired stay."""
        self._emit(SwapRefused(name, alias, target.version, problem.message))
        found = self._aliases.get((name, alias))
        if found is None and self.view(name, alias) is not None:
            found = self.open(name, alias)
        if found is not None:
            found.show(self._wall(), "refused", problem.message)
        else:
            self._attempts[name, alias] = Attempt(
                name, alias, target.version, "refused", problem.message, self._wall()
            )

    def clear_error(self, found: LiveAlias) -> None:
        """Forgets the error and tries again at once: the operator repeated the move that the registry
        holds."""
        if found.rollout is not None:
            return
        if found.verdict is not None and self._entry(found.name, found.alias)[1] is not None:
            model, entry = self._entry(found.name, found.alias)
            assert model is not None
            assert entry is not None
            records.want(found, model, entry, self.verdicts.of(model, found.alias))
        if found.desired is not None:
            self._manager.retry(found.desired)
        found.show(self._wall(), self.conductor.settled(found))
        found.refusal = None
        if found.diverged:
            found.renew_attempt()
            found.generation += 1
            found.moved.set()
            self._reconciler.start(found)

    # For peers.

    def standings(self, *, verdicts: bool) -> list[Standing]:
        """What this gateway says of its aliases to its peers. `verdicts`: with those that the registry does
        not hold; their aliases come first."""
        said: list[Standing] = []
        for key in dict.fromkeys((*self.verdicts.held(), *self._aliases)):
            model, entry = self._entry(*key)
            if model is None or entry is None:
                continue
            found = self._aliases.get(key) or self.view(*key)
            assert found is not None
            tried = found.serving if found.in_steps else None  # it may not have answered yet
            serving, good = number(found.serving), number(tried or found.last_good)
            said.append(
                self.verdicts.standing(model, key[1], serving=serving, last_good=good, verdicts=verdicts)
            )
        said.sort(key=lambda one: one.verdict is None)
        return said

    def hear(self, said: Iterable[Standing]) -> None:
        """What a peer says of aliases: a verdict that it reached holds here, too."""
        changed, again = self.verdicts.hear(said)
        for key in changed:
            model, entry = self._entry(*key)
            if model is None or entry is None:
                continue
            if (found := self._aliases.get(key)) is None:
                self.verdicts.of(model, key[1])
                continue
            self._take(found, "peers")
            if key in again and found.verdict is None:
                self.clear_error(found)

    def _found(self, observation: Observation) -> None:
        self.verdicts.found(observation)
        self._found_out(observation)

    def _digest(self, version: Version) -> str | None:
        held = self._manager.find(version)
        prepared = None if held is None else held.prepared
        return version.digest or (None if prepared is None else prepared.digest)

    async def close(self) -> None:
        for timer in self._deleted.values():
            timer.cancel()
        await self._reconciler.close()
