"""What a model may try from inside its process: each attempt fails, and what it needs is there."""

from __future__ import annotations

import http.server
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from gateway.runners import confinement
from gateway.runners.base import ModelError, RunnerCrashed
from gateway.runners.confinement import Confinement
from gateway.runners.environments import Environment
from tests.support.hostile import write_package
from tests.support.processes import ONE, Processes, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="model processes need Linux")


ATTEMPT = "try:\n    {}\nexcept Exception as error:\n    return [type(error).__name__]\nreturn ['done']"


def attempt(lines: str) -> str:
    return ATTEMPT.format(lines.replace("\n", "\n    "))


def outcome(tmp_path: Path, lines: str, confined: Confinement | None = None, **params: object) -> str:
    """What became of an attempt from inside a model: `done`, or the error's name."""
    package = write_package(tmp_path / "p", at_predict=attempt(lines))
    found: list[str] = []

    async def work(h: Processes) -> None:
        runner = await h.started(package, confinement=confined or Confinement())
        found.append((await runner.predict(ONE, params)).value[0])  # type: ignore[union-attr]

    run(tmp_path / "tmp", work)
    return found[0]


LIBC = "import ctypes\nif ctypes.CDLL(None).{} < 0: raise PermissionError"
REFUSED = ("PermissionError", "OSError")


@pytest.mark.parametrize("confined", ["", "user='same', filesystem=False, syscalls=False"])
def test_a_secret_of_the_gateways_environment_cannot_be_found(tmp_path: Path, confined: str) -> None:
    """In a gateway of its own process, as its environment and its memory are what is looked for. Closing
    the processes is enough by itself, where the kernel has nothing else to offer."""
    secret = secrets.token_hex(16)
    package = write_package(
        tmp_path / "p",
        at_predict="""
            found = [name for name, value in os.environ.items() if params["secret"] in value]
            reached = []
            for pid in os.listdir("/proc"):
                for file in ("environ", "mem", "maps", "smaps_rollup"):
                    if pid.isdigit() and int(pid) != os.getpid():
                        try:
                            with open(f"/proc/{pid}/{file}", "rb") as f:
                                if file == "environ" and params["secret"].encode() in f.read():
                                    found.append(pid)
                                if file != "environ" and int(pid) in params["ours"]:
                                    f.read(1)
                                    reached.append(f"{file} of {pid}")
                        except OSError:
                            pass
            return [found, reached]
        """,
    )
    code = f"""
import asyncio, os
from gateway.runners import confinement
from gateway.runners.environments import Environment
from gateway.runners.process import ProcessRunner
from gateway.runners.zygote import Zygotes
from loaders.package import read
from tests.support.processes import ONE

async def main():
    assert confinement.hide()
    zygotes = Zygotes()
    runners = [ProcessRunner(read({str(package.path)!r}), {{}}, zygotes=zygotes, name="m", version="1",
                             environment=Environment(), confinement=confinement.Confinement({confined}))
               for _ in range(2)]
    for runner in runners:
        await runner.start()
    ours = [os.getpid(), runners[1].pids[0], zygotes.alive[0].pid]
    answer = await runners[0].predict(ONE, {{"secret": os.environ["AWS_SECRET_ACCESS_KEY"], "ours": ours}})
    print(answer.value)
    for runner in runners:
        await runner.close()
    await zygotes.close()

asyncio.run(main())
"""
    environ = {**os.environ, "AWS_SECRET_ACCESS_KEY": secret, "MLFLOW_TRACKING_PASSWORD": secret}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[[], []]", done.stderr


