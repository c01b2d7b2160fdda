"""The phases of a rollout, and the decision about what comes next.

A candidate first answers captured requests (`replaying`) and copies of requests (`shadowing`), which no
caller sees. Then it gets a growing share of the callers, step by step, while the version in service answers
the others (`canary`). Then it serves, and the version before stays loaded for a while (`watching`). Each of
these is optional. A phase ends when enough time has passed *and* enough requests were answered. A breached
guard takes the candidate back. Too little traffic is never a pass.

Pure: must not know a clock, a registry or requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from gateway.quantities import shown_seconds
from gateway.rollouts.agreement import Outcome

if TYPE_CHECKING:
    from gateway.rollout_settings import RolloutPolicy


class Phase(StrEnum):
    """The phase of a rollout. During the checks before the first step, the alias has its own phase."""

    CHECKING = "checking"
    REPLAYING = "replaying"
    SHADOWING = "shadowing"
    CANARY = "canary"
    HELD = "held"
    WATCHING = "watching"
    DONE = "done"
    REFUSED = "refused"
    ROLLED_BACK = "rolled_back"
    ABORTED = "aborted"
    SUPERSEDED = "superseded"


STOPPED: Final = frozenset({Phase.REFUSED, Phase.ROLLED_BACK, Phase.ABORTED, Phase.SUPERSEDED})
_SERVES: Final = frozenset({Phase.WATCHING, Phase.DONE})

FOLLOWS: Final[dict[Phase, frozenset[Phase]]] = {
    Phase.CHECKING: frozenset({Phase.REPLAYING, Phase.SHADOWING, Phase.CANARY, Phase.HELD})
    | _SERVES
    | STOPPED,
    Phase.REPLAYING: frozenset({Phase.SHADOWING, Phase.CANARY, Phase.HELD}) | _SERVES | STOPPED,
    Phase.SHADOWING: frozenset({Phase.CANARY, Phase.HELD}) | _SERVES | STOPPED,
    Phase.CANARY: frozenset({Phase.CANARY, Phase.HELD}) | _SERVES | STOPPED,
    Phase.HELD: frozenset({Phase.REPLAYING, Phase.SHADOWING, Phase.CANARY}) | _SERVES | STOPPED,
    Phase.WATCHING: frozenset({Phase.DONE}) | STOPPED,
    **dict.fromkeys((Phase.DONE, *STOPPED), frozenset()),
}
"""The phases that may follow each phase. A phase without followers ends the rollout."""

UNSEEN: Final = frozenset({Phase.REPLAYING, Phase.SHADOWING})
"""The phases in which no caller gets an answer of the candidate."""
BEFORE_SERVING: Final = UNSEEN | {Phase.CANARY, Phase.HELD}
UNDER_WAY: Final = BEFORE_SERVING | {Phase.WATCHING}
TAKEN_BACK: Final = STOPPED - {Phase.SUPERSEDED}


@dataclass(frozen=True, slots=True)
class Seen:
    """The facts for a decision. `seconds` and `requests` (of the candidate) are those of this step, without
    pauses. `following`: the number of the canary's next step, which counts from 0; None after the last one.
    `shadows`: whether copies of requests follow. `compared`: the outcome of a replay or of a shadow, None
    while it is open; `comparison`: the same in words. `breached`: a guard's finding. `suspected`: that of a
    guard with strong evidence that is not yet proof. `lost`: why the candidate can no longer answer.
    `order`: a person's command, `finish` or `abort`."""

    phase: Phase
    following: int | None = None
    seconds: float = 0.0
    requests: int = 0
    breached: str | None = None
    suspected: str | None = None
    lost: str | None = None
    order: str | None = None
    paused: bool = False
    shadows: bool = False
    compared: Outcome | None = None
    comparison: str = ""


@dataclass(frozen=True, slots=True)
class Next:
    """`phase` None: nothing changes. `step`: the step that begins, if the phase is `canary`."""

    phase: Phase | None = None
    step: int = 0
    reason: str | None = None


WAIT: Final = Next()
#: The reason of a rollout that a person aborted.
ABORTED: Final = "a person aborted it"


def next_step(policy: RolloutPolicy, seen: Seen, later: RolloutPolicy | None = None) -> Next:
    """Decides what a rollout does next. Findings against the candidate come first: a known breach overrides a
    person's command. `policy`: that of the present phase or step. `later`: that of the next one, None for the
    same."""
    later = later or policy
    found = seen.lost or seen.breached
    if found is not None:
        return Next(Phase.REFUSED if seen.phase in UNSEEN else Phase.ROLLED_BACK, reason=found)
    if seen.order == "abort":
        return Next(Phase.ABORTED, reason=ABORTED)
    if seen.order == "finish":
        last = Phase.DONE if seen.phase is Phase.WATCHING else swapped(later)
        return Next(last, reason="a person finished it")
    if seen.paused:
        return WAIT
    match seen.phase:
        case Phase.REPLAYING | Phase.SHADOWING:
            return _after_comparison(policy, seen, later)
        case Phase.CANARY:
            return _after_step(policy, seen, later)
        case Phase.WATCHING if seen.seconds >= policy.watch:
            compared = f"{seen.requests} requests in {shown_seconds(policy.watch)}"
            return Next(Phase.DONE, reason=f"no guard found a difference: {compared}")
    return WAIT


def swapped(policy: RolloutPolicy) -> Phase:
    """The phase in which the candidate serves all callers."""
    return Phase.WATCHING if policy.watch else Phase.DONE


def _onwards(seen: Seen, later: RolloutPolicy, reason: str | None = None) -> Next:
    """The next step of the canary, or the swap."""
    if seen.following is None:
        return Next(swapped(later), reason=reason)
    return Next(Phase.CANARY, seen.following, reason)


def _after_comparison(policy: RolloutPolicy, seen: Seen, later: RolloutPolicy) -> Next:
    match seen.compared:
        case None:
            return WAIT
        case Outcome.PASSED:
            if seen.shadows and seen.phase is Phase.REPLAYING:
                return Next(Phase.SHADOWING, reason=seen.comparison)
            return _onwards(seen, later, seen.comparison)
        case Outcome.FAILED:
            return Next(Phase.REFUSED, reason=seen.comparison)
        case Outcome.THIN:
            return Next(Phase.HELD if policy.thin == "hold" else Phase.REFUSED, reason=seen.comparison)


def _after_step(policy: RolloutPolicy, seen: Seen, later: RolloutPolicy) -> Next:
    canary = policy.canary
    undecided = Phase.HELD if policy.thin == "hold" else Phase.REFUSED
    if seen.seconds >= canary.every and seen.requests >= canary.requests:
        if seen.suspected is None:
            return _onwards(seen, later)
        if seen.seconds < longest_step(policy):
            return WAIT
        return Next(undecided, reason=f"not decided in {seen.seconds:.0f} s: {seen.suspected}")
    if seen.seconds >= max(canary.within, canary.every) and seen.requests < canary.requests:
        reason = f"too little traffic: {seen.requests} of {canary.requests} requests in {canary.within:g} s"
        return Next(undecided, reason=reason)
    return WAIT


def longest_step(policy: RolloutPolicy) -> float:
    """The seconds after which a step ends although a guard suspects the candidate: `within`, but at least
    twice the time that a step takes anyway."""
    return max(policy.canary.within, 2 * policy.canary.every)
