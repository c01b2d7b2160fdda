"""What a rollout survives: a policy that lost its phase while the gateway was down, and a bug."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.events import RolloutChanged
from gateway.registries.base import Alias
from gateway.rollout_settings import RolloutPolicy
from gateway.rollouts.alias import LiveAlias
from gateway.rollouts.rollout import SERVED
from tests.support.controlled import turns, version
from tests.support.rollouts import Setup, conducted

WATCH = {"watch": "10m"}
SHADOW_AND_CANARY = {
    "shadow": {"share": 1.0, "requests": 10, "agreement": 0.9, "within": "1h"},
    "canary": {"steps": [50], "every": 0, "requests": 100, "within": "1h"},
    **WATCH,
}


async def swapped(setup: Setup) -> None:
    """Version 1 has answered some requests, and version 2 has taken its place a moment ago."""
    setup.say("1")
    await setup.ask(300)
    setup.say(Alias("2", previous=(), last_good="1"))
    await turns(50)
    assert await setup.ask() == ["2"]


def alias(setup: Setup) -> LiveAlias:
    found = setup.aliases.find("iris", "champion")
    assert found is not None
    return found


@pytest.mark.parametrize("restarts", [False, True])
def test_a_shadow_that_left_the_policy_ends_by_its_own_policy(tmp_path: Path, restarts: bool) -> None:
    async def test(setup: Setup) -> None:
        setup.bench.behaviour(version(2)).answers = 1  # it agrees with version 1
        await setup.begun()
        setup.policy = RolloutPolicy.model_validate({"canary": SHADOW_AND_CANARY["canary"]})
        if restarts:
            await setup.restart()
            await setup.ask()
        await turns(50)
        assert setup.phase == "shadowing"
        while setup.phase == "shadowing":
            await setup.ask()
            await turns(20)
        assert setup.phase == "canary 50 %"

    conducted(tmp_path, test, SHADOW_AND_CANARY)


def test_a_held_phase_that_left_the_policy_is_skipped_when_a_person_resumes(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        setup.bench.clock.now += 3601
        setup.rollout.changed.set()
        await turns(50)
        assert setup.phase == "held"
        setup.policy = RolloutPolicy.model_validate({"canary": SHADOW_AND_CANARY["canary"]})
        await setup.restart()
        await setup.ask()
        await turns(50)
        assert setup.phase == "held"  # a person decides
        setup.say_verb("resume")
        await turns(50)
        assert setup.phase == "canary 50 %"
        assert set(await setup.ask(20)) == {"1", "2"}

    conducted(tmp_path, test, SHADOW_AND_CANARY)


TWO_STEPS = {"canary": {"steps": [20, 50], "every": 0, "requests": 30, "within": "1h"}}


@pytest.mark.parametrize("restarts", [False, True])
def test_a_canary_whose_steps_are_removed_ends_its_step_and_then_serves(
    tmp_path: Path, restarts: bool
) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        setup.policy = RolloutPolicy()
        if restarts:
            await setup.restart()
            await setup.ask()
            await turns(50)
        assert (setup.phase, setup.rollout.percent) == ("canary 20 %", 20.0)
        began = len(setup.bench.of(RolloutChanged))
        answered = []
        while setup.phase == "canary 20 %":
            answered += await setup.ask()
        assert answered.count("2") >= 29  # the evidence of its step, by the policy that it began with
        assert (setup.phase, await setup.ask(3)) == ("done", ["2", "2", "2"])
        assert [event.phase for event in setup.bench.of(RolloutChanged)][began:] == ["done"]

    conducted(tmp_path, test, TWO_STEPS)


@pytest.mark.parametrize("restarts", [False, True])
def test_a_canary_whose_steps_are_removed_is_taken_back_by_the_guards_of_its_step(
    tmp_path: Path, restarts: bool
) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        setup.policy = RolloutPolicy()
        if restarts:
            await setup.restart()
        setup.fails(2)
        assert set(await setup.ask(200)) == {"1"}
        assert (setup.phase, setup.course) == ("rolled_back", "rolled_back")

    conducted(tmp_path, test, {"canary": {**TWO_STEPS["canary"], "requests": 1000}})


@pytest.mark.parametrize(
    ("steps", "follows"),
    [([20, 90], "canary 90 %"), ([5, 10, 15, 60], "canary 60 %"), ([5, 20], "done"), ([10], "done")],
)
def test_the_next_step_of_changed_steps_has_a_larger_share(
    tmp_path: Path, steps: list[int], follows: str
) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        setup.policy = RolloutPolicy.model_validate({"canary": {**TWO_STEPS["canary"], "steps": steps}})
        await setup.restart()
        await setup.ask()
        await turns(50)
        while setup.phase == "canary 20 %":
            await setup.ask()
        assert setup.phase == follows

    conducted(tmp_path, test, TWO_STEPS)


def test_a_step_that_a_person_resumes_follows_the_present_policy_and_keeps_its_share(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        setup.bench.clock.now += 3601
        setup.rollout.changed.set()
        await turns(50)
        assert setup.phase == "held"
        canary = {"steps": [], "every": 0, "requests": 5}
        setup.policy = RolloutPolicy.model_validate({"canary": canary})
        setup.say_verb("resume")
        await turns(50)
        await setup.restart()
        await setup.ask()
        await turns(50)
        assert setup.phase == "canary 20 %"
        answered = []
        while setup.phase == "canary 20 %":
            answered += await setup.ask()
        assert 4 <= answered.count("2") <= 6
        assert setup.phase == "done"

    conducted(tmp_path, test, TWO_STEPS)


def test_a_watch_that_left_the_policy_goes_on_after_a_restart(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await swapped(setup)
        setup.policy = RolloutPolicy()
        await setup.restart()
        await setup.ask()
        await turns(50)
        assert setup.phase == SERVED
        setup.bench.clock.now += 601
        setup.rollout.changed.set()
        await turns(50)
        assert (await setup.ask(3), setup.phase, setup.course) == (["2", "2", "2"], "done", "done")
        assert setup.aliases.conductor.courses.under_way() == []

    conducted(tmp_path, test, WATCH)


def test_a_bug_in_a_rollout_ends_neither_the_service_nor_the_reconciler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    async def test(setup: Setup) -> None:
        with monkeypatch.context() as patched:
            patched.setattr("gateway.rollouts.rollout.Rollout.decide", broken)
            setup.say("1")
            assert await setup.ask() == ["1"]
            setup.say(Alias("2", previous=("1",), last_good="1"))
            await turns(50)
            assert (setup.phase, await setup.ask()) == ("refused", ["1"])
            assert alias(setup).task is not None  # it is tried again
            candidate = setup.bench.manager.find(version(2))
            assert candidate is None or setup.bench.ledger[candidate].pins == 0
        setup.say(Alias("3", previous=("1",), last_good="1"))
        await turns(50)
        assert setup.rollout.candidate == version(3)

    conducted(tmp_path, test, SHADOW_AND_CANARY)
    assert "a bug" in caplog.text


def test_a_bug_in_a_watch_leaves_the_new_version_in_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    async def test(setup: Setup) -> None:
        await swapped(setup)
        with monkeypatch.context() as patched:
            patched.setattr("gateway.rollouts.rollout.Rollout.decide", broken)
            setup.rollout.changed.set()
            await turns(50)
        assert (await setup.ask(), setup.phase, setup.course) == (["2"], "done", "done")
        setup.say(Alias("3", previous=("1",), last_good="1"))
        await turns(50)
        assert await setup.ask() == ["3"]

    conducted(tmp_path, test, WATCH)
    assert "a bug" in caplog.text
