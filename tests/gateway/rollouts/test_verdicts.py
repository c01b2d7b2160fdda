"""What one gateway finds out holds for all: verdicts and the last good version, through the registry."""

from __future__ import annotations

import itertools
import weakref
from pathlib import Path

import pytest

from gateway.aliasmemory import AliasMemory
from gateway.errors import Problem
from gateway.events import AliasDeleted
from gateway.names import Reference
from gateway.registries.base import Alias, Model, Move, Observation, Snapshot, Verdict
from gateway.registries.file import FileRegistry
from gateway.rollouts.aliases import Aliases
from gateway.rollouts.gates import Gates
from gateway.state import State
from loaders.signature import ColSpec, Signature
from tests.support.controlled import Bench, bounded, turns, version

CHAMPION = Reference("iris", alias="champion")
REFUSED = Verdict("2", "refused", "outputs were columns and are tensors now")


class Setup:
    """One gateway's aliases over a bench; `found` is what it wants every gateway to know."""

    def __init__(self, directory: Path, *, grace: float = 0.0) -> None:
        self.bench = Bench(directory / "package")
        self.found: list[Observation] = []
        state = State(directory / "state")
        weakref.finalize(self, state.close)
        self.aliases = Aliases(
            self.bench.manager,
            Gates(self.bench.manager, prepare=self.bench.prepare),
            memory=AliasMemory(state, "test", lambda write: write()),
            emit=self.bench.events.append,
            found_out=self.found.append,
            grace=lambda name: grace,
        )
        self.stamp = 0

    def say(self, alias: Alias | None, versions: str = "123") -> None:
        self.stamp += 1
        aliases = {} if alias is None else {"champion": alias}
        models = {"iris": Model("iris", {n: version(int(n)) for n in versions}, aliases)}
        self.aliases.apply(Snapshot(models if alias is not None else {}, str(self.stamp)))

    async def ask(self) -> str:
        target = self.aliases.target(CHAMPION)
        assert target.alias is not None
        chosen = target.version or await self.aliases.wait_until_served(target.alias, None)
        self.aliases.answered(target.alias, chosen)
        return chosen.version


