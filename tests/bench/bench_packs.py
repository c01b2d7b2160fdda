"""Packs, compared with a process per model: the same gateway, the same models, the same run.

    python -m tests.bench.bench_packs serve [N] [SECONDS]   N (100) different fits behind a real gateway, once
                                                            with isolation: auto, once with isolation: process
    python -m tests.bench.bench_packs cycles [N]            N (500) load and unload of a 20 MB model in a pack

`serve` tells: the first answer of a cold model, the proportional memory of all of them resident, requests per
second of one hot model, and of Zipf(1.0) over all with room for all and with room for a fifth. The caller is
16 threads in this process: it takes as much of the machine as the gateway, so compare columns, not absolutes.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import gateway
from tests.support.hostile import descendants, write_package
from tests.support.running import Running

CONNECTIONS = 16


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def log_models(directory: Path, count: int) -> bytes:
    """`count` fits of one small classifier, each to other rows. Returns a request body."""
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    x, y = load_iris(return_X_y=True, as_frame=True)
    chance = np.random.default_rng(0)
    for i in range(count):
        rows = chance.choice(len(x), 120)
        model = LogisticRegression(max_iter=2000).fit(x.iloc[rows], y.iloc[rows])
        registry = str(directory / "registry.yaml")
        gateway.log_model(
            model, f"m{i}", registry, input_example=x[:3], alias="champion", verify=False
        )  # fmt: skip
    return json.dumps({"dataframe_split": json.loads(x[:1].to_json(orient="split", index=False))}).encode()


class Caller:
    """Requests over connections that stay open, as many at a time as there are threads."""

    def __init__(self, url: str, body: bytes) -> None:
        self._address = httpx.URL(url)
        self._body = body

    def one(self, connection: http.client.HTTPConnection, name: str) -> tuple[float, int]:
        started = time.perf_counter()
        connection.request("POST", f"/predict/{name}", self._body, {"content-type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        return time.perf_counter() - started, answer.status

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._address.host, self._address.port, timeout=60)

    def load(self, names: list[list[str]], seconds: float) -> dict[str, float]:
        """Each thread asks for its names over and over."""
        end = time.perf_counter() + seconds
        taken: list[float] = []
        codes: list[int] = []

        def work(mine: list[str]) -> None:
            connection = self.connection()
            i = 0
            while time.perf_counter() < end:
                took, status = self.one(connection, mine[i % len(mine)])
                taken.append(took)
                codes.append(status)
                i += 1
            connection.close()

        threads = [threading.Thread(target=work, args=(mine,)) for mine in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {
            "requests_per_second": round(len(taken) / seconds, 1),
            "p50_ms": round(statistics.median(taken) * 1e3, 2),
            "p99_ms": round(sorted(taken)[int(len(taken) * 0.99)] * 1e3, 1),
            "failed": sum(code != 200 for code in codes),
        }


def zipf(count: int, requests: int = 5000) -> list[list[str]]:
    chance = np.random.default_rng(1)
    shares = 1.0 / np.arange(1, count + 1)
    return [
        [f"m{i}" for i in chance.choice(count, requests, p=shares / shares.sum())] for _ in range(CONNECTIONS)
    ]


def proportional(server: Running) -> float:
    """Megabytes of the gateway's process and all below it, each page by its share."""
    total = 0
    for pid in (server.process.pid, *descendants(server.process.pid)):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024


def room_for(server: Running, share: float) -> int:
    """Bytes that hold what belongs to no model, and that share of what the models take now."""
    found = httpx.get(f"{server.url}/metrics", headers=server.key).text.splitlines()
    models = sum(float(line.split()[-1]) for line in found if line.startswith("gateway_model_bytes{"))
    states = sum(float(line.split()[-1]) for line in found if line.startswith("gateway_memory_bytes{"))
    return int(states - models + share * models)


def serve(count: int, seconds: float) -> None:
    directory = Path(tempfile.mkdtemp())
    body = log_models(directory, count)
    for isolation in ("auto", "process"):
        result: dict[str, Any] = {}
        limit = 0
        server = Running(
            directory, ["--registry", str(directory / "registry.yaml")], {"GATEWAY_ISOLATION": isolation}
        )
        try:
            caller = Caller(server.url, body)
            connection = caller.connection()
            caller.one(connection, "m0")  # starts the zygote, and the pack
            cold = [caller.one(connection, f"m{i}")[0] for i in range(1, count)]
            result["cold_p50_ms"] = round(statistics.median(cold) * 1e3, 1)
            result["cold_p99_ms"] = round(sorted(cold)[int(len(cold) * 0.99)] * 1e3, 1)
            time.sleep(2.5)
            result["resident_pss_mb"] = round(proportional(server), 1)
            limit = room_for(server, 0.2)
            result["hot"] = caller.load([["m0"]] * CONNECTIONS, seconds)
            result["zipf"] = caller.load(zipf(count), seconds)
        finally:
            server.stop()
        environ = {"GATEWAY_ISOLATION": isolation, "GATEWAY_MEMORY_LIMIT": str(limit)}
        server = Running(directory, ["--registry", str(directory / "registry.yaml")], environ)
        try:
            caller = Caller(server.url, body)
            caller.one(caller.connection(), "m0")
            result["zipf_room_for_a_fifth"] = caller.load(zipf(count), seconds)
        finally:
            server.stop()
        say(f"isolation: {isolation}, {count} models, {CONNECTIONS} connections")
        for name, value in result.items():
            say(f"  {name:24} {value}")


async def cycles(count: int) -> None:
    from tests.gateway.runners.test_packs import Quarters, answered_by, scaled
    from tests.support.processes import processes

    directory = Path(tempfile.mkdtemp())
    large = write_package(
        directory / "p", at_load="import numpy as np; global kept; kept = np.ones(20 << 17)"
    )
    async with processes(directory / "scratch") as made:
        quarters = Quarters(made)
        stays = await quarters.started(scaled(directory / "2", 2.0))
        sizes = []
        for i in range(count):
            runner = await quarters.started(large)
            await answered_by(runner, 1.0)
            await runner.close()
            quarters.runners.remove(runner)
            quarters.packs.tend()
            if i % max(1, count // 10) == 0 or i == count - 1:
                assert await answered_by(stays, 1.0) == [2.0]
                (process,) = quarters.pack.processes
                sizes.append(process.worker.memory().private)
                say(f"cycle {i:4}: {sizes[-1] / 1e6:7.2f} MB private")
        say(f"the last is {sizes[-1] / sizes[1] - 1:+.1%} of what it was after the first tenth")
        await stays.close()
        await quarters.packs.close()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", *rest]:
            serve(int(rest[0]) if rest else 100, float(rest[1]) if len(rest) > 1 else 10.0)
        case ["cycles", *rest]:
            asyncio.run(cycles(int(rest[0]) if rest else 500))
        case _:
            say(__doc__ or "")
            sys.exit(2)
