"""Who is stopped when memory runs short: as a decision, and for real in a memory control group."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
from collections.abc import Hashable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.cgroup import Usage, memory_usage
from gateway.serving.governor import Governor, Reading, Rule, victim
from tests.support.hostile import write_package

GB = 1 << 30
RULE = Rule()


@pytest.mark.parametrize(
    ("used", "models", "expected"),
    [
        (0.5, [("a", 400, 10)], None),
        (0.89, [("a", 400, 10)], None),
        (0.91, [("a", 400, 10), ("b", 500, 500)], "a"),
        (0.91, [("a", 105, 100), ("b", 500, 500)], None),
        (0.91, [("a", 300, 100), ("b", 900, 500)], "b"),
        (0.97, [("a", 100, 100), ("b", 500, 500)], "b"),
        (0.97, [("a", 150, 100), ("b", 500, 500)], "a"),
        (0.97, [], None),
    ],
)
def test_the_rule(used: float, models: list[tuple[str, int, int]], expected: str | None) -> None:
    chosen = victim(Usage(int(used * GB), GB), [Reading(*model) for model in models], RULE)
    assert (chosen.key if chosen else None) == expected


readings = st.builds(Reading, st.integers(), st.integers(0, GB), st.integers(0, GB))


@given(st.integers(0, GB), st.lists(readings, max_size=6))
def test_nobody_is_stopped_without_need_and_somebody_at_the_end(used: int, models: list[Reading]) -> None:
    chosen = victim(Usage(used, GB), models, RULE)
    if used < RULE.high * GB:
        assert chosen is None
    elif used >= RULE.critical * GB and models:
        assert chosen in models


def test_it_stops_one_waits_until_memory_came_back_and_looks_often_when_it_matters() -> None:
    used = [0.1]
    stopped: list[tuple[Hashable, str]] = []
    asked: list[int] = []

    def models() -> list[Reading]:
        asked.append(1)
        return [Reading("a", 500, 100), Reading("b", 400, 100)]

    governor = Governor(
        lambda: Usage(int(used[0] * GB), GB), models, lambda key, why: stopped.append((key, why))
    )
    assert governor.look(0.0) == RULE.calm
    used[0] = 0.7
    assert governor.look(1.0) == RULE.alert
    assert not asked
    used[0] = 0.92
    governor.look(2.0)
    governor.look(2.1)
    assert [key for key, _ in stopped] == ["a"]
    assert "memory ran short" in stopped[0][1]
    governor.look(2.6)
    assert len(stopped) == 2


def test_it_runs_until_it_is_cancelled() -> None:
    async def main() -> None:
        looks: list[int] = []
        done = asyncio.Event()

        def usage() -> Usage:
            looks.append(1)
            if len(looks) == 3:
                done.set()
            return Usage(7, 10)

        task = asyncio.ensure_future(Governor(usage, list, lambda key, why: None, Rule(alert=0.001)).run())
        await asyncio.wait_for(done.wait(), 10)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(main())


# ---- what the kernel's files say


def write(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


MEMINFO = "MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:    600 kB\n"


def test_usage_of_version_2_without_what_the_kernel_can_drop(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/pod/c\n",
            "cg/pod/c/memory.max": "1000",
            "cg/pod/c/memory.current": "900",
            "cg/pod/c/memory.stat": "anon 500\ninactive_file 100\nactive_file 50\n",
            "cg/pod/memory.max": "max",
            "cg/pod/memory.current": "5000",
        },
    )
    assert memory_usage(tmp_path / "cg", tmp_path / "proc") == Usage(750, 1000)


def test_usage_of_version_1_and_of_a_tighter_group_above(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "4:memory:/pod/c\n3:cpu:/\n",
            "cg/memory/pod/c/memory.limit_in_bytes": "1000",
            "cg/memory/pod/c/memory.usage_in_bytes": "500",
            "cg/memory/pod/c/memory.stat": "inactive_file 7\ntotal_inactive_file 100\ntotal_active_file 0\n",
            "cg/memory/pod/memory.limit_in_bytes": "1000",
            "cg/memory/pod/memory.usage_in_bytes": "950",
        },
    )
    assert memory_usage(tmp_path / "cg", tmp_path / "proc") == Usage(950, 1000)


def test_usage_of_the_machine_where_no_group_has_a_limit(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": MEMINFO})
    assert memory_usage(tmp_path / "cg", tmp_path / "proc") == Usage(400 * 1024, 1000 * 1024)


# ---- for real


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory control group of 500 MB below this process's own."""
    root = Path("/sys/fs/cgroup/memory")
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.split(":", 2)[2] for line in lines if "memory" in line.split(":")[1].split(",")), None)
    if own is None or not os.access(root / own.lstrip("/"), os.W_OK):
        pytest.skip("needs a version 1 memory control group that can be written to")
    made = root / own.lstrip("/") / f"gateway-test-{os.getpid()}"
    made.mkdir()
    (made / "memory.limit_in_bytes").write_text(str(500 << 20))
    yield made
    made.rmdir()


HOST = """
import asyncio, os, sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
from gateway.cgroup import memory_usage
from gateway.governor import Governor, Reading
from gateway.runners.base import RunnerCrashed
from gateway.runners.environments import Environment
from gateway.runners.process import ProcessRunner
from gateway.runners.zygote import Zygotes
from loaders.package import read
from tests.support.house import ONE

async def main():
    zygotes = Zygotes()
    runners = {
        path: ProcessRunner(
            read(path), {}, zygotes=zygotes, name="m", version="1", environment=Environment()
        )
        for path in sys.argv[2:]
    }
    governor = Governor(
        memory_usage,
        lambda: [Reading(path, runner.present_bytes(), 30 << 20) for path, runner in runners.items()],
        lambda path, why: runners[path].stop(why),
    )
    watching = asyncio.ensure_future(governor.run())
    for runner in runners.values():
        await runner.start()
    grows, good = runners.values()
    pids = good.pids
    growing = asyncio.ensure_future(grows.predict(ONE, {}))
    answered = 0
    while not growing.done():
        await good.predict(ONE, {})
        answered += 1
    try:
        await growing
    except RunnerCrashed as error:
        print("stopped:", error)
    await good.predict(ONE, {})
    assert good.pids == pids and answered > 10, answered
    watching.cancel()
    for runner in runners.values():
        await runner.close()
    await zygotes.close()
    print("well")

asyncio.run(main())
"""


def test_a_model_that_grows_is_stopped_before_the_kernel_would(group: Path, tmp_path: Path) -> None:
    grows = write_package(
        tmp_path / "grows", at_predict="kept = []\nwhile True: kept.append(bytearray(os.urandom(1 << 20)))"
    )
    good = write_package(tmp_path / "good")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HOST), str(group), str(grows.path), str(good.path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "stopped because memory ran short" in done.stdout
    assert done.stdout.endswith("well\n")
    control = dict(line.split() for line in (group / "memory.oom_control").read_text().splitlines())
    assert control.get("oom_kill", "0") == "0"
