"""What a model answers before it serves leaves no trace in what serves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gateway.runners.base import ModelError
from gateway.runners.inline import InlineRunner
from loaders.batch import Batch, Value
from loaders.worker.process import FORKED, LOADED_AGAIN
from tests.support.hostile import write_package
from tests.support.processes import Processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="model processes need Linux")

ASKED = Value([0])
COUNTS = """
if params.get("die"):
    os._exit(3)
return [self.calls]
"""
IN_THREAD = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()"
OPEN_FILE = "global kept\nkept = open(__file__)"


def value(answer: Batch) -> object:
    assert isinstance(answer, Value)
    return answer.value


@pytest.mark.parametrize(
    ("at_load", "how"), [("", FORKED), (IN_THREAD, LOADED_AGAIN), (OPEN_FILE, LOADED_AGAIN)]
)
@pytest.mark.anyio
async def test_the_first_real_answer_is_the_first(
    tmp_path: Path, at_load: str, how: str, processes: Processes
) -> None:
    package = write_package(tmp_path / "p", at_load=at_load, at_predict=COUNTS)
    runner = await processes.started(package)
    assert runner.status()["warm_up"] == how
    before = runner.pids
    assert value(await runner.prewarm(ASKED, {})) == [1]
    assert value(await runner.prewarm(ASKED, {})) == [1 if how == FORKED else 2]
    await runner.finish_prewarm()
    assert (runner.pids == before) == (how == FORKED)
    assert value(await runner.predict(ASKED, {})) == [1]
    assert value(await runner.predict(ASKED, {})) == [2]


@pytest.mark.anyio
async def test_a_fork_that_ends_is_an_error_of_the_model(tmp_path: Path, processes: Processes) -> None:
    package = write_package(tmp_path / "p", at_predict=COUNTS)
    runner = await processes.started(package)
    with pytest.raises(ModelError, match="exited with code 3"):
        await runner.prewarm(ASKED, {"die": True})
    assert value(await runner.predict(ASKED, {})) == [1]


@pytest.mark.anyio
async def test_inline_a_model_that_was_prewarmed_is_loaded_again(
    tmp_path: Path, processes: Processes
) -> None:
    package = write_package(tmp_path / "p", at_predict=COUNTS)
    runner = InlineRunner(package, {})
    await runner.start()
    assert value(await runner.prewarm(ASKED, {})) == [1]
    await runner.finish_prewarm()
    assert value(await runner.predict(ASKED, {})) == [1]
    await runner.close()