@pytest.mark.anyio
async def test_variables_are_passed_on_by_name_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: Processes
) -> None:
    package = write_package(tmp_path / "p", at_predict="return [sorted(os.environ)]")
    environ = {"HF_TOKEN": "a", "HF_HOME": "b", "AWS_SECRET_ACCESS_KEY": "c"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    runner = await processes.started(package, env_allow=["HF_TOKEN"], environ=environ)
    (names,) = (await runner.predict(ONE, {})).value  # type: ignore[union-attr]
    assert "HF_TOKEN" in names
    assert not {"HF_HOME", "AWS_SECRET_ACCESS_KEY"} & set(names)
    other = await processes.started(package, environ=environ)
    assert "HF_TOKEN" not in (await other.predict(ONE, {})).value[0]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("what", "lines"),
    {
        "read the state directory": "open(params['state'] + '/state.db').read()",
        "list the cache": "os.listdir(params['state'])",
        "write next to it": "open(params['state'] + '/new', 'w').close()",
        "remove its package": "os.remove(os.path.join(os.path.dirname(__file__), '..', 'MLmodel'))",
        "write into its package": "open(__file__, 'a').write('x')",
        "look into a home": "os.listdir(params['home'])",
        "mount": LIBC.format("mount(b'none', b'/', None, 32, None)"),
        "trace its parent": LIBC.format("ptrace(16, os.getppid(), 0, 0)"),
        "signal the gateway": "os.kill(params['gateway'], 0)",
        "signal its zygote": "os.kill(os.getppid(), 9)",
        "take a raw socket": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
        "change its clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)",
    }.items(),
)
def test_an_attempt_from_inside_fails(tmp_path: Path, what: str, lines: str) -> None:
    if _landlock() < 6:
        pytest.skip(
            "this kernel has no Landlock with scopes: such attempts are open here, and status says so"
        )
    state = tmp_path / "state"
    state.mkdir()
    (state / "state.db").write_text("secret")
    home = os.path.expanduser("~")
    assert outcome(tmp_path, lines, state=str(state), gateway=os.getpid(), home=home) in REFUSED
    assert sorted(os.listdir(state)) == ["state.db"]


def test_what_a_model_needs_is_there(tmp_path: Path) -> None:
    lines = """
import ssl, tempfile, multiprocessing, threading, subprocess, socket, ctypes.util
open("notes.txt", "w").write("x")
with tempfile.NamedTemporaryFile() as f: f.write(b"x")
assert tempfile.gettempdir() == os.getcwd()
assert open(__file__).read()
threading.Thread(target=int).start()
assert subprocess.run([sys.executable, "-c", "print(1)"], capture_output=True).stdout == b"1\\n"
with multiprocessing.get_context("fork").Pool(1) as pool: assert pool.map(abs, [-1]) == [1]
ssl.create_default_context()
socket.socket().close()
os.kill(os.getpid(), 0)
open("/dev/null", "w").close()
import json, decimal
"""
    assert outcome(tmp_path, lines) == "done"


def test_without_network_only_local_sockets_remain(tmp_path: Path) -> None:
    lines = "import socket\nsocket.socketpair()\nsocket.socket(socket.{})"
    confined = Confinement(network=False)
    for family in ("AF_INET", "AF_INET6", "AF_NETLINK"):
        directory = tmp_path / family
        directory.mkdir()
        assert outcome(directory, lines.format(family), confined) == "PermissionError"
    assert outcome(tmp_path, lines.format("AF_UNIX"), confined) == "done"


def test_control_verbs_on_loopback_are_out_of_reach_without_network(tmp_path: Path) -> None:
    hits: list[str] = []

    class Control(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            hits.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Control) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        lines = "import urllib.request as u\nu.urlopen(u.Request(params['url'], method='POST', data=b''))"
        url = f"http://127.0.0.1:{server.server_port}/models/m/unload"
        assert outcome(tmp_path, lines, Confinement(network=False), url=url) == "URLError"
        assert hits == []
        server.shutdown()


def test_limits_hold(tmp_path: Path) -> None:
    lines = "kept = [open('/dev/null') for _ in range(params['n'])]"
    (tmp_path / "a").mkdir()
    assert outcome(tmp_path / "a", lines, Confinement(files=100), n=200) == "OSError"
    assert outcome(tmp_path, lines, Confinement(files=400), n=200) == "done"


@pytest.mark.anyio
async def test_cpu_seconds_end_a_model_that_burns_them(tmp_path: Path, processes: Processes) -> None:
    package = write_package(tmp_path / "p", at_predict="while True: pass")
    runner = await processes.started(package, confinement=Confinement(cpu_seconds=2))
    with pytest.raises(RunnerCrashed, match=r"SIGXCPU|SIGKILL"):
        await runner.predict(ONE, {})


