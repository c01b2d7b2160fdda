"""Zygotes: one per environment, made when needed, made again when killed, retired when idle."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.runners.base import RunnerTimeout
from gateway.runners.environments import Environment, allowed, preload_for
from gateway.runners.process import ProcessRunner
from gateway.runners.pulse import Sign, read
from gateway.runners.zygote import ZygoteGone, Zygotes
from loaders.worker import bootstrap
from tests.support.hostile import alive, eventually, write_package
from tests.support.processes import ONE, Processes, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="model processes need Linux")


@pytest.mark.anyio
async def test_models_of_one_environment_share_a_zygote(tmp_path: Path, processes: Processes) -> None:
    package = write_package(tmp_path / "p")
    await asyncio.gather(*(processes.started(package) for _ in range(3)))
    (zygote,) = processes.zygotes.alive
    assert len(zygote.children) == 3
    await processes.started(package, environment=Environment(preload=("json",)))
    assert len(processes.zygotes.alive) == 2
    assert processes.zygotes.bytes > 5 << 20


@pytest.mark.anyio
async def test_a_killed_zygote_costs_nothing_but_itself(tmp_path: Path, processes: Processes) -> None:
    package = write_package(tmp_path / "p")
    runner = await processes.started(package)
    (zygote,) = processes.zygotes.alive
    assert zygote.pid is not None
    os.kill(zygote.pid, signal.SIGKILL)
    await until(lambda: not processes.zygotes.alive)
    await runner.predict(ONE, {})
    another = await processes.started(package)
    await another.predict(ONE, {})
    # The first one's process has no parent that could tell how it ends: it is replaced all the same.
    os.kill(runner.pids[0], signal.SIGKILL)
    await until(lambda: processes.observed[-1:] == [("restarted", "")])
    await runner.predict(ONE, {})
    pids = runner.pids + another.pids
    await asyncio.gather(runner.close(), another.close())
    processes.runners.clear()
    assert eventually(lambda: not any(map(alive, pids)))


@pytest.mark.anyio
async def test_a_zygote_killed_while_it_makes_a_process_is_replaced(
    tmp_path: Path, processes: Processes
) -> None:
    package = write_package(tmp_path / "p")
    await processes.started(package)
    (zygote,) = processes.zygotes.alive
    assert zygote.pid is not None
    os.kill(zygote.pid, signal.SIGSTOP)  # it hears the request and does not answer
    starting = asyncio.ensure_future(processes.started(package))
    await until(lambda: zygote.waiting)
    os.kill(zygote.pid, signal.SIGKILL)
    await (await starting).predict(ONE, {})


@pytest.mark.anyio
async def test_a_stopped_zygote_is_ended_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: Processes
) -> None:
    package = write_package(tmp_path / "p")
    runner = await processes.started(package)
    (zygote,) = processes.zygotes.alive
    assert zygote.pid is not None
    os.kill(zygote.pid, signal.SIGSTOP)
    starting = asyncio.ensure_future(processes.started(package))
    await until(lambda: zygote.waiting and (read(zygote.pid or 0) or Sign("", 0)).state == "T")
    processes.zygotes.tend()
    assert zygote.alive, "it may go on in a moment"
    monkeypatch.setattr("gateway.runners.pulse.STOPPED", 0.0)
    processes.zygotes.tend()
    await (await starting).predict(ONE, {})
    await runner.predict(ONE, {})


@pytest.mark.anyio
async def test_a_process_that_is_never_made_counts_as_a_load_that_takes_too_long(
    tmp_path: Path, processes: Processes
) -> None:
    package = write_package(tmp_path / "p")
    await processes.started(package)
    (zygote,) = processes.zygotes.alive
    assert zygote.pid is not None
    os.kill(zygote.pid, signal.SIGSTOP)
    with pytest.raises(RunnerTimeout, match=r"within 0\.1 s"):
        await processes.started(package, load_timeout=0.1)
    os.kill(zygote.pid, signal.SIGCONT)


@pytest.mark.anyio
async def test_an_idle_zygote_is_retired_and_comes_back(tmp_path: Path, processes: Processes) -> None:
    package = write_package(tmp_path / "p")
    runner = await processes.started(package)
    (zygote,) = processes.zygotes.alive
    far = asyncio.get_running_loop().time() + 1e6
    assert await processes.zygotes.retire_idle(far) == 0  # it has a model
    await runner.close()
    processes.runners.clear()
    assert await processes.zygotes.retire_idle() == 0  # it was used just now
    assert await processes.zygotes.retire_idle(idle=0.0) == 1  # others need the memory
    assert zygote.pid is not None
    assert not alive(zygote.pid)
    assert processes.zygotes.bytes == 0
    await (await processes.started(package)).predict(ONE, {})


@pytest.mark.anyio
async def test_idle_zygotes_are_retired_by_themselves(tmp_path: Path) -> None:
    package = write_package(tmp_path / "p")
    zygotes = Zygotes(idle=0.1)
    runner = ProcessRunner(package, {}, zygotes=zygotes, name="m", version="1", environment=Environment())
    await runner.start()
    await runner.close()
    await until(lambda: not zygotes.alive)
    await zygotes.close()


@pytest.mark.anyio
async def test_a_module_that_starts_a_thread_is_left_to_the_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: Processes
) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "quiet_one.py").write_text("")
    (modules / "threaded_one.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    (modules / "broken_one.py").write_text("raise RuntimeError('no such driver')\n")
    monkeypatch.setenv("PYTHONPATH", str(modules), prepend=os.pathsep)
    package = write_package(
        tmp_path / "p",
        at_predict="return [m in sys.modules for m in ('quiet_one', 'threaded_one', 'broken_one')]",
    )
    preload = ("quiet_one", "threaded_one", "not_there", "broken_one")
    runner = await processes.started(package, environment=Environment(preload=preload))
    (zygote,) = processes.zygotes.alive
    assert zygote.start_method == "fork"
    assert zygote.missing == ("threaded_one", "not_there", "broken_one")
    assert (await runner.predict(ONE, {})).value == [True, False, False]  # type: ignore[union-attr]
    assert processes.zygote_lines == ["broken_one cannot be imported here: RuntimeError: no such driver"]


@pytest.mark.anyio
async def test_where_threads_are_there_from_the_start_processes_are_spawned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: Processes
) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "sitecustomize.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(modules), prepend=os.pathsep)
    package = write_package(tmp_path / "p")
    await (await processes.started(package)).predict(ONE, {})
    (zygote,) = processes.zygotes.alive
    assert zygote.start_method == "spawn"


@pytest.mark.anyio
async def test_an_interpreter_that_does_not_work_is_a_clean_error(tmp_path: Path) -> None:
    zygotes = Zygotes()
    package = write_package(tmp_path / "p")
    for python in ("/bin/false", "/nowhere/python"):
        runner = ProcessRunner(
            package, {}, zygotes=zygotes, name="m", version="1", environment=Environment(python=python)
        )
        with pytest.raises(Exception, match="no process could be started"):
            await runner.start()
        await runner.close()
    await zygotes.close()
    with pytest.raises(ZygoteGone):
        await zygotes.make(Environment(), None, 0)  # type: ignore[arg-type]


def test_a_zygote_whose_gateway_stopped_during_its_imports_ends_silently(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()
    options = {
        "control": theirs.fileno(), "parent": os.getpid(), "preload": [], "start": "fork",
        "scratch": str(tmp_path / "scratch"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, bootstrap.__file__, "zygote", json.dumps(options)],
        pass_fds=[theirs.fileno()],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    theirs.close()
    assert (done.returncode, done.stderr) == (0, "")


def test_only_listed_variables_are_passed_on() -> None:
    environ = {"PATH": "/bin", "LC_ALL": "C", "AWS_SECRET_ACCESS_KEY": "x", "MLFLOW_TRACKING_PASSWORD": "x"}
    passed = Environment().variables({**environ, "GATEWAY_ADMIN_KEY_FILE": "x", "OMP_NUM_THREADS": "8"})
    assert {name for name in passed if name in environ} == {"PATH", "LC_ALL"}
    assert passed["OMP_NUM_THREADS"] == "1"
    assert not any(name.startswith("GATEWAY") for name in passed)
    assert allowed({"HF_HOME": "a", "HF_TOKEN": "b", "X": "c"}, ["HF_*"]) == {"HF_HOME": "a", "HF_TOKEN": "b"}


def test_each_framework_has_its_preload_and_threaded_ones_none() -> None:
    assert "sklearn.ensemble" in preload_for("mlflow.sklearn")
    assert preload_for("mlflow.pyfunc.model") == preload_for("somebody.loader") == ("numpy", "pandas")
    assert preload_for("mlflow.onnx") == ("numpy",)


@pytest.mark.anyio
async def test_a_process_that_comes_as_its_caller_leaves_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: Processes
) -> None:
    package = write_package(tmp_path / "p")
    await processes.started(package)
    (zygote,) = processes.zygotes.alive
    ours, theirs = socket.socketpair()
    with ours, theirs:
        leaving = asyncio.ensure_future(zygote.make(theirs, theirs.fileno()))
        told = zygote._told

        def tell(message: dict[str, Any], descriptors: list[int]) -> None:
            told(message, descriptors)
            leaving.cancel()

        monkeypatch.setattr(zygote, "_told", tell)
        with pytest.raises(asyncio.CancelledError):
            await leaving
    await until(lambda: len(zygote.children) == 1)
