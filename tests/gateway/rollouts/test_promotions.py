"""Promote, roll back, delete: checked before the registry is written, and what the registry then says."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import Problem
from gateway.events import SwapRefused
from gateway.rollouts.phases import Phase
from gateway.rollouts.promotions import Moved, Promotions
from tests.support.composed import Composed, composed
from tests.support.processes import until

pytestmark = pytest.mark.anyio


async def promote(promotions: Promotions, number: str, **more: object) -> Moved:
    async with promotions.promote("iris", "champion", number, **more) as moved:  # type: ignore[arg-type]
        await promotions.take_effect(moved, wait=10)
        return moved


async def refusal(parts: Composed, number: str, **more: object) -> Problem:
    with pytest.raises(Problem) as caught:
        await promote(parts.promotions, number, **more)
    return caught.value


async def test_a_promotion_loads_then_writes_then_serves(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        assert await parts.answers() == "1"
        hold = parts.of(2).hold = asyncio.Event()
        moving = asyncio.create_task(promote(parts.promotions, "2"))
        await until(lambda: parts.of(2).starts == 1)
        assert (parts.written(), await parts.answers()) == ("1", "1")
        assert parts.promotions.trials["iris", "champion"].now == "load, warm-up and example"
        hold.set()
        moved = await moving
        assert (moved.previous, moved.overruled, moved.unchanged) == ("1", (), False)
        assert (parts.written(), await parts.answers()) == ("2", "2")
        assert parts.promotions.trials == {}


async def test_a_version_that_fails_leaves_the_registry_as_it_is(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        await parts.answers()
        parts.of(2).fails = "ValueError: bad weights"
        problem = await refusal(parts, "2")
        assert (problem.code, "bad weights" in problem.message) == ("ROLLOUT_REFUSED", True)
        assert (parts.written(), await parts.answers()) == ("1", "1")
        assert [event.version for event in parts.bench.of(SwapRefused)] == ["2"]


@pytest.mark.parametrize(
    ("number", "more", "code"),
    [
        ("9", {}, "VERSION_NOT_FOUND"),
        ("two", {}, "INVALID_REFERENCE"),
        ("2", {"expect": "3"}, "PRECONDITION_FAILED"),
        ("2", {"expect": None}, "PRECONDITION_FAILED"),
    ],
)
async def test_a_promotion_that_cannot_be_loads_nothing(
    number: str, more: dict[str, object], code: str, tmp_path: Path
) -> None:
    async with composed(tmp_path) as parts:
        assert (await refusal(parts, number, **more)).code == code
        assert parts.written() == "1"
        assert parts.bench.prepared == {}


async def test_an_alias_that_moved_while_it_was_checked_stays_there(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        hold = parts.of(2).hold = asyncio.Event()
        moving = asyncio.create_task(promote(parts.promotions, "2", expect="1"))
        await until(lambda: parts.of(2).starts == 1)
        parts.file.write_text(parts.file.read_text().replace("champion: 1", "champion: 3"))
        hold.set()
        with pytest.raises(Problem) as caught:
            await moving
        assert caught.value.code == "PRECONDITION_FAILED"
        assert parts.written() == "3"


async def test_an_alias_that_is_deleted_while_a_version_is_checked_stays_deleted(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        hold = parts.of(2).hold = asyncio.Event()
        moving = asyncio.create_task(promote(parts.promotions, "2"))
        await until(lambda: parts.of(2).starts == 1)
        await parts.promotions.delete_alias("iris", "champion")
        hold.set()
        with pytest.raises(Problem, match="does not exist; expected version 1") as caught:
            await moving
        assert caught.value.code == "PRECONDITION_FAILED"
        assert "champion" not in parts.file.read_text()


async def test_of_two_promotions_at_once_the_later_one_wins(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        await parts.answers()
        hold = parts.of(2).hold = asyncio.Event()
        earlier = asyncio.create_task(promote(parts.promotions, "2"))
        await until(lambda: parts.of(2).starts == 1)
        await promote(parts.promotions, "3")
        hold.set()
        with pytest.raises(Problem, match="points to version 3; expected version 1") as caught:
            await earlier
        assert caught.value.code == "PRECONDITION_FAILED"
        assert (parts.written(), await parts.answers()) == ("3", "3")


async def test_two_promotions_of_one_version_at_once_agree(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        await parts.answers()
        hold = parts.of(2).hold = asyncio.Event()
        both = [asyncio.create_task(promote(parts.promotions, "2")) for _ in range(2)]
        await until(lambda: parts.of(2).starts == 1)
        hold.set()
        assert [moved.target.version for moved in await asyncio.gather(*both)] == ["2", "2"]
        assert (parts.written(), await parts.answers()) == ("2", "2")


async def test_an_alias_that_does_not_exist_yet_is_made(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        async with parts.promotions.promote("iris", "fresh", "2") as moved:
            assert moved.previous is None
        assert "fresh: 2" in parts.file.read_text()


async def test_a_dry_run_writes_nothing_and_keeps_nothing_loaded(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        async with parts.promotions.promote("iris", "champion", "2", dry_run=True) as moved:
            assert not moved.written
            assert parts.bench.manager.is_ready(parts.version(2))
        assert parts.written() == "1"
        await until(lambda: parts.bench.manager.find(parts.version(2)) is None)


async def moved_by_hand(parts: Composed, number: int) -> None:
    """The champion serves, and then points to another version in the file."""
    await parts.answers()
    parts.file.write_text(parts.file.read_text().replace("champion: 1", f"champion: {number}"))
    await parts.watch.look()


async def test_a_version_that_the_alias_points_to_but_that_does_not_serve_is_checked_again(
    tmp_path: Path,
) -> None:
    async with composed(tmp_path) as parts:
        parts.of(2).fails = "ValueError: bad weights"
        await moved_by_hand(parts, 2)
        found = parts.aliases.find("iris", "champion")
        assert found is not None
        await until(lambda: found.refusal is not None)
        for dry_run in (True, False):
            for _ in range(2):
                problem = await refusal(parts, "2", dry_run=dry_run)
                assert (problem.code, "bad weights" in problem.message) == ("ROLLOUT_REFUSED", True)
        assert (parts.written(), found.phase, await parts.answers()) == ("2", "refused", "1")
        parts.of(2).fails = None
        moved = await promote(parts.promotions, "2")
        assert (moved.unchanged, moved.previous, [check for check, _ in moved.checks][-1]) == (
            True, "2", "load, warm-up and example",
        )  # fmt: skip
        assert (found.phase, found.error, await parts.answers()) == ("done", None, "2")


async def test_a_version_that_serves_is_not_checked_again_unless_in_a_dry_run(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        await parts.answers()
        moved = await promote(parts.promotions, "1")
        assert (moved.unchanged, moved.checks, parts.of(1).starts) == (True, (), 1)
        async with parts.promotions.promote("iris", "champion", "1", dry_run=True) as rehearsed:
            assert [check for check, _ in rehearsed.checks][-1] == "load, warm-up and example"
        assert (parts.of(1).starts, await parts.answers()) == (1, "1")


async def test_a_version_that_is_on_its_way_is_left_to_it(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        hold = parts.of(2).hold = asyncio.Event()
        await moved_by_hand(parts, 2)
        await until(lambda: parts.of(2).starts == 1)
        async with parts.promotions.promote("iris", "champion", "2") as moved:
            assert (moved.unchanged, moved.checks) == (True, ())
        hold.set()
        await promote(parts.promotions, "2")
        assert (await parts.answers(), parts.of(2).starts) == ("2", 1)


async def test_a_registry_with_bad_yaml_must_be_corrected(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        parts.file.write_text(parts.file.read_text() + "  iris: [")
        for verb in (
            parts.promotions.promote("iris", "champion", "2"),
            parts.promotions.rollback("iris", "x"),
        ):
            with pytest.raises(Problem) as caught:
                async with verb:
                    pass
            assert caught.value.code == "REGISTRY_UNAVAILABLE"
            assert (caught.value.hint or "").startswith("correct the registry")
        with pytest.raises(Problem) as written:
            await parts.promotions.delete_alias("iris", "champion")
        assert (written.value.hint or "").startswith("correct the registry")


async def test_a_second_at_sign_is_named(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        with pytest.raises(Problem, match="no model 'iris@champion'") as caught:
            async with parts.promotions.promote("iris@champion", "x", "1"):
                pass
        assert caught.value.hint == "a reference has one @, between the name and the alias: NAME@ALIAS"


async def test_rollbacks_go_further_back_each_time(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        await parts.answers()
        for number in "23":
            await promote(parts.promotions, number)
        went = []
        for _ in range(2):
            async with parts.promotions.rollback("iris", "champion") as moved:
                await parts.promotions.take_effect(moved, wait=10)
            went.append((parts.written(), await parts.answers()))
        assert went == [("2", "2"), ("1", "1")]


async def test_a_move_that_a_poll_applies_first_is_still_its_writers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with composed(tmp_path) as parts:
        await parts.answers()
        await promote(parts.promotions, "2")
        move, loop = parts.registry.move, asyncio.get_running_loop()

        def polled(*given: Any) -> Any:
            snapshot = move(*given)
            asyncio.run_coroutine_threadsafe(apply(snapshot), loop).result(10)
            return snapshot

        async def apply(snapshot: Any) -> None:
            parts.aliases.apply(snapshot)

        monkeypatch.setattr(parts.registry, "move", polled)
        async with parts.promotions.rollback("iris", "champion") as moved:
            await parts.promotions.take_effect(moved, wait=10)
        found = parts.aliases.find("iris", "champion")
        assert found is not None
        assert [served.moved_by for served in found.history][-2:] == ["promote", "rollback"]


async def test_steps_that_a_promotion_names_are_taken_by_a_version_that_has_served(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        await parts.answers()
        await promote(parts.promotions, "2")
        async with parts.promotions.rollback("iris", "champion") as moved:
            await parts.promotions.take_effect(moved, wait=10)
        await promote(parts.promotions, "2", steps=(50.0,))
        found = parts.aliases.find("iris", "champion")
        assert found is not None
        assert found.rollout is not None
        assert (found.rollout.course.phase, found.serving) == (Phase.CANARY, parts.version(1))


async def test_nothing_before_is_no_place_to_go_back_to(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        await parts.answers()
        with pytest.raises(Problem) as caught:
            async with parts.promotions.rollback("iris", "champion"):
                pass
        assert caught.value.code == "ROLLOUT_REFUSED"
        assert parts.written() == "1"


async def test_a_file_that_cannot_be_written_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        parts.registry.why_not_writable = lambda: "it is on read-only media"  # type: ignore[method-assign]
        problem = await refusal(parts, "2")
        assert (problem.code, problem.hint) == ("REGISTRY_READ_ONLY", "it is on read-only media")
        assert parts.bench.prepared == {}


async def test_a_deleted_alias_answers_no_more(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        await parts.answers()
        await parts.promotions.delete_alias("iris", "champion")
        with pytest.raises(Problem) as caught:
            await parts.ask()
        assert caught.value.code == "ALIAS_NOT_FOUND"


async def test_only_a_rollout_under_way_takes_orders(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        with pytest.raises(Problem) as caught:
            await parts.promotions.direct("iris", "champion", "pause")
        assert caught.value.code == "ROLLOUT_REFUSED"
        with pytest.raises(Problem) as caught:
            await parts.promotions.direct("iris", "nobody", "pause")
        assert caught.value.code == "ALIAS_NOT_FOUND"
