"""What a rollout does next, as a table."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.rollout_settings import Canary, RolloutPolicy
from gateway.rollouts.phases import FOLLOWS, Phase, Seen, next_step

CANARY = Canary(steps=[5, 50], every=60, requests=100, within=600)
WATCH = RolloutPolicy(canary=CANARY, watch=60)
HOLD, REFUSE = RolloutPolicy(canary=CANARY), RolloutPolicy(canary=CANARY, thin="refuse")

SHORT = RolloutPolicy(canary=Canary(steps=[5, 50], every=60, requests=100, within=60))


def seen(**facts: Any) -> Seen:
    return Seen(**{"phase": Phase.CANARY, "following": 1, **facts})


ENOUGH = {"seconds": 60, "requests": 100}


@pytest.mark.parametrize(
    ("facts", "policy", "phase", "step"),
    [
        # Time and evidence, both.
        ({}, HOLD, None, 0),
        ({"seconds": 60, "requests": 99}, HOLD, None, 0),
        ({"seconds": 59, "requests": 5000}, HOLD, None, 0),
        (ENOUGH, HOLD, Phase.CANARY, 1),
        ({**ENOUGH, "following": None}, HOLD, Phase.DONE, 0),
        # Too little traffic is never a pass.
        ({"seconds": 600, "requests": 99}, HOLD, Phase.HELD, 0),
        ({"seconds": 600, "requests": 99}, REFUSE, Phase.REFUSED, 0),
        ({"seconds": 600, "requests": 0, "following": None}, REFUSE, Phase.REFUSED, 0),
        ({"seconds": 600, "requests": 100}, REFUSE, Phase.CANARY, 1),
        ({**ENOUGH, "phase": Phase.HELD}, HOLD, None, 0),
        # Strong evidence that is no proof: more is needed, up to a bound.
        ({**ENOUGH, "suspected": "errors"}, HOLD, None, 0),
        ({**ENOUGH, "suspected": "errors", "seconds": 599}, HOLD, None, 0),
        ({**ENOUGH, "suspected": "errors", "seconds": 600}, HOLD, Phase.HELD, 0),
        ({**ENOUGH, "suspected": "errors", "seconds": 600}, REFUSE, Phase.REFUSED, 0),
        ({**ENOUGH, "suspected": "errors", "order": "finish"}, HOLD, Phase.DONE, 0),
        ({**ENOUGH, "suspected": "errors", "seconds": 119}, SHORT, None, 0),
        ({**ENOUGH, "suspected": "errors", "seconds": 120}, SHORT, Phase.HELD, 0),
        # What speaks against the candidate wins over everything.
        ({**ENOUGH, "breached": "errors"}, HOLD, Phase.ROLLED_BACK, 0),
        ({"lost": "it crashed"}, HOLD, Phase.ROLLED_BACK, 0),
        ({"breached": "errors", "order": "finish"}, HOLD, Phase.ROLLED_BACK, 0),
        ({"breached": "errors", "paused": True}, HOLD, Phase.ROLLED_BACK, 0),
        ({"breached": "errors", "phase": Phase.HELD}, HOLD, Phase.ROLLED_BACK, 0),
        # A person.
        ({"order": "finish"}, HOLD, Phase.DONE, 0),
        ({"order": "abort"}, HOLD, Phase.ABORTED, 0),
        ({"order": "finish", "phase": Phase.HELD, "paused": True}, HOLD, Phase.DONE, 0),
        ({"order": "abort", "phase": Phase.HELD}, HOLD, Phase.ABORTED, 0),
        ({**ENOUGH, "paused": True}, HOLD, None, 0),
        ({"seconds": 600, "paused": True}, HOLD, None, 0),
        # After the swap.
        ({**ENOUGH, "following": None}, WATCH, Phase.WATCHING, 0),
        ({"order": "finish"}, WATCH, Phase.WATCHING, 0),
        ({"phase": Phase.WATCHING, "seconds": 59, "requests": 5000}, WATCH, None, 0),
        ({"phase": Phase.WATCHING, "seconds": 60}, WATCH, Phase.DONE, 0),
        ({"phase": Phase.WATCHING, "seconds": 60, "paused": True}, WATCH, None, 0),
        ({"phase": Phase.WATCHING, "order": "finish"}, WATCH, Phase.DONE, 0),
        ({"phase": Phase.WATCHING, "order": "abort"}, WATCH, Phase.ABORTED, 0),
        ({"phase": Phase.WATCHING, "seconds": 60, "breached": "errors"}, WATCH, Phase.ROLLED_BACK, 0),
        ({"phase": Phase.WATCHING, "order": "finish", "lost": "crashed"}, WATCH, Phase.ROLLED_BACK, 0),
    ],
)
def test_what_comes_next(
    facts: dict[str, Any], policy: RolloutPolicy, phase: Phase | None, step: int
) -> None:
    decision = next_step(policy, seen(**facts))
    assert (decision.phase, decision.step) == (phase, step)
    if phase is not None:
        assert phase in FOLLOWS[seen(**facts).phase]
        assert phase in (Phase.CANARY, Phase.WATCHING, Phase.DONE) or decision.reason


def test_the_next_step_follows_the_policy_of_the_next_step() -> None:
    assert next_step(WATCH, seen(**ENOUGH, following=None), RolloutPolicy()).phase is Phase.DONE
    assert next_step(HOLD, seen(**ENOUGH, following=None), WATCH).phase is Phase.WATCHING
    assert next_step(HOLD, seen(order="finish"), WATCH).phase is Phase.WATCHING
    # The present step keeps its own.
    quick = RolloutPolicy(canary=Canary(steps=[5, 50], every=0, requests=1))
    assert next_step(HOLD, seen(seconds=1, requests=5), quick).phase is None


def test_a_rollout_that_is_over_stays_over() -> None:
    assert {phase for phase, following in FOLLOWS.items() if not following} == {
        Phase.DONE, Phase.REFUSED, Phase.ROLLED_BACK, Phase.ABORTED, Phase.SUPERSEDED,
    }  # fmt: skip
    assert set(FOLLOWS) == set(Phase)
