"""Packages that do harm, at import, at load and at predict: the gateway and the others notice nothing, and
nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from gateway.runners.base import ModelError, RunnerCrashed, RunnerTimeout
from gateway.runners.process import ProcessRunner
from gateway.runners.restarts import Policy
from tests.support.hostile import alive, descendants, eventually, write_package
from tests.support.processes import ONE, Processes, processes, run, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="model processes need Linux")

Start = Literal["fork", "spawn"]
Failure = type[ModelError] | type[RunnerCrashed] | type[RunnerTimeout] | None

DEAF = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass"
# What it does: the lines, what the caller gets, and what is said of it. None: nothing, it goes on.
HARM: dict[str, tuple[str, Failure, str]] = {
    "raises": ("raise ValueError('no')", ModelError, "ValueError: no"),
    "hangs": ("while True: pass", RunnerTimeout, "did not answer within"),
    "hangs deaf": (DEAF, RunnerTimeout, "did not answer within"),
    "exits": ("sys.exit(3)", ModelError, "SystemExit: 3"),
    "leaves": ("os._exit(3)", RunnerCrashed, "exited with code 3"),
    "leaves as if well": ("os._exit(0)", RunnerCrashed, "exited with code 0"),
    "segfaults": ("import ctypes\nctypes.string_at(0)", RunnerCrashed, "SIGSEGV"),
    "kills itself": ("import signal\nos.kill(os.getpid(), signal.SIGKILL)", RunnerCrashed, "SIGKILL"),
    "allocates": (
        "kept = []\nwhile True: kept.append(bytearray(os.urandom(1 << 20)))",
        RunnerCrashed,
        "its limit is",
    ),
    "spawns": (
        "import subprocess\nfor _ in range(3): subprocess.Popen(['sleep', '1000'], start_new_session=True)",
        None,
        "",
    ),
    "forks and lets the child return": ("os.fork()", None, ""),
    "prints": ("print('x' * (1 << 20))", None, ""),
    "closes its descriptors": ("os.closerange(0, 100)", RunnerCrashed, "exited with code 1"),
    "closes them and goes on": (
        "os.closerange(0, 100)\nwhile True: pass",
        RunnerCrashed,
        "closed its connection",
    ),
    "changes directory": ("os.chdir('/')", None, ""),
}


class Street:
    """One loop and one set of processes for many tests, with a neighbour who must notice nothing."""

    def __init__(self, runner: asyncio.Runner, processes_: Processes, neighbour: ProcessRunner) -> None:
        self.loop = runner
        self.processes = processes_
        self.neighbour = neighbour


@pytest.fixture(scope="module", params=["fork", "spawn"])
def street(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Street]:
    place = tmp_path_factory.mktemp("street")
    with asyncio.Runner() as loop:
        manager = processes(place / "tmp", request.param)
        made = loop.run(manager.__aenter__())
        neighbour = loop.run(made.started(write_package(place / "good")))
        yield Street(loop, made, neighbour)
        loop.run(manager.__aexit__(None, None, None))


@pytest.mark.parametrize("place", ["import", "load", "predict"])
@pytest.mark.parametrize("harm", HARM)
def test_harm_stays_with_the_model(tmp_path: Path, street: Street, harm: str, place: str) -> None:
    lines, failure, said = HARM[harm]
    package = write_package(tmp_path / "p", **{f"at_{place}": lines})
    bound = 0.5 if failure is RunnerTimeout else 20.0

    async def work() -> None:
        (neighbour_pid,) = street.neighbour.pids
        runner = street.processes.runner(
            package,
            # By exec a Python that only starts may take that long on a busy machine.
            timeout=bound,
            load_timeout=bound if place != "predict" else 20.0,
            memory_limit=100 << 20,
            restarts=Policy(base=60, crashes=2),
        )

        async def harmed() -> None:
            await runner.start()
            if place == "predict":
                await runner.predict(ONE, {})

        call = asyncio.ensure_future(harmed())
        while not call.done():
            await street.neighbour.predict(ONE, {})
        if failure is None:
            await call
            await runner.predict(ONE, {})
        else:
            with pytest.raises(failure) as caught:
                await call
            assert said in str(caught.value)
        await runner.close()
        street.processes.runners.remove(runner)
        await street.neighbour.predict(ONE, {})
        assert street.neighbour.pids == [neighbour_pid]
        (zygote,) = street.processes.zygotes.alive
        await until(lambda: set(descendants(zygote.pid)) == {neighbour_pid})

    street.loop.run(work())


@pytest.mark.anyio
async def test_children_of_a_model_end_with_it(tmp_path: Path, processes: Processes) -> None:
    package = write_package(
        tmp_path / "p",
        at_predict="""
            import subprocess
            deep = "import subprocess as s; s.run(['sleep', '1000'], start_new_session=True)"
            subprocess.Popen([sys.executable, "-c", deep], start_new_session=True)
            if os.fork() == 0:
                if os.fork() == 0:
                    os.setsid()
                    import time
                    time.sleep(1000)
                os._exit(0)
        """,
    )
    runner = await processes.started(package)
    await runner.predict(ONE, {})
    (pid,) = runner.pids
    await until(lambda: "sleep" in descendants(pid).values())
    (zygote,) = processes.zygotes.alive
    os.kill(pid, signal.SIGKILL)
    await until(lambda: set(descendants(zygote.pid)) == set(runner.pids) != {pid})


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_nothing_outlives_a_killed_gateway(tmp_path: Path, start: Start) -> None:
    places = {
        "idle": {},
        "busy": {"at_predict": "while True: pass"},
        "deaf": {"at_predict": DEAF},
        "parent": {
            "at_predict": "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)"
        },
        "closer": {"at_predict": "os.closerange(0, 100)\nwhile True: pass"},
    }
    packages = [str(write_package(tmp_path / name, **lines).path) for name, lines in places.items()]
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.hosting", str(scratch), start, *packages],
        stdout=subprocess.PIPE,
    ) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == b"ready\n"
        assert eventually(lambda: "sleep" in descendants(host.pid).values())
        family = set(descendants(host.pid))
        assert len(family) >= 6
        host.kill()
        host.wait()
        assert eventually(lambda: not any(map(alive, family))), "something outlived the gateway"
        assert eventually(lambda: os.listdir(scratch) == [])


# Lets go of whatever might end it, in every way that is left to it, and has a child do more. It keeps its
# socket: a model that closes it is ended by the gateway.
HOSTILE = """
import fcntl, subprocess
script = "import fcntl, os, signal\\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\\n" \\
    "try: os.setsid()\\nexcept OSError: pass\\nos.closerange(0, 100)\\nwhile True: pass"
