"""A rollback reaches every gateway at once, and which versions have served is known from one place."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.aliasmemory import AliasMemory
from gateway.events import RolloutChanged
from gateway.registries import mlflow_answers
from gateway.registries.base import Alias, Model, Move, Observation, Verdict
from gateway.rollout_settings import RolloutPolicy
from gateway.rollouts import records
from gateway.rollouts.alias import LiveAlias
from gateway.rollouts.aliases import Aliases
from gateway.rollouts.records import PROMOTE, ROLLBACK, ROLLED_BACK
from gateway.state import Served, State
from tests.support.composed import Composed, composed
from tests.support.controlled import turns, version
from tests.support.processes import until
from tests.support.rollouts import STEPS, Setup, conducted

SHADOW = {"shadow": {"share": 1.0, "requests": 20, "within": "1h", "agreement": 0.9}}
Way = Callable[[Composed, str], Awaitable[None]]
BACK = Alias("1", last_good="2", back=True)


async def other_serves(setup: Setup) -> None:
    """A gateway that started after version 2 was promoted, so it has never seen version 1."""
    setup.say(Alias("2", previous=("1",), last_good="2"))
    assert await setup.ask() == ["2"]


@pytest.mark.parametrize("policy", [STEPS, SHADOW, {"watch": "10m"}], ids=["canary", "shadow", "watch"])
@pytest.mark.parametrize("stopped", [False, True])
def test_a_rollback_reaches_a_gateway_that_never_served_that_version(
    tmp_path: Path, policy: dict[str, Any], stopped: bool
) -> None:
    async def test(setup: Setup) -> None:
        await other_serves(setup)
        if stopped:  # it was stopped when the alias moved back
            setup.entry = BACK
            await setup.restart()
        else:
            setup.say(BACK)
            await turns(50)
        assert await setup.ask() == ["1"]
        found = setup.aliases.find("iris", "champion")
        assert found is not None
        assert found.rollout is None
        assert {event.phase for event in setup.bench.of(RolloutChanged)} <= {"done"}
        assert found.history[-1].moved_by == ROLLBACK
        assert setup.aliases.earlier("iris", "champion") is None  # not forward to version 2 again
        setup.say(Alias("3", ("1",), last_good="1"))  # forward again: the flag is gone
        await turns(50)
        assert found.rollout is not None

    conducted(tmp_path, test, policy)


@pytest.mark.anyio
@pytest.mark.parametrize("policy", [STEPS, SHADOW, {"watch": "10m"}], ids=["canary", "shadow", "watch"])
async def test_a_rollback_of_an_alias_that_was_not_used_here_is_a_rollback(
    tmp_path: Path, policy: dict[str, Any]
) -> None:
    async with composed(tmp_path) as parts:
        parts.aliases.gates._policy = lambda model: (RolloutPolicy.model_validate(policy), None)
        parts.registry.move(Move("iris", "champion", "2"))
        parts.registry.record(Observation("iris", "champion", "2", "2"))
        parts.aliases.apply(parts.registry.read())
        async with parts.promotions.rollback("iris", "champion") as moved:
            await parts.promotions.take_effect(moved, wait=10)
        found = parts.aliases.find("iris", "champion")
        assert found is not None
        assert found.rollout is None
        assert [(served.version, served.moved_by) for served in found.history] == [("1", ROLLBACK)]
        assert parts.registry.read().models["iris"].aliases["champion"].back


def candidate(found: LiveAlias) -> str | None:
    return None if found.rollout is None else found.rollout.candidate.version


@pytest.mark.anyio
async def test_a_version_that_is_superseded_while_it_is_tried_has_not_served(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        parts.aliases.gates._policy = lambda model: (RolloutPolicy.model_validate(STEPS), None)
        assert await parts.answers() == "1"
        for number in "23":
            async with parts.promotions.promote("iris", "champion", number) as moved:
                await parts.promotions.take_effect(moved, wait=10)
        found = parts.aliases.find("iris", "champion")
        assert found is not None
        await until(lambda: candidate(found) == "3")
        assert found.serving == parts.version(1)
        assert parts.registry.read().models["iris"].aliases["champion"].previous == ("1",)
        assert parts.aliases.record("iris", "champion").served == {"1"}
        assert parts.aliases.earlier("iris", "champion") == "1"
        async with parts.promotions.promote("iris", "champion", "2") as moved:
            await parts.promotions.take_effect(moved, wait=10)
        await until(lambda: candidate(found) == "2")  # it is tried from the beginning
        assert found.serving == parts.version(1)


async def by_hand(parts: Composed, number: str) -> None:
    """A person writes the file, and drops what the gateway kept next to the alias."""
    text = parts.file.read_text()
    head = text[: text.index("    aliases:")]
    parts.file.write_text(f"{head}    aliases: {{champion: {number}}}\n")
    parts.aliases.apply(parts.registry.read())


async def elsewhere(parts: Composed, number: str) -> None:
    """A command without a gateway, or a gateway that does not serve the alias."""
    parts.registry.move(Move("iris", "champion", number))
    parts.aliases.apply(parts.registry.read())


async def through_it(parts: Composed, number: str) -> None:
    async with parts.promotions.promote("iris", "champion", number) as moved:
        await parts.promotions.take_effect(moved, wait=10)


WAYS = [by_hand, elsewhere, through_it]


@pytest.mark.anyio
@pytest.mark.parametrize("then", WAYS)
@pytest.mark.parametrize("first", WAYS)
@pytest.mark.parametrize("answered", [True, False], ids=["answered", "loaded"])
async def test_a_candidate_that_a_move_overtakes_is_no_version_to_go_back_to(
    tmp_path: Path, answered: bool, first: Way, then: Way
) -> None:
    async with composed(tmp_path) as parts:

        def found_out(observation: Observation) -> None:
            parts.registry.record(observation)
            parts.aliases.apply(parts.registry.read())

        parts.aliases._found_out = found_out
        parts.aliases.gates._policy = lambda model: (RolloutPolicy.model_validate(STEPS), None)
        found = parts.aliases.open("iris", "champion")
        if answered:
            assert await parts.answers() == "1"
        else:
            parts.aliases.begin(found)
            await until(lambda: found.serving == parts.version(1))
        await first(parts, "2")
        await until(lambda: candidate(found) == "2")
        await then(parts, "3")
        await until(lambda: candidate(found) == "3")
        assert found.serving == parts.version(1)
        assert parts.aliases.record("iris", "champion").served == {"1"}
        assert parts.aliases.earlier("iris", "champion") == "1"
        # What the registry says to a command, or to a gateway without a memory of its own.
        entry = parts.registry.read().models["iris"].aliases["champion"]
        assert entry.previous in ((), ("1",))
        assert entry.served == "1"
        other = Aliases(
            parts.bench.manager, parts.aliases.gates,
            memory=AliasMemory(parts.state, "other", lambda write: write()),
        )  # fmt: skip
        other.apply(parts.registry.read())
        assert other.earlier("iris", "champion") == "1"
        async with parts.promotions.rollback("iris", "champion") as moved:
            await parts.promotions.take_effect(moved, wait=10)
        assert found.serving == found.desired == parts.version(1)
        assert parts.aliases.earlier("iris", "champion") is None


def test_a_gateway_without_memory_learns_from_the_registry_which_version_is_only_tried(
    tmp_path: Path,
) -> None:
    async def test(setup: Setup) -> None:
        setup.say("1")
        assert await setup.ask() == ["1"]
        setup.say("2")  # by hand: the registry says nothing else
        await turns(50)
        [observation] = setup.found
        assert (observation.version, observation.last_good, observation.verdict) == ("2", "1", None)
        setup.entry = observation.applied(setup.entry)
        setup.state = State(tmp_path / "other")
        await setup.restart()
        await setup.ask()
        await turns(50)
        assert setup.rollout.candidate.version == "2"
        found = setup.aliases.find("iris", "champion")
        assert found is not None
        assert found.serving == version(1)
        setup.state.close()

    conducted(tmp_path, test)


def test_a_verdict_on_another_version_does_not_lift_this_gateways_own(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        setup.fails(2)
        await setup.ask(300)
        assert setup.phase == "rolled_back"
        setup.fails(2, None)
        void = Verdict("3", "refused", "it was a bad day")
        setup.entry = Alias("2", ("1",), last_good="1", verdict=void)
        for _ in range(2):  # the first look may forget what the second one needs
            await setup.restart()
            assert setup.phase == "rolled_back"
            assert set(await setup.ask(20)) == {"1"}

    conducted(tmp_path, test, {"canary": {**STEPS["canary"], "requests": 1000}})


def test_a_move_in_the_same_turn_as_the_end_of_the_gates_begins_no_step(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        check = setup.aliases.gates.check

        async def moves(*given: Any, **more: Any) -> Any:
            passed = await check(*given, **more)
            setup.aliases.gates.check = check  # type: ignore[method-assign]
            setup.say(Alias("2", ("1",), last_good="1", forced=True))
            return passed

        setup.say("1")
        assert await setup.ask() == ["1"]
        setup.aliases.gates.check = moves  # type: ignore[method-assign]
        setup.say(Alias("2", ("1",), last_good="1"))
        await turns(50)
        await setup.ask(200)
        assert await setup.ask() == ["2"]
        phases = [event.phase for event in setup.bench.of(RolloutChanged)]
        assert phases == ["canary 20 %", "canary 50 %", "done"]

    conducted(tmp_path, test)


@pytest.mark.parametrize(
    ("previous", "serving", "last_good", "refused", "left"),
    [
        ((), None, None, False, ("2",)),  # nothing else is known
        (("1",), "2", "1", False, ("2", "1")),  # it served, and nobody has asked yet
        (("1",), "1", "1", False, ("1",)),  # 2 was superseded in its canary
        (("1",), None, "1", False, ("1",)),  # the same, found by a command without a gateway
        ((), "1", None, False, ("1",)),
        (("1",), None, None, True, ("1",)),  # 2 was refused
        (("3", "1"), "3", "3", False, ("3", "1")),  # back to what serves, as a new move
    ],
)
def test_only_versions_that_served_become_previous_ones(
    previous: tuple[str, ...],
    serving: str | None,
    last_good: str | None,
    refused: bool,
    left: tuple[str, ...],
) -> None:
    known = Verdict("2", "refused", "bad") if refused else None
    current = Alias("2", previous, last_good, verdict=known)
    assert Move("iris", "champion", "3", serving=serving).applied(current).previous == left


def test_the_flag_of_a_rollback_ends_with_the_next_move() -> None:
    back = Move("iris", "champion", "1", back=True).applied(Alias("3", ("2", "1")))
    assert back == Alias.from_json(back.to_json()) == Alias("1", back=True)
    assert not Move("iris", "champion", "3").applied(back).back
    by_hand = {**json.loads(json.dumps(back.to_json())), "version": "3"}
    assert not Alias.from_json(by_hand).back  # a person moved it in the document


@pytest.mark.parametrize(
    ("past", "version", "found"),
    [
        ({"version": "1", "previous": [], "back": True}, "1", Alias("1", back=True)),
        ({"version": "1", "previous": [], "back": True}, "2", Alias("2", ("1",))),
        (
            {"version": "3", "previous": ["2", "1"]},
            "1",
            Alias("1", back=True),
        ),  # by another client
        ({"version": "2", "previous": ["1"], "last_good": "1"}, "3", Alias("3", ("1",), "1")),
    ],
)
def test_what_an_alias_of_mlflow_says(past: dict[str, Any], version: str, found: Alias) -> None:
    assert mlflow_answers.with_past(version, json.dumps(past)) == found


def stretch(number: str, moved_by: str = PROMOTE, reason: str | None = None) -> Served:
    return Served(number, 0.0, moved_by, None if reason is None else 1.0, reason)


TAKEN_BACK = stretch("2", reason=f"{ROLLED_BACK}errors")


@pytest.mark.parametrize(
    ("entry", "history", "good", "served", "earlier"),
    [
        (Alias("1"), [], None, set(), None),
        (Alias("1", back=True), [], None, {"1"}, None),
        (Alias("3", ("2", "1"), "3"), [], None, {"1", "2", "3"}, "2"),
        (Alias("3"), [stretch("1"), stretch("3")], "3", {"1", "3"}, "1"),
        (Alias("2"), [stretch("1"), TAKEN_BACK, stretch("1", ROLLBACK)], "1", {"1"}, "1"),
        (Alias("3", ("2", "1")), [stretch("1"), TAKEN_BACK, stretch("3")], "3", {"1", "3"}, "1"),
        (Alias("2", back=True), [stretch("1"), TAKEN_BACK], None, {"1", "2"}, "1"),
        (Alias("2", ("1",)), [TAKEN_BACK, stretch("2")], None, {"1", "2"}, "1"),
    ],
)
def test_one_place_says_which_versions_have_served(
    entry: Alias, history: list[Served], good: str | None, served: set[str], earlier: str | None
) -> None:
    model = Model("iris", {n: version(int(n)) for n in "123"}, {"champion": entry})
    found = LiveAlias("iris", "champion", history=history)
    found.last_good = None if good is None else version(int(good))
    record = records.record_of(model, "champion", found, history)
    assert record.served == served
    assert records.earlier(record, "champion", history) == earlier
    assert {n for n in "123" if records.has_served(found, model, version(int(n)))} == served
