"""One rollout: a candidate and the version in service, side by side under one alias.

`Course` is the part of a rollout that survives a restart; `Rollout` is the live half, which assigns
callers, counts what both versions did and asks the guards. `InService` records a version that may be compared
later. Knows versions and outcomes; no HTTP, no manager.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from gateway.quantities import utc
from gateway.rollout_settings import PRINCIPAL
from gateway.rollout_settings import Shadow as ShadowPolicy
from gateway.rollouts.afterwards import Afterwards
from gateway.rollouts.before import Before, Reference
from gateway.rollouts.canary import assigned
from gateway.rollouts.guards import ALPHA, Guards, Limits, Outcome
from gateway.rollouts.phases import FOLLOWS, TAKEN_BACK, UNSEEN, Next, Phase, Seen, next_step

if TYPE_CHECKING:
    from gateway.registries.base import Version
    from gateway.rollout_settings import RolloutPolicy
    from gateway.rollouts.agreement import Outcome as Compared
    from gateway.rollouts.replay import Report
    from gateway.rollouts.shadow import Shadow

#: The phase of an alias while its new version is watched, for people.
SERVED: Final = "serving (watching)"
#: So many changes of a rollout are remembered.
CHANGES_KEPT: Final = 50
#: Calls faster than this, in seconds, count as equally fast: which of two processes has the warmer caches is
#: no difference between two versions.
FELT_SECONDS: Final = 0.005
#: A request that the candidate has not answered after this time, in seconds, and after this many times the
#: slowest call of the version in service, goes to the version in service.
PATIENCE_SECONDS: Final = 2.0
PATIENCE_TIMES: Final = 10.0
#: So many crashes without an answer in between are a crash loop.
CRASHES: Final = 3
#: The part of the guards' alpha for a watch that follows a canary; the canary has the rest.
WATCH_SHARE: Final = 0.2


@dataclass(frozen=True, slots=True)
class Course:
    """The durable state of a rollout. `version` is the candidate, `service` the version it is compared with.

    `steps`: the percentages of the promotion, None for the policy's; `shadow`: its share of copied requests,
    likewise. `since`: the unix time of the phase or step. `recorded`: the registry has held the verdict, so
    only the registry counts from then on. `changes`: the changes, oldest first. `before`: the reference of a
    watch.
    """

    version: str
    service: str | None = None
    phase: Phase = Phase.CHECKING
    step: int = 0
    steps: tuple[float, ...] | None = None
    shadow: float | None = None
    paused: bool = False
    reason: str | None = None
    since: float = 0.0
    recorded: bool = False
    changes: tuple[Mapping[str, Any], ...] = ()
    before: Mapping[str, Any] | None = None

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


def shadow_of(policy: RolloutPolicy, course: Course | None) -> ShadowPolicy | None:
    """The policy for copies of requests: the share of the promotion overrides the policy's."""
    if course is None or course.shadow is None:
        return policy.shadow
    return (policy.shadow or ShadowPolicy()).model_copy(update={"share": course.shadow})


def _patience(slowest: float) -> float | None:
    """How long an answer may take, in seconds; None if no call is known yet. `slowest`: the longest call of
    the version in service."""
    return max(PATIENCE_SECONDS, PATIENCE_TIMES * slowest) if slowest else None


def hangs(patience: float | None, waited: float, stalled: float | None) -> bool:
    """Whether a request that was given up, after `waited` seconds, counts as a failure of its version: the
    version's call, or the wait and most of it for one call, took longer than an answer may take. In a queue
    that moves, the request would have had its turn. `stalled`: see `Batcher.stalled`; None: not given up."""
    if patience is None or stalled is None:
        return False
    return stalled >= patience or (waited >= patience and stalled >= patience / 2)


class InService:
    """The version that serves an alias whose policy has a watch: its last minutes are recorded. It has the
    methods that a request needs of `Rollout`."""

    retries = False

    def __init__(self, version: Version, clock: Callable[[], float] = time.monotonic) -> None:
        self.version = version
        self.before = Before(clock)
        self._slowest = 0.0

    @property
    def checks(self) -> bool:
        return self.before.checks

    @property
    def patience(self) -> float | None:
        return _patience(self._slowest)

    def caller(self, headers: Mapping[bytes, bytes], request_id: str, principal: str | None = None) -> str:
        return ""

    def versions(self, caller: str, serving: Version) -> tuple[Version, Version | None]:
        return serving, None

    def observe(
        self,
        caller: str,
        version: Version,
        *,
        failed: bool,
        refused: bool = False,
        seconds: float = 0.0,
        violated: bool | None = None,
        repeats: bool = False,
    ) -> None:
        """Records a finished request. Left out: one that failed because of its input, and one of an earlier
        version, which was on its way at a swap."""
        if version == self.version and not (failed and refused):
            self._slowest = max(self._slowest, seconds)
            self.before.observe(failed=failed, seconds=max(seconds, FELT_SECONDS), violated=violated)


