"""What a hostile model tries against others, as root and as a user that has no rights but the gateway's own:
each attempt fails, and nothing has changed. The third column, the image, is in `e2e/test_image.py`."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.runners.base import Runner
from gateway.runners.confinement import Confinement, hide
from gateway.runners.environments import Environment
from gateway.runners.packed import PackedRunner, Record
from gateway.runners.packs import Packs
from gateway.runners.places import Conditions
from loaders.package import Package
from loaders.worker import wire
from tests.support.attempts import ATTEMPTS, Victims, asked, is_as_it_must, write_attempts
from tests.support.hostile import write_package
from tests.support.processes import Processes

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or ctypes.CDLL(None).syscall(444, None, 0, 1) < 6,
    reason="needs Linux 6.12: older kernels lack a part of what is tried here, and `status` says so",
)
COLUMNS = ("as this user", "without capabilities", "in a pack")


class Stage:
    """A gateway in a process of its own, with the attacker and a sibling. Answers each line with JSON."""

    def __init__(self, directory: Path, column: str) -> None:
        self._host = subprocess.Popen(
            [sys.executable, "-m", "tests.gateway.runners.test_attempts", str(directory), column],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, name: str) -> dict[str, Any]:
        assert self._host.stdin is not None
        assert self._host.stdout is not None
        self._host.stdin.write(name + "\n")
        self._host.stdin.flush()
        line = self._host.stdout.readline()
        assert line, f"the gateway ended: {self._host.wait()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> int:
        assert self._host.stdin is not None
        assert self._host.stdout is not None
        self._host.stdin.close()
        self._host.stdout.close()
        return self._host.wait(30)


@pytest.fixture(scope="module", params=COLUMNS)
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("stage"), request.param)
    yield made
    assert made.close() == 0


@pytest.mark.parametrize("name", ATTEMPTS)
def test_an_attempt_fails_and_changes_nothing(stage: Stage, name: str) -> None:
    answer = stage.ask(name)
    assert is_as_it_must(name, answer["outcome"]), answer["outcome"]
    assert answer["changed"] == []


def test_its_report_says_what_holds(stage: Stage) -> None:
    held = stage.ask("status")["confinement"]
    assert held["shared_memory"] == "its own, removed when it ends"
    assert held["signals"] == "to its own processes"
    assert held["children"].startswith("in its process group")
    assert held["filesystem"].startswith("its own directory")
    assert held["syscalls"] == "filtered"


# ---- the gateway's side


def _read(loop: asyncio.AbstractEventLoop, lines: asyncio.Queue[str]) -> None:
    while line := sys.stdin.readline():
        loop.call_soon_threadsafe(lines.put_nowait, line)
    loop.call_soon_threadsafe(lines.put_nowait, "")


async def _attacker(h: Processes, packs: Packs, package: Package, in_a_pack: bool) -> Runner:
    confinement = Confinement(user="same")
    if not in_a_pack:
        return await h.started(package, confinement=confinement)
    conditions = Conditions("attackers", Environment(), 1, (), confinement, wire.MAX_FRAME)
    runner = PackedRunner(
        package, {}, packs=packs, conditions=conditions, record=Record(),
        alone=lambda reason: h.runner(package, confinement=confinement),
    )  # fmt: skip
    await runner.start()
    assert runner.isolation == "pack"
    return runner


async def _serve(directory: Path, in_a_pack: bool) -> None:
    state = directory / "state"
    state.mkdir()
    victim = state / "admin.key"
    victim.write_text("secret")
    victim.chmod(0o600)
    h = Processes(directory)
    packs = Packs(h.zygotes)
    try:
        package = write_attempts(directory / "a", str(victim))
        attacker = await _attacker(h, packs, package, in_a_pack)
        sibling = await h.started(write_package(directory / "b"), confinement=Confinement(user="same"))
        (zygote,) = h.zygotes.alive
        assert zygote.pid is not None
        pids = (os.getpid(), zygote.pid, *sibling.pids)
        victims = Victims(
            pids, (str(victim), str(state), str(directory / "a"), str(directory / "a" / "code"))
        )
        lines: asyncio.Queue[str] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        threading.Thread(target=_read, args=(loop, lines), daemon=True).start()
        while name := (await lines.get()).strip():
            if name == "status":
                answer: dict[str, Any] = attacker.status()
            else:
                before = victims.state()
                outcome = (await attacker.predict(asked(name), {})).value[0]  # type: ignore[union-attr]
                after = victims.state()
                answer = {"outcome": outcome, "changed": [k for k in before if before[k] != after[k]]}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
        assert h.observed == []
        assert attacker.isolation == ("pack" if in_a_pack else "process")
        await attacker.close()
    finally:
        await packs.close()
        await h.close()


def _drop_capabilities() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert libc.capset(header, bytes(24)) == 0


if __name__ == "__main__":
    if sys.argv[2] == "without capabilities":
        _drop_capabilities()
    hide()
    shared = Path("/dev/shm/of-another")
    shared.write_text("secret")
    try:
        asyncio.run(_serve(Path(sys.argv[1]), sys.argv[2] == "in a pack"))
    finally:
        shared.unlink()
