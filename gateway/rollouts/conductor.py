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
from typing import TYPE_CHECKING, Any, Final

from gateway.errors import Problem
from gateway.events import Emit, RolloutChanged
from gateway.rollouts.before import Reference
from gateway.rollouts.course import policy_of_step, shadow_of, steps_of
from gateway.rollouts.phases import BEFORE_SERVING, STOPPED, TAKEN_BACK, UNDER_WAY, UNSEEN, Phase
from gateway.rollouts.records import ROLLBACK, has_served, is_other
from gateway.rollouts.rollout import InService, Rollout
from gateway.rollouts.shadow import Shadow
from gateway.rollouts.verdicts import ELSEWHERE

if TYPE_CHECKING:
    from gateway.registries.base import Model, Version
    from gateway.rollout_settings import RolloutPolicy
    from gateway.rollouts.alias import LiveAlias
    from gateway.rollouts.course import Course
    from gateway.rollouts.memory import Courses
    from gateway.rollouts.replay import Replays, Report
    from gateway.serving.manager import Lease, Manager
    from loaders.signature import Signature

log = logging.getLogger("gateway.aliases")

#: A rollout is looked at this often, in seconds, although nothing happened.
TICK: Final = 1.0
BEGINS: Final = UNDER_WAY | {Phase.CHECKING}
"""The phases of a rollout that has not ended."""


class TakenBack(Problem):
    """A candidate that does not replace the version in service. `outcome`: `rolled_back` or `refused`."""

    def __init__(self, target: Version, outcome: str, reason: str) -> None:
        said = outcome.replace("_", " ")
        super().__init__("ROLLOUT_REFUSED", f"{target} was {said}: {reason}")
        self.outcome = outcome
        self.reason = reason


