"""The course of a rollout: its phase, its step and what happened so far. This is what survives a restart.

Pure: plain facts and JSON. Must not know requests, guards, a manager or where it is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from gateway.quantities import utc
from gateway.rollout_settings import RolloutPolicy
from gateway.rollout_settings import Shadow as ShadowPolicy
from gateway.rollouts.phases import FOLLOWS, UNDER_WAY, Phase

if TYPE_CHECKING:
    from typing import Self

#: So many changes of a rollout are remembered, and of one that a later rollout has replaced.
CHANGES_KEPT: Final = 50
EARLIER_CHANGES_KEPT: Final = 12
#: So many earlier rollouts of an alias are remembered.
EARLIER_KEPT: Final = 10


@dataclass(frozen=True, slots=True)
class Course:
    """The durable state of a rollout. `version` is the candidate, `service` the version it is compared with.

    `steps`: the percentages of the promotion, None for the policy's; `shadow`: its share of copied requests,
    likewise. `order`: what a person said before it began, `finish` or None. `since`: the unix time of the
    phase or step. `recorded`: the registry has held the verdict, so only the registry counts from then on.
    `changes`: the changes, oldest first. `before`: the reference of a
    watch. `policy`: the policy that the phase or step began with. `earlier`: the rollouts of the alias before
    this one, oldest first, as `put_away` writes them.
    """

    version: str
    service: str | None = None
    phase: Phase = Phase.CHECKING
    step: int = 0
    steps: tuple[float, ...] | None = None
    shadow: float | None = None
    paused: bool = False
    order: str | None = None
    reason: str | None = None
    since: float = 0.0
    recorded: bool = False
    changes: tuple[Mapping[str, Any], ...] = ()
    before: Mapping[str, Any] | None = None
    policy: Mapping[str, Any] | None = None
    earlier: tuple[Mapping[str, Any], ...] = ()

    @property
    def stage(self) -> Phase:
        """The phase; the one that was left for it while the rollout is held."""
        if self.phase is not Phase.HELD:
            return self.phase
        before = [change["phase"] for change in self.changes if change["phase"] != Phase.HELD]
        return Phase(before[-1]) if before else Phase.CANARY

    @property
    def evidence(self) -> Mapping[str, Any] | None:
        """The evidence of the last change."""
        return self.changes[-1].get("evidence") if self.changes else None

    def to_json(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`. Ignores what a newer gateway has added."""
        known = {field.name for field in fields(cls)}
        facts = {key: found for key, found in value.items() if key in known}
        steps = facts.get("steps")
        facts["phase"] = Phase(facts["phase"])
        facts["steps"] = None if steps is None else tuple(steps)
        for name in ("changes", "earlier"):
            facts[name] = tuple(facts.get(name, ()))
        return cls(**facts)

    def to(
        self, phase: Phase, now: float, *, step: int = 0, reason: str | None = None, **said: Any
    ) -> Course:
        """The course after a change of phase or step. Raises ValueError for one that the table does not
        have."""
        if phase not in FOLLOWS[self.phase]:
            raise ValueError(f"a rollout does not go from {self.phase} to {phase}")
        at = utc(now)
        change = {"at": at, "phase": phase.value, **({"reason": reason} if reason else {}), **said}
        kept = (*self.changes, change)[-CHANGES_KEPT:]
        return replace(
            self, phase=phase, step=step, reason=reason, since=now, paused=False, order=None, changes=kept
        )

    def put_away(self, now: float) -> tuple[Mapping[str, Any], ...]:
        """The earlier rollouts for the next one: with this one, unless it has nothing to tell: a swap without
        evidence is in the alias's history."""
        course = self
        if self.phase in UNDER_WAY:
            course = self.to(Phase.SUPERSEDED, now, reason="the alias moved")
        told = course.phase is not Phase.DONE or any(change.get("evidence") for change in course.changes)
        if not course.changes or not told:
            return self.earlier
        kept = {
            "version": course.version,
            "compared_with": course.service,
            "phase": course.phase.value,
            "reason": course.reason,
            "evidence": course.evidence,
            "changes": list(course.changes[-EARLIER_CHANGES_KEPT:]),
        }
        return (*self.earlier, kept)[-EARLIER_KEPT:]


def steps_of(policy: RolloutPolicy, course: Course | None) -> tuple[float, ...]:
    """The steps of a canary: those of the promotion override the policy's."""
    if course is not None and course.steps is not None:
        return course.steps
    return tuple(policy.canary.steps)


def shadow_of(policy: RolloutPolicy, course: Course | None) -> ShadowPolicy | None:
    """The policy for copies of requests: the share of the promotion overrides the policy's."""
    if course is None or course.shadow is None:
        return policy.shadow
    return (policy.shadow or ShadowPolicy()).model_copy(update={"share": course.shadow})


def policy_of_step(course: Course, now: RolloutPolicy) -> RolloutPolicy:
    """The policy that the phase or step began with: a change applies from the next one. `now`: the present
    policy, for a course that has not begun, or that another edition of the gateway has written."""
    try:
        return now if course.policy is None else RolloutPolicy.model_validate(course.policy)
    except ValidationError:
        return now
