"""Models in processes, measured: the cost of a process compared with the gateway's own, and its savings.

    python -m tests.bench.bench_process latency     one row, process and inline; 1 and 2 processes
    python -m tests.bench.bench_process resident    200 scikit-learn models: private bytes, load p50 and p99
    python -m tests.bench.bench_process cycles N    N times (500) load and unload of a 200 MB model
    python -m tests.bench.bench_process kill        kill -9 under load: who failed, and for how long
    python -m tests.bench.bench_process large       another model's p99 while a 1 GB pickle loads

Needs scikit-learn. What is compared is interleaved; every figure says how many observations it has.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

import loaders
from gateway.runners.base import Runner, RunnerCrashed
from gateway.runners.environments import Environment, preload_for
from gateway.runners.inline import InlineRunner
from gateway.runners.process import ProcessRunner
from gateway.runners.zygote import Zygotes
from loaders.batch import Batch, Columns, Tensors
from loaders.package import Package
from tests.support.hostile import descendants, write_package

ROW = Tensors({"": np.zeros((1, 4))}, 1)
SKLEARN = Environment(preload=preload_for("mlflow.sklearn"))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def told(times: list[float]) -> str:
    ordered = sorted(times)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return f"p50 {statistics.median(ordered) * 1e3:8.3f} ms  p99 {p99 * 1e3:8.3f} ms  (n={len(times)})"


def sklearn_package(directory: Path) -> tuple[Package, Batch]:
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    x, y = load_iris(return_X_y=True, as_frame=True)
    package = loaders.save_model(LogisticRegression(max_iter=500).fit(x, y), directory, input_example=x[:3])
    return package, Columns({name: x[name].to_numpy()[:1] for name in x.columns}, 1)


def process(package: Package, zygotes: Zygotes, **options: Any) -> ProcessRunner:
    options.setdefault("environment", SKLEARN)
    return ProcessRunner(package, {}, zygotes=zygotes, name="m", version="1", **options)


async def asked(runner: Runner, batch: Batch, callers: int, seconds: float) -> tuple[list[float], float]:
    """Call durations of so many callers, and calls a second."""
    times: list[float] = []
    begin = time.perf_counter()

    async def caller() -> None:
        while time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            await runner.predict(batch, {})
            times.append(time.perf_counter() - start)

    await asyncio.gather(*(caller() for _ in range(callers)))
    return times, len(times) / (time.perf_counter() - begin)


async def latency(directory: Path, zygotes: Zygotes) -> None:
    package, row = sklearn_package(directory / "sklearn")
    echo = write_package(directory / "echo")
    busy = write_package(
        directory / "busy", at_predict="import hashlib; hashlib.pbkdf2_hmac('sha1', b'', b'', 20_000)"
    )
    for name, batch, runners in [
        ("echo", ROW, {"inline": InlineRunner(echo, {}), "process": process(echo, zygotes)}),
        ("scikit-learn", row, {"inline": InlineRunner(package, {}), "process": process(package, zygotes)}),
        ("CPU-bound", ROW, {f"{n} processes": process(busy, zygotes, processes=n) for n in (1, 2)}),
    ]:
        for runner in runners.values():
            await runner.start()
        for callers in (1, 32):
            seen: dict[str, list[float]] = {where: [] for where in runners}
            rates: dict[str, list[float]] = {where: [] for where in runners}
            for _ in range(5):
                for where, runner in runners.items():
                    times, rate = await asked(runner, batch, callers, 1.0)
                    seen[where] += times
                    rates[where].append(rate)
            for where in runners:
                median = statistics.median(rates[where])
                say(f"{name:13} {callers:2} callers {where:12} {told(seen[where])}  {median:8.0f} calls/s")
        await asyncio.gather(*(runner.close() for runner in runners.values()))


async def resident(directory: Path, zygotes: Zygotes) -> None:
    package, row = sklearn_package(directory / "sklearn")
    first = process(package, zygotes)
    await first.start()  # the zygote's imports are not a load
    runners, loads, inline = [first], [], []
    for _ in range(199):
        runner = process(package, zygotes)
        start = time.perf_counter()
        await runner.start()
        await runner.predict(row, {})
        loads.append(time.perf_counter() - start)
        runners.append(runner)
        beside = InlineRunner(package, {})
        start = time.perf_counter()
        await beside.start()
        await beside.predict(row, {})
        inline.append(time.perf_counter() - start)
        await beside.close()
    private = sorted(runner.measured_bytes or 0 for runner in runners)
    say(f"load and first prediction, process {told(loads)}")
    say(f"load and first prediction, inline  {told(inline)}")
    say(
        f"private bytes of 200: median {private[100] / 1e6:.1f} MB, largest {private[-1] / 1e6:.1f} MB, "
        f"sum {sum(private) / 1e6:.0f} MB; zygote {zygotes.bytes / 1e6:.0f} MB"
    )
    start = time.perf_counter()
    await asyncio.gather(*(runner.close() for runner in runners))
    say(f"all closed in {time.perf_counter() - start:.2f} s")


async def cycles(directory: Path, zygotes: Zygotes, count: int) -> None:
    package = write_package(
        directory / "heavy", at_load="global X\nimport numpy\nX = numpy.ones(200 * 1024 * 1024 // 8)"
    )
    measured: list[int] = []
    begin = time.perf_counter()
    for i in range(count):
        runner = process(package, zygotes, environment=Environment())
        await runner.start()
        await runner.predict(ROW, {})
        measured.append(runner.measured_bytes or 0)
        await runner.close()
        if i in (9, count - 1):
            say(
                f"after {i + 1:3}: gateway {_rss() / 1e6:.1f} MB, zygote {zygotes.bytes / 1e6:.1f} MB, "
                f"{len(os.listdir('/proc/self/fd'))} descriptors, {len(descendants())} processes below"
            )
    say(
        f"{count} cycles in {time.perf_counter() - begin:.1f} s; each took "
        f"{statistics.median(measured) / 1e6:.0f} MB while loaded"
    )


async def kill(directory: Path, zygotes: Zygotes) -> None:
    package, row = sklearn_package(directory / "sklearn")
    other = process(package, zygotes)
    await other.start()
    recoveries: list[float] = []
    failed = neighbours = calls = 0
    for _ in range(10):
        runner = process(package, zygotes)
        await runner.start()
        stop = asyncio.Event()
        outcomes: list[tuple[float, bool]] = []

        async def caller(
            runner: ProcessRunner = runner,
            stop: asyncio.Event = stop,
            outcomes: list[tuple[float, bool]] = outcomes,
        ) -> None:
            while not stop.is_set():
                try:
                    await runner.predict(row, {})
                    outcomes.append((time.perf_counter(), True))
                except RunnerCrashed:
                    outcomes.append((time.perf_counter(), False))

        async def neighbour(stop: asyncio.Event = stop) -> int:
            count = 0
            while not stop.is_set():
                await other.predict(row, {})
                count += 1
            return count

        callers = [asyncio.ensure_future(caller()) for _ in range(16)]
        beside = asyncio.ensure_future(neighbour())
        await asyncio.sleep(0.3)
        os.kill(runner.pids[0], signal.SIGKILL)
        at = time.perf_counter()
        while not any(good and when > at + 0.001 for when, good in outcomes):
            await asyncio.wait(callers, timeout=0.001)
        recoveries.append(next(when for when, good in outcomes if good and when > at + 0.001) - at)
        await asyncio.sleep(0.2)
        stop.set()
        await asyncio.gather(*callers)
        neighbours += await beside
        failed += sum(not good for _, good in outcomes)
        calls += len(outcomes)
        await runner.close()
    say(f"10 kills under 16 callers: {failed} of {calls} calls failed; answering after {told(recoveries)}")
    say(f"the other model answered {neighbours} calls, all of them")
    await other.close()


async def large(directory: Path, zygotes: Zygotes) -> None:
    small, row = sklearn_package(directory / "sklearn")
    # Many objects rather than one block: reading them holds the interpreter's lock the whole time.
    pickled = directory / "big.pkl"
    import pickle

    with pickled.open("wb") as file:
        pickle.dump([os.urandom(1 << 10) for _ in range(1 << 20)], file)
    big = write_package(
        directory / "big", at_load=f"global X\nimport pickle\nX = pickle.load(open({str(pickled)!r}, 'rb'))"
    )
    from gateway.runners.confinement import Confinement

    served = process(small, zygotes)
    await served.start()
    await asked(served, row, 1, 0.5)

    async def loaded_by(make: Callable[[], Runner]) -> tuple[list[float], float]:
        runner = make()
        loading = asyncio.ensure_future(runner.start())
        times: list[float] = []
        begin = time.perf_counter()
        while not loading.done():
            start = time.perf_counter()
            await served.predict(row, {})
            times.append(time.perf_counter() - start)
        await loading
        took = time.perf_counter() - begin
        await runner.close()
        return times, took

    kinds: dict[str, Callable[[], Awaitable[tuple[list[float], float]]]] = {
        "nothing loads": lambda: asked(served, row, 1, 2.0),
        "loads in a process": lambda: loaded_by(
            lambda: process(
                big, zygotes, environment=Environment(), confinement=Confinement(filesystem=False)
            )
        ),
        "loads inline": lambda: loaded_by(lambda: InlineRunner(big, {})),
    }
    seen: dict[str, list[float]] = {kind: [] for kind in kinds}
    loads: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(10):
        for kind, measure in kinds.items():
            times, took = await measure()
            seen[kind] += times
            loads[kind].append(took)
    for kind, times in seen.items():
        load = "" if kind == "nothing loads" else f"  the load took {statistics.median(loads[kind]):.2f} s"
        say(f"{kind:20} {told(times)}{load}")
    await served.close()


def _rss() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def main(what: str, *arguments: str) -> None:
    zygotes = Zygotes()
    work: dict[str, Callable[[Path], Awaitable[None]]] = {
        "latency": lambda d: latency(d, zygotes),
        "resident": lambda d: resident(d, zygotes),
        "cycles": lambda d: cycles(d, zygotes, int(arguments[0]) if arguments else 500),
        "kill": lambda d: kill(d, zygotes),
        "large": lambda d: large(d, zygotes),
    }
    with tempfile.TemporaryDirectory() as directory:
        await work[what](Path(directory))
    await zygotes.close()


if __name__ == "__main__":
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(main(*sys.argv[1:]))
