"""What a rollout survives: a policy that lost its phase while the gateway was down, and a bug."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.registries.base import Alias
from gateway.rollout_settings import RolloutPolicy
from gateway.rollouts.alias import LiveAlias
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


@pytest.mark.parametrize("stop", ["shadowing", "held"])
def test_a_shadow_that_left_the_policy_is_skipped_after_a_restart(tmp_path: Path, stop: str) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        if stop == "held":
            setup.bench.clock.now += 3601
            setup.rollout.changed.set()
            await turns(50)
        assert setup.phase == stop
        setup.policy = RolloutPolicy.model_validate({"canary": SHADOW_AND_CANARY["canary"]})
        await setup.restart()
        await setup.ask()
        await turns(50)
        if stop == "held":
            assert setup.phase == "held"  # a person decides
            setup.aliases.conductor.say(alias(setup), "resume")
            await turns(50)
        assert setup.phase == "canary 50 %"
        assert set(await setup.ask(20)) == {"1", "2"}

    conducted(tmp_path, test, SHADOW_AND_CANARY)


@pytest.mark.parametrize("before", [SHADOW_AND_CANARY, WATCH])
def test_a_rollout_whose_policy_is_gone_after_a_restart_is_done(
    tmp_path: Path, before: dict[str, Any]
) -> None:
    async def test(setup: Setup) -> None:
        if before is WATCH:
            await swapped(setup)
        else:
            await setup.begun()
        setup.policy = RolloutPolicy()
        await setup.restart()
        await setup.ask()
        await turns(50)
        assert (await setup.ask(3), setup.phase) == (["2", "2", "2"], "serving")
        assert setup.course == "done"
        assert setup.aliases.conductor.under_way() == []

    conducted(tmp_path, test, before)


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
        assert (await setup.ask(), setup.phase, setup.course) == (["2"], "serving", "done")
        setup.say(Alias("3", previous=("1",), last_good="1"))
        await turns(50)
        assert await setup.ask() == ["3"]

    conducted(tmp_path, test, WATCH)
    assert "a bug" in caplog.text
