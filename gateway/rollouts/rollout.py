"""One rollout: a candidate and the version in service, side by side under one alias.

`Course` is the part of a rollout that survives a restart; `Rollout` is the live half, which assigns
callers, counts what both versions did and asks the guards. Knows versions and outcomes; no HTTP, no manager.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from gateway.quantities import utc
from gateway.rollouts.canary import assigned
from gateway.rollouts.guards import Guards, Limits, Outcome
from gateway.rollouts.phases import FOLLOWS, Next, Phase, Seen, next_step

if TYPE_CHECKING:
    from gateway.policy import RolloutPolicy
    from gateway.registries.base import Version
    from gateway.rollouts.replay import Report

#: So many changes of a rollout are remembered.
CHANGES_KEPT: Final = 50
#: Calls faster than this, in seconds, count as equally fast: which of two processes has the warmer caches is
#: no difference between two versions.
FELT_SECONDS: Final = 0.005


@dataclass(frozen=True, slots=True)
class Course:
    """The durable state of a rollout. `version` is the candidate, `service` the version it is compared with.

    `steps`: the percentages of the promotion, None for the policy's. `since`: the unix time of the phase or
    step. `recorded`: the registry has held the verdict, so only the registry counts from then on. `changes`:
    the changes, oldest first.
    """

    version: str
    service: str | None = None
    phase: Phase = Phase.CHECKING
    step: int = 0
    steps: tuple[float, ...] | None = None
    paused: bool = False
    reason: str | None = None
    since: float = 0.0
    recorded: bool = False
    changes: tuple[Mapping[str, Any], ...] = ()

    @property
    def stage(self) -> Phase:
        """The phase; the one that was left for it while the rollout is held."""
        if self.phase is not Phase.HELD:
            return self.phase
        before = [change["phase"] for change in self.changes if change["phase"] != Phase.HELD]
        return Phase(before[-1]) if before else Phase.CANARY

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Course:
        """The inverse of `to_json`."""
        facts = dict(value)
        steps = facts.get("steps")
        facts["phase"] = Phase(facts["phase"])
        facts["steps"] = None if steps is None else tuple(steps)
        facts["changes"] = tuple(facts.get("changes", ()))
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
        return replace(self, phase=phase, step=step, reason=reason, since=now, paused=False, changes=kept)


class Rollout:
    """A rollout in progress. `changed` is set when there may be something to decide. `counted` is called with
    the arm of each request: `candidate` or `service`."""

    def __init__(
        self,
        candidate: Version,
        policy: RolloutPolicy,
        course: Course,
        *,
        counted: Callable[[str], None] = lambda arm: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.candidate = candidate
        self.policy = policy
        self.course = course
        self.changed = asyncio.Event()
        self.order: str | None = None
        #: What the captured requests have shown; None before the replay begins.
        self.replay: Report | None = None
        self.retried = 0
        self.felt = 0
        self._counted = counted
        self._clock = clock
        self._began = clock()
        self._paused_at = self._began if course.paused else None
        self._requests = 0
        self._header = b""
        self._steps: tuple[float, ...] = (50.0,)
        self.follow(policy)
        limits = policy.guards
        self.guards = Guards(
            Limits(errors=limits.errors, latency=limits.latency, output=limits.output),
            share=self._steps[min(course.step, len(self._steps) - 1)] / 100,
        )

    def __repr__(self) -> str:
        return f"<Rollout of {self.candidate}, {self.shown}>"

    def follow(self, policy: RolloutPolicy) -> None:
        """Sets the policy. A change during a rollout applies from the next step."""
        self.policy = policy
        self._header = (policy.canary.key or "").lower().encode()
        self._steps = self.course.steps or tuple(policy.canary.steps) or self._steps

    @property
    def steps(self) -> tuple[float, ...]:
        return self._steps

    @property
    def has_steps(self) -> bool:
        """Whether a canary follows the replay."""
        steps = self.course.steps if self.course.steps is not None else self.policy.canary.steps
        return bool(steps)

    @property
    def percent(self) -> float:
        """The share of the callers that the candidate gets now."""
        if self.course.stage is Phase.REPLAYING:
            return 0.0
        return self.steps[min(self.course.step, len(self.steps) - 1)]

    @property
    def shown(self) -> str:
        """The phase as text for people, such as `canary 25 %`."""
        if self.course.phase is Phase.CANARY:
            return f"canary {self.percent:g} %"
        return self.course.phase.value

    @property
    def retries(self) -> bool:
        return self.policy.canary.retry

    # Requests.

    def caller(self, headers: Mapping[bytes, bytes], request_id: str) -> str:
        """The key by which the policy identifies the caller."""
        named = headers.get(self._header) if self._header else None
        return request_id if named is None else named.decode("latin-1")

    def takes(self, caller: str) -> bool:
        """Whether the candidate answers this caller now."""
        return assigned(caller, self.candidate.name, self.candidate.version, self.percent)

    def observe(
        self,
        caller: str,
        *,
        candidate: bool,
        failed: bool,
        seconds: float = 0.0,
        violated: bool = False,
        repeats: bool = False,
    ) -> None:
        """Records a finished request. `seconds`: the duration of the model's call. `repeats`: it failed, and
        the version in service answers it."""
        self._counted("candidate" if candidate else "service")
        if self.course.stage is Phase.REPLAYING:
            return  # there is nothing to compare it with
        outcome = Outcome(failed, max(seconds, FELT_SECONDS), violated, caller)
        self.guards.observe(outcome, candidate=candidate)
        if candidate:
            self._requests += 1
            self.retried += repeats
            self.felt += failed and not repeats
        if self.guards.breached is not None or (candidate and self._requests >= self.policy.canary.requests):
            self.changed.set()

    # Decisions.

    def seen(self, lost: str | None) -> Seen:
        breached = None
        if self.guards.breached is not None:
            breached = str(self.guards.verdict())
        replay = self.replay
        return Seen(
            self.course.phase,
            self.course.step,
            len(self.steps) if self.has_steps or self.course.stage is Phase.CANARY else 0,
            self.seconds,
            self._requests,
            breached,
            lost,
            self.order,
            self.course.paused,
            None if replay is None else replay.outcome,
            "" if replay is None else str(replay),
        )

    @property
    def seconds(self) -> float:
        """The duration of the step so far, without pauses."""
        return (self._paused_at if self._paused_at is not None else self._clock()) - self._began

    def decide(self, lost: str | None) -> Next:
        """Decides what happens next. Before a step ends, the remaining requests are compared; the moment
        depends on time and counts, never on the answers."""
        decision = next_step(self.policy, self.seen(lost))
        if decision.phase in (Phase.CANARY, Phase.DONE, Phase.HELD) and self.order is None:
            self.guards.end_block()
            decision = next_step(self.policy, self.seen(lost))
        return decision

    def move(self, course: Course) -> None:
        """Continues with `course`: the clock and the count of requests start again."""
        self.course = course
        self._began = self._clock()
        self._paused_at = None
        self._requests = 0
        if course.phase is Phase.REPLAYING:
            self.replay = None

    def pause(self) -> None:
        if self._paused_at is None:
            self._paused_at = self._clock()
            self.course = replace(self.course, paused=True)

    def resume(self) -> None:
        if self._paused_at is not None:
            self._began += self._clock() - self._paused_at
            self._paused_at = None
            self.course = replace(self.course, paused=False)

    def evidence(self) -> dict[str, Any]:
        """The evidence of the guards, JSON-ready. `retried`: failed requests that the version in service then
        answered. `felt`: failures of the candidate that callers saw."""
        if self.course.stage is Phase.REPLAYING:
            return {} if self.replay is None else {"replay": self.replay.evidence()}
        return {**self.guards.verdict().evidence, "retried": self.retried, "felt": self.felt}

    def step_view(self) -> dict[str, Any]:
        """How far the step is; step 0 is the replay, which no caller takes part in."""
        canary = self.policy.canary
        if self.course.stage is Phase.REPLAYING:
            return {
                "number": 0,
                "of": len(self.steps) if self.has_steps else 0,
                "percent": 0.0,
                "seconds": round(self.seconds, 1),
                "seconds_wanted": 0.0,
                "requests": 0 if self.replay is None else self.replay.requests,
                "requests_wanted": 0 if self.replay is None else self.replay.wanted,
                "paused": self.course.paused,
            }
        return {
            "number": self.course.step + 1,
            "of": len(self.steps),
            "percent": self.percent,
            "seconds": round(self.seconds, 1),
            "seconds_wanted": canary.every,
            "requests": self._requests,
            "requests_wanted": canary.requests,
            "paused": self.course.paused,
        }
