"""Memory of model processes: measured as the kernel counts it, limited, and given back."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import pytest

from gateway.runners import memory
from gateway.runners.base import RunnerCrashed
from gateway.runners.confinement import Confinement
from gateway.runners.memory import Footprint, Memory, parse, resident
from gateway.runners.process import ProcessRunner
from tests.support.hostile import descendants, write_package
from tests.support.processes import ONE, Processes, descriptors, run, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="model processes need Linux")


def test_memory_figures_are_read_from_the_kernels_text() -> None:
    lines = [
        b"1-2 ---p 0 [rollup]",
        b"Rss:  100 kB",
        b"Private_Clean: 1 kB",
        b"Private_Dirty: 20 kB",
        b"Anonymous: 30 kB",
    ]
    assert parse(b"\n".join(lines)) == Memory(private=21 * 1024, resident=100 * 1024, anonymous=30 * 1024)
    assert parse(b"") == Memory()
    assert resident(2**22 + 1) == 0


def test_measured_bytes_are_what_proc_says(tmp_path: Path, start: Literal["fork", "spawn"]) -> None:
    package = write_package(tmp_path / "p", at_load="global X; X = bytearray(os.urandom(1 << 20) * 60)")

    async def work(h: Processes) -> None:
        runner = await h.started(package)
        await runner.predict(ONE, {})
        (pid,) = runner.pids
        with open(f"/proc/{pid}/smaps_rollup") as file:  # noqa: ASYNC230
            lines = file.read().splitlines()
        private = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))
        measured = runner.measured_bytes
        assert measured is not None
        assert measured > 60 << 20
        assert abs(measured - private) < 0.05 * private
        assert runner.load_peak >= measured * 0.9

    if os.geteuid() == 0:
        run(tmp_path / "tmp", work, start)
    else:
        pytest.skip("only root may look into a process that closed itself")


@pytest.mark.anyio
async def test_load_peak_is_more_than_what_remains(tmp_path: Path, processes: Processes) -> None:
    package = write_package(tmp_path / "p", at_load="x = bytearray(os.urandom(1 << 20) * 80); del x")
    runner = await processes.started(package)
    assert runner.load_peak > 80 << 20
    assert (runner.measured_bytes or 0) < 40 << 20


@pytest.mark.anyio
async def test_a_model_that_grows_past_its_limit_is_recycled_without_a_failed_call(
    tmp_path: Path, processes: Processes
) -> None:
    package = write_package(
        tmp_path / "p",
        at_import="KEPT = []",
        at_predict="KEPT.append(bytearray(os.urandom(1 << 20) * 4)); return [os.getpid()]",
    )
    runner = await processes.started(package, memory_limit=120 << 20)
    pids = set()
    while len(pids) < 3:
        pids.add((await runner.predict(ONE, {})).value[0])  # type: ignore[union-attr]
        await asyncio.sleep(0.02)
    assert {what for what, _ in processes.observed} == {"recycled", "restarted"}


@pytest.mark.anyio
async def test_a_model_that_allocates_without_end_is_stopped(tmp_path: Path, processes: Processes) -> None:
    package = write_package(
        tmp_path / "p",
        at_import="KEPT = []",
        at_predict="while True: KEPT.append(bytearray(os.urandom(1 << 20)))",
    )
    runner, other = (
        await processes.started(package, memory_limit=100 << 20),
        await processes.started(write_package(tmp_path / "q")),
    )
    call = asyncio.ensure_future(runner.predict(ONE, {}))
    while not call.done():
        await other.predict(ONE, {})
    with pytest.raises(RunnerCrashed, match="its limit is"):
        await call


@pytest.mark.anyio
async def test_a_model_larger_than_its_limit_does_not_load(tmp_path: Path, processes: Processes) -> None:
    package = write_package(
        tmp_path / "p", at_load="kept = []\nwhile True: kept.append(bytearray(os.urandom(1 << 20)))"
    )
    with pytest.raises(RunnerCrashed, match="its limit is"):
        await processes.started(package, memory_limit=80 << 20)


@pytest.mark.anyio
async def test_loading_and_unloading_again_and_again_leaves_nothing(
    tmp_path: Path, processes: Processes
) -> None:
    """The short form of `bench_process cycles`."""
    package = write_package(tmp_path / "p", at_load="global X; X = b'x' * (50 << 20)")
    seen = []
    for _ in range(15):
        runner = await processes.started(package)
        await runner.predict(ONE, {})
        assert (runner.measured_bytes or 0) > 50 << 20
        await runner.close()
        processes.runners.clear()
        (zygote,) = processes.zygotes.alive
        await until(lambda z=zygote: not descendants(z.pid))
        seen.append((zygote.bytes, descriptors(), resident(os.getpid())))
    (zygote_5, descriptors_5, own_5), (zygote_15, _, own_15) = seen[4], seen[14]
    assert abs(zygote_15 - zygote_5) < 0.05 * zygote_5
    gc.collect()  # what earlier tests left unreferenced may be open still
    await until(lambda: not descriptors() - descriptors_5)
    assert own_15 - own_5 < 0.05 * own_5


CHILD = """
import subprocess
code = "kept = bytearray(__import__('os').urandom(1 << 20) * 150)\\nprint(1, flush=True)\\nwhile True: pass"
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
"""
FORKED = """
X = bytearray(os.urandom(1 << 20) * 150)
if os.fork() == 0:
    import time
    time.sleep(1000)
