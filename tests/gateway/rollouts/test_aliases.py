"""Aliases: desired, serving and last good, and the reconciler that makes them agree."""

from __future__ import annotations

import asyncio
import random
import weakref
from pathlib import Path

import pytest

from gateway.aliasmemory import AliasMemory
from gateway.errors import Problem
from gateway.events import Swapped, SwapRefused
from gateway.names import Reference
from gateway.registries.base import Alias, Model, Snapshot, Version
from gateway.rollouts.aliases import Aliases
from gateway.rollouts.gates import Gates
from gateway.rollouts.records import rollback_target
from gateway.serving.ledger import Plan
from gateway.serving.servable import Servable, Status
from gateway.state import Served, State
from loaders.signature import ColSpec, Signature
from tests.support.controlled import MB, Behaviour, Bench, bounded, turns, version

CHAMPION = Reference("iris", alias="champion")


class Setup:
    """A bench with aliases over it; `say` is the registry moving."""

    def __init__(self, directory: Path, versions: int = 3) -> None:
        self.bench = Bench(directory / "package")
        self.state = State(directory / "state")
        weakref.finalize(self, self.state.close)
        self.versions = {str(n): version(n) for n in range(1, versions + 1)}
        self.aliases = self.restarted()

    def restarted(self) -> Aliases:
        return Aliases(
            self.bench.manager,
            Gates(self.bench.manager, prepare=self.bench.prepare),
            memory=AliasMemory(self.state, "test", lambda write: write()),
            emit=self.bench.events.append,
        )

    def say(self, champion: str | None, *, forced: bool = False, moved_by: str = "registry") -> None:
        aliases = {} if champion is None else {"champion": Alias(champion, forced=forced)}
        model = Model("iris", self.versions, aliases)
        self.aliases.apply(Snapshot({"iris": model}, f"{champion} {forced}"), moved_by)

    async def ask(self) -> str:
        """One request, as the service makes it: which version answered."""
        target = self.aliases.target(CHAMPION)
        assert target.alias is not None
        chosen = target.version or await self.aliases.wait_until_served(target.alias, None)
        lease = self.bench.manager.lease(chosen)
        try:
            await self.bench.manager.ready(lease)
            self.aliases.answered(target.alias, chosen)
        finally:
            lease.release()
        return chosen.version

    def of(self, number: int) -> Behaviour:
        return self.bench.behaviour(version(number))

    async def settled(self) -> None:
        found = self.aliases.find("iris", "champion")
        assert found is not None
        if found.task is not None and found.attempt is not None:
            await asyncio.wait({found.attempt})