@pytest.mark.anyio
@bounded
async def test_a_fresh_gateway_honours_the_verdict_of_another(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.say(Alias("2", last_good="1", verdict=REFUSED))
    seen = setup.aliases.view("iris", "champion")
    assert seen is not None
    assert (seen.phase, seen.diverged) == ("refused", True)  # before any request
    assert await setup.ask() == "1"
    assert version(2) not in setup.bench.prepared


@pytest.mark.anyio
@bounded
async def test_a_verdict_ends_what_another_gateway_serves(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.say(Alias("2"))
    assert await setup.ask() == "2"
    setup.say(Alias("2", last_good="1", verdict=REFUSED))
    await turns(50)
    assert await setup.ask() == "1"
    setup.say(Alias("2", last_good="1", forced=True))
    await turns(50)
    assert await setup.ask() == "2"


@pytest.mark.anyio
@bounded
async def test_a_refusal_is_passed_on_with_the_version_that_answers(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.bench.behaviour(version(1)).signature = Signature(inputs=(ColSpec("double", "a"),))
    setup.bench.behaviour(version(2)).signature = Signature(
        inputs=(ColSpec("double", "a"), ColSpec("double", "b"))
    )
    setup.say(Alias("1"))
    assert await setup.ask() == "1"
    setup.say(Alias("2"))
    await turns(50)
    assert await setup.ask() == "1"
    [observation] = setup.found
    assert (observation.version, observation.last_good) == ("2", "1")
    assert observation.verdict is not None
    assert "b is required now" in observation.verdict.reason


@pytest.mark.anyio
@bounded
async def test_a_version_that_cannot_be_loaded_gets_no_verdict_because_that_may_pass(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.say(Alias("1"))
    assert await setup.ask() == "1"
    setup.bench.behaviour(version(2)).unavailable = "digest mismatch"
    setup.say(Alias("2"))
    await turns(50)
    assert await setup.ask() == "1"
    assert setup.found == [Observation("iris", "champion", "2", "1")]
    assert (found := setup.aliases.find("iris", "champion")) is not None
    assert (found.phase, found.error) == ("refused", "digest mismatch")


@pytest.mark.anyio
@bounded
async def test_without_a_last_good_version_the_alias_is_unproven_until_it_answers(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.say(Alias("1"))
    seen = setup.aliases.view("iris", "champion")
    assert seen is not None
    assert seen.unproven
    await setup.ask()
    again = setup.aliases.view("iris", "champion")
    assert again is not None
    assert not again.unproven


@pytest.mark.anyio
@bounded
async def test_an_alias_of_an_unregistered_version_is_diverged_from_the_first_snapshot(
    tmp_path: Path,
) -> None:
    setup = Setup(tmp_path)
    setup.say(Alias("9"))
    seen = setup.aliases.view("iris", "champion")
    assert seen is not None
    assert seen.diverged
    assert seen.error is not None
    assert "not registered" in seen.error


@pytest.mark.anyio
@bounded
async def test_a_deleted_alias_is_said_and_kept_for_its_grace(tmp_path: Path) -> None:
    for grace in (0.0, 60.0):
        setup = Setup(tmp_path / str(grace), grace=grace)
        setup.say(Alias("1"))
        await setup.ask()
        setup.say(None)
        [said] = [event for event in setup.bench.events if isinstance(event, AliasDeleted)]
        assert (said.version, said.grace) == ("1", grace)
        if grace:
            assert await setup.ask() == "1"
            setup.say(Alias("1"))
            found = setup.aliases.find("iris", "champion")
            assert found is not None
            assert found.phase == "serving"
        else:
            with pytest.raises(Problem, match="no model"):
                await setup.ask()
            [attempt] = setup.aliases.attempts()
            assert attempt.phase == "deleted"
        await setup.aliases.close()


DOCUMENT = """\
version: 1
models:
  iris:
    versions: {1: {source: a}, 2: {source: b}}
    aliases:
      champion: 2  # by hand
"""


def test_a_finding_in_a_registry_file_is_ignored_by_older_readers_and_void_after_a_move(
    tmp_path: Path,
) -> None:
    file = tmp_path / "registry.yaml"
    file.write_text(DOCUMENT)
    registry = FileRegistry(str(file))
    observation = Observation("iris", "champion", "2", "1", REFUSED)
    registry.record(observation)
    assert "x-verdict" in file.read_text()
    alias = FileRegistry(str(file)).read().models["iris"].aliases["champion"]
    assert (alias.refused, alias.last_good) == (REFUSED, "1")
    before = file.read_bytes()
    registry.record(observation)
    registry.record(Observation("iris", "champion", "1", "2"))  # it does not point there
    assert file.read_bytes() == before
    moved = registry.move(Move("iris", "champion", "1")).models["iris"].aliases["champion"]
    assert (moved.verdict, moved.previous) == (None, ())  # version 2 never served
    assert "x-verdict" not in file.read_text()


SERVED = Observation("iris", "champion", "2", "2")
GONE_BACK = Observation("iris", "champion", "2", "1", Verdict("2", "rolled_back", "errors", "now"))
NOT_LET_IN = Observation("iris", "champion", "2", "1", Verdict("2", "refused", "it does not load", "now"))


@pytest.mark.parametrize("order", list(itertools.permutations([SERVED, GONE_BACK, NOT_LET_IN])))
def test_of_verdicts_in_conflict_a_rollback_wins_in_any_order(order: tuple[Observation, ...]) -> None:
    alias: Alias | None = Alias("2", previous=("1",), last_good="1")
    for observation in order:
        alias = observation.applied(alias)
    assert alias is not None
    assert alias.verdict == GONE_BACK.verdict
    assert alias.last_good == "1"


def test_an_operator_who_asks_again_ends_a_verdict(tmp_path: Path) -> None:
    file = tmp_path / "registry.yaml"
    file.write_text(DOCUMENT)
    registry = FileRegistry(str(file))
    registry.record(Observation("iris", "champion", "2", "1", REFUSED))
    again = registry.move(Move("iris", "champion", "2", forced=True)).models["iris"].aliases["champion"]
    assert (again.refused, again.forced, again.last_good) == (None, True, "1")
