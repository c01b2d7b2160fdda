"""What follows when a model process ends by itself: it is replaced, later and later, and at last no more."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from pathlib import Path
from typing import Literal

import pytest

from gateway.runners.base import RunnerCrashed
from gateway.runners.confinement import Confinement
from gateway.runners.restarts import Policy, Restarts
from tests.support.hostile import write_package
from tests.support.house import ONE, House, run, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="model processes need Linux")

PATIENT = Policy(base=0.01, crashes=100)


def test_the_restart_rule() -> None:
    rule = Restarts(Policy(window=60, base=0.5, longest=3, crashes=6, jitter=0.0), random.Random(0))
    assert [rule.ended(t, crashed=True) for t in (0.0, 1.0, 2.0, 3.0, 4.0)] == [0.0, 0.5, 1.0, 2.0, 3.0]
    assert rule.ended(5.0, crashed=True) is None
    later = Restarts(Policy(crashes=2, jitter=0.0))
    assert later.ended(0.0, crashed=True) == 0.0
    assert later.ended(61.0, crashed=True) == 0.0
    timeouts = Restarts(Policy(crashes=2, jitter=0.0))
    assert None not in [timeouts.ended(float(t), crashed=False) for t in range(10)]
    jittered = Restarts(Policy(jitter=0.2, crashes=1000), random.Random(0))
    delays = [jittered.ended(0.0, crashed=True) for _ in range(2)]
    assert delays[0] == 0.0
    assert delays[1] is not None
    assert 0.4 <= delays[1] <= 0.6


def test_a_crash_fails_its_own_calls_and_the_next_is_answered(
    tmp_path: Path, start: Literal["fork", "spawn"]
) -> None:
    package = write_package(
        tmp_path / "p", at_predict="if params.get('die'): import signal; os.kill(os.getpid(), signal.SIGSEGV)"
    )

    async def work(h: House) -> None:
        runner, other = await h.started(package), await h.started(package)
        with pytest.raises(RunnerCrashed, match="SIGSEGV"):
            await runner.predict(ONE, {"die": True})
        await other.predict(ONE, {})
        await runner.predict(ONE, {})
        assert [what for what, _ in h.observed] == ["crashed", "restarted"]
        assert "SIGSEGV" in h.observed[0][1]
        assert runner.status()["crashes"] == 1

    run(tmp_path / "tmp", work, start)


def test_with_two_processes_the_other_goes_on(tmp_path: Path) -> None:
    package = write_package(tmp_path / "p", at_predict="if params.get('die'): os._exit(7)")

    async def work(h: House) -> None:
        runner = await h.started(package, processes=2, restarts=PATIENT)
        calls = [runner.predict(ONE, {"die": i == 3}) for i in range(10)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [i for i, r in enumerate(results) if isinstance(r, RunnerCrashed)] == [3]
        assert "exited with code 7" in str(results[3])
        await until(lambda: len(runner.pids) == 2)

    run(tmp_path / "tmp", work)


def test_an_idle_process_that_is_killed_is_replaced(tmp_path: Path) -> None:
    package = write_package(tmp_path / "p")

    async def work(h: House) -> None:
        runner = await h.started(package)
        (pid,) = runner.pids
        os.kill(pid, signal.SIGKILL)
        await until(lambda: h.observed[-1:] == [("restarted", "")])
        await runner.predict(ONE, {})
        assert "SIGKILL" in h.observed[0][1]

    run(tmp_path / "tmp", work)


def test_restarts_back_off_and_end_in_quarantine(tmp_path: Path) -> None:
    package = write_package(tmp_path / "p", at_predict="os._exit(1)")

    async def work(h: House) -> None:
        runner = await h.started(package, restarts=Policy(base=0.5, crashes=3, jitter=0.0))
        for _ in range(2):
            with pytest.raises(RunnerCrashed, match="code 1"):
                await runner.predict(ONE, {})
        with pytest.raises(RunnerCrashed) as caught:
            await runner.predict(ONE, {})
        assert caught.value.retry_after is not None
        assert 0 < caught.value.retry_after <= 0.5
        await until(lambda: runner.pids)
        with pytest.raises(RunnerCrashed, match="code 1"):
            await runner.predict(ONE, {})
        for _ in range(2):
            with pytest.raises(RunnerCrashed, match="quarantine"):
                await runner.predict(ONE, {})
        assert runner.quarantine is not None
        assert h.observed[-1][0] == "quarantined"

    run(tmp_path / "tmp", work)


def test_a_package_that_fails_to_load_again_counts_as_a_crash(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    package = write_package(
        tmp_path / "p",
        at_load=f"if os.path.exists({str(flag)!r}): raise ValueError('changed')",
        at_predict="os._exit(1)",
    )

    async def work(h: House) -> None:
        runner = await h.started(
            package,
            restarts=Policy(base=0.01, crashes=3),
            confinement=Confinement(filesystem=False, user="same"),
        )
        flag.touch()
        with pytest.raises(RunnerCrashed, match="code 1"):
            await runner.predict(ONE, {})
        await until(lambda: runner.quarantine)
        assert "ValueError: changed" in str(runner.quarantine)

    run(tmp_path / "tmp", work)
