"""Models in the gateway's own process: measured by what that grows by, and given back when they go. Brief
calls of harmless ones run on the event loop."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import loaders
from gateway.runners import brevity, memory
from gateway.runners.base import ModelError
from gateway.runners.inline import InlineRunner
from loaders.batch import Batch, Tensors
from loaders.package import Package
from tests.support.hostile import write_package
from tests.support.processes import ONE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux")

# Small pieces, which the C library keeps for itself when they are freed, unless it is told otherwise.
GROWS = "self.kept = [bytes(1000) for _ in range(100_000)] if not hasattr(self, 'kept') else self.kept"

LOADS = "Model.kept_by_load = [bytes(1000) for _ in range(100_000)]"


def main(directory: Path) -> None:
    package = write_package(
        directory / "p",
        at_load=LOADS,
        at_predict=GROWS,
    )

    async def work() -> None:
        runner = InlineRunner(package, {})
        assert runner.measured_bytes is None
        await runner.start()
        loaded = runner.measured_bytes
        assert loaded is not None
        assert 90e6 < loaded < 150e6, loaded
        await runner.predict(ONE, {})
        assert 190e6 < (runner.measured_bytes or 0) < 280e6, runner.measured_bytes
        before = memory.own()
        await runner.close()
        assert before - memory.own() > 80e6, (before, memory.own())

    asyncio.run(work())


def test_an_inline_model_is_measured_by_what_the_gateway_grows_by(tmp_path: Path) -> None:
    """In a process of its own, as what other tests left behind would be counted too."""
    code = """
import pathlib, sys
from tests.gateway.runners.test_inline import main
main(pathlib.Path(sys.argv[1]))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


ROW = np.array([[0.5, 0.0]])


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Package:
    model = LogisticRegression().fit([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], [0, 0, 1, 1])
    return loaders.save_model(model, tmp_path_factory.mktemp("inline") / "m", verify=False)


def tensors(array: np.ndarray) -> Tensors:
    return Tensors({"": array}, len(array))


def on_loop(runner: InlineRunner, array: np.ndarray) -> asyncio.Future[Batch] | None:
    """A call on the event loop; None if it is not allowed there."""
    future: asyncio.Future[Batch] = asyncio.get_running_loop().create_future()

    def then(answer: Batch | None, error: Exception | None) -> None:
        assert threading.current_thread() is threading.main_thread()
        if answer is None:
            future.set_exception(error or AssertionError("neither an answer nor an exception"))
        else:
            future.set_result(answer)

    return future if runner.begin(tensors(array), {}, then) else None


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call is brief, however busy the machine is."""
    for name in ("BRIEF", "AWAITED", "USED_ON_LOOP", "TOOK_ON_LOOP"):
        monkeypatch.setattr(brevity, name, 60.0)


async def proved(package: Package) -> InlineRunner:
    """A runner whose calls were brief often enough."""
    runner = InlineRunner(package, {}, harmless=True)
    await runner.start()
    for _ in range(brevity.CALLS):
        assert on_loop(runner, ROW) is None
        await runner.predict(tensors(ROW), {})
    return runner


@pytest.mark.anyio
async def test_brief_calls_run_on_the_loop_and_answer_the_same(unhurried: None, harmless: Package) -> None:
    runner = await proved(harmless)
    answered = on_loop(runner, ROW)
    assert answered is not None
    assert not answered.done(), "the loop gets a turn first"
    one, same = await answered, await runner.predict(tensors(ROW), {})
    assert isinstance(one, Tensors)
    assert isinstance(same, Tensors)
    assert one.arrays[""].tolist() == same.arrays[""].tolist()
    assert on_loop(runner, np.repeat(ROW, 5, axis=0)) is None, "a larger call has not shown that it is brief"
    await runner.close()


@pytest.mark.anyio
async def test_what_a_model_raises_on_the_loop_is_its_error(unhurried: None, harmless: Package) -> None:
    runner = await proved(harmless)
    failing = on_loop(runner, ROW[:, :1])
    assert failing is not None
    with pytest.raises(ModelError, match="features"):
        await failing
    late = on_loop(runner, ROW)
    assert late is not None
    await runner.close()
    with pytest.raises(ModelError, match="closed"):
        await late


@pytest.mark.anyio
async def test_a_long_call_on_the_loop_is_the_last_one_there(
    unhurried: None, harmless: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = await proved(harmless)
    monkeypatch.setattr(brevity, "USED_ON_LOOP", 0.0)
    answer = on_loop(runner, ROW)
    assert answer is not None
    await answer
    assert on_loop(runner, ROW) is None
    await runner.close()


@pytest.mark.parametrize("options", [{}, {"harmless": True, "timeout": 60.0}])
@pytest.mark.anyio
async def test_what_may_be_long_never_runs_on_the_loop(
    unhurried: None, harmless: Package, options: dict[str, Any]
) -> None:
    runner = InlineRunner(harmless, {}, **options)
    await runner.start()
    for _ in range(3 * brevity.CALLS):
        await runner.predict(tensors(ROW), {})
    assert on_loop(runner, ROW) is None
    await runner.close()