"""
SHARED = "open('/dev/shm/x', 'wb').write(bytes(150 << 20))"


async def present_bytes(h: Processes, runner: ProcessRunner) -> int:
    await h.zygotes.read_memory()
    return runner.recent_bytes()


@pytest.mark.parametrize("lines", [CHILD, FORKED, SHARED], ids=["a child", "a fork", "shared memory"])
def test_memory_of_children_and_shared_memory_counts(tmp_path: Path, lines: str) -> None:
    package = write_package(tmp_path / "p", at_import="global X; X = None", at_predict=lines)

    async def work(h: Processes) -> None:
        runner = await h.started(package)
        before = await present_bytes(h, runner)
        assert before < 60 << 20
        await runner.predict(ONE, {})
        assert 140 << 20 < await present_bytes(h, runner) - before < 340 << 20
        await runner.close()

    run(tmp_path / "tmp", work)
    assert not os.path.exists("/dev/shm/x")


@pytest.mark.parametrize("lines", [CHILD, SHARED], ids=["a child", "shared memory"])
@pytest.mark.anyio
async def test_children_and_shared_memory_are_limited(
    tmp_path: Path, lines: str, processes: Processes
) -> None:
    package = write_package(tmp_path / "p", at_predict=f"{lines}\nwhile True: pass")
    runner = await processes.started(package, memory_limit=90 << 20)
    with pytest.raises(RunnerCrashed, match="its limit is"):
        await runner.predict(ONE, {})


THREADS = """
import threading, time
try:
    for _ in range(300): threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
except RuntimeError:
    os._exit(3)
"""
FORKS = """
import time
try:
    for _ in range(300):
        if os.fork() == 0: time.sleep(1000)
except OSError:
    os._exit(3)
