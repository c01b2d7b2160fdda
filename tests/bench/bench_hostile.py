"""What one client's large bodies cost: the memory of the gateway, and the time that another client waits.

    python -m tests.bench.bench_hostile [--memory 1073741824] [--bodies 20] [--json] [--source DIR]

A gateway with one small model runs in a memory cgroup (version 1, as root; elsewhere without a limit). A
neighbour asks for one row ten times a second. Then `--bodies` large bodies come at once, of each kind: 31 MB
of empty lists that are 31 KB on the wire, valid rows of numbers, and CSV. Shown are the statuses they got,
the cgroup's peak, what is left 10 s later, and the neighbour's p50, p99 and slowest request meanwhile.
`--source` runs the gateway of another checkout, to compare.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

CGROUPS = Path("/sys/fs/cgroup/memory")
SIZE = 31 << 20
STABLE_SECONDS = 10.0
ONE = json.dumps({"dataframe_records": [{"a": 5.1, "b": 3.5}]}).encode()
JSON = {"content-type": "application/json"}


def lists() -> tuple[bytes, dict[str, str]]:
    body = b'{"inputs":[' + b"[]," * (SIZE // 3) + b"[]]}"
    return gzip.compress(body), {**JSON, "content-encoding": "gzip"}


def rows() -> tuple[bytes, dict[str, str]]:
    row = b"[5.123456789012345,3.512345678901234],"
    body = b'{"dataframe_split":{"columns":["a","b"],"data":['
    return body + row * (SIZE // len(row)) + b"[1.5,2.5]]}}", JSON


def table() -> tuple[bytes, dict[str, str]]:
    row = b"5.123456789012345,3.512345678901234\n"
    return b"a,b\n" + row * (SIZE // len(row)), {"content-type": "text/csv"}


KINDS: dict[str, Callable[[], tuple[bytes, dict[str, str]]]] = {"lists": lists, "rows": rows, "csv": table}


class Group:
    """A memory cgroup of version 1; does nothing where there is none."""

    def __init__(self, limit: int) -> None:
        self.path = CGROUPS / f"bench-{os.getpid()}"
        try:
            self.path.mkdir()
            (self.path / "memory.limit_in_bytes").write_text(str(limit))
        except OSError:
            self.path = Path()

    @property
    def there(self) -> bool:
        return self.path != Path()

    def enter(self) -> None:
        if self.there:
            (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def resident(self) -> int:
        stat = (self.path / "memory.stat").read_text() if self.there else "total_rss 0"
        found = re.search(r"^total_rss (\d+)", stat, re.M)
        return int(found[1]) if found else 0

    def remove(self) -> None:
        if self.there:
            self.path.rmdir()


async def neighbour(url: str, done: asyncio.Event) -> list[float]:
    """Seconds of each request; one without an answer counts as 60."""
    times: list[float] = []
    async with httpx.AsyncClient(timeout=60) as client:
        while not done.is_set():
            began = time.perf_counter()
            try:
                reply = await client.post(f"{url}/predict/m", content=ONE, headers=JSON)
                times.append(time.perf_counter() - began if reply.status_code == 200 else 60.0)
            except httpx.HTTPError:
                times.append(60.0)
            await asyncio.sleep(0.1)
    return times


async def peaks(group: Group, done: asyncio.Event) -> int:
    highest = 0
    while not done.is_set():
        highest = max(highest, group.resident())
        await asyncio.sleep(0.02)
    return highest


async def hostile(url: str, kind: str, bodies: int) -> Counter[str]:
    body, headers = KINDS[kind]()

    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=bodies)) as client:

        async def one() -> str:
            try:
                reply = await client.post(f"{url}/predict/m", content=body, headers=headers)
                return str(reply.status_code)
            except httpx.HTTPError as error:
                return type(error).__name__

        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        return Counter(await asyncio.gather(*(one() for _ in range(bodies))))


async def measure(url: str, group: Group, kind: str, bodies: int) -> dict[str, Any]:
    # In a process of its own: the neighbour must not wait for this client.
    command = [sys.executable, "-m", "tests.bench.bench_hostile", "--attack", url, kind, str(bodies)]
    pipe = asyncio.subprocess.PIPE
    attack = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    assert attack.stdout is not None
    await attack.stdout.readline()
    done = asyncio.Event()
    asked, peak = asyncio.create_task(neighbour(url, done)), asyncio.create_task(peaks(group, done))
    await asyncio.sleep(1.0)
    began = time.perf_counter()
    output, _ = await attack.communicate(b"go\n")
    statuses = json.loads(output)
    seconds = time.perf_counter() - began
    await asyncio.sleep(0.3)
    done.set()
    times = sorted(await asked)
    await asyncio.sleep(STABLE_SECONDS)
    return {
        "kind": kind,
        "statuses": statuses,
        "seconds": round(seconds, 2),
        "peak_mb": await peak >> 20,
        "left_mb": group.resident() >> 20,
        "p50_ms": round(statistics.median(times) * 1e3, 1),
        "p99_ms": round(times[int(len(times) * 0.99)] * 1e3, 1),
        "slowest_ms": round(times[-1] * 1e3, 1),
    }


def package(directory: Path) -> None:
    import pandas as pd
    from sklearn.linear_model import LinearRegression

    import gateway

    frame = pd.DataFrame({"a": [1.0, 2.0, 4.0], "b": [0.0, 1.0, 3.0]})
    model = LinearRegression().fit(frame, [1.0, 2.0, 3.0])
    gateway.log_model(model, "m", str(directory / "registry.yaml"), input_example=frame, alias="champion")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--memory", type=int, default=1 << 30)
    parser.add_argument("--bodies", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--source", type=Path, default=Path(__file__).parents[2])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--attack", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.attack:
        url, kind, bodies = arguments.attack
        print(json.dumps(asyncio.run(hostile(url, kind, int(bodies)))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        package(directory)
        for kind in arguments.kinds:
            result = run(directory, arguments, kind)
            print(json.dumps(result) if arguments.json else result, flush=True)


def run(directory: Path, arguments: argparse.Namespace, kind: str) -> dict[str, Any]:
    """One kind of body, with a gateway of its own."""
    group = Group(arguments.memory)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
        "PYTHONPATH": str(arguments.source),
        "GATEWAY_CACHE_DIR": str(directory / "cache"),
        "GATEWAY_STATE_DIR": str(directory / "state"),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", "serve", "--port", "0", "--registry", "registry.yaml"],
        cwd=directory,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=group.enter,
    )
    assert process.stderr is not None
    try:
        url = next(
            found[1] for line in process.stderr if (found := re.search(r" on (http://[^\s\"]+)", line))
        )
        assert httpx.post(f"{url}/predict/m", content=ONE, headers=JSON, timeout=60).status_code == 200
        drained = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        result = asyncio.run(measure(url, group, kind, arguments.bodies))
        result["survived"] = process.poll() is None
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    drained.wait(10)
    time.sleep(0.5)
    group.remove()
    return result


if __name__ == "__main__":
    main()
