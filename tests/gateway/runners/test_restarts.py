"""What follows when a model process ends by itself: it is replaced, later and later, and at last no more."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from gateway.runners.base import NoProcess, RunnerCrashed
from gateway.runners.confinement import Confinement
from gateway.runners.pulse import Sign, read
from gateway.runners.restarts import Policy, Restarts
from tests.support.hostile import write_package
from tests.support.processes import ONE, Processes, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="model processes need Linux")

PATIENT = Policy(base=0.01, crashes=100)


class NoJitter(random.Random):
    def random(self) -> float:
        return 0.0


def rule(**policy: Any) -> Restarts:
    return Restarts(Policy(**{"crashes": 1000} | policy), NoJitter())


def test_restarts_wait_longer_and_longer_while_the_model_does_not_answer() -> None:
    it = rule(window=60, base=0.5, longest=3)
    assert [it.ended(float(t), crashed=True) for t in range(5)] == [0.0, 0.5, 1.0, 2.0, 3.0]
    assert it.ended(5.0, crashed=True, answered=True) == 0.0, "it answers: somebody kills it"
    assert it.ended(6.0, crashed=True) == 0.5
    assert it.ended(67.0, crashed=True) == 0.0, "the window has passed"
    assert it.crashes == 8
    jittered = Restarts(Policy(base=0.5), random.Random(0))
    delays = [jittered.ended(0.0, crashed=True) for _ in range(2)]
    assert delays[0] == 0.0
    assert delays[1] is not None
    assert 0.4 <= delays[1] < 0.5


Case = tuple[str, bool]


@pytest.mark.parametrize(
    ("ends", "quarantined"),
    [
        pytest.param([("a", False), ("b", False), ("c", False)], True, id="three inputs, no answer"),
        pytest.param([("a", False)] * 10, False, id="one input, again and again"),
        pytest.param([("", False)] * 3, True, id="without any call"),
        pytest.param([("", True)] * 10, False, id="killed from outside, it answers in between"),
        pytest.param([(str(n), True) for n in range(10)], False, id="poisoned inputs among good ones"),
        pytest.param([("a", False), ("a", False), ("b", False), ("c", False)], True, id="each ran twice"),
    ],
)
def test_quarantine_counts_suspects(ends: list[Case], quarantined: bool) -> None:
    it = rule(crashes=3, suspects=3)
    said = [
        it.ended(float(t), crashed=True, suspect=suspect or None, answered=answered)
        for t, (suspect, answered) in enumerate(ends)
    ]
    assert (None in said) is quarantined
    timeouts = rule(crashes=2, suspects=1)
    assert None not in [timeouts.ended(float(t), crashed=False) for t in range(10)]


@pytest.mark.anyio
async def test_a_crash_fails_its_own_calls_and_the_next_is_answered(
    tmp_path: Path, start: Literal["fork", "spawn"], processes: Processes
) -> None:
    package = write_package(
        tmp_path / "p", at_predict="if params.get('die'): import signal; os.kill(os.getpid(), signal.SIGSEGV)"
    )
    runner, other = await processes.started(package), await processes.started(package)
    with pytest.raises(RunnerCrashed, match="SIGSEGV"):
        await runner.predict(ONE, {"die": True})
    await other.predict(ONE, {})
    await runner.predict(ONE, {})
    assert [what for what, _ in processes.observed] == ["crashed", "restarted"]
    assert "SIGSEGV" in processes.observed[0][1]
    assert runner.status()["crashes"] == 1


@pytest.mark.anyio
async def test_with_two_processes_the_other_goes_on(tmp_path: Path, processes: Processes) -> None:
    package = write_package(tmp_path / "p", at_predict="if params.get('die'): os._exit(7)")
    runner = await processes.started(package, processes=2, restarts=PATIENT)
    calls = [runner.predict(ONE, {"die": i == 3}) for i in range(10)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [i for i, r in enumerate(results) if isinstance(r, RunnerCrashed)] == [3]
    assert "exited with code 7" in str(results[3])
    await until(lambda: len(runner.pids) == 2)


@pytest.mark.anyio
async def test_an_idle_process_that_is_killed_is_replaced(tmp_path: Path, processes: Processes) -> None:
    package = write_package(tmp_path / "p")
    runner = await processes.started(package)
    (pid,) = runner.pids
    os.kill(pid, signal.SIGKILL)
    await until(lambda: processes.observed[-1:] == [("restarted", "")])
    await runner.predict(ONE, {})
    assert "SIGKILL" in processes.observed[0][1]


@pytest.mark.anyio
async def test_calls_wait_for_the_restart_and_a_broken_model_ends_in_quarantine(
    tmp_path: Path, processes: Processes
) -> None:
    package = write_package(tmp_path / "p", at_predict="os._exit(1)")
    runner = await processes.started(package, restarts=Policy(base=0.5, crashes=3, suspects=3))
    for n in range(3):
        # The third call comes while the restart waits for its half second, and waits too.
        with pytest.raises(RunnerCrashed, match="code 1"):
            await runner.predict(ONE, {"n": n})
    for _ in range(2):
        with pytest.raises(NoProcess, match="quarantine"):
            await runner.predict(ONE, {})
    assert runner.quarantine is not None
    assert [what for what, _ in processes.observed].count("restarted") == 2
    assert processes.observed[-1][0] == "quarantined"


@pytest.mark.anyio
async def test_a_call_does_not_wait_for_ever_for_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: Processes
) -> None:
    package = write_package(tmp_path / "p", at_predict="os._exit(1)")
    runner = await processes.started(package, restarts=Policy(base=600.0, longest=600.0))
    for n in range(2):
        with pytest.raises(RunnerCrashed):
            await runner.predict(ONE, {"n": n})
    monkeypatch.setattr("gateway.runners.pool.PATIENCE", 0.05)
    with pytest.raises(NoProcess, match="is restarting") as caught:
        await runner.predict(ONE, {})
    assert caught.value.retry_after > 100


@pytest.mark.anyio
async def test_the_same_input_that_ends_each_process_does_not_quarantine_the_model(
    tmp_path: Path, processes: Processes
) -> None:
    package = write_package(tmp_path / "p", at_predict="if params.get('die'): os.abort()")
    runner = await processes.started(package, restarts=Policy(base=0.01, crashes=3, suspects=3))
    for _ in range(6):
        with pytest.raises(RunnerCrashed, match="SIGABRT"):
            await runner.predict(ONE, {"die": True})
    await runner.predict(ONE, {})


@pytest.mark.anyio
async def test_a_spare_process_takes_over_at_once(tmp_path: Path, processes: Processes) -> None:
    """A restart would take ten minutes here, so the spare answers."""
    package = write_package(tmp_path / "p", at_predict="if params.get('die'): os.abort()")
    runner = await processes.started(package, restarts=Policy(base=600.0, longest=600.0))
    with pytest.raises(RunnerCrashed):
        await runner.predict(ONE, {"die": 1})
    await until(lambda: processes.observed[-1:] == [("restarted", "")])
    runner.start_spare()
    await until(lambda: any(p["spare"] for p in runner.status()["processes"]))
    assert len(runner.pids) == 2
    before = runner.measured_bytes
    with pytest.raises(RunnerCrashed):
        await runner.predict(ONE, {"die": 2})
    await runner.predict(ONE, {})
    assert len(runner.pids) == 1
    assert not runner.spare
    runner.start_spare()
    await runner.drop_spare()  # while it starts
    assert len(runner.pids) == 1
    runner.start_spare()
    await until(lambda: any(p["spare"] for p in runner.status()["processes"]))
    await runner.drop_spare()
    assert len(runner.pids) == 1
    assert before is not None
    os.kill(runner.pids[0], 0)
    assert [what for what, _ in processes.observed].count("crashed") == 2, (
        "a spare that is given up is not a crash"
    )


@pytest.mark.anyio
async def test_a_stopped_process_is_shown_as_stuck_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: Processes
) -> None:
    package = write_package(tmp_path / "p")
    runner = await processes.started(package)
    (pid,) = runner.pids
    runner.tend()
    assert runner.stuck is None
    os.kill(pid, signal.SIGSTOP)
    await until(lambda: (read(pid) or Sign("", 0)).state == "T")
    call = asyncio.ensure_future(runner.predict(ONE, {}))
    await asyncio.sleep(0)
    runner.tend()
    assert runner.stuck is not None
    assert "state T" in runner.stuck
    assert [p["stuck"] is not None for p in runner.status()["processes"]] == [True]
    monkeypatch.setattr("gateway.runners.pulse.STOPPED", 0.0)
    runner.tend()
    with pytest.raises(RunnerCrashed, match="stopped"):
        await call
    await runner.predict(ONE, {})
    runner.tend()
    assert runner.stuck is None
    assert [what for what, _ in processes.observed] == ["stuck", "crashed", "restarted", "moving"]


@pytest.mark.anyio
async def test_a_package_that_fails_to_load_again_counts_as_a_crash(
    tmp_path: Path, processes: Processes
) -> None:
    flag = tmp_path / "flag"
    package = write_package(
        tmp_path / "p",
        at_load=f"if os.path.exists({str(flag)!r}): raise ValueError('changed')",
        at_predict="os._exit(1)",
    )
    runner = await processes.started(
        package,
        restarts=Policy(base=0.01, crashes=3),
        confinement=Confinement(filesystem=False, user="same"),
    )
    flag.touch()
    with pytest.raises(RunnerCrashed, match="code 1"):
        await runner.predict(ONE, {})
    await until(lambda: runner.quarantine)
    assert "ValueError: changed" in str(runner.quarantine)
