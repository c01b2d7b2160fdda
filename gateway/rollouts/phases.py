"""The phases of a rollout, and the decision about what comes next.

With a replay, a candidate first answers captured requests, which no caller sees. Then it gets a growing
share of the callers, step by step, while the version in service answers the others. It advances when enough
time has passed *and* enough requests were answered. A breached guard rolls it back. Too little traffic is
never a pass.

Pure: must not know a clock, a registry or requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from gateway.rollouts.agreement import Outcome

if TYPE_CHECKING:
    from gateway.policy import RolloutPolicy


class Phase(StrEnum):
    """The phase of a rollout. During the checks before the first step, the alias has its own phase."""

    CHECKING = "checking"
    REPLAYING = "replaying"
    CANARY = "canary"
    HELD = "held"
    DONE = "done"
    REFUSED = "refused"
    ROLLED_BACK = "rolled_back"
    ABORTED = "aborted"
    SUPERSEDED = "superseded"


FOLLOWS: Final[dict[Phase, frozenset[Phase]]] = {
    Phase.CHECKING: frozenset(
        {Phase.REPLAYING, Phase.CANARY, Phase.HELD, Phase.REFUSED, Phase.SUPERSEDED}
    ),
    Phase.REPLAYING: frozenset(
        {
            Phase.CANARY, Phase.HELD, Phase.DONE, Phase.REFUSED, Phase.ROLLED_BACK, Phase.ABORTED,
            Phase.SUPERSEDED,
        }
    ),
    Phase.CANARY: frozenset(
        {
            Phase.CANARY, Phase.HELD, Phase.DONE, Phase.REFUSED, Phase.ROLLED_BACK, Phase.ABORTED,
            Phase.SUPERSEDED,
        }
    ),
    Phase.HELD: frozenset(
        {
            Phase.REPLAYING, Phase.CANARY, Phase.DONE, Phase.REFUSED, Phase.ROLLED_BACK, Phase.ABORTED,
            Phase.SUPERSEDED,
        }
    ),
    **dict.fromkeys(
        (Phase.DONE, Phase.REFUSED, Phase.ROLLED_BACK, Phase.ABORTED, Phase.SUPERSEDED), frozenset()
    ),
}  # fmt: skip
"""The phases that may follow each phase. A phase without followers ends the rollout."""

UNDER_WAY: Final = frozenset({Phase.REPLAYING, Phase.CANARY, Phase.HELD})
TAKEN_BACK: Final = frozenset({Phase.ROLLED_BACK, Phase.ABORTED, Phase.REFUSED})


@dataclass(frozen=True, slots=True)
class Seen:
    """The facts for a decision. `step` counts from 0. `seconds` and `requests` (of the candidate) are those
    of this step, without pauses. `breached`: a guard's finding. `lost`: why the candidate can no longer
    answer. `order`: a person's command, `finish` or `abort`. `replayed`: the outcome of the replay, None
    while it runs; `replay`: the same in words."""

    phase: Phase
    step: int
    steps: int
    seconds: float = 0.0
    requests: int = 0
    breached: str | None = None
    lost: str | None = None
    order: str | None = None
    paused: bool = False
    replayed: Outcome | None = None
    replay: str = ""


@dataclass(frozen=True, slots=True)
class Next:
    """`phase` None: nothing changes. `step`: the step that begins, if the phase is `canary`."""

    phase: Phase | None = None
    step: int = 0
    reason: str | None = None


WAIT: Final = Next()


def next_step(policy: RolloutPolicy, seen: Seen) -> Next:
    """Decides what a rollout does next. Findings against the candidate come first: a known breach overrides a
    person's command."""
    canary = policy.canary
    if seen.lost is not None:
        # Before the first step no caller has had it.
        lost = Phase.REFUSED if seen.phase is Phase.REPLAYING else Phase.ROLLED_BACK
        return Next(lost, reason=seen.lost)
    if seen.breached is not None:
        return Next(Phase.ROLLED_BACK, reason=seen.breached)
    if seen.order == "abort":
        return Next(Phase.ABORTED, reason="a person aborted it")
    if seen.order == "finish":
        return Next(Phase.DONE, reason="a person finished it")
    if seen.paused or seen.phase is Phase.HELD:
        return WAIT
    if seen.phase is Phase.REPLAYING:
        return _after_replay(policy, seen)
    if seen.seconds >= canary.every and seen.requests >= canary.requests:
        if seen.step + 1 >= seen.steps:
            return Next(Phase.DONE)
        return Next(Phase.CANARY, seen.step + 1)
    if seen.seconds >= max(canary.within, canary.every) and seen.requests < canary.requests:
        reason = f"too little traffic: {seen.requests} of {canary.requests} requests in {canary.within:g} s"
        return Next(Phase.HELD if policy.thin == "hold" else Phase.REFUSED, reason=reason)
    return WAIT


def _after_replay(policy: RolloutPolicy, seen: Seen) -> Next:
    match seen.replayed:
        case None:
            return WAIT
        case Outcome.PASSED:
            return Next(Phase.CANARY if seen.steps else Phase.DONE, reason=seen.replay)
        case Outcome.FAILED:
            return Next(Phase.REFUSED, reason=seen.replay)
        case Outcome.THIN:
            return Next(Phase.HELD if policy.thin == "hold" else Phase.REFUSED, reason=seen.replay)
