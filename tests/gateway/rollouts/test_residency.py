"""Load and unload by name, as an operator asks for it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gateway.errors import Problem
from gateway.names import Reference
from gateway.rollouts.alias import LiveAlias
from tests.support.composed import CHAMPION, composed
from tests.support.processes import until

pytestmark = pytest.mark.anyio
SECOND = Reference("iris", version="2")


async def test_an_alias_is_loaded_through_its_gates_and_unloaded(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        loaded = await parts.residency.load(CHAMPION)
        assert isinstance(loaded, tuple)
        assert loaded[0] == parts.version(1)
        assert parts.bench.manager.is_ready(parts.version(1))
        version, servable = await parts.residency.unload(CHAMPION)
        assert (version, parts.bench.manager.find(parts.version(1))) == (parts.version(1), None)
        assert servable is not None
        assert servable.gone.is_set()
        assert await parts.residency.unload(SECOND) == (parts.version(2), None)


async def test_without_wait_the_alias_is_returned_while_its_gates_run(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        hold = parts.of(1).hold = asyncio.Event()
        found = await parts.residency.load(CHAMPION, wait=False)
        assert isinstance(found, LiveAlias)
        assert found.serving is None
        hold.set()
        await until(lambda: found.serving == parts.version(1))


async def test_a_failure_is_tried_again_when_an_operator_asks(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        parts.of(2).fails = "ValueError: no"
        for starts in (1, 2):
            with pytest.raises(Problem, match="ValueError: no"):
                await parts.residency.load(SECOND)
            assert parts.of(2).starts == starts
        parts.of(2).fails = None
        await parts.residency.load(SECOND)


async def test_patterns_are_preloaded_from_the_registry(tmp_path: Path) -> None:
    async with composed(tmp_path, preload=("*", "iris/2")) as parts:
        assert not parts.views.ready().ready
        await parts.residency.preload()
        assert parts.views.ready().ready
        assert {servable.version.version for servable in parts.bench.manager} == {"1", "2"}
