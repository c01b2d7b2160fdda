"""Aliases: what the registry wants, what answers here, what has proved itself; and what makes them agree.

Three facts, never mixed. *desired* is what the registry says. *serving* is what requests get. *last
good* is the version that has answered last, and survives restarts. One reconciler per alias moves
serving towards desired: a swap, a rollback, an outage and a restart are the same motion.

    desired moves ──► generation + 1 ──► gates (fetch, digest, format, signature, load, warm-up)
                                           │ refused: serving stays, error shown, try again later
                                           ▼
                         generation unchanged? ──no──► drop what was loaded, start over
                                           │ yes
                                           ▼
                                   serving = desired        (one assignment)

An alias whose model is not loaded moves lazily: the first request takes it through the same gates.

All of it runs on the event loop. This module knows versions and leases, and nothing of HTTP, processes
or files.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from gateway.errors import Problem
from gateway.events import Emit, Swapped, SwapRefused
from gateway.names import Reference
from gateway.registries.base import Model, NotInRegistry, Snapshot, Version, resolve
from gateway.rollouts.gates import refusals
from gateway.serving.failures import backoff
from gateway.serving.manager import Lease, Manager
from gateway.settings import Rollout
from gateway.state import HISTORY_KEPT, Served

if TYPE_CHECKING:
    from gateway.artifacts.packages import Prepared

log = logging.getLogger("gateway.aliases")

#: How long a replaced version stays loaded for an instant way back, in seconds.
LINGER = 60.0
SHOWN_HISTORY = 20
#: A load that ended so was stopped from outside: the version was not refused.
_INTERRUPTED = frozenset({"MODEL_LOADING", "SHUTTING_DOWN"})


class Memory(Protocol):
    """What of an alias survives a restart. Calls return at once; writing happens elsewhere."""

    def last_good(self, name: str, alias: str) -> str | None: ...

    def history(self, name: str, alias: str) -> list[Served]: ...

    def save_last_good(self, name: str, alias: str, version: str) -> None: ...

    def begin_serving(self, name: str, alias: str, served: Served) -> None: ...

    def end_serving(self, name: str, alias: str, ended: float, reason: str) -> None: ...


@dataclass(slots=True, eq=False)
class Alias:
    """One alias here. `generation` counts the moves of `desired`; `since` is the unix time of `phase`."""

    name: str
    alias: str
    desired: Version | None = None
    serving: Version | None = None
    last_good: Version | None = None
    forced: bool = False
    generation: int = 0
    phase: str = "unloaded"
    error: str | None = None
    since: float = 0.0
    moved_by: str = "registry"
    history: list[Served] = field(default_factory=list)
    #: The reconciler's task, and a future for the end of its present attempt.
    task: asyncio.Task[None] | None = None
    waiting: int = 0
    attempt: asyncio.Future[None] | None = None
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    refusal: Problem | None = None

    @property
    def diverged(self) -> bool:
        return self.serving is not None and self.serving != self.desired

    def __repr__(self) -> str:
        facts = f"desired {_number(self.desired)}, serving {_number(self.serving)}, {self.phase}"
        return f"<Alias {self.name}@{self.alias} {facts}>"


class Target(NamedTuple):
    """What a reference stands for now. `version` None: the alias must be settled first."""

    version: Version | None
    alias: Alias | None


class Aliases:
    """`policy` gives a model's rollout policy; `prepare` reads a version's package without loading it."""

    def __init__(
        self,
        manager: Manager,
        *,
        prepare: Callable[[Version], Awaitable[Prepared]],
        memory: Memory,
        default_alias: Sequence[str] = ("champion",),
        max_waiting: int = 1000,
        policy: Callable[[Model], Rollout] = lambda model: Rollout(),
        emit: Emit = lambda event: None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._manager = manager
        self._prepare = prepare
        self._memory = memory
        self._default_alias = tuple(default_alias)
        self._policy = policy
        self._max_waiting = max_waiting
        self._emit = emit
        self._wall = wall
        self._aliases: dict[tuple[str, str], Alias] = {}
        self._snapshot = Snapshot({}, "")
        self._lingering: dict[Version, asyncio.TimerHandle] = {}
        self._closed = False
        self._chance = random.Random()

    def __iter__(self) -> Iterator[Alias]:
        """The aliases somebody has asked for; the others cost nothing."""
        return iter(self._aliases.values())

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    def find(self, name: str, alias: str) -> Alias | None:
        return self._aliases.get((name, alias))

    def remembered(self, name: str, alias: str) -> tuple[str | None, list[Served]]:
        """The last good version and the history of an alias nobody has asked for since the start."""
        return self._memory.last_good(name, alias), self._memory.history(name, alias)

    # What a request needs.

    def target(self, reference: Reference) -> Target:
        """What a reference stands for now: a dictionary read on the hot path. Raises Problem 404."""
        try:
            if reference.alias is not None:
                found = self.open(reference.name, reference.alias)
            elif reference.version is not None or reference.latest or reference.model_id or reference.run_id:
                return Target(resolve(self._snapshot, reference), None)
            else:
                found = self._open_default(reference.name)
        except NotInRegistry as error:
            raise Problem(error.code, str(error), hint=error.hint) from None
        serving = found.serving
        if serving is not None and (serving is found.desired or self._manager.is_ready(serving)):
            return Target(serving, found)
        return Target(None, found)

    async def settle(self, found: Alias, timeout: float | None) -> Version:
        """The version that answers for an alias whose model is not loaded: desired if it passes its gates,
        else the one that served before. Raises Problem."""
        attempt = self._start(found)
        if not attempt.done():
            if found.waiting >= self._max_waiting:
                wait = self._manager.expected_load_seconds()
                message = f"{found.name} is loading, and as many requests wait for it as may"
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
            raise Problem("ALIAS_NOT_FOUND", f"{found.name} has no alias {found.alias} any more")
        if found.serving is None and found.refusal is not None and found.refusal.code in _INTERRUPTED:
            raise found.refusal.again()
        if found.serving is None and found.last_good is not None and found.last_good != found.desired:
            self._serve(found, found.last_good, moved_by="fallback")
        if found.serving is not None:
            return found.serving
        if found.refusal is not None:
            raise found.refusal.again()
        raise Problem("MODEL_UNAVAILABLE", f"{found.name}@{found.alias} cannot be served", retry_after=1)

    def begin(self, found: Alias) -> None:
        """Starts what the first request would start, without waiting for it."""
        self._start(found)

    async def served(self, found: Alias, target: Version, timeout: float) -> None:
        """Returns when `target` is the serving version. Raises Problem if it is refused or overtaken, or
        MODEL_LOADING after `timeout` seconds."""
        while found.serving != target:
            if found.desired != target:
                message = (
                    f"{found.name}@{found.alias} was moved on to version {_number(found.desired)} meanwhile"
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

    def open(self, name: str, alias: str, moved_by: str = "registry") -> Alias:
        """The alias, from now on followed; `moved_by` says who made it, if it is new here. Raises
        NotInRegistry."""
        found = self._aliases.get((name, alias))
        if found is None:
            model = self._snapshot.models.get(name)
            if model is None or alias not in model.aliases:
                resolve(self._snapshot, Reference(name, alias=alias))
                raise NotInRegistry("ALIAS_NOT_FOUND", f"{name} has no alias {alias}")
            found = Alias(name, alias, since=self._wall(), moved_by=moved_by)
            found.history = self._memory.history(name, alias)
            good = self._memory.last_good(name, alias) or model.aliases[alias].last_good
            found.last_good = None if good is None else model.versions.get(good)
            self._aliases[name, alias] = found
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
        model = self._snapshot.models.get(found.name)
        entry = None if model is None else model.aliases.get(found.alias)
        if model is None or entry is None:
            self._end(found)
            return
        desired = model.versions.get(entry.version) or Version(found.name, entry.version, source="")
        if desired == found.desired and entry.forced == found.forced:
            return
        if found.desired is not None:
            found.generation += 1
            found.moved_by = moved_by
        found.desired, found.forced = desired, entry.forced
        found.refusal = None
        if found.phase == "refused":
            self._show(found, "unloaded" if found.serving is None else "loading")
        if desired == found.serving:
            found.desired = found.serving  # one object, so that `is` holds on the hot path
        self._renew_attempt(found)
        found.moved.set()
        loaded = found.serving is not None and self._manager.is_ready(found.serving)
        if found.task is None and (loaded or self._manager.is_ready(desired)):
            self._start(found)

    def busy(self) -> set[str]:
        """The names of which a version is on its way, be it loaded yet or not."""
        return {found.name for found in self if found.attempt is not None and not found.attempt.done()}

    def forget(self, names: Collection[str]) -> None:
        """Follows these names no more, until somebody asks for them again. Nothing of them is loaded, and
        nothing has happened to them: their history goes on where it is."""
        for found in list(self):
            if found.name in names:
                self._drop(found)

    def _drop(self, found: Alias) -> None:
        del self._aliases[found.name, found.alias]
        found.generation += 1
        found.desired = None
        if found.serving is not None and not any(found.serving == other.serving for other in self):
            self._manager.serves(found.serving, False)
        found.moved.set()  # its reconciler sees that there is nothing to do any more

    def _end(self, found: Alias) -> None:
        """The registry has no such alias any more."""
        self._drop(found)
        if found.serving is not None:
            self._memory.end_serving(found.name, found.alias, self._wall(), "the alias was removed")
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
            while found.desired is not None and found.serving != found.desired:
                generation, target = found.generation, found.desired
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
            if found.desired is not None:
                self._show(found, "serving")
        finally:
            found.task = None
            self._end_attempt(found)

    async def _attempt(self, found: Alias, target: Version, generation: int) -> Problem | None:
        """One try to make `target` the serving version. Returns the refusal, None if it was not refused."""
        self._show(found, "loading", found.error)
        serving = found.serving
        # The version in service is held until its replacement serves.
        held = None
        if serving is not None and self._manager.is_ready(serving):
            held = self._manager.lease(serving, pin=True)
        try:
            lease = await self._admitted_unless_moved(found, target)
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
            if lease is None:
                return None  # overtaken
            try:
                if generation == found.generation:
                    self._serve(found, target, moved_by=found.moved_by)
                else:
                    self._let_linger(target)
            finally:
                lease.release()
            return None
        finally:
            if held is not None:
                held.release()

    async def _admitted_unless_moved(self, found: Alias, target: Version) -> Lease | None:
        """`admit`, given up as soon as the alias moves: None then. The load ends too, unless
        somebody else wants it."""
        admitting = asyncio.ensure_future(self.admit(found, target, forced=found.forced))
        moving = asyncio.ensure_future(found.moved.wait())
        try:
            await asyncio.wait({admitting, moving}, return_when=asyncio.FIRST_COMPLETED)
            if not admitting.done():
                admitting.cancel()
                await asyncio.wait({admitting})
                if admitting.cancelled() or admitting.exception() is not None:
                    if not any(target in (other.desired, other.serving) for other in self):
                        self._manager.abandon(target)
                    return None
            return admitting.result()
        finally:
            moving.cancel()
            if not admitting.done():
                admitting.cancel()

    async def admit(self, found: Alias | None, target: Version, *, forced: bool) -> Lease:
        """Takes a version through the gates and returns a lease on it, loaded and warm. Raises Problem.

        Files, digest and format first, then whether present callers would still be understood, and only
        then is anything loaded. A version that this alias has served before has proved itself: its
        signature is not held against it, so that the way back is always open.
        """
        if not target.source:
            message = (
                f"the alias points to version {target.version} of {target.name}, which is not registered"
            )
            raise Problem("VERSION_NOT_FOUND", message)
        self._manager.check(target)
        try:
            prepared = await self._prepared(target)
        except Problem as problem:
            self._manager.failed(target, problem)
            raise
        old = None if found is None else found.serving or found.last_good
        if found is not None and old is not None and old != target and not forced:
            served_before = any(served.version == target.version for served in found.history)
            if not served_before:
                await self._check_signature(old, prepared)
        lease = self._manager.lease(target, prepared)
        try:
            await self._manager.ready(lease)
        except BaseException:
            lease.release()
            raise
        return lease

    async def _prepared(self, version: Version) -> Prepared:
        servable = self._manager.find(version)
        if servable is not None and servable.prepared is not None:
            return servable.prepared
        return await self._prepare(version)

    async def _check_signature(self, old: Version, new: Prepared) -> None:
        model = self._snapshot.models.get(old.name)
        policy = Rollout() if model is None else self._policy(model)
        try:
            predecessor = (await self._prepared(old)).package.signature
        except Problem:
            return  # its files are gone: there is nothing to compare with
        reasons = refusals(policy, predecessor, new.package.signature)
        if reasons:
            message = f"{new.version} may not replace {old}: {'; '.join(reasons)}"
            raise Problem("ROLLOUT_REFUSED", message, hint="force moves the alias all the same")

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
            self._show(found, "refused", found.error)
        if not (
            found.history and found.history[-1].version == version.version and found.history[-1].ended is None
        ):
            self._end_history(found, now, f"replaced by {version.version}")
            served = Served(version.version, now, moved_by)
            found.history.append(served)
            del found.history[:-HISTORY_KEPT]
            self._memory.begin_serving(found.name, found.alias, served)
        timer = self._lingering.pop(version, None)
        if timer is not None:
            timer.cancel()
        self._manager.linger(version, False)
        self._manager.serves(version, True)
        if previous is not None:
            self._let_linger(previous)
        number = None if previous is None else previous.version
        self._emit(Swapped(found.name, found.alias, version.version, number, moved_by))

    def _end_history(self, found: Alias, now: float, reason: str) -> None:
        if found.history and found.history[-1].ended is None:
            last = found.history[-1]
            found.history[-1] = Served(last.version, last.started, last.moved_by, now, reason)
            self._memory.end_serving(found.name, found.alias, now, reason)

    def refuse(self, found: Alias, target: Version, problem: Problem) -> None:
        """A promotion that was tried through the gateway was refused; serving and desired stay."""
        self._emit(SwapRefused(found.name, found.alias, target.version, problem.message))
        self._show(found, "refused", problem.message)

    def _refused(self, found: Alias, target: Version, problem: Problem) -> None:
        found.refusal = problem
        self.refuse(found, target, problem)

    async def _pause(self, found: Alias, refusal: Problem, refusals_in_a_row: int) -> None:
        """Until it is worth trying again, or the alias moves. What a signature refuses it always will."""
        pause = max(backoff(refusals_in_a_row, self._chance), refusal.retry_after or 0.0)
        final = refusal.code == "ROLLOUT_REFUSED"
        waiter = asyncio.ensure_future(found.moved.wait())
        await asyncio.wait({waiter}, timeout=None if final else pause)
        waiter.cancel()

    def clear_error(self, found: Alias) -> None:
        """The operator asked again for what the registry says already: try at once, and forget the error."""
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

    # What was replaced.

    def _let_linger(self, version: Version) -> None:
        """Keeps a replaced version loaded for a while: the way back is one assignment."""
        if not any(version == found.serving for found in self):
            self._manager.serves(version, False)
        if any(version in (found.serving, found.desired) for found in self):
            return
        self._manager.linger(version, True)
        if version not in self._lingering and not self._closed:
            loop = asyncio.get_running_loop()
            self._lingering[version] = loop.call_later(LINGER, self._end_linger, version)

    def _end_linger(self, version: Version) -> None:
        del self._lingering[version]
        if not any(version in (found.serving, found.desired) for found in self):
            self._manager.retire(version, "replaced")

    async def close(self) -> None:
        self._closed = True
        for timer in self._lingering.values():
            timer.cancel()
        tasks = [found.task for found in self if found.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _number(version: Version | None) -> str | None:
    return None if version is None else version.version
