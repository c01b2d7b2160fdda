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

MB = 1_000_000
GB = 1 << 30
RULE = Rule()


async def nothing() -> None:
    """Reads no memory."""


@pytest.mark.parametrize(
    ("used", "models", "before", "expected"),
    [
        pytest.param(0.5, [("a", 400, 10)], {}, None, id="there is room"),
        pytest.param(0.89, [("a", 400, 10)], {}, None, id="just below"),
        pytest.param(0.91, [("a", 400, 10), ("b", 500, 500)], {}, "a", id="above its grant"),
        pytest.param(0.91, [("a", 105, 100), ("b", 500, 500)], {}, None, id="within the tolerance"),
        pytest.param(0.91, [("a", 300, 100), ("b", 900, 500)], {}, "b", id="the one that grew most"),
        pytest.param(
            0.91, [("a", 300, 300), ("b", 500, 500)], {"a": 100}, "a", id="grew, and was granted it"
        ),
        pytest.param(0.99, [("a", 20, 20)], {"a": 20}, None, id="a neighbour fills the machine"),
        pytest.param(0.99, [("a", 24, 20)], {"a": 20}, None, id="ending a small one does not help"),
        pytest.param(0.97, [("a", 100, 100), ("b", 500, 500)], {"a": 100, "b": 500}, None, id="none grew"),
        pytest.param(0.97, [], {}, None, id="no models"),
    ],
)
def test_the_rule(
    used: float, models: list[tuple[str, int, int]], before: dict[Hashable, int], expected: str | None
) -> None:
    """Megabytes, of a thousand."""
    readings = [Reading(key, size * MB, granted * MB) for key, size, granted in models]
    earlier = {key: size * MB for key, size in before.items()}
    chosen = victim(Usage(int(used * 1000) * MB, 1000 * MB), readings, RULE, earlier)
    assert (chosen.key if chosen else None) == expected


readings = st.builds(Reading, st.integers(), st.integers(0, GB), st.integers(0, GB))


@given(st.integers(0, GB), st.lists(readings, max_size=6), st.dictionaries(st.integers(), st.integers(0, GB)))
def test_only_what_grew_is_stopped_and_only_when_memory_is_short(
    used: int, models: list[Reading], before: dict[Hashable, int]
) -> None:
    chosen = victim(Usage(used, GB), models, RULE, before)
    if chosen is not None:
        assert used >= RULE.high * GB
        assert chosen.bytes > min(chosen.granted, before.get(chosen.key, chosen.granted))


@pytest.mark.anyio
async def test_a_model_that_grows_within_its_grant_is_stopped_and_an_innocent_one_is_not() -> None:
    """The books follow what a model takes, so its grant says nothing of how fast it grew."""
    used, grows = [0.7], [100]
    stopped: list[Hashable] = []
    reported: list[str] = []
    governor = Governor(
        lambda: Usage(int(used[0] * 1000) * MB, 1000 * MB),
        nothing,
        lambda: [Reading("grows", grows[0] * MB, grows[0] * MB), Reading("calm", 500 * MB, 500 * MB)],
        lambda key, why: stopped.append(key),
        report=reported.append,
    )
    await governor.look(0.0)
    used[0], grows[0] = 0.92, 320
    await governor.look(1.0)
    assert stopped == ["grows"]
    grows[0] = 100
    for second in range(2, 10):
        used[0] = 0.99
        await governor.look(float(second))
    assert stopped == ["grows"]
    assert len(reported) == 1
    assert "no model grew" in reported[0]
    await governor.look(70.0)
    assert len(reported) == 2


@pytest.mark.anyio
async def test_it_stops_one_waits_until_memory_came_back_and_looks_often_when_it_matters() -> None:
    used = [0.1]
    stopped: list[tuple[Hashable, str]] = []
    asked: list[int] = []

    def models() -> list[Reading]:
        asked.append(1)
        return [Reading("a", 500 * MB, 100), Reading("b", 400 * MB, 100)]

    governor = Governor(
        lambda: Usage(int(used[0] * GB), GB), nothing, models, lambda key, why: stopped.append((key, why))
    )
    assert await governor.look(0.0) == RULE.calm
    assert not asked
    used[0] = 0.7
    assert await governor.look(1.0) == RULE.alert
    used[0] = 0.92
    await governor.look(2.0)
    await governor.look(2.1)
    assert [key for key, _ in stopped] == ["a"]
    assert "memory ran short" in stopped[0][1]
    await governor.look(2.6)
    assert len(stopped) == 2


@pytest.mark.anyio
async def test_no_model_is_stopped_for_memory_that_came_back_while_it_was_read() -> None:
    """A reading of many models takes as long as the end of one that was stopped before."""
    used = [0.95]
    stopped: list[Hashable] = []

    async def read() -> None:
        used[0] = 0.5

    governor = Governor(
        lambda: Usage(int(used[0] * GB), GB),
        read,
        lambda: [Reading("grows", 500 * MB, 100 * MB)],
        lambda key, why: stopped.append(key),
    )
    await governor.look(0.0)
    assert stopped == []


@pytest.mark.anyio
async def test_it_runs_until_it_is_cancelled() -> None:
    looks: list[int] = []
    done = asyncio.Event()

    def usage() -> Usage:
        looks.append(1)
        if len(looks) == 3:
            done.set()
        return Usage(7, 10)

    task = asyncio.ensure_future(
        Governor(usage, nothing, list, lambda key, why: None, Rule(alert=0.001)).run()
    )
    await asyncio.wait_for(done.wait(), 10)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


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
from gateway.serving.governor import Governor, Reading
from gateway.runners.base import RunnerCrashed
from gateway.runners.environments import Environment
from gateway.runners.process import ProcessRunner
from gateway.runners.zygote import Zygotes
from loaders.package import read
from tests.support.processes import ONE

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
        zygotes.read_memory,
        lambda: [Reading(path, runner.recent_bytes(), 30 << 20) for path, runner in runners.items()],
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
