"""Verdicts that peers pass on, where the registry cannot hold them: two gateways over the same aliases."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.registries.base import Alias, Model, Snapshot
from gateway.rollouts.verdicts import ELSEWHERE, HEARD_SECONDS, Standing
from loaders.signature import ColSpec, Signature
from tests.support.controlled import run, turns, version
from tests.support.rollouts import CHAMPION, Setup

Two = Callable[[Setup, Setup], Awaitable[None]]


def between(directory: Path, test: Two) -> None:
    async def main() -> None:
        one, other = Setup(directory / "one"), Setup(directory / "other")
        await test(one, other)
        for setup in (one, other):
            await setup.aliases.close()

    run(main)


async def tell(one: Setup, other: Setup) -> None:
    """`other` hears what `one` says."""
    other.aliases.hear(one.aliases.standings(verdicts=True))
    await turns(50)


async def taken_back(setup: Setup) -> None:
    """The candidate fails until it is rolled back."""
    setup.fails(2)
    while setup.phase != "rolled_back":
        await setup.ask(10)
        await turns(10)


def said(setup: Setup) -> Standing:
    [one] = setup.aliases.standings(verdicts=True)
    return one


async def serving(setup: Setup) -> set[str]:
    return set(await setup.ask(20))


async def answering(setup: Setup) -> str:
    """Which version would answer."""
    target = setup.aliases.target(CHAMPION)
    assert target.alias is not None
    chosen = target.version or await setup.aliases.wait_until_served(target.alias, None)
    setup.aliases.answered(target.alias, chosen)
    return chosen.version


def test_a_rollback_ends_the_canary_of_a_peer_and_survives_its_restart(tmp_path: Path) -> None:
    async def test(one: Setup, other: Setup) -> None:
        for setup in (one, other):
            await setup.begun()
        await taken_back(one)
        await tell(one, other)
        assert (other.phase, other.course, await serving(other)) == ("rolled_back", "rolled_back", {"1"})
        view = other.aliases.view("iris", "champion")
        assert view is not None
        assert view.verdict is not None
        assert view.verdict.reason.startswith(f"{ELSEWHERE}errors")
        await other.restart()
        assert (other.phase, await serving(other)) == ("rolled_back", {"1"})
        # It passes it on as it was: without another prefix, and with its time.
        third = said(other)
        assert third.verdict is not None
        assert third.verdict.reason.count(ELSEWHERE) == 1
        assert third.at == said(one).at

    between(tmp_path, test)


def test_where_the_registry_can_hold_a_verdict_peers_do_not_carry_it(tmp_path: Path) -> None:
    async def test(one: Setup, other: Setup) -> None:
        await one.begun()
        await taken_back(one)
        [quiet] = one.aliases.standings(verdicts=False)
        assert (quiet.version, quiet.serving, quiet.last_good, quiet.verdict) == ("2", "1", "1", None)

    between(tmp_path, test)


def test_a_refusal_at_the_gates_holds_for_a_peer_and_does_not_echo(tmp_path: Path) -> None:
    async def test(one: Setup, other: Setup) -> None:
        for setup in (one, other):
            setup.bench.behaviour(version(1)).signature = Signature(inputs=(ColSpec("double", "a"),))
        narrow = Signature(inputs=(ColSpec("double", "a"), ColSpec("double", "b")))
        one.bench.behaviour(version(2)).signature = narrow
        for setup in (one, other):
            setup.say("1")
            assert await answering(setup) == "1"
        one.say("2")
        await turns(50)
        assert one.phase == "refused"
        await tell(one, other)  # before the peer has seen the move
        assert await answering(other) == "1"
        other.say("2")
        await turns(50)
        assert (other.phase, await answering(other)) == ("refused", "1")
        assert version(2) not in other.bench.prepared
        found = one.aliases.find("iris", "champion")
        assert found is not None
        generation = found.generation
        await tell(other, one)
        assert found.generation == generation

    between(tmp_path, test)


def test_of_two_verdicts_the_rollback_wins(tmp_path: Path) -> None:
    async def test(one: Setup, other: Setup) -> None:
        for setup in (one, other):
            await setup.begun()
        found = other.aliases.find("iris", "champion")
        assert found is not None
        other.aliases.orders.give(found, "finish")
        await turns(50)
        assert await serving(other) == {"2"}
        await taken_back(one)
        await tell(other, one)  # what serves there is no verdict
        assert await serving(one) == {"1"}
        await tell(one, other)
        assert (other.phase, await serving(other)) == ("rolled_back", {"1"})
        assert found.history[-1].moved_by == "peers"

    between(tmp_path, test)


def test_a_verdict_holds_for_one_version_and_one_package(tmp_path: Path) -> None:
    async def test(one: Setup, other: Setup) -> None:
        for setup in (one, other):
            await setup.begun()
        await taken_back(one)
        verdict = said(one)
        assert verdict.verdict is not None
        other.aliases.hear([replace(verdict, digest="sha256:another")])
        other.aliases.hear([replace(verdict, alias="other"), replace(verdict, name="other")])
        other.aliases.hear([replace(verdict, version="3", verdict=replace(verdict.verdict, version="3"))])
        other.aliases.hear([replace(verdict, at=verdict.at + 3600)])  # its clock is wrong
        await turns(50)
        assert other.phase == "canary 20 %"
        await tell(one, other)
        assert other.phase == "rolled_back"

    between(tmp_path, test)


def test_a_person_who_moves_the_alias_again_ends_the_verdict_everywhere(tmp_path: Path) -> None:
    async def test(one: Setup, other: Setup) -> None:
        for setup in (one, other):
            await setup.begun()
        await taken_back(one)
        await tell(one, other)
        one.fails(2, None)
        one.say(Alias("1", last_good="1"))
        await turns(50)
        one.say(Alias("2", last_good="1"))
        await turns(50)
        assert one.phase == "canary 20 %"  # it is tried again
        await tell(other, one)  # a peer that has not read the registry yet does not bring it back
        assert one.phase == "canary 20 %"
        await tell(one, other)  # and it never sees where the alias was meanwhile
        assert other.phase == "canary 20 %"
        other.fails(2, None)
        assert await serving(other) >= {"1"}
        await tell(other, one)
        assert one.phase == "canary 20 %"

    between(tmp_path, test)


@pytest.mark.parametrize("used", [True, False])
def test_an_own_verdict_ends_when_the_alias_moves_on_a_registry_that_cannot_be_written(
    tmp_path: Path, used: bool
) -> None:
    async def test(one: Setup, other: Setup) -> None:
        await one.begun()
        await taken_back(one)
        one.fails(2, None)
        if not used:
            await one.restart()
        one.say(Alias("1", last_good="1"))
        await turns(50)
        one.say(Alias("2", last_good="1"))
        await turns(50)
        if not used:
            await one.ask()
            await turns(50)
        assert one.phase == "canary 20 %"

    between(tmp_path, test)


def test_a_person_who_overruled_the_gates_overrules_a_refusal_of_a_peer_but_no_rollback(
    tmp_path: Path,
) -> None:
    async def test(one: Setup, other: Setup) -> None:
        other.say(Alias("2", forced=True))
        assert await serving(other) == {"2"}
        await one.begun()
        await taken_back(one)
        rollback = said(one)
        assert rollback.verdict is not None
        other.aliases.hear([replace(rollback, verdict=replace(rollback.verdict, outcome="refused"))])
        await turns(50)
        assert await serving(other) == {"2"}
        other.aliases.hear([rollback])
        await turns(50)
        assert await serving(other) == {"1"}

    between(tmp_path, test)


def test_a_fresh_gateway_knows_what_was_good_from_its_peers(tmp_path: Path) -> None:
    async def test(one: Setup, other: Setup) -> None:
        await one.begun()
        other.aliases.hear([Standing("iris", "champion", "2", serving="1", last_good="1")])
        other.say("2")  # its document has no last_good, and it has no state
        assert await other.ask() == ["1"]
        await turns(50)
        assert other.phase == "canary 20 %"

    between(tmp_path, test)


def test_what_was_heard_long_ago_is_void(tmp_path: Path) -> None:
    async def test(one: Setup, other: Setup) -> None:
        await one.begun()
        await taken_back(one)
        other.say("1")
        await other.ask()
        await tell(one, other)
        other.bench.clock.now += HEARD_SECONDS + 1
        other.say(Alias("2", last_good="1"))
        await turns(50)
        assert other.phase == "canary 20 %"

    between(tmp_path, test)


def test_a_verdict_in_the_registry_counts_alone(tmp_path: Path) -> None:
    async def test(one: Setup, other: Setup) -> None:
        for setup in (one, other):
            await setup.begun()
        await taken_back(one)
        verdict = said(one).verdict
        other.say(Alias("2", last_good="1", verdict=verdict))
        await tell(one, other)
        assert other.phase == "rolled_back"
        assert said(other).verdict is None
        other.say(Alias("2", last_good="1"))  # a person took it out of the registry
        await turns(50)
        assert other.phase == "canary 20 %"

    between(tmp_path, test)


def test_a_name_that_the_registry_does_not_have_is_ignored(tmp_path: Path) -> None:
    async def test(one: Setup, other: Setup) -> None:
        await one.begun()
        await taken_back(one)
        other.aliases.apply(Snapshot({"iris": Model("iris", {}, {"champion": Alias("2")})}, "empty"))
        await tell(one, other)
        other.aliases.hear([replace(said(one), name="unknown")])
        assert other.aliases.view("unknown", "champion") is None

    between(tmp_path, test)