@pytest.mark.anyio
@bounded
async def test_an_alias_nobody_asked_for_loads_nothing(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.say("1")
    setup.say("2")
    await turns()
    assert setup.bench.prepared == {}
    assert await setup.ask() == "2"


@pytest.mark.anyio
@bounded
async def test_promise_1_the_old_version_answers_until_the_new_one_is_warm(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.say("1")
    assert await setup.ask() == "1"
    hold = setup.of(2).hold = asyncio.Event()
    setup.say("2")
    await turns()
    for _ in range(3):
        assert await setup.ask() == "1"
    hold.set()
    await setup.settled()
    assert await setup.ask() == "2"
    assert [event.version for event in setup.bench.of(Swapped)] == ["1", "2"]


@pytest.mark.anyio
@bounded
async def test_promise_2_the_version_in_service_is_held_during_a_swap(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.say("1")
    await setup.ask()
    hold = setup.of(2).hold = asyncio.Event()
    setup.say("2")
    await turns()
    servable = setup.bench.manager.find(version(1))
    assert servable is not None
    assert setup.bench.ledger[servable].leases == 1
    hold.set()
    await setup.settled()
    assert setup.bench.ledger[servable].leases == 0
    assert setup.bench.ledger[servable].lingering


@pytest.mark.anyio
@bounded
async def test_promise_1_a_version_that_fails_never_serves(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.say("1")
    await setup.ask()
    setup.of(2).fails = "ValueError: bad weights"
    setup.say("2")
    await setup.settled()
    found = setup.aliases.find("iris", "champion")
    assert found is not None
    assert await setup.ask() == "1"
    assert found.diverged
    assert found.phase == "refused"
    assert "bad weights" in (found.error or "")
    assert [event.version for event in setup.bench.of(SwapRefused)] == ["2"]
    setup.say("3")
    await setup.settled()
    assert await setup.ask() == "3"
    assert (found.error, found.diverged, found.phase) == (None, False, "done")


@pytest.mark.anyio
@bounded
async def test_a_newer_move_overtakes_one_that_is_loading(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.say("1")
    await setup.ask()
    hold = setup.of(2).hold = asyncio.Event()
    setup.say("2")
    await turns()
    setup.say("3")
    hold.set()
    await turns(50)
    await setup.settled()
    assert await setup.ask() == "3"
    assert [event.version for event in setup.bench.of(Swapped)] == ["1", "3"]


@pytest.mark.anyio
@bounded
async def test_moving_back_while_the_new_version_loads_changes_nothing(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.say("1")
    await setup.ask()
    hold = setup.of(2).hold = asyncio.Event()
    setup.say("2")
    await turns()
    setup.say("1")
    hold.set()
    await turns(50)
    assert await setup.ask() == "1"
    assert [event.version for event in setup.bench.of(Swapped)] == ["1"]


@pytest.mark.anyio
@bounded
async def test_a_newer_move_does_not_wait_for_a_load_that_hangs(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.say("1")
    await setup.ask()
    setup.of(2).hold = asyncio.Event()  # never set
    setup.say("2")
    await turns()
    setup.say("3")
    await setup.settled()
    assert await setup.ask() == "3"


@pytest.mark.anyio
@bounded
async def test_after_a_fallback_the_desired_version_is_tried_again(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.say("1")
    await setup.ask()
    await setup.aliases.close()
    setup.of(2).fails = "OSError: the store is away"
    setup.aliases = setup.restarted()
    setup.say("2")
    assert await setup.ask() == "1"
    found = setup.aliases.find("iris", "champion")
    assert found is not None
    assert (found.phase, found.task is not None) == ("refused", True)
    setup.of(2).fails = None
    setup.bench.clock.now += 120
    setup.aliases.clear_error(found)
    await setup.settled()
    assert await setup.ask() == "2"


@pytest.mark.anyio
@bounded
async def test_a_cold_load_prepares_its_files_once(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.say("1")
    await setup.ask()
    assert setup.bench.prepared == {version(1): 1}


@pytest.mark.anyio
@bounded
async def test_files_that_cannot_be_had_cost_one_attempt_per_pause(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.of(1).unavailable = "digest mismatch"
    setup.say("1")
    for _ in range(30):
        with pytest.raises(Problem, match="digest mismatch"):
            await setup.ask()
    assert setup.bench.prepared == {version(1): 1}
    setup.bench.clock.now += 1.1
    with pytest.raises(Problem):
        await setup.ask()
    assert setup.bench.prepared == {version(1): 2}


@pytest.mark.anyio
@bounded
async def test_a_bug_while_preparing_does_not_end_the_reconciler(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.say("1")
    await setup.ask()
    setup.of(2).bug = True
    setup.say("2")
    await setup.settled()
    found = setup.aliases.find("iris", "champion")
    assert found is not None
    assert found.phase == "refused"
    assert await setup.ask() == "1"
    setup.say("3")
    await setup.settled()
    assert await setup.ask() == "3"


@pytest.mark.anyio
@bounded
async def test_an_alias_removed_while_it_loads_is_not_served(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    hold = setup.of(1).hold = asyncio.Event()
    setup.say("1")
    asking = asyncio.create_task(setup.ask())
    await turns()
    setup.say(None)
    hold.set()
    with pytest.raises(Problem) as caught:
        await asking
    assert caught.value.code == "ALIAS_NOT_FOUND"


@pytest.mark.anyio
@bounded
async def test_those_who_wait_for_a_cold_alias_are_bounded(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.aliases = Aliases(
        setup.bench.manager,
        Gates(setup.bench.manager, prepare=setup.bench.prepare),
        memory=AliasMemory(setup.state, "test", lambda write: write()),
        max_waiting=3,
    )
    hold = setup.of(1).hold = asyncio.Event()
    setup.say("1")
    asking = [asyncio.create_task(setup.ask()) for _ in range(5)]
    await turns()
    hold.set()
    results = await asyncio.gather(*asking, return_exceptions=True)
    refused = [result.code for result in results if isinstance(result, Problem)]
    assert refused == ["OVERLOADED", "OVERLOADED"]
    assert [result for result in results if isinstance(result, str)] == ["1"] * 3


def signature(*columns: ColSpec) -> Signature:
    return Signature(inputs=columns)


@pytest.mark.anyio
@bounded
async def test_a_version_that_would_break_callers_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.of(1).signature = signature(ColSpec("double", "x"))
    setup.of(2).signature = signature(ColSpec("double", "x"), ColSpec("double", "y"))
    setup.say("1")
    await setup.ask()
    setup.say("2")
    await setup.settled()
    assert await setup.ask() == "1"
    assert setup.of(2).starts == 0
    setup.say("2", forced=True)
    await setup.settled()
    assert await setup.ask() == "2"
    setup.say("1")
    await setup.settled()
    assert await setup.ask() == "1", "the way back is open: it has served before"


@pytest.mark.anyio
@bounded
async def test_after_a_restart_a_bad_version_does_not_keep_the_last_good_one_from_answering(
    tmp_path: Path,
) -> None:
    setup = Setup(tmp_path)
    setup.say("1")
    assert await setup.ask() == "1"
    await setup.aliases.close()
    setup.of(2).fails = "ImportError: gone"
    setup.aliases = setup.restarted()
    setup.say("2")
    assert await setup.ask() == "1"
    found = setup.aliases.find("iris", "champion")
    assert found is not None
    assert found.diverged
    assert "gone" in (found.error or "")


@pytest.mark.anyio
@bounded
async def test_with_nothing_to_fall_back_on_the_reason_is_told(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.of(1).fails = "ValueError: broken"
    setup.say("1")
    for _ in range(3):
        with pytest.raises(Problem, match="broken") as caught:
            await setup.ask()
        assert (caught.value.code, caught.value.status) == ("MODEL_UNAVAILABLE", 503)
        assert caught.value.retry_after is not None
    assert setup.of(1).starts == 1


@pytest.mark.anyio
@bounded
async def test_an_alias_of_a_version_that_is_not_registered_keeps_what_serves(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.say("1")
    await setup.ask()
    setup.say("9")
    await setup.settled()
    assert await setup.ask() == "1"
    found = setup.aliases.find("iris", "champion")
    assert found is not None
    assert found.diverged
    assert "not registered" in (found.error or "")


@pytest.mark.anyio
@bounded
async def test_an_alias_that_is_removed_is_gone(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.say("1")
    await setup.ask()
    setup.say(None)
    with pytest.raises(Problem) as caught:
        await setup.ask()
    assert caught.value.code == "ALIAS_NOT_FOUND"


@pytest.mark.anyio
@bounded
async def test_a_version_that_left_the_registry_is_unloaded_unless_it_serves(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.say("1")
    await setup.ask()
    lease = setup.bench.manager.lease(version(3))
    await setup.bench.manager.ready(lease)
    lease.release()
    del setup.versions["3"], setup.versions["1"]
    setup.say("1")
    await turns()
    assert setup.bench.manager.find(version(3)) is None
    assert await setup.ask() == "1"


@pytest.mark.anyio
@bounded
async def test_history_survives_and_a_rollback_goes_further_back_each_time(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    for number in ("1", "2", "3"):
        setup.say(number)
        await setup.ask()
        await setup.settled()
    await setup.ask()
    history = setup.state.histories("test")["iris", "champion"]
    assert [(s.version, s.reason) for s in history] == [
        ("1", "replaced by 2"),
        ("2", "replaced by 3"),
        ("3", None),
    ]
    found = setup.aliases.find("iris", "champion")
    assert found is not None
    assert rollback_target(found.history, "3") == "2"
    setup.say("2", moved_by="rollback", forced=True)
    await setup.settled()
    assert rollback_target(found.history, "2") == "1"


def served(*moves: str) -> list[Served]:
    """`2` is a move forward to version 2, `<1` a rollback to 1."""
    return [Served(m.lstrip("<"), 0.0, "rollback" if m.startswith("<") else "promote", 1.0) for m in moves]


@pytest.mark.parametrize(
    ("moves", "current", "target"),
    [
        ((), None, None),
        (("1",), "1", None),
        (("1", "2"), "2", "1"),
        (("1", "2", "3", "<2"), "2", "1"),
        (("1", "2", "3", "<2", "<1"), "1", None),
        (("1", "2", "<1", "3"), "3", "1"),
        (("1", "2", "1"), "1", "2"),
        (("1", "2"), "3", "2"),
    ],
)
def test_where_a_rollback_goes(moves: tuple[str, ...], current: str | None, target: str | None) -> None:
    assert rollback_target(served(*moves), current) == target


def test_only_versions_of_the_registry_are_equal_by_source() -> None:
    assert Version("a", "1", "/x") != Version("a", "1", "/y")
    assert Version("a", "1", "/x", tags={"k": "v"}) == Version("a", "1", "/x")


@pytest.mark.anyio
@bounded
async def test_a_forgotten_alias_has_lost_nothing_when_it_is_asked_for_again(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.say("1")
    await setup.ask()
    setup.say("2")
    await setup.settled()
    assert await setup.ask() == "2"
    setup.bench.manager.retire(version(2), "idle")
    await turns()
    assert setup.aliases.busy() == set()
    setup.aliases.forget({"another"})
    assert [found.name for found in setup.aliases] == ["iris"]
    setup.aliases.forget({"iris"})
    setup.aliases.apply(Snapshot({}, "without it"))
    assert list(setup.aliases) == []
    setup.say("2")
    assert await setup.ask() == "2"
    found = setup.aliases.find("iris", "champion")
    assert found is not None
    assert [(served.version, served.reason) for served in found.history] == [
        ("1", "replaced by 2"),
        ("2", None),
    ]
    assert found.last_good == version(2)


@pytest.mark.anyio
@bounded
async def test_an_alias_on_its_way_is_busy(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.say("1")
    hold = setup.of(1).hold = asyncio.Event()
    asking = asyncio.ensure_future(setup.ask())
    await turns()
    assert setup.aliases.busy() == {"iris"}
    hold.set()
    await asking
    assert setup.aliases.busy() == set()


@pytest.mark.anyio
@bounded
async def test_a_superseded_load_is_cancelled_and_what_serves_stays(tmp_path: Path) -> None:
    """Room for one: the alias goes to a version that loads for long, and back."""

    setup = Setup(tmp_path)
    setup.bench.ledger.limit = 25 * MB
    setup.of(3).hold = asyncio.Event()  # never set
    setup.of(3).size, setup.of(3).measured = 10 * MB, 20 * MB
    setup.say("1")
    assert await setup.ask() == "1"
    setup.say("3")
    await turns()
    assert setup.of(3).starts == 1
    setup.say("1")
    await turns()
    assert setup.bench.manager.find(version(3)) is None
    assert setup.of(3).closes == 1
    assert await setup.ask() == "1"
    assert setup.of(1).starts == 1
    assert setup.bench.ledger.accounted == 10 * MB


@pytest.mark.anyio
@bounded
async def test_an_unload_during_a_load_is_no_refusal_and_the_next_request_loads(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.of(1).hold = asyncio.Event()  # never set
    setup.say("1")
    waiting = asyncio.create_task(setup.ask())
    await turns()
    setup.bench.manager.retire(version(1), "unloaded")
    with pytest.raises(Problem) as caught:
        await waiting
    assert (caught.value.code, caught.value.retryable) == ("MODEL_LOADING", True)
    assert setup.bench.of(SwapRefused) == []
    found = setup.aliases.find("iris", "champion")
    assert found is not None
    assert (found.phase, found.error) == ("unloaded", None)
    setup.of(1).hold = None
    assert await setup.ask() == "1"


@pytest.mark.anyio
@pytest.mark.parametrize("seed", range(20))
@bounded
async def test_promise_2_alias_flaps_never_cost_what_serves(tmp_path: Path, seed: int) -> None:
    """A seeded walk: moves, requests, loads that end or fail, in room for little more than one version. What
    the alias serves goes only for a load that a request or the alias waits for, and nothing loads for
    nobody."""
    rng = random.Random(seed)

    setup = Setup(tmp_path, versions=4)
    ledger, manager = setup.bench.ledger, setup.bench.manager
    ledger.limit = rng.choice((15, 25, 35)) * MB
    plan = ledger.plan

    def watched(now: float) -> Plan[Servable]:
        decided = plan(now)
        for victim in decided.evict:
            served = any(a.serving == victim.version for a in setup.aliases)
            if served and decided.asking is not None:
                assert ledger[decided.asking].leases, f"{victim} goes for {decided.asking}"
        return decided

    ledger.plan = watched  # type: ignore[method-assign]
    asked: list[asyncio.Task[str]] = []
    setup.say("1")
    for _ in range(120):
        setup.bench.clock.now += rng.random()
        action = rng.randrange(6)
        number = rng.randint(1, 4)
        if action == 0:
            setup.say(str(number))
        elif action == 1:
            setup.of(number).hold = asyncio.Event()
            setup.of(number).measured = rng.choice((None, 5, 12, 20)) and rng.choice((5, 12, 20)) * MB
        elif action == 2:
            hold, setup.of(number).hold = setup.of(number).hold, None
            if hold is not None:
                hold.set()
        elif action == 3:
            setup.of(number).fails = rng.choice((None, None, "ValueError: broken"))
        else:
            asked.append(asyncio.create_task(setup.ask()))
        await turns(rng.choice((1, 5, 30)))
        ledger.check()
        if action == 0:
            await turns(30)
            wanted = {v for a in setup.aliases for v in (a.desired, a.serving, a.last_good)}
            for servable in manager:
                unwanted = servable.version not in wanted and servable in ledger
                if unwanted and servable.status is Status.LOADING and servable.retiring is None:
                    assert ledger[servable].leases, f"{servable} loads for nobody"
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    await setup.aliases.close()
    await manager.close()
    assert ledger.accounted == 0
