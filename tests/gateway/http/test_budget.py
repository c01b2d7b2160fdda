"""The HTTP layer's part of the hot path has a budget, counted in function calls: a time depends on the
machine."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from gateway.http.predict import LOOK_SECONDS, WATCH_AFTER_SECONDS, _DisconnectWatchers
from loaders.batch import Tensors
from tests.bench.bench_http import COLUMNS, asking, calls

#: A request calls 102 functions in Python and in C, the test's included. Raise this only with a reason.
MOST = 103


@pytest.mark.anyio
@pytest.mark.parametrize("rows", [1, 100])
async def test_a_prediction_calls_few_functions_however_many_rows_it_has(rows: int, tmp_path: Path) -> None:
    split = {"columns": COLUMNS, "data": [[5.1, 3.5, 1.4, 0.2]] * rows}
    body = orjson.dumps({"dataframe_split": split})
    async with asking(body, Tensors({"": np.arange(rows)}, rows), tmp_path) as ask:
        assert await calls(ask) <= MOST


def test_looking_for_clients_that_left_takes_few_turns_of_the_loop() -> None:
    """The clock of uvloop counts milliseconds: a timer for the exact moment fired many times too early."""
    uvloop = pytest.importorskip("uvloop")
    looks = 0

    class Counted(_DisconnectWatchers):
        def _begin(self) -> None:
            nonlocal looks
            looks += 1
            super()._begin()

    async def never() -> Any:
        raise AssertionError("the request has ended")

    async def requests() -> float:
        watchers, began = Counted(), time.monotonic()
        for _ in range(20):
            watchers.watch(never, time.perf_counter()).end()
            await asyncio.sleep(0.003)
        await asyncio.sleep(2 * WATCH_AFTER_SECONDS)
        return time.monotonic() - began

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        seconds = runner.run(requests())
    assert 0 < looks <= seconds / LOOK_SECONDS + 1
