"""A killed zygote leaves no zombies and no orphans, and takes no exit status of others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.runners import orphans
from tests.support.hostile import alive, eventually, write_package
from tests.support.processes import ONE, Processes, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="model processes need Linux")

LEAVES = """
import subprocess
left = subprocess.Popen(['sleep', '1000'], start_new_session=True)
shell = ['sh', '-c', 'sleep 1000 & echo $!']
outside = subprocess.Popen(shell, stdout=subprocess.PIPE, start_new_session=True)
return [left.pid, int(outside.stdout.readline())]
"""


@pytest.fixture(autouse=True)
def subreaper() -> Iterator[None]:
    """Makes this process like the first one of a container."""
    assert orphans.adopt()
    yield
    assert orphans.adopt(False)


def exists(pid: int) -> bool:
    return Path("/proc", str(pid)).exists()


def gone(h: Processes, *pids: int) -> bool:
    """Returns True if they are not in the process table any more, after one more look."""
    h.zygotes.tend()
    return not any(map(exists, pids))


def ended_with(code: int) -> subprocess.Popen[bytes]:
    """A child of this process itself that has ended, and waits to be asked how."""
    child = subprocess.Popen(["sh", "-c", f"exit {code}"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    return child


def kill_zygote(h: Processes) -> int:
    (zygote,) = h.zygotes.alive
    assert zygote.pid is not None
    os.kill(zygote.pid, signal.SIGKILL)
    return zygote.pid


@pytest.mark.anyio
async def test_what_a_killed_zygote_leaves_is_used_on_and_reaped(
    tmp_path: Path, processes: Processes
) -> None:
    package = write_package(tmp_path / "p")
    first, second = await processes.started(package), await processes.started(package)
    zygote = kill_zygote(processes)
    await until(lambda: not processes.zygotes.alive)  # the end of its stream was read
    await until(lambda: gone(processes, zygote))
    for _ in range(5):
        processes.zygotes.tend()
    for runner in (first, second):
        await runner.predict(ONE, {})
    (crashed,) = first.pids
    os.kill(crashed, signal.SIGKILL)
    await until(lambda: gone(processes, crashed))
    await until(lambda: processes.observed[-1:] == [("restarted", "")])
    (ended,) = second.pids
    await second.close()
    await until(lambda: gone(processes, ended))
    await first.predict(ONE, {})


@pytest.mark.anyio
async def test_what_a_model_left_behind_ends_without_its_zygote_too(
    tmp_path: Path, processes: Processes
) -> None:
    package = write_package(tmp_path / "p", at_predict=LEAVES)
    runner = await processes.started(package)
    answer = await runner.predict(ONE, {})
    child, orphan = answer.value  # type: ignore[union-attr]
    kill_zygote(processes)
    await until(lambda: not processes.zygotes.alive)
    for _ in range(3):
        processes.zygotes.tend()
    assert all(map(alive, (child, orphan)))  # the model still has them
    await runner.close()
    await until(lambda: gone(processes, child, orphan))


def test_what_is_left_at_the_end_ends_with_it(tmp_path: Path) -> None:
    package = write_package(tmp_path / "p", at_predict=LEAVES)

    async def main() -> list[int]:
        h = Processes(tmp_path)
        runner = await h.started(package)
        left: list[int] = (await runner.predict(ONE, {})).value  # type: ignore[union-attr]
        kill_zygote(h)
        await until(lambda: not h.zygotes.alive)
        await h.close()
        return left

    left = asyncio.run(main())
    assert eventually(lambda: not any(map(alive, left)))
    for pid in left:
        with contextlib.suppress(ChildProcessError):  # the gateway may have reaped it before it closed
            os.waitpid(pid, 0)


@pytest.mark.anyio
async def test_exit_statuses_of_other_processes_are_not_taken(tmp_path: Path, processes: Processes) -> None:
    package = write_package(tmp_path / "p")
    runner = await processes.started(package)
    own = ended_with(7)
    (model,) = runner.pids
    zygote = kill_zygote(processes)
    os.kill(model, signal.SIGKILL)
    await until(lambda: gone(processes, model, zygote))
    assert own.wait() == 7


def test_what_is_started_here_later_is_left_alone() -> None:
    looking = orphans.Orphans()
    lives = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    try:
        looking.come({})  # as if a zygote had been killed
        for _ in range(3):
            looking.tend()
        looking.end()
        assert alive(lives.pid)
    finally:
        lives.kill()
        lives.wait()


@pytest.mark.parametrize(
    "adopting", [True, False], ids=["of one that was there before", "of who adopts nobody"]
)
def test_children_that_others_started_are_left_alone(adopting: bool) -> None:
    lives = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    ended = subprocess.Popen(["sh", "-c", "exit 7"], start_new_session=True)
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    try:
        assert orphans.adopt(adopting)
        looking = orphans.Orphans()
        for _ in range(3):
            looking.tend()
        looking.end()
        assert ended.wait() == 7
        assert alive(lives.pid)
    finally:
        lives.kill()
        lives.wait()
