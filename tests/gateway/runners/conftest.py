"""Fixtures of the runners' tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support import processes as support
from tests.support.packs import PackBench
from tests.support.processes import Processes


@pytest.fixture
async def processes(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Processes]:
    """Model processes that must leave nothing behind; a test that takes `start` runs each way to start."""
    start = request.getfixturevalue("start") if "start" in request.fixturenames else "fork"
    async with support.processes(tmp_path / "tmp", start) as made:
        yield made


@pytest.fixture
async def bench(processes: Processes) -> AsyncIterator[PackBench]:
    made = PackBench(processes)
    yield made
    await asyncio.gather(*(runner.close() for runner in made.runners))
    await made.packs.close()
