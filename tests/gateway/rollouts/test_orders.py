"""A person's orders to a rollout before its first step: they act on what a promotion has just begun."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gateway.errors import Problem
from gateway.events import RolloutChanged
from gateway.registries.base import Alias
from gateway.rollouts.rollout import SERVED
from tests.support.composed import Composed, composed
from tests.support.controlled import turns, version
from tests.support.processes import until
from tests.support.rollouts import STEPS, Setup, conducted


async def loads(setup: Setup) -> asyncio.Event:
    """Version 1 serves, and version 2 is loaded until the event is set."""
    setup.say("1")
    assert await setup.ask() == ["1"]
    hold = setup.bench.behaviour(version(2)).hold = asyncio.Event()
    setup.say(Alias("2", previous=("1",), last_good="1"))
    await turns(50)
    assert setup.phase == "loading"
    return hold


@pytest.mark.parametrize("policy", [STEPS, {"watch": "10m"}, {}], ids=["canary", "watch", "no policy"])
def test_abort_while_the_version_loads_ends_the_load(tmp_path: Path, policy: dict[str, object]) -> None:
    async def test(setup: Setup) -> None:
        await loads(setup)
        setup.say_verb("abort")
        await turns(50)
        assert setup.bench.manager.find(version(2)) is None  # nothing waits for it any more
        assert (setup.phase, setup.course) == ("rolled_back", "aborted")
        assert set(await setup.ask(30)) == {"1"}
        verdict = setup.found[-1].verdict
        assert verdict is not None
        assert (verdict.version, verdict.reason) == ("2", "a person aborted it")
        assert [event.phase for event in setup.bench.of(RolloutChanged)] == ["aborted"]
        with pytest.raises(Problem, match="no rollout of iris@champion is under way"):
            setup.say_verb("abort")
        await setup.restart()
        assert set(await setup.ask(30)) == {"1"}
        setup.bench.behaviour(version(2)).hold = None
        setup.say(Alias("1", last_good="1"))
        setup.say(Alias("2", previous=("1",), last_good="1"))
        await turns(50)
        assert setup.phase in ("canary 20 %", SERVED, "done")  # the alias has moved again

    conducted(tmp_path, test, policy)


def test_a_rollout_that_is_paused_while_its_version_loads_begins_paused_also_after_a_restart(
    tmp_path: Path,
) -> None:
    async def test(setup: Setup) -> None:
        hold = await loads(setup)
        setup.say_verb("pause")
        setup.bench.behaviour(version(2)).hold = None
        hold.set()
        await setup.restart()
        await setup.ask(300)
        assert setup.phase == "canary 20 %"
        assert setup.rollout.step_view()["paused"]
        setup.say_verb("resume")
        await setup.ask(300)
        assert setup.phase == "done"

    conducted(tmp_path, test)


def test_pause_and_resume_before_the_first_step_leave_the_rollout_as_it_was(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        hold = await loads(setup)
        setup.say_verb("pause")
        setup.say_verb("resume")
        hold.set()
        await setup.ask(300)
        assert setup.phase == "done"

    conducted(tmp_path, test)


@pytest.mark.parametrize(("watch", "phase"), [(0, "done"), (60, SERVED)])
def test_finish_while_the_version_loads_lets_it_serve_without_steps(
    tmp_path: Path, watch: int, phase: str
) -> None:
    async def test(setup: Setup) -> None:
        hold = await loads(setup)
        setup.say_verb("finish")
        assert await setup.ask() == ["1"]
        hold.set()
        await turns(50)
        assert setup.phase == phase
        assert set(await setup.ask(30)) == {"2"}

    conducted(tmp_path, test, {**STEPS, "watch": watch})


@pytest.mark.parametrize("verb", ["pause", "resume", "finish"])
def test_a_version_without_steps_says_that_only_abort_acts(tmp_path: Path, verb: str) -> None:
    async def test(setup: Setup) -> None:
        hold = await loads(setup)
        with pytest.raises(Problem, match=f"has no steps to {verb}"):
            setup.say_verb(verb)
        hold.set()
        await turns(50)
        assert setup.phase == "done"

    conducted(tmp_path, test, {})


def test_an_order_ends_with_the_move_that_it_was_for(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        hold = await loads(setup)
        setup.say_verb("pause")
        hold.set()
        setup.bench.behaviour(version(3)).fails = "broken"
        setup.say(Alias("3", previous=("1",), last_good="1"))
        await turns(50)
        assert setup.phase == "refused"
        setup.say(Alias("2", previous=("1",), last_good="1"))
        await turns(50)
        assert not setup.rollout.step_view()["paused"]

    conducted(tmp_path, test)


def test_abort_of_a_first_version_or_a_rollback_finds_no_rollout(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        setup.bench.behaviour(version(1)).hold = hold = asyncio.Event()
        setup.say("1")
        asked = asyncio.ensure_future(setup.ask())
        await turns(20)
        with pytest.raises(Problem, match="no rollout"):
            setup.say_verb("abort")
        hold.set()
        assert await asked == ["1"]
        setup.say("2")
        await turns(50)
        setup.say_verb("finish")
        await turns(50)
        assert await setup.ask() == ["2"]
        setup.bench.manager.retire(version(1), "unloaded")
        await turns(50)
        setup.bench.behaviour(version(1)).hold = hold = asyncio.Event()
        setup.say(Alias("1", last_good="2", back=True))
        await turns(50)
        with pytest.raises(Problem, match="no rollout"):
            setup.say_verb("abort")
        hold.set()
        await turns(50)
        assert await setup.ask() == ["1"]

    conducted(tmp_path, test)


# ---- through the promotions of a gateway


async def promotes(parts: Composed, number: str = "2") -> None:
    async with parts.promotions.promote("iris", "champion", number) as moved:
        await parts.promotions.take_effect(moved, wait=None)


@pytest.mark.anyio
async def test_abort_while_a_promotion_checks_the_version_leaves_the_registry(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        assert await parts.answers() == "1"
        parts.of(2).hold = asyncio.Event()
        moving = asyncio.create_task(promotes(parts))
        await until(lambda: parts.of(2).starts == 1)
        await parts.promotions.direct("iris", "champion", "abort")
        with pytest.raises(Problem, match="was not promoted: a person aborted it"):
            await moving
        assert (parts.written(), await parts.answers()) == ("1", "1")
        assert parts.promotions.trials == {}
        assert parts.bench.manager.find(version(2)) is None
        parts.of(2).hold = None
        await promotes(parts)  # it was not refused
        assert parts.written() == "2"


@pytest.mark.anyio
async def test_an_order_reaches_a_move_that_the_gateway_has_not_seen_yet(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        assert await parts.answers() == "1"
        parts.of(2).hold = asyncio.Event()
        parts.file.write_text(parts.file.read_text().replace("champion: 1", "champion: 2"))
        await parts.promotions.direct("iris", "champion", "abort")
        await turns(50)
        found = parts.aliases.view("iris", "champion")
        assert found is not None
        assert (found.phase, await parts.answers()) == ("rolled_back", "1")