subprocess.Popen([sys.executable, "-c", script], start_new_session=True, close_fds=False)
for number in os.listdir("/proc/self/fd"):
    try:
        flags = fcntl.fcntl(int(number), fcntl.F_GETFL)
        fcntl.fcntl(int(number), fcntl.F_SETFL, flags & ~os.O_ASYNC)
    except OSError:
        pass
os.setpgid(0, 0)
import ctypes
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
while True: pass
"""


def test_nothing_outlives_a_killed_zygote_and_a_killed_gateway(tmp_path: Path) -> None:
    packages = [
        str(write_package(tmp_path / name, at_predict=lines).path)
        for name, lines in {"idle": "", "busy": "while True: pass", "hostile": HOSTILE}.items()
    ]
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.hosting", str(scratch), "fork", *packages],
        stdout=subprocess.PIPE,
    ) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == b"ready\n"
        assert eventually(lambda: len(descendants(host.pid)) == 5), "the hostile one's child"
        family = set(descendants(host.pid))
        zygote = next(pid for pid in family if len(descendants(pid)) == 4)
        os.kill(zygote, signal.SIGKILL)
        models = family - {zygote}
        assert eventually(lambda: not alive(zygote))
        assert all(map(alive, models)), "the models live on without their zygote"
        host.kill()
        host.wait()
        assert eventually(lambda: not any(map(alive, models)))


INHERITED = """
import socket, stat
found = []
for number in sorted(map(int, os.listdir("/proc/self/fd"))):
    try:
        kind = os.fstat(number).st_mode
        name = os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        continue  # the listing's own
    reached = []
    for how in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY):
        try:
            again = os.open(f"/proc/self/fd/{number}", how | os.O_NONBLOCK)
        except OSError:
            continue
        if how != os.O_RDONLY and stat.S_ISFIFO(kind):
            os.write(again, b"x" * 10)
        reached.append(how)
    if number > 2:
        try:
            os.write(number, b"") if not stat.S_ISSOCK(kind) else None
        except OSError:
            pass
    found.append([number, name.partition(":")[0], reached])