class Conductor:
    """`courses` remembers the rollouts. `policy` gives the policy that applies to a model. `counted` is
    called with the model, the alias and the arm of each request. `replays` lets a candidate answer captured
    requests."""

    def __init__(
        self,
        manager: Manager,
        courses: Courses,
        *,
        policy: Callable[[Model], RolloutPolicy],
        emit: Emit = lambda event: None,
        counted: Callable[[str, str, str], None] = lambda name, alias, arm: None,
        replays: Replays | None = None,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._manager = manager
        self.courses = courses
        self.policy = policy
        self._emit = emit
        self._counted = counted
        self._replays = replays
        self._wall = wall
        self._clock = clock

    def course(self, name: str, alias: str) -> Course | None:
        """The last rollout of an alias, also if it has ended."""
        return self.courses.of(name, alias)

    def settled(self, found: LiveAlias) -> str:
        """The phase of an alias without a rollout under way and without a verdict."""
        if found.serving is None:
            return "unloaded"
        phase = self.courses.phase(found.name, found.alias, found.serving.version)
        ended = phase is Phase.DONE and found.serving == found.desired
        return Phase.DONE.value if ended else "serving"

    def phase(self, found: LiveAlias) -> str | None:
        """The phase of the rollout of the version that the alias points to, also if it has ended. None if
        there was none."""
        if found.rollout is not None:
            return found.rollout.course.phase.value
        number = None if found.desired is None else found.desired.version
        phase = None if number is None else self.courses.phase(found.name, found.alias, number)
        if phase not in (None, Phase.CHECKING):
            return phase.value
        return found.phase if found.phase in STOPPED else None

    # Actions.

    def wanted(self, found: LiveAlias, model: Model, target: Version) -> bool:
        """Whether `target` goes through steps before it serves: the policy has steps, or they have begun, and
        another version can answer meanwhile. A version that has served before takes only the steps that its
        promotion names."""
        service = found.serving or found.last_good
        if not is_other(service, target) or target != found.desired or found.moved_by == ROLLBACK:
            return False
        course = self._known(found, target)
        if course is not None and course.phase in UNDER_WAY:
            return course.phase is not Phase.WATCHING  # after the swap, its steps are over
        policy = self.policy(model)
        compares = self._replayed(policy) or shadow_of(policy, course) is not None
        if not (compares or steps_of(policy, course)):
            return False
        planned = course is not None and course.phase is Phase.CHECKING
        named = planned and course is not None and (course.steps is not None or course.shadow is not None)
        return named or not has_served(found, model, target)

    def _known(self, found: LiveAlias, target: Version) -> Course | None:
        """The last rollout of an alias, if it is that of this version."""
        course = self.course(found.name, found.alias)
        return course if course is not None and course.version == target.version else None

    def _replayed(self, policy: RolloutPolicy) -> bool:
        return self._replays is not None and policy.replay is not None

    def rehearsal(
        self, found: LiveAlias, model: Model, target: Version, service: Version | None, *, named: bool
    ) -> Report | None:
        """An empty report for the replay that a rollout of `target` would begin with; None if it would not
        replay. `named`: whether the promotion names steps. `Replays.run` fills it."""
        policy = self.policy(model)
        if self._replays is None or policy.replay is None or service is None:
            return None
        if not is_other(service, target) or not (named or not has_served(found, model, target)):
            return None
        return self._replays.report(target, service, policy.replay)

    async def rehearse(self, report: Report, signature: Signature | None) -> None:
        """Replays, without a rollout. `signature`: that of the version in service, if it is not loaded."""
        assert self._replays is not None
        await self._replays.run(report, signature=signature)

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
        course = self._known(found, target)
        resumed = course is not None and course.phase is Phase.WATCHING
        policy = self.policy(model)
        if course is not None and resumed:
            policy = policy_of_step(course, policy)
            service = service if course.service is None else model.versions.get(course.service)
        if not is_other(service, target) or not policy.watch or target != found.desired:
            why = "its policy has no watch" if not policy.watch else "there is no version to go back to"
            why = f"it serves ({why})"
            self.close(found, target, service, why)
            return False
        assert service is not None
        if course is None or not resumed:
            if found.moved_by == ROLLBACK or has_served(found, model, target):
                self.close(found, target, service, "it serves (it has served before)")
                return False
            if course is None or course.phase not in BEGINS:
                course = self.courses.new(found.name, found.alias, target.version)
            course = self.onto(course, policy, Phase.WATCHING)
        if course.before is None:
            last = found.in_service
            known = last is not None and last.version == service
            before = last.before.reference() if last is not None and known else Reference()
            course = replace(course, before=before.to_json())
        rollout = self._live(found, policy, replace(course, service=service.version), target, service)
        found.observe_with(rollout)
        self._changed(found, rollout)
        return True

    def close(self, found: LiveAlias, target: Version, service: Version | None, reason: str) -> None:
        """Records that the rollout of `target`, which serves, is over. A move without steps and watch is a
        rollout too; the first version of an alias takes the place of none."""
        course = self._known(found, target)
        if course is None or course.phase not in BEGINS:
            moved = service is not None and service != target and target == found.desired
            if not moved or service is None or (course is not None and course.phase is Phase.DONE):
                return
            course = replace(
                self.courses.new(found.name, found.alias, target.version), service=service.version
            )
        self._save(found, course.to(Phase.DONE, self._wall(), reason=reason), Phase.DONE.value)

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
            decision = rollout.decide(
                self._lost(target, watching), lambda: self._later(rollout, model(), watching=watching)
            )
            if decision.phase is None:
                await _either(rollout.changed, found.moved, TICK)
                rollout.changed.clear()
                continue
            held, later = decision.phase is Phase.HELD, self._later(rollout, model(), watching=watching)
            course = self.onto(
                rollout.course, rollout.policy if held else later, decision.phase, step=decision.step,
                reason=decision.reason, evidence=rollout.evidence(),
            )  # fmt: skip
            if held:
                course = replace(course, step=rollout.course.step)
            elif decision.phase in UNDER_WAY:
                rollout.follow(later)
            rollout.move(course)
            if decision.phase is Phase.WATCHING and not watching:
                self.courses.save(found.name, found.alias, course)  # a restart goes on with the watch
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

    def _later(self, rollout: Rollout, model: Model | None, *, watching: bool) -> RolloutPolicy:
        """The policy of the next phase or step. A watch keeps its own."""
        return rollout.policy if model is None or watching else self.policy(model)

    def _begun(self, found: LiveAlias, policy: RolloutPolicy, target: Version) -> Rollout | None:
        """A new rollout, or the one that a restart interrupted, in its phase and step. A phase that the
        policy does not have any more is skipped; None where no other follows."""
        service = found.serving or found.last_good
        course = self._known(found, target)
        now = self._wall()
        if course is not None and course.phase in BEFORE_SERVING:
            policy = policy_of_step(course, policy)
            phase, paused, order = course.phase, course.paused, course.order
            course = replace(course, since=now)
            if phase is not Phase.HELD and (follows := self.first_phase(phase, policy, course)) is not phase:
                if follows is None:
                    return None
                reason = f"the policy has no phase {phase} any more"
                course = replace(self.onto(course, policy, follows, reason=reason), paused=paused)
        else:
            if course is None or course.phase is not Phase.CHECKING:
                course = self.courses.new(found.name, found.alias, target.version)
            paused, order = course.paused, course.order
            first = self.first_phase(Phase.REPLAYING, policy, course) or Phase.CANARY
            course = replace(self.onto(course, policy, first), paused=paused)
        course = replace(course, service=None if service is None else service.version)
        rollout = self._live(found, policy, course, target, service)
        rollout.order = order
        return rollout

    def first_phase(self, first: Phase, policy: RolloutPolicy, course: Course) -> Phase | None:
        """The phase `first`, or the next one that the policy has; None without one. A canary that has begun
        goes on with its steps."""
        if first is Phase.REPLAYING and self._replayed(policy):
            return Phase.REPLAYING
        if first in UNSEEN and shadow_of(policy, course) is not None:
            return Phase.SHADOWING
        return Phase.CANARY if steps_of(policy, course) or first is Phase.CANARY else None

    def onto(
        self,
        course: Course,
        policy: RolloutPolicy,
        phase: Phase,
        *,
        step: int = 0,
        reason: str | None = None,
        **said: Any,
    ) -> Course:
        """The course in its next phase or step, which keeps the policy that it begins with."""
        if phase is Phase.CANARY and (steps := steps_of(policy, course)):
            said = {"percent": steps[min(step, len(steps) - 1)], **said}
        course = course.to(phase, self._wall(), step=step, reason=reason, **said)
        kept = policy.model_dump(mode="json") if phase in UNDER_WAY else None
        return replace(course, policy=kept)

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

    def ended_early(
        self, found: LiveAlias, target: Version, service: Version, phase: Phase, reason: str
    ) -> TakenBack:
        """Takes back a version without a step or a watch: a person aborted it before its first step, or it
        crashed again and again soon after its swap."""
        course = self._known(found, target)
        if course is None or course.phase not in BEGINS:
            course = self.courses.new(found.name, found.alias, target.version)
        course = replace(course, service=service.version)
        course = course.to(phase, self._wall(), reason=reason, evidence={"reference": "none"})
        self._save(found, course, course.phase.value)
        return TakenBack(target, "rolled_back", reason)

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

    def _changed(self, found: LiveAlias, rollout: Rollout) -> None:
        evidence = None if rollout.course.changes else rollout.evidence()
        self._save(found, rollout.course, rollout.shown, evidence)

    def _save(
        self, found: LiveAlias, course: Course, shown: str, evidence: dict[str, Any] | None = None
    ) -> None:
        """Saves a change and publishes it. `evidence`: if the change has none."""
        if course.phase is Phase.SUPERSEDED:
            self.courses.superseded(found.name, found.alias, course)
        else:
            self.courses.save(found.name, found.alias, course)
        known = course.evidence
        self._emit(
            RolloutChanged(
                found.name, found.alias, course.version, course.service, shown, course.reason,
                evidence if known is None else dict(known),
            )
        )  # fmt: skip


async def _either(one: asyncio.Event, other: asyncio.Event, timeout: float) -> None:
    """Returns when one of them is set, or after `timeout` seconds."""
    waiting = [asyncio.ensure_future(event.wait()) for event in (one, other)]
    try:
        await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for waiter in waiting:
            waiter.cancel()