"""


@pytest.mark.parametrize("lines", [THREADS, FORKS], ids=["threads", "forks"])
@pytest.mark.anyio
async def test_a_model_has_so_many_processes_and_threads_and_no_more(
    tmp_path: Path, lines: str, processes: Processes
) -> None:
    """Held by the kernel where it can, else ended by the gateway."""
    package = write_package(
        tmp_path / "p", at_predict=f"if params.get('many'):{lines}".replace("\n", "\n    ")
    )
    runner = await processes.started(package, confinement=Confinement(user="same", processes=100))
    with suppress(RunnerCrashed):
        await runner.predict(ONE, {"many": 1})
    async with asyncio.timeout(60):
        while "crashed" not in [what for what, _ in processes.observed]:
            await present_bytes(processes, runner)
            runner.tend()
            await asyncio.sleep(0.02)
    await runner.predict(ONE, {})


def test_a_look_that_took_long_is_not_repeated_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    pread = os.pread

    def counted(*arguments: int) -> bytes:
        looks.append(arguments)
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", counted)
    for seconds, expected in ((0.001, 100), (100.0, 1)):
        looks.clear()
        spent = iter(range(10**6))
        own = os.open("/proc/self/smaps_rollup", os.O_RDONLY)
        footprint = Footprint(own, cost=lambda t=spent, s=seconds: next(t) * s)
        for _ in range(100):
            assert footprint.read().resident
        assert len([descriptor for descriptor, *_ in looks if descriptor == own]) == expected
        footprint.close()


SHARES_MEMORY = """
import os, sys
shared = bytearray(os.urandom(1 << 20)) * 50
if os.fork():
    os.wait()
else:
    print(os.getpid(), flush=True)
    for line in sys.stdin:
        exec(line)
        print("done", flush=True)
    os._exit(0)
"""


@pytest.fixture
def shares_memory() -> Iterator[tuple[int, Callable[[str], None]]]:
    """A process that shares 50 MB with its parent: its pid, and what makes it run a line."""
    command = [sys.executable, "-c", SHARES_MEMORY]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        pid = int(process.stdout.readline())

        def order(line: str) -> None:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(line + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"

        order("kept = []")
        yield pid, order
        process.stdin.close()


def test_a_process_that_stays_as_it_is_is_read_rarely_and_one_that_changed_at_once(
    monkeypatch: pytest.MonkeyPatch, shares_memory: tuple[int, Callable[[str], None]]
) -> None:
    pid, order = shares_memory
    now, looks = 0.0, 0
    pread = os.pread

    def counted(*arguments: int) -> bytes:
        nonlocal looks
        looks += arguments[0] == descriptor
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", counted)
    descriptor = os.open(f"/proc/{pid}/smaps_rollup", os.O_RDONLY)
    footprint = Footprint(descriptor, pid, clock=lambda: now)

    def refreshed() -> int:
        nonlocal now
        now += 1
        footprint.refresh()
        seen = looks
        private = footprint.recent().private
        assert looks == seen, "what was refreshed is recent"
        return private

    before = [refreshed() for _ in range(100)][-1]
    assert 5 <= looks <= 12
    order("kept.append(os.urandom(10 << 20))")
    assert refreshed() - before > 9 << 20, "it grew"

    monkeypatch.setattr(memory, "resident", lambda pid: 1 << 20)  # its size stays, and its private part grows
    before, looks = [refreshed() for _ in range(100)][-1], 0
    order("for place in range(0, len(shared), 4096): shared[place] ^= 1")
    assert [refreshed() for _ in range(16)][-1] - before > 45 << 20
    assert 1 <= looks <= 5
    looks = 0
    assert footprint.recent(since=now).private > before
    assert looks == 1, "it was not read since then"
    footprint.close()


def test_descriptors_that_a_thread_reads_are_given_back_when_it_has_read() -> None:
    reads, goes_on = threading.Event(), threading.Event()

    def cost() -> float:
        reads.set()
        assert goes_on.wait(20)
        return 0.0

    descriptor = os.open("/proc/self/smaps_rollup", os.O_RDONLY)
    footprint = Footprint(descriptor, cost=cost)
    thread = threading.Thread(target=footprint.read)
    thread.start()
    assert reads.wait(20)
    footprint.close()  # does not wait
    os.fstat(descriptor)  # still its own: no other file has this number
    goes_on.set()
    thread.join(20)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert footprint.recent().resident
    footprint.close()