return [found]
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.anyio
async def test_what_a_model_inherits_harms_only_itself(
    tmp_path: Path, start: Start, processes: Processes
) -> None:
    """Its input, its own output, its own socket: each is opened again and written to, and nothing happens to
    the sibling, the zygote or the gateway. Nothing else is open."""
    package = write_package(tmp_path / "p", at_predict=INHERITED)
    sibling = await processes.started(write_package(tmp_path / "q"))
    runner = await processes.started(package)
    (zygote,) = processes.zygotes.alive
    pids = [*sibling.pids, *runner.pids, zygote.pid]
    (found,) = (await runner.predict(ONE, {})).value  # type: ignore[union-attr]
    kinds = {number: (name, ways) for number, name, ways in found}
    assert {number: name for number, (name, _) in kinds.items() if number < 3} == {
        0: "/dev/null", 1: "pipe", 2: "pipe",
    }  # fmt: skip
    others = [(name, ways) for number, (name, ways) in kinds.items() if number > 2]
    ((connection, ways),) = [other for other in others if other[0] != "/dev/null"]
    assert (connection, ways) == ("socket", [])  # a socket cannot be opened again
    await sibling.predict(ONE, {})
    await runner.predict(ONE, {})
    assert [*sibling.pids, *runner.pids, zygote.pid] == pids
    assert processes.observed == []


LEFT_BEHIND = {
    "deep": """
        for _ in range(3000):
            os.mkdir("d")
            os.chdir("d")
        open("file", "w").close()
    """,
    "closed": """
        os.makedirs("a/b/c")
        open("a/b/f", "w").close()
        os.mkdir("a/none", 0)
        os.umask(0o777)
        os.mkdir("n")
    """,
    "linked": """
        os.symlink(params["elsewhere"], "link")
        os.mkdir("d")
        os.symlink("..", "d/up")
        os.mkfifo("d/pipe")
    """,
}


@pytest.mark.parametrize("what", LEFT_BEHIND)
def test_whatever_a_model_leaves_in_its_directory_is_removed(tmp_path: Path, what: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("")
    package = write_package(tmp_path / "p", at_predict=LEFT_BEHIND[what])

    async def work(h: Processes) -> None:
        sibling, runner = await h.started(write_package(tmp_path / "q")), await h.started(package)
        (zygote,) = h.zygotes.alive
        await runner.predict(ONE, {"elsewhere": str(elsewhere)})
        await runner.close()
        scratch = next(path for path in (tmp_path / "tmp").iterdir())
        await until(lambda: len(list(scratch.iterdir())) == 1)
        await sibling.predict(ONE, {})
        assert [z.pid for z in h.zygotes.alive] == [zygote.pid]

    run(tmp_path / "tmp", work)
    assert os.listdir(elsewhere) == ["kept"]


@pytest.mark.anyio
async def test_a_killed_zygotes_directories_are_removed_too(tmp_path: Path, processes: Processes) -> None:
    package = write_package(tmp_path / "p", at_predict=LEFT_BEHIND["deep"])
    runner = await processes.started(package)
    await runner.predict(ONE, {})
    (zygote,) = processes.zygotes.alive
    assert zygote.pid is not None
    os.kill(zygote.pid, signal.SIGKILL)
