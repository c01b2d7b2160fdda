"""One rollout: a candidate and the version in service, side by side under one alias.

`Rollout` assigns callers, counts what both versions did and asks the guards; its `Course` survives a restart.
`InService` records a version that may be compared later. Knows versions and outcomes; no HTTP, no manager.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from gateway.rollout_settings import PRINCIPAL
from gateway.rollouts.afterwards import Afterwards
from gateway.rollouts.before import Before, Reference
from gateway.rollouts.canary import assigned
from gateway.rollouts.course import shadow_of, steps_of
from gateway.rollouts.guards import ALPHA, Guards, Limits, Outcome
from gateway.rollouts.phases import TAKEN_BACK, UNSEEN, Next, Phase, Seen, next_step

if TYPE_CHECKING:
    from gateway.registries.base import Version
    from gateway.rollout_settings import RolloutPolicy
    from gateway.rollout_settings import Shadow as ShadowPolicy
    from gateway.rollouts.agreement import Outcome as Compared
    from gateway.rollouts.course import Course
    from gateway.rollouts.replay import Report
    from gateway.rollouts.shadow import Shadow

#: The phase of an alias while its new version is watched, for people.
SERVED: Final = "serving (watching)"
#: Calls faster than this, in seconds, count as equally fast: which of two processes has the warmer caches is
#: no difference between two versions.
FELT_SECONDS: Final = 0.005
#: The percentage of a canary without steps, which only another edition of the gateway can leave behind.
ANY_SHARE: Final = 50.0
#: A request that the candidate has not answered after this time, in seconds, and after this many times the
#: slowest call of the version in service, goes to the version in service.
PATIENCE_SECONDS: Final = 2.0
PATIENCE_TIMES: Final = 10.0
#: So many crashes without an answer in between are a crash loop.
CRASHES: Final = 3
#: The part of the guards' alpha for a watch that follows a canary; the canary has the rest.
WATCH_SHARE: Final = 0.2


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
        #: Its answers to captured and copied requests when a process ended last.
        self._answers = 0
        self._crash_loop: str | None = None
        self._slowest = 0.0
        self._header = b""
        self._by_principal = False
        self.guards: Guards | Afterwards
        self.follow(policy)
        if course.phase is Phase.WATCHING:
            before = Reference() if course.before is None else Reference.from_json(course.before)
            after_steps = any(change["phase"] == Phase.CANARY.value for change in course.changes)
            alpha = ALPHA * WATCH_SHARE if after_steps else ALPHA
            self.guards = Afterwards(_limits(policy), before, alpha=alpha, repeats=self.retries)
            self._slowest = before.slowest
        else:
            self.guards = self._guards()

    def __repr__(self) -> str:
        return f"<Rollout of {self.candidate}, {self.shown}>"

    def follow(self, policy: RolloutPolicy) -> None:
        """Sets the policy of the phase or step that begins. Other limits mean that the guards start again."""
        changed = policy.guards != self.policy.guards
        self.policy = policy
        self._by_principal = policy.canary.key == PRINCIPAL
        self._header = (policy.canary.key or "").lower().encode()
        if changed:
            self.guards = self._guards()

    def _guards(self) -> Guards:
        alpha = ALPHA * (1 - WATCH_SHARE) if self.policy.watch else ALPHA
        return Guards(_limits(self.policy), share=self._share / 100, alpha=alpha)

    @property
    def steps(self) -> tuple[float, ...]:
        return steps_of(self.policy, self.course)

    def following(self, later: RolloutPolicy) -> int | None:
        """The number of the next step, by the policy that holds from then on: the first one with a larger
        share, so that a caller who is in stays in. None if there is none."""
        steps, now = steps_of(later, self.course), self.percent
        return next((number for number, percent in enumerate(steps) if percent > now), None)

    @property
    def shadows(self) -> ShadowPolicy | None:
        """The policy for copies of requests, None without a shadow."""
        return shadow_of(self.policy, self.course)

    @property
    def _share(self) -> float:
        return self.steps[min(self.course.step, len(self.steps) - 1)] if self.steps else ANY_SHARE

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
        answers = sum(one.answers for one in (self.replay, self.shadow) if one is not None)
        self._crashes = self._crashes + 1 if answers == self._answers else 1
        self._answers = answers
        if final or self._crashes >= CRASHES:
            times = "" if final else f" {self._crashes} times without an answer"
            self._crash_loop = f"crash loop: its process ended{times}: {reason}"
            self.changed.set()

    # Decisions.

    def seen(self, lost: str | None, later: RolloutPolicy) -> Seen:
        breached = None
        if self.guards.breached is not None:
            breached = str(self.guards.verdict())
        compared, comparison = self._compared()
        return Seen(
            self.course.phase,
            self.following(later),
            self.seconds,
            self._requests,
            breached=breached,
            suspected=None if breached else self._suspected(),
            lost=self._crash_loop or lost,
            order=self.order,
            paused=self.course.paused,
            shadows=shadow_of(later, self.course) is not None,
            compared=compared,
            comparison=comparison,
        )

    def _suspected(self) -> str | None:
        """What keeps a step from its end although it has its time and its requests; None if nothing does."""
        canary = self.policy.canary
        full = self._requests >= canary.requests and self.seconds >= canary.every
        if self.course.phase is not Phase.CANARY or not full or isinstance(self.guards, Afterwards):
            return None
        return self.guards.suspected()

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

    def decide(self, lost: str | None, later: Callable[[], RolloutPolicy] | None = None) -> Next:
        """Decides what happens next. `later` gives the policy that holds from the next phase or step; it is
        called only when one begins. None: the same. Before a step ends, the remaining requests are compared;
        the moment depends on time and counts, never on the answers."""
        decision = next_step(self.policy, self.seen(lost, self.policy))
        if decision.phase in (None, *TAKEN_BACK):
            return decision
        if self.order is None:
            self.guards.end_block()
        policy = self.policy if later is None else later()
        return next_step(self.policy, self.seen(lost, policy), policy)

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
                "of": len(self.steps),
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
        canary, suspected = self.policy.canary, self._suspected()
        return {
            **({} if suspected is None else {"waits": suspected}),
            "number": self.course.step + 1,
            "of": len(self.steps),
            "percent": self.percent,
            "seconds_wanted": canary.every,
            "requests_wanted": canary.requests,
            **common,
        }


def _limits(policy: RolloutPolicy) -> Limits:
    guards = policy.guards
    return Limits(errors=guards.errors, latency=guards.latency, output=guards.output)