class Rollout:
    """A rollout in progress. `service` is the version in service before it. `changed` is set when there may
    be something to decide. `counted` is called with the arm of each request: `candidate` or `service`.
    `record` gives the record of the version that serves the alias."""

    def __init__(
        self,
        candidate: Version,
        policy: RolloutPolicy,
        course: Course,
        *,
        service: Version | None = None,
        counted: Callable[[str], None] = lambda arm: None,
        record: Callable[[], InService | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.candidate = candidate
        self.service = service
        self.policy = policy
        self.course = course
        self.changed = asyncio.Event()
        self.order: str | None = None
        #: What the captured requests have shown; None before the replay begins.
        self.replay: Report | None = None
        #: The copies of requests; None before the shadow begins.
        self.shadow: Shadow | None = None
        self.retried = 0
        self.felt = 0
        self._counted = counted
        self._record = record
        self._clock = clock
        self._began = clock()
        self._paused_at = self._began if course.paused else None
        self._requests = 0
        self._crashes = 0
        self._crash_loop: str | None = None
        self._slowest = 0.0
        self._header = b""
        self._by_principal = False
        self._steps: tuple[float, ...] = (50.0,)
        self.follow(policy)
        self.guards: Guards | Afterwards
        limits = Limits(
            errors=policy.guards.errors, latency=policy.guards.latency, output=policy.guards.output
        )
        if course.phase is Phase.WATCHING:
            before = Reference() if course.before is None else Reference.from_json(course.before)
            after_steps = any(change["phase"] == Phase.CANARY.value for change in course.changes)
            alpha = ALPHA * WATCH_SHARE if after_steps else ALPHA
            self.guards = Afterwards(limits, before, alpha=alpha, repeats=self.retries)
            self._slowest = before.slowest
        else:
            alpha = ALPHA * (1 - WATCH_SHARE) if policy.watch else ALPHA
            self.guards = Guards(limits, share=self._share / 100, alpha=alpha)

    def __repr__(self) -> str:
        return f"<Rollout of {self.candidate}, {self.shown}>"

    def follow(self, policy: RolloutPolicy) -> None:
        """Sets the policy. A change during a rollout applies from the next step."""
        self.policy = policy
        self._by_principal = policy.canary.key == PRINCIPAL
        self._header = (policy.canary.key or "").lower().encode()
        self._steps = self.course.steps or tuple(policy.canary.steps) or self._steps

    @property
    def steps(self) -> tuple[float, ...]:
        return self._steps

    @property
    def shadows(self) -> ShadowPolicy | None:
        """The policy for copies of requests, None without a shadow."""
        return shadow_of(self.policy, self.course)

    @property
    def has_steps(self) -> bool:
        """Returns True if there is a canary."""
        steps = self.course.steps if self.course.steps is not None else self.policy.canary.steps
        return bool(steps)

    @property
    def _share(self) -> float:
        return self.steps[min(self.course.step, len(self.steps) - 1)]

    @property
    def percent(self) -> float:
        """The share of the callers that the candidate gets now."""
        return 0.0 if self.course.stage in UNSEEN else self._share

    @property
    def watching(self) -> bool:
        """Returns True if the candidate serves all callers."""
        return self.course.phase is Phase.WATCHING

    @property
    def shown(self) -> str:
        """The phase as text for people, such as `canary 25 %`."""
        if self.course.phase is Phase.CANARY:
            return f"canary {self.percent:g} %"
        return SERVED if self.watching else self.course.phase.value

    @property
    def retries(self) -> bool:
        return self.policy.canary.retry

    @property
    def copies(self) -> bool:
        """Returns True if the candidate gets copies of requests now."""
        return self.course.phase is Phase.SHADOWING and not self.course.paused

    @property
    def patience(self) -> float | None:
        return _patience(self._slowest)

    @property
    def checks(self) -> bool:
        return self.policy.guards.output is not None

    # Requests.

    def caller(self, headers: Mapping[bytes, bytes], request_id: str, principal: str | None = None) -> str:
        """The key by which the policy identifies the caller. `principal`: the name of the valid credential,
        None without one."""
        if self._by_principal:
            return request_id if principal is None else principal
        named = headers.get(self._header) if self._header else None
        return request_id if named is None else named.decode("latin-1")

    def takes(self, caller: str) -> bool:
        """Returns True if the candidate answers this caller now."""
        return assigned(caller, self.candidate.name, self.candidate.version, self.percent)

    def versions(self, caller: str, serving: Version) -> tuple[Version, Version | None]:
        if self.watching:
            return serving, self.service
        return (self.candidate, serving) if self.takes(caller) else (serving, None)

    def observe(
        self,
        caller: str,
        version: Version,
        *,
        failed: bool,
        refused: bool = False,
        seconds: float = 0.0,
        violated: bool | None = None,
        repeats: bool = False,
    ) -> None:
        """Records a finished request of either version. `seconds`: the duration of the model's call.
        `refused`: it failed because of its input. `repeats`: it failed, and the other version answers it."""
        candidate = version == self.candidate
        self._counted("candidate" if candidate else "service")
        if (recorded := self._record()) is not None:
            recorded.observe(
                caller, version, failed=failed, refused=refused, seconds=seconds, violated=violated
            )
        if self.course.stage in UNSEEN:
            self._slowest = max(self._slowest, seconds)
            return  # there is nothing to compare it with
        if self.watching and refused and not repeats:
            return  # perhaps the version before would refuse it too
        outcome = Outcome(failed, max(seconds, FELT_SECONDS), bool(violated), caller, repeats)
        self.guards.observe(outcome, candidate=candidate)
        if candidate:
            self._requests += 1
            self.retried += repeats
            self.felt += failed and not repeats
            if not failed:
                self._crashes = 0
        elif not failed:
            self._slowest = max(self._slowest, outcome.seconds)
        enough = candidate and not self.watching and self._requests >= self.policy.canary.requests
        if enough or self.guards.breached is not None:
            self.changed.set()

    def crashed(self, reason: str, *, final: bool) -> None:
        """A process of the candidate ended. Too many of them without an answer in between take it back.
        `final`: it is not started again."""
        self._crashes += 1
        if final or self._crashes >= CRASHES:
            times = "" if final else f" {self._crashes} times without an answer"
            self._crash_loop = f"crash loop: its process ended{times}: {reason}"
            self.changed.set()

    # Decisions.

    def seen(self, lost: str | None) -> Seen:
        breached = None
        if self.guards.breached is not None:
            breached = str(self.guards.verdict())
        compared, comparison = self._compared()
        return Seen(
            self.course.phase,
            self.course.step,
            len(self.steps) if self.has_steps or self.course.stage is Phase.CANARY else 0,
            self.seconds,
            self._requests,
            breached=breached,
            lost=self._crash_loop or lost,
            order=self.order,
            paused=self.course.paused,
            shadows=self.shadows is not None,
            compared=compared,
            comparison=comparison,
        )

    def _compared(self) -> tuple[Compared | None, str]:
        """The outcome of the replay or the shadow that is under way, None while it is open, and in words."""
        if self.course.phase is Phase.REPLAYING and self.replay is not None:
            return self.replay.outcome, str(self.replay)
        if self.course.phase is Phase.SHADOWING and self.shadow is not None:
            outcome = self.shadow.outcome(self.seconds)
            return outcome, "" if outcome is None else str(self.shadow)
        return None, ""

    @property
    def seconds(self) -> float:
        """The duration of the step so far, without pauses."""
        return (self._paused_at if self._paused_at is not None else self._clock()) - self._began

    def decide(self, lost: str | None) -> Next:
        """Decides what happens next. Before a step ends, the remaining requests are compared; the moment
        depends on time and counts, never on the answers."""
        decision = next_step(self.policy, self.seen(lost))
        if decision.phase not in (None, *TAKEN_BACK) and self.order is None:
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
        if self.course.stage is Phase.SHADOWING:
            return {} if self.shadow is None else {"shadow": self.shadow.evidence()}
        return {**self.guards.verdict().evidence, "retried": self.retried, "felt": self.felt}

    def step_view(self) -> dict[str, Any]:
        """How far the step is. `percent`: the share of the callers that the candidate answers. Step 0 is the
        replay, which no caller takes part in."""
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
        common = {
            "seconds": round(self.seconds, 1),
            "requests": self._requests,
            "paused": self.course.paused,
        }
        if self.watching:
            return {"percent": 100.0, "seconds_wanted": self.policy.watch, **common}
        shadow = self.shadows
        if self.course.stage is Phase.SHADOWING and shadow is not None:
            compared = 0 if self.shadow is None else self.shadow.requests
            wanted = {"seconds_wanted": shadow.within, "requests_wanted": shadow.requests}
            return {"percent": shadow.share * 100, **wanted, **common, "requests": compared, "copies": True}
        canary = self.policy.canary
        return {
            "number": self.course.step + 1,
            "of": len(self.steps),
            "percent": self.percent,
            "seconds_wanted": canary.every,
            "requests_wanted": canary.requests,
            **common,
        }