@pytest.mark.anyio
async def test_a_measure_that_is_required_and_missing_refuses_the_load(
    tmp_path: Path, processes: Processes
) -> None:
    package = write_package(tmp_path / "p")
    with pytest.raises(ModelError, match="required but not available: filesystem"):
        await processes.started(package, confinement=Confinement(filesystem=False, required=("filesystem",)))


SYSTEM_PYTHON = "/usr/bin/python3"


def _has_numpy(python: str) -> bool:
    done = subprocess.run([python, "-c", "import numpy"], capture_output=True, check=False)
    return done.returncode == 0


def test_each_process_has_a_user_of_its_own(tmp_path: Path) -> None:
    """Needs root, and a Python that another user can read."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a process another user")
    python = next((p for p in (sys.executable, SYSTEM_PYTHON) if _open_to_all(p) and _has_numpy(p)), None)
    if python is None:
        pytest.skip("no Python with numpy here that another user can read")
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)  # what pytest gives is for this user alone
        _check_users(Path(directory), python)


def _check_users(directory: Path, python: str) -> None:
    lines = (
        "open('mine', 'w').close()\nreturn [os.getuid(), os.getgid(), os.getgroups(), os.stat('.').st_uid]"
    )
    package = write_package(directory / "p", at_predict=lines)

    async def work(h: Processes) -> None:
        runners = [await h.started(package, environment=Environment(python=python)) for _ in range(2)]
        users = [(await r.predict(ONE, {})).value for r in runners]  # type: ignore[union-attr]
        for (uid, gid, groups, owner), runner in zip(users, runners, strict=True):
            assert uid == gid == owner != 0
            assert groups == []
            assert runner.status()["confinement"]["user"] == str(uid)
            assert (runner.measured_bytes or 0) > 1 << 20  # though it belongs to somebody else
        assert users[0][0] != users[1][0]

    run(directory / "tmp", work)


@pytest.mark.anyio
async def test_a_package_that_another_user_cannot_read_keeps_the_user_and_says_so(
    tmp_path: Path, processes: Processes
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a process another user")
    package = write_package(tmp_path / "p", at_predict="return [os.getuid()]")
    package.path.chmod(0o700)
    runner = await processes.started(package)
    assert (await runner.predict(ONE, {})).value == [0]  # type: ignore[union-attr]
    status = runner.status()["confinement"]
    assert status["user"].startswith("not changed")
    assert status["capabilities"] == "none"


def test_users_are_never_shared() -> None:
    users = confinement.Users(first=10, count=3)
    taken = [users.take() for _ in range(3)]
    assert sorted(taken) == [10, 11, 12]
    with pytest.raises(RuntimeError):
        users.take()
    users.give_back(11)
    assert users.take() == 11


def _open_to_all(python: str) -> bool:
    done = subprocess.run(
        [python, "-c", "import sys; print(sys.prefix, sys.base_prefix)"],
        capture_output=True,
        text=True,
        check=False,
    )
    places = [Path(place) for place in done.stdout.split()]
    return bool(places) and all(
        p.stat().st_mode & 0o005 == 0o005 for place in places for p in (place, *place.parents)
    )


def _landlock() -> int:
    import ctypes

    return int(ctypes.CDLL(None).syscall(444, None, 0, 1))


@pytest.mark.anyio
async def test_the_model_is_the_kernels_first_victim(tmp_path: Path, processes: Processes) -> None:
    package = write_package(tmp_path / "p")
    runner = await processes.started(package)
    scores = {}
    for name, pid in {
        "model": runner.pids[0],
        "zygote": processes.zygotes.alive[0].pid,
        "gateway": os.getpid(),
    }.items():
        with open(f"/proc/{pid}/oom_score_adj") as file:  # noqa: ASYNC230
            scores[name] = int(file.read())
    assert scores["model"] > scores["zygote"] > scores["gateway"]


@pytest.mark.anyio
async def test_measures_take_milliseconds(tmp_path: Path, processes: Processes) -> None:
    """Confinement must not eat what a fork saves."""
    package = write_package(tmp_path / "p")
    await processes.started(package)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        await processes.started(package)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.5
