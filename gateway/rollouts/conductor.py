"""Conducts rollouts: takes a candidate that passed its gates through its steps, watches it once it serves,
and writes down how far it is.

A rollout is examined after each event, and at least once a second. `rollouts.phases` decides;
`rollouts.reconciler` then moves the alias. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from gateway.errors import Problem
from gateway.events import Emit, RolloutChanged
from gateway.rollouts.before import Reference
from gateway.rollouts.phases import BEFORE_SERVING, TAKEN_BACK, UNDER_WAY, UNSEEN, Phase
from gateway.rollouts.records import ROLLBACK
from gateway.rollouts.rollout import Course, InService, Rollout, shadow_of
from gateway.rollouts.shadow import Shadow
from gateway.rollouts.verdicts import ELSEWHERE, Verdicts

if TYPE_CHECKING:
    from gateway.registries.base import Model, Version
    from gateway.rollout_settings import RolloutPolicy
    from gateway.rollouts.alias import LiveAlias, Memory
    from gateway.rollouts.replay import Replays
    from gateway.serving.manager import Lease, Manager

log = logging.getLogger("gateway.aliases")

#: A rollout is looked at this often, in seconds, although nothing happened.
TICK: Final = 1.0
ROLLED_BACK: Final = "rolled back: "
"""The prefix of the reason in the history when a version was rolled back."""


class TakenBack(Problem):
    """A candidate that does not replace the version in service. `outcome`: `rolled_back` or `refused`."""

    def __init__(self, target: Version, outcome: str, reason: str) -> None:
        said = outcome.replace("_", " ")
        super().__init__("ROLLOUT_REFUSED", f"{target} was {said}: {reason}")
        self.outcome = outcome
        self.reason = reason


class Conductor:
    """`verdicts` knows the courses. `policy` gives the policy that applies to a model. `counted` is called
    with the model, the alias and the arm of each request. `replays` lets a candidate answer captured
    requests."""

    def __init__(
        self,
        manager: Manager,
        memory: Memory,
        *,
        verdicts: Verdicts,
        policy: Callable[[Model], RolloutPolicy],
        emit: Emit = lambda event: None,
        counted: Callable[[str, str, str], None] = lambda name, alias, arm: None,
        replays: Replays | None = None,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._manager = manager
        self._memory = memory
        self.verdicts = verdicts
        self.policy = policy
        self._emit = emit
        self._counted = counted
        self._replays = replays
        self._wall = wall
        self._clock = clock

    # Memory.

    def course(self, name: str, alias: str) -> Course | None:
        """The last rollout of an alias, also if it has ended."""
        return self.verdicts.course(name, alias)

    def _save(self, name: str, alias: str, course: Course) -> None:
        self._memory.save_rollout(name, alias, course.to_json())

    def under_way(self) -> list[tuple[str, str]]:
        """The aliases whose rollout had not ended when the gateway last stopped."""
        return [key for key, saved in self._memory.rollouts().items() if Phase(saved["phase"]) in UNDER_WAY]

    def plan(
        self,
        name: str,
        alias: str,
        version: str,
        steps: tuple[float, ...] | None,
        shadow: float | None = None,
    ) -> Callable[[], None]:
        """Records the steps of a promotion and its share of copied requests before the registry is written;
        None means those of the policy. Forgets an earlier try of that version, because a person asks for it
        again. Returns a function that undoes the record if the registry cannot be written."""
        before = self._memory.rollout(name, alias)
        course = self.course(name, alias)
        if steps is not None or shadow is not None:
            self._save(name, alias, Course(version, steps=steps, shadow=shadow, since=self._wall()))
        elif course is not None and course.version == version and course.phase not in UNDER_WAY:
            self._memory.save_rollout(name, alias, None)
        return lambda: self._memory.save_rollout(name, alias, before)

    # Actions.

    def wanted(self, found: LiveAlias, model: Model, target: Version) -> bool:
        """Whether `target` goes through steps before it serves: the policy has steps, and another version can
        answer meanwhile. A version that has served before takes only the steps that its promotion names."""
        service = found.serving or found.last_good
        if service is None or service == target or target != found.desired or found.moved_by == ROLLBACK:
            return False
        compares = self._replayed(model) or self._shadowed(found, model, target)
        if not service.source or not (compares or self._steps(found, model, target)):
            return False
        course = self.course(found.name, found.alias)
        named = False
        if course is not None and course.version == target.version:
            if course.phase is Phase.WATCHING:
                return False  # its steps are over
            begins = course.phase is Phase.CHECKING or course.phase in BEFORE_SERVING
            named = begins and (course.steps is not None or course.shadow is not None)
        return named or not _has_served(found, model, target)

    def _steps(self, found: LiveAlias, model: Model, target: Version) -> tuple[float, ...]:
        course = self.course(found.name, found.alias)
        if course is not None and course.version == target.version and course.steps is not None:
            return course.steps
        return tuple(self.policy(model).canary.steps)

    def _shadowed(self, found: LiveAlias, model: Model, target: Version) -> bool:
        course = self.course(found.name, found.alias)
        known = course is not None and course.version == target.version
        return shadow_of(self.policy(model), course if known else None) is not None

    def _replayed(self, model: Model) -> bool:
        return self._replays is not None and self.policy(model).replay is not None

    async def run(
        self,
        found: LiveAlias,
        model: Callable[[], Model | None],
        target: Version,
        began: Callable[[str], None],
    ) -> TakenBack | None:
        """Takes `target` through its steps. Returns None when it should serve, or when the alias has moved.
        `model` gives the current registered model; `began` is called with the phase to show."""
        registered = model()
        assert registered is not None
        rollout = self._begun(found, self.policy(registered), target)
        if rollout is None:
            return None
        lease = self._manager.lease(target, pin=True)
        work: dict[Phase, asyncio.Task[None]] = {}

        def look() -> None:
            """Starts and stops what the phase needs next to the requests."""
            phase = rollout.course.phase
            for over in [begun for begun in work if begun is not phase]:
                work.pop(over).cancel()
            if phase is Phase.REPLAYING and rollout.replay is None:
                work[phase] = self._begin_replay(found, rollout)
            elif phase is Phase.SHADOWING and phase not in work:
                work[phase] = self._begin_shadow(found, rollout)

        try:
            found.observe_with(rollout)
            self._changed(found, rollout)
            began(rollout.shown)
            return await self._conducted(found, rollout, model, began, look)
        finally:
            found.observe_with(None)
            for task in work.values():
                task.cancel()
            lease.release()

    def watch(self, found: LiveAlias, model: Model, target: Version, service: Version | None) -> bool:
        """Begins to watch `target`, which serves from now on in the place of `service`. Returns False if the
        policy has no watch, or if there is nothing to go back to."""
        course = self.course(found.name, found.alias)
        if course is None or course.version != target.version or course.phase not in UNDER_WAY:
            course = Course(target.version)
        resumed = course.phase is Phase.WATCHING
        if resumed and course.service is not None:
            service = model.versions.get(course.service)
        policy = self.policy(model)
        back = service is not None and service != target and service.source
        if not back or not policy.watch or target != found.desired:
            self.close(found, target, "the policy has no watch, or there is no version to go back to")
            return False
        assert service is not None
        if not resumed:
            if found.moved_by == ROLLBACK or _has_served(found, model, target):
                self.close(found, target, "the version has served before")
                return False
            course = course.to(Phase.WATCHING, self._wall())
        if course.before is None:
            last = found.in_service
            known = last is not None and last.version == service
            before = last.before.reference() if last is not None and known else Reference()
            course = replace(course, before=before.to_json())
        rollout = self._live(found, policy, replace(course, service=service.version), target, service)
        found.observe_with(rollout)
        self._changed(found, rollout)
        return True

    def close(self, found: LiveAlias, target: Version, reason: str) -> None:
        """Records that the rollout of `target`, which serves, is over, if it was still under way."""
        course = self.course(found.name, found.alias)
        if course is not None and course.version == target.version and course.phase in UNDER_WAY:
            self._save(found.name, found.alias, course.to(Phase.DONE, self._wall(), reason=reason))

    async def watched(
        self, found: LiveAlias, model: Callable[[], Model | None], began: Callable[[str], None]
    ) -> TakenBack | None:
        """Watches the version that serves. Returns None when the watch is over or the alias has moved."""
        rollout = found.rollout
        assert rollout is not None
        assert rollout.service is not None
        held: list[Lease] = []
        for version in (rollout.service, rollout.candidate):
            try:
                held.append(self._manager.lease(version, pin=True))  # after a restart, this loads it
            except Problem as problem:
                log.warning("%s is watched without %s: %s", rollout.candidate, version, problem.message)

        def let_go() -> None:
            """Releases what the operator unloads."""
            for lease in [lease for lease in held if lease.servable.retiring is not None]:
                held.remove(lease)
                lease.release()

        try:
            began(rollout.shown)
            return await self._conducted(found, rollout, model, began, let_go)
        finally:
            found.observe_with(None)
            for lease in held:
                lease.release()

    async def _conducted(
        self,
        found: LiveAlias,
        rollout: Rollout,
        model: Callable[[], Model | None],
        began: Callable[[str], None],
        look: Callable[[], None] = lambda: None,
    ) -> TakenBack | None:
        """Follows a rollout from decision to decision. `look` is called before each."""
        generation, target, watching = found.generation, rollout.candidate, rollout.watching
        while generation == found.generation:
            look()
            decision = rollout.decide(self._lost(target, watching))
            if decision.phase is None:
                await _either(rollout.changed, found.moved, TICK)
                rollout.changed.clear()
                continue
            evidence = rollout.evidence()
            course = rollout.course.to(
                decision.phase, self._wall(), step=decision.step or rollout.course.step,
                reason=decision.reason, evidence=evidence,
            )  # fmt: skip
            if decision.phase is Phase.CANARY:
                now = model()
                if now is not None:
                    rollout.follow(self.policy(now))
            rollout.move(course)
            if decision.phase is Phase.WATCHING and not watching:
                self._save(found.name, found.alias, course)  # a restart goes on with the watch
                return None
            self._changed(found, rollout)
            if decision.phase is Phase.DONE:
                return None
            if decision.phase in TAKEN_BACK:
                outcome = "refused" if decision.phase is Phase.REFUSED else "rolled_back"
                return TakenBack(target, outcome, decision.reason or "")
            began(rollout.shown)
        self._overtaken(found, rollout)
        return None

    def _begun(self, found: LiveAlias, policy: RolloutPolicy, target: Version) -> Rollout | None:
        """A new rollout, or the one that a restart interrupted, in its phase and step. A phase that the
        policy does not have any more is skipped; None where no other follows."""
        service = found.serving or found.last_good
        saved = self.course(found.name, found.alias)
        now = self._wall()
        known = saved is not None and saved.version == target.version
        if saved is not None and known and saved.phase in BEFORE_SERVING:
            course, phase = replace(saved, since=now), saved.phase
            if phase is not Phase.HELD and (follows := self._phase(phase, policy, saved)) is not phase:
                if follows is None:
                    return None
                course = course.to(follows, now, reason=f"the policy has no phase {phase} any more")
                course = replace(course, paused=saved.paused)
        else:
            course = Course(target.version)
            if saved is not None and known and saved.phase is Phase.CHECKING:
                course = replace(course, steps=saved.steps, shadow=saved.shadow)
            course = course.to(self._phase(Phase.REPLAYING, policy, course) or Phase.CANARY, now)
        course = replace(course, service=None if service is None else service.version)
        return self._live(found, policy, course, target, service)

    def _phase(self, first: Phase, policy: RolloutPolicy, course: Course) -> Phase | None:
        """The phase `first`, or the next one that the policy has; None without one. A canary that has begun
        goes on with its steps."""
        if first is Phase.REPLAYING and policy.replay is not None and self._replays is not None:
            return Phase.REPLAYING
        if first in UNSEEN and shadow_of(policy, course) is not None:
            return Phase.SHADOWING
        steps = policy.canary.steps if course.steps is None else course.steps
        return Phase.CANARY if steps or first is Phase.CANARY else None

    def _live(
        self,
        found: LiveAlias,
        policy: RolloutPolicy,
        course: Course,
        target: Version,
        service: Version | None,
    ) -> Rollout:
        return Rollout(
            target, policy, course, service=service, clock=self._clock,
            counted=lambda arm: self._counted(found.name, found.alias, arm),
            record=lambda: found.in_service,
        )  # fmt: skip

    def _begin_replay(self, found: LiveAlias, rollout: Rollout) -> asyncio.Task[None]:
        """Lets the candidate answer captured requests, in a task of its own."""
        policy, service = rollout.policy.replay, found.serving or found.last_good
        assert self._replays is not None
        assert policy is not None
        assert service is not None
        rollout.replay = self._replays.report(rollout.candidate, service, policy)
        task = asyncio.get_running_loop().create_task(self._replays.run(rollout.replay))
        task.add_done_callback(lambda _: rollout.changed.set())
        return task

    def _begin_shadow(self, found: LiveAlias, rollout: Rollout) -> asyncio.Task[None]:
        """Lets the candidate answer copies of requests, in a task of its own."""
        policy, service = rollout.shadows, found.serving or found.last_good
        assert policy is not None
        assert service is not None
        if rollout.shadow is None:
            rollout.shadow = Shadow(
                rollout.candidate, service, policy, self._manager, changed=rollout.changed.set
            )
        return asyncio.get_running_loop().create_task(rollout.shadow.run())

    def records(self, found: LiveAlias, model: Model, serving: Version) -> None:
        """Records the requests of `serving` from now on, if the policy may compare it with a later one."""
        if not self.policy(model).watch:
            found.record(None)
        elif found.in_service is None or found.in_service.version != serving:
            found.record(found.recorded.get(serving) or InService(serving, self._clock))

    def crash_loop(self, found: LiveAlias, target: Version, service: Version, reason: str) -> TakenBack:
        """Takes back a version that crashed again and again soon after its swap, without a watch."""
        why = f"crash loop: {reason}"
        course = Course(target.version, service=service.version)
        course = course.to(Phase.ROLLED_BACK, self._wall(), reason=why, evidence={"reference": "none"})
        self._save(found.name, found.alias, course)
        evidence = course.changes[-1].get("evidence")
        self._emit(
            RolloutChanged(
                found.name, found.alias, target.version, service.version, course.phase.value, why, evidence
            )
        )
        return TakenBack(target, "rolled_back", why)

    def _lost(self, target: Version, watching: bool) -> str | None:
        """Why the candidate cannot answer any more: it ended again and again, or was unloaded. One that
        serves may be unloaded: the next request loads it."""
        failure = self._manager.failure(target)
        if watching:
            failed = failure is not None and failure.code == "MODEL_UNAVAILABLE"
            return failure.message if failure is not None and failed else None
        if failure is not None:
            return failure.message
        return None if self._manager.is_ready(target) else f"{target} is not loaded any more"

    def _overtaken(self, found: LiveAlias, rollout: Rollout) -> None:
        """The alias moved, was deleted, or another gateway has taken the candidate back."""
        verdict, own = found.verdict, self.course(found.name, found.alias)
        if verdict is not None and verdict.version == rollout.candidate.version:
            phase = Phase.REFUSED if verdict.outcome == "refused" else Phase.ROLLED_BACK
            reason = ELSEWHERE + verdict.reason.removeprefix(ELSEWHERE)
        else:
            phase = Phase.SUPERSEDED
            goal = None if found.desired is None else found.desired.version
            moved = goal is not None and goal != rollout.candidate.version
            reason = f"the alias moved to version {goal}" if moved else "the alias was deleted or moved again"
        evidence = rollout.evidence()
        rollout.move(rollout.course.to(phase, self._wall(), reason=reason, evidence=evidence))
        if phase is not Phase.SUPERSEDED and own is not None and own.phase in TAKEN_BACK:
            # A peer's verdict, which the registry does not hold: it keeps its time.
            rollout.course = replace(rollout.course, recorded=own.recorded, since=own.since)
        elif phase is not Phase.SUPERSEDED:
            rollout.course = replace(rollout.course, recorded=True)
        self._changed(found, rollout)

    def say(self, found: LiveAlias, verb: str) -> None:
        """A person's word: pause, resume, abort, finish. Raises Problem where no rollout is under way."""
        rollout = found.rollout
        if rollout is None:
            message = f"no rollout of {found.name}@{found.alias} is under way"
            raise Problem("ROLLOUT_REFUSED", message, hint="gateway rollout shows which are")
        if verb == "pause":
            rollout.pause()
        elif verb == "resume" and rollout.course.phase is Phase.HELD:
            course = rollout.course
            phase = self._phase(course.stage, rollout.policy, course)
            if phase is None:  # nothing that it was held in is left
                rollout.order = "finish"
            else:
                step = course.step if phase is course.stage else 0
                rollout.move(course.to(phase, self._wall(), step=step, reason="resumed"))
                found.show(self._wall(), rollout.shown)
        elif verb == "resume":
            rollout.resume()
        else:
            rollout.order = verb
        self._save(found.name, found.alias, rollout.course)
        rollout.changed.set()

    def _changed(self, found: LiveAlias, rollout: Rollout) -> None:
        course = rollout.course
        saved = self.course(found.name, found.alias)
        if course.phase is not Phase.SUPERSEDED or saved is None or saved.version == course.version:
            self._save(found.name, found.alias, course)
        event = RolloutChanged(
            found.name, found.alias, course.version, course.service, rollout.shown, course.reason,
            rollout.evidence() if not course.changes else course.changes[-1].get("evidence"),
        )  # fmt: skip
        self._emit(event)


def _has_served(found: LiveAlias, model: Model, target: Version) -> bool:
    """Whether a version has proved itself under an alias: it needs no steps and no watch."""
    entry = model.aliases.get(found.alias)
    if entry is not None and target.version in (*entry.previous, entry.last_good):
        return True
    stretches = [served for served in found.history if served.version == target.version]
    return not all((served.reason or "").startswith(ROLLED_BACK) for served in stretches)


async def _either(one: asyncio.Event, other: asyncio.Event, timeout: float) -> None:
    """Returns when one of them is set, or after `timeout` seconds."""
    waiting = [asyncio.ensure_future(event.wait()) for event in (one, other)]
    try:
        await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for waiter in waiting:
            waiter.cancel()
