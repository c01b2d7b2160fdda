"""The reconciler by itself: when it starts, what it holds, and that nothing ends it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gateway.events import Swapped
from gateway.rollouts.alias import LiveAlias
from tests.support.composed import Composed, composed
from tests.support.processes import until

pytestmark = pytest.mark.anyio


def champion(parts: Composed) -> LiveAlias:
    found = parts.aliases.find("iris", "champion")
    assert found is not None
    return found


async def moved_to(parts: Composed, number: int) -> None:
    text = parts.file.read_text()
    at = parts.written()
    parts.file.write_text(text.replace(f"champion: {at}", f"champion: {number}"))
    await parts.watch.look()


async def test_its_task_ends_when_serving_and_desired_agree(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        await parts.answers()
        found = champion(parts)
        await until(lambda: found.task is None)
        await moved_to(parts, 2)
        assert found.task is not None
        await until(lambda: found.task is None)
        assert (found.serving, found.phase) == (parts.version(2), "done")
        assert [event.version for event in parts.bench.of(Swapped)] == ["1", "2"]


async def test_a_newer_move_ends_the_load_that_is_under_way(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        await parts.answers()
        parts.of(2).hold = asyncio.Event()  # never set
        await moved_to(parts, 2)
        await until(lambda: parts.of(2).starts == 1)
        await moved_to(parts, 3)
        await until(lambda: champion(parts).serving == parts.version(3))
        assert parts.bench.manager.find(parts.version(2)) is None
        assert [event.version for event in parts.bench.of(Swapped)] == ["1", "3"]


async def test_a_bug_ends_neither_the_service_nor_the_reconciler(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with composed(tmp_path) as parts:
        await parts.answers()
        parts.of(2).bug = True
        await moved_to(parts, 2)
        found = champion(parts)
        await until(lambda: found.refusal is not None)
        assert (await parts.answers(), found.diverged) == ("1", True)
        assert found.task is not None  # it waits for another try, or another move
        await moved_to(parts, 3)
        await until(lambda: found.serving == parts.version(3))
    assert "a bug" in caplog.text


async def test_the_replaced_version_lingers_and_is_the_first_to_go(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        await parts.answers()
        await moved_to(parts, 2)
        await until(lambda: champion(parts).serving == parts.version(2))
        old = parts.bench.manager.find(parts.version(1))
        assert old is not None
        assert parts.bench.ledger[old].lingering
        await moved_to(parts, 1)
        await until(lambda: champion(parts).serving == parts.version(1))
        assert parts.of(1).starts == 1
        assert not parts.bench.ledger[old].lingering
