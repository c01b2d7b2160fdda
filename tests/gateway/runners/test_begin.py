"""Calls that begin without a task: answered, refused and repeated as calls in a task are, for fewer steps."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.runners.base import ModelError, NoProcess, RunnerCrashed, RunnerTimeout
from gateway.runners.confinement import Confinement
from gateway.runners.packed import PackedRunner
from gateway.runners.process import ProcessRunner
from loaders.batch import Batch, Columns, Tensors
from tests.support.counted import counted
from tests.support.hostile import write_package
from tests.support.packs import HELD, PackBench, answered_by, given, pid, rows, scaled
from tests.support.processes import Processes, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="model processes need Linux")

#: Raises for 14, too.
FAILS = (
    HELD
    + """
if data[0] == 14:
    raise ValueError("fourteen")
"""
)
#: One call in a pack runs 32 functions of the runners and of `loaders`, from its begin to its answer.
#: Raise this only with a reason.
MOST = 33


def begun(
    runner: PackedRunner | ProcessRunner, batch: Batch, params: Mapping[str, Any] | None = None
) -> asyncio.Future[Batch]:
    """Begins a call, which must be possible now."""
    future: asyncio.Future[Batch] = asyncio.get_running_loop().create_future()

    def then(answer: Batch | None, error: Exception | None) -> None:
        assert not future.done()
        if answer is None:
            future.set_exception(error or AssertionError("neither an answer nor an exception"))
        else:
            future.set_result(answer)

    assert runner.begin(batch, params or {}, then)
    return future


def held(directory: Path) -> dict[str, str]:
    return {"begun": str(directory / "begun"), "go": str(directory / "go")}


@pytest.mark.anyio
async def test_each_caller_gets_his_answer_or_his_error(tmp_path: Path, bench: PackBench) -> None:
    runners = [await bench.started(scaled(tmp_path / str(i), i)) for i in range(4)]
    failing = await bench.started(write_package(tmp_path / "f", at_predict=FAILS))
    calls = {(i, n): begun(runners[i], rows(n)) for n in range(5) for i in range(4)}
    failed = begun(failing, rows(14))
    for (i, n), call in calls.items():
        assert given(await call) == [i * n]
    with pytest.raises(ModelError, match="ValueError: fourteen"):
        await failed


@pytest.mark.anyio
async def test_only_the_call_that_ran_when_its_pack_ended_fails(tmp_path: Path, bench: PackBench) -> None:
    guilty = await bench.started(write_package(tmp_path / "g", at_predict=FAILS))
    other = await bench.started(scaled(tmp_path / "2", 2))
    running = begun(guilty, rows(13), held(tmp_path))
    waiting = [begun(other, rows(n)) for n in range(3)]
    await until((tmp_path / "begun").exists)
    os.kill(pid(other), signal.SIGKILL)
    with pytest.raises(RunnerCrashed) as crashed:
        await running
    assert crashed.value.outside
    assert [given(await call) for call in waiting] == [[0], [2], [4]]
    assert [what for what, _ in bench.observed] == ["crashed"]
    assert other.isolation == "pack"
    assert await answered_by(guilty, 1) == [1]
    assert guilty.isolation == "process"
    assert given(await begun(guilty, rows(2))) == [2]  # now in its own process


@pytest.mark.anyio
async def test_a_call_over_its_time_ends_its_pack_alone(tmp_path: Path, bench: PackBench) -> None:
    slow = await bench.started(write_package(tmp_path / "s", at_predict=FAILS), timeout=1.0)
    other = await bench.started(scaled(tmp_path / "2", 2), timeout=120.0)
    running = begun(slow, rows(13), held(tmp_path))
    waiting = begun(other, rows(4))
    with pytest.raises(RunnerTimeout):
        await running
    assert given(await waiting) == [8]
    assert other.isolation == "pack"


@pytest.mark.anyio
async def test_calls_wait_in_a_closed_runner_for_nothing(tmp_path: Path, bench: PackBench) -> None:
    holding = await bench.started(write_package(tmp_path / "h", at_predict=FAILS))
    leaving = await bench.started(scaled(tmp_path / "2", 2))
    running = begun(holding, rows(13), held(tmp_path))
    waiting = begun(leaving, rows(1))
    await until((tmp_path / "begun").exists)
    closing = asyncio.ensure_future(leaving.close())
    await asyncio.sleep(0)
    os.kill(pid(holding), signal.SIGKILL)
    await closing
    with pytest.raises(NoProcess):
        await waiting
    with pytest.raises(RunnerCrashed):
        await running


@pytest.mark.anyio
async def test_a_process_of_its_own_takes_one_call_at_a_time(tmp_path: Path, processes: Processes) -> None:
    confinement = Confinement(filesystem=False, user="same")  # it meets the test by files
    runner = processes.runner(write_package(tmp_path / "p", at_predict=FAILS), confinement=confinement)
    await runner.start()
    try:
        running = begun(runner, rows(13), held(tmp_path))
        assert not runner.begin(rows(1), {}, lambda answer, error: None)
        waiting = asyncio.ensure_future(runner.predict(rows(1), {}))
        await until((tmp_path / "begun").exists)
        os.kill(runner.pids[0], signal.SIGKILL)
        with pytest.raises(RunnerCrashed):
            await running
        assert given(await waiting) == [1]
        assert given(await begun(runner, rows(2))) == [2]
        with pytest.raises(ModelError):
            await begun(runner, rows(14))
    finally:
        await runner.close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    "batch", [Columns({"a": np.ones(1), "b": np.ones(1)}, 1), Tensors({"": np.ones((1, 2))}, 1)]
)
async def test_a_call_in_a_pack_runs_few_functions(tmp_path: Path, bench: PackBench, batch: Batch) -> None:
    runner = await bench.started(
        write_package(tmp_path / "a", at_predict="import numpy; return numpy.ones(1)")
    )
    times = 50
    await begun(runner, batch)
    with counted() as calls:
        for _ in range(times):
            await begun(runner, batch)
    ours = (f"{os.sep}gateway{os.sep}runners{os.sep}", f"{os.sep}loaders{os.sep}")
    here = {file: count / times for file, count in calls.items() if any(place in file for place in ours)}
    assert sum(count for file, count in here.items() if file != __file__) <= MOST, here
