"""The reconciler: moves the serving version of an alias towards the desired one.

    desired moves ──► generation + 1 ──► gates (fetch, digest, format, signature, load, warm-up)
                                           │ refused: serving stays, error shown, try again later
                                           ▼
                         steps of a canary, if the policy has some
                                           │ worse than the version in service: rolled back
                                           ▼
                         generation unchanged? ──no──► drop what was loaded, start over
                                           │ yes
                                           ▼
                                   serving = desired        (one assignment)
                                           │
                                           ▼
                         watch, if the policy has one
                                           │ worse than before the swap, or a crash loop:
                                           ▼
                                   serving = the version before        (one assignment)

There is one task per alias; it ends when both versions agree and no watch is left. `rollouts.aliases` starts
it and sets the desired version. Runs on the event loop. Knows versions, gates and leases; must not know HTTP,
processes or files.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable

from gateway import backoff
from gateway.errors import Problem
from gateway.events import Emit, Swapped, SwapRefused
from gateway.quantities import utc
from gateway.registries import base
from gateway.registries.base import Observation, Version
from gateway.rollouts.alias import LiveAlias, number
from gateway.rollouts.conductor import Conductor, TakenBack
from gateway.rollouts.gates import Gates, Passed
from gateway.rollouts.lingering import LINGER, Lingering
from gateway.rollouts.memory import Memory
from gateway.rollouts.phases import ABORTED, Phase
from gateway.rollouts.records import ROLLBACK, ROLLED_BACK, Record, has_served
from gateway.rollouts.verdicts import ELSEWHERE
from gateway.serving.manager import Lease, Manager
from gateway.state import HISTORY_KEPT, Served

log = logging.getLogger("gateway.aliases")

#: A load that ended with one of these codes was stopped from outside: the version was not refused.
INTERRUPTED = frozenset({"MODEL_LOADING", "SHUTTING_DOWN"})


class Reconciler:
    """`gates` decide about versions; `conductor` takes them through their steps. `all_aliases`: the aliases
    in use here. `model`: gives the registry's current model. `record`: the facts about an alias for its
    gates. `found_out` publishes findings that every gateway should know."""

    def __init__(
        self,
        manager: Manager,
        gates: Gates,
        conductor: Conductor,
        memory: Memory,
        *,
        all_aliases: Callable[[], Iterable[LiveAlias]],
        model: Callable[[str], base.Model | None],
        record: Callable[[str, str], Record],
        emit: Emit,
        found_out: Callable[[Observation], None],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._manager = manager
        self._gates = gates
        self._conductor = conductor
        self._memory = memory
        self._all = all_aliases
        self._model = model
        self._record = record
        self._emit = emit
        self._found_out = found_out
        self._wall = wall
        self._lingering = Lingering(manager, self.in_use)
        self._chance = random.Random()

    def start(self, found: LiveAlias) -> asyncio.Future[None]:
        """Makes sure that the reconciler runs. Returns the end of its current attempt (done while it
        pauses)."""
        if found.task is None:
            found.renew_attempt()
            loop = asyncio.get_running_loop()
            found.task = loop.create_task(
                self._reconcile(found), name=f"reconcile {found.name}@{found.alias}"
            )
        assert found.attempt is not None
        return found.attempt

    async def _reconcile(self, found: LiveAlias) -> None:
        """Moves serving towards desired until they agree, or until a refusal while no version is loaded."""
        refusals_in_a_row = 0
        try:
            while (target := found.goal) is not None:
                generation = found.generation
                if found.serving == target and found.rollout is None:
                    break
                found.moved.clear()
                refusal: Problem | None
                if found.serving == target:
                    refusal = await self._watched(found)
                else:
                    found.renew_attempt()
                    refusal = await self._attempt(found, target, generation)
                if generation != found.generation:
                    refusals_in_a_row = 0
                    continue  # superseded: callers wait for the newer move
                found.end_attempt()
                if refusal is None:
                    continue
                interrupted = refusal.code in INTERRUPTED
                if found.serving is None and (found.last_good is None or interrupted):
                    return  # no version answers: the next request tries again
                if found.serving == found.goal:
                    continue  # the version before serves again
                refusals_in_a_row += 1
                await self._pause(found, refusal, refusals_in_a_row)
            if found.serving is not None and found.serving == found.desired and found.phase != "deleted":
                found.show(self._wall(), self._conductor.settled(found))
        finally:
            found.task = None
            found.end_attempt()

    async def _attempt(self, found: LiveAlias, target: Version, generation: int) -> Problem | None:
        """Tries once to make `target` the serving version. Returns the refusal, or None."""
        found.show(self._wall(), "loading", found.error)
        # The version in service is held until its replacement serves.
        held = await self._held(found, target)
        if generation != found.generation:
            if held is not None:
                held.release()
            return None
        try:
            passed = await self._checked_unless_moved(found, target)
            if passed is None:
                return None  # overtaken
            try:
                if generation == found.generation and held is not None and self._in_steps(found, target):
                    taken_back = await self._conducted(found, target)
                    if taken_back is not None:
                        return taken_back
                if generation == found.generation:
                    model = self._model(found.name)
                    if model is not None:
                        before = found.serving or found.last_good
                        self._conductor.watch(found, model, target, before)
                    why = None
                    if found.verdict is not None and found.serving == found.desired != target:
                        reason = found.verdict.reason.removeprefix(ELSEWHERE)
                        why = f"{ROLLED_BACK}{ELSEWHERE}{reason}"
                    self.serve(found, target, found.moved_by, why)
                else:
                    self.let_linger(target)
            finally:
                passed.lease.release()
            return None
        except Problem as problem:
            if generation == found.generation:
                if problem.code in INTERRUPTED:
                    found.refusal = problem  # for those who wait; nothing is wrong with the version
                    found.show(self._wall(), self._conductor.settled(found))
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
        finally:
            if held is not None:
                held.release()

    def _in_steps(self, found: LiveAlias, target: Version) -> bool:
        model = self._model(found.name)
        return model is not None and self._conductor.wanted(found, model, target)

    async def _held(self, found: LiveAlias, target: Version) -> Lease | None:
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
        if found.serving is None and target == found.goal:
            self.serve(found, service, moved_by="fallback")
            found.show(self._wall(), "loading")
            found.end_attempt()
        return held

    async def _conducted(self, found: LiveAlias, target: Version) -> TakenBack | None:
        """Takes a version that passed its gates through its steps, while requests are answered."""
        found.end_attempt()
        self._tell_service(found, target)
        taken_back = await self._conductor.run(
            found,
            lambda: self._model(found.name),
            target,
            lambda phase: found.show(self._wall(), phase),
        )
        if taken_back is not None:
            self._refused(found, target, taken_back, taken_back.outcome, taken_back.reason)
            if not any(target == other.serving for other in self._all()):
                self._manager.retire(target, "rolled back")
        return taken_back

    def _tell_service(self, found: LiveAlias, target: Version) -> None:
        """Writes down which version serves while another one is tried. A person or another client may have
        moved the alias in the registry, and may do so again during the steps: the next move must not take
        the candidate for a version that has served."""
        model, service = self._model(found.name), number(found.serving or found.last_good)
        entry = None if model is None else model.aliases.get(found.alias)
        if entry is not None and service is not None and entry.last_good != service:
            self._found_out(Observation(found.name, found.alias, target.version, service))

    async def _watched(self, found: LiveAlias) -> TakenBack | None:
        """Watches the version that serves since the last swap. If it is worse, the version before serves
        again."""
        rollout = found.rollout
        assert rollout is not None
        found.end_attempt()
        try:
            taken_back = await self._conductor.watched(
                found, lambda: self._model(found.name), lambda phase: found.show(self._wall(), phase)
            )
            if taken_back is not None and rollout.service is not None:
                self._go_back(found, rollout.candidate, rollout.service, taken_back)
        except Exception:
            # A bug must not end the reconciler: what serves goes on serving, without the watch.
            log.exception("%s cannot be watched", rollout.candidate)
            found.observe_with(None)
            self._conductor.close(
                found, rollout.candidate, rollout.service, "the watch ended early: the gateway failed"
            )
            return None
        return taken_back

    def ended(self, name: str, version: str, reason: str, *, final: bool) -> None:
        """A process of a version ended. `final`: it ended again and again, and is not started again: the
        version that it replaced a moment ago serves again."""
        for found in list(self._all()):
            rollout, serving = found.rollout, found.serving
            if found.name != name:
                continue
            if rollout is not None and rollout.candidate.version == version:
                rollout.crashed(reason, final=final)
            elif final and serving is not None and serving.version == version and serving == found.desired:
                before, began = found.replaced, found.history[-1].started if found.history else 0.0
                soon = self._wall() - began <= LINGER
                if before is not None and soon and self._manager.is_ready(before):
                    why = f"crash loop: {reason}"
                    back = self._conductor.ended_early(found, serving, before, Phase.ROLLED_BACK, why)
                    found.generation += 1
                    self._go_back(found, serving, before, back)
                    found.moved.set()

    def _go_back(self, found: LiveAlias, target: Version, service: Version, taken_back: TakenBack) -> None:
        """The version before serves again, at once and after a restart. The version that was taken back is
        not tried again until the alias moves or a person asks for it."""
        if self._manager.failure(service) is None:
            self.serve(found, service, ROLLBACK, f"{ROLLED_BACK}{taken_back.reason}")
            found.last_good = service
            self._memory.save_last_good(found.name, found.alias, service.version)
        self._keep_out(found, target, service, taken_back)

    def abort(self, found: LiveAlias, target: Version, service: Version) -> None:
        """A person ends a rollout before its first step: the load ends, and `service` stays."""
        back = self._conductor.ended_early(found, target, service, Phase.ABORTED, ABORTED)
        found.generation += 1
        self._keep_out(found, target, service, back)
        found.moved.set()

    def _keep_out(self, found: LiveAlias, target: Version, service: Version, taken_back: TakenBack) -> None:
        """Holds `target` back until the alias moves, and unloads it unless another alias needs it."""
        found.replaced = None
        self._refused(found, target, taken_back, taken_back.outcome, taken_back.reason)
        if found.verdict is None:
            at = utc(self._wall())
            found.verdict = base.Verdict(target.version, taken_back.outcome, taken_back.reason, at)
        found.fallback = service
        others = [other for other in self._all() if other is not found]
        if not any(target in (other.serving, other.desired) for other in others):
            self._manager.retire(target, "rolled back")

    async def _checked_unless_moved(self, found: LiveAlias, target: Version) -> Passed | None:
        """Runs the gates. Returns None as soon as the alias moves; the load then ends too, unless another
        alias or a request needs it."""
        record = self._record(found.name, found.alias)
        passed = await self._gates.check_unless(found.moved, target, record, force=found.forced)
        if passed is None and not any(target in (other.desired, other.serving) for other in self._all()):
            self._manager.abandon(target)
        return passed

    def serve(self, found: LiveAlias, version: Version, moved_by: str, why: str | None = None) -> None:
        """The swap. `why`: why the version before it ends, None if it was simply replaced."""
        previous, found.serving = found.serving, version
        found.replaced = None if moved_by == ROLLBACK else previous
        if (model := self._model(found.name)) is not None:
            self._conductor.records(found, model, version)
            if version != found.last_good and has_served(found, model, version):
                # It has proved itself before: after a restart, it is the one to go back to.
                found.last_good = version
                self._memory.save_last_good(found.name, found.alias, version.version)
                entry = model.aliases.get(found.alias)
                if entry is not None and entry.last_good not in (None, version.version):
                    self._found_out(Observation(found.name, found.alias, entry.version, version.version))
        if version == found.desired:
            found.desired = version
        found.refusal = None if version is found.desired else found.refusal
        now = self._wall()
        if version is found.desired:
            shown = self._conductor.settled(found) if found.rollout is None else found.rollout.shown
            found.show(self._wall(), shown)
        else:
            found.show(self._wall(), found.stopped, found.error)
        if not (
            found.history and found.history[-1].version == version.version and found.history[-1].ended is None
        ):
            self._end_history(found, now, why or f"replaced by {version.version}")
            served = Served(version.version, now, moved_by)
            found.history.append(served)
            del found.history[:-HISTORY_KEPT]
            self._memory.begin_serving(found.name, found.alias, served)
        self._lingering.end(version)
        self._manager.serves(version, True)
        if previous is not None:
            self.let_linger(previous)
        if found.unproven:
            log.info(
                "%s@%s serves version %s unproven: no version is known to have served before it",
                found.name,
                found.alias,
                version.version,
            )
        number = None if previous is None else previous.version
        self._emit(Swapped(found.name, found.alias, version.version, number, moved_by))

    def _end_history(self, found: LiveAlias, now: float, reason: str) -> None:
        if found.history and found.history[-1].ended is None:
            last = found.history[-1]
            found.history[-1] = Served(last.version, last.started, last.moved_by, now, reason)
            self._memory.end_serving(found.name, found.alias, now, reason)

    def _refused(
        self,
        found: LiveAlias,
        target: Version,
        problem: Problem,
        outcome: str = "refused",
        reason: str | None = None,
    ) -> None:
        """Records that the desired version was refused or rolled back here, so that other gateways know.
        `reason`: without the version; None for the problem's message."""
        found.refusal = problem
        if outcome == "refused":
            self._emit(SwapRefused(found.name, found.alias, target.version, problem.message))
        found.show(self._wall(), outcome, problem.message)
        good = number(found.serving or found.last_good)
        verdict = None
        if problem.code == "ROLLOUT_REFUSED" and found.verdict is None:
            at = utc(self._wall())
            verdict = base.Verdict(target.version, outcome, reason or problem.message, at)
        if verdict is not None or good is not None:
            self._found_out(Observation(found.name, found.alias, target.version, good, verdict))

    async def _pause(self, found: LiveAlias, refusal: Problem, refusals_in_a_row: int) -> None:
        """Waits until a retry makes sense, or the alias moves. An incompatible signature is not retried."""
        pause = max(backoff.pause(refusals_in_a_row, chance=self._chance), refusal.retry_after or 0.0)
        final = refusal.code == "ROLLOUT_REFUSED"
        waiter = asyncio.ensure_future(found.moved.wait())
        await asyncio.wait({waiter}, timeout=None if final else pause)
        waiter.cancel()

    def let_linger(self, version: Version) -> None:
        if not any(version == found.serving for found in self._all()):
            self._manager.serves(version, False)
        self._lingering.begin(version)

    def in_use(self, version: Version) -> bool:
        return any(version in (found.serving, found.desired) for found in self._all())

    async def close(self) -> None:
        self._lingering.close()
        tasks = [found.task for found in self._all() if found.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
