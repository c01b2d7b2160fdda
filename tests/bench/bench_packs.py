"""Packs, compared with a process per model: the same gateway, the same models, the same run.

    python -m tests.bench.bench_packs serve [N] [SECONDS]   N (100) different fits behind a real gateway, once
                                                            with isolation: auto, once with isolation: process
    python -m tests.bench.bench_packs cycles [N]            N (500) load and unload of a 20 MB model in a pack
    python -m tests.bench.bench_packs many [SECONDS] [NAMES] [ASKED] [MEGABYTES] [RATE]
        Zipf(1.0) over ASKED (2,000) of NAMES (10,000) at RATE (200) a second for SECONDS (900), limited to
        MEGABYTES (2,000)
    python -m tests.bench.bench_packs chaos [SECONDS] [RATE]
        50 models in packs at RATE (200) a second for SECONDS (60): one request of 200 ends its process, one
        of 2,000 others ends it by chance, a process of models is killed every 5 seconds, and each
        process that they are forked from every 15 seconds

`serve` tells: the first answer of a cold model, the proportional memory of all of them resident, requests per
second of one hot model, and of Zipf(1.0) over all with room for all and with room for a fifth. The caller is
16 threads in this process: it takes as much of the machine as the gateway, so compare columns, not absolutes.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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


def log_packages(directory: Path, count: int) -> bytes:
    """`count` different fits as packages, without a registry. Returns a request body."""
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    import loaders

    x, y = load_iris(return_X_y=True, as_frame=True)
    chance = np.random.default_rng(0)
    for i in range(count):
        rows = chance.choice(len(x), 120)
        model = LogisticRegression(max_iter=200, tol=0.01).fit(x.iloc[rows], y.iloc[rows])
        loaders.save_model(model, directory / "packages" / str(i), input_example=x[:3], verify=False)
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


def room_for(url: str, share: float) -> int:
    """The `memory_limit` that has room for that share of what the models take now.

    The gateway keeps at least 16 MiB of the limit, or half of a smaller one, for models, however much the
    processes take that they share.
    """
    text = httpx.get(f"{url}/metrics", timeout=30).text
    models = share * total(text, "gateway_model_bytes")
    rest = total(text, "gateway_memory_bytes") - total(text, "gateway_model_bytes")
    return int(models + (min(rest, models) if models < 16 << 20 else rest))


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
            limit = room_for(server.url, 0.2)
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
    from tests.support.packs import PackBench, answered_by, scaled
    from tests.support.processes import processes

    directory = Path(tempfile.mkdtemp())
    large = write_package(
        directory / "p", at_load="import numpy as np; global kept; kept = np.ones(20 << 17)"
    )
    async with processes(directory / "scratch") as made:
        bench = PackBench(made)
        stays = await bench.started(scaled(directory / "2", 2.0))
        sizes = []
        for i in range(count):
            runner = await bench.started(large)
            await answered_by(runner, 1.0)
            await runner.close()
            bench.runners.remove(runner)
            bench.packs.tend()
            if i % max(1, count // 10) == 0 or i == count - 1:
                assert await answered_by(stays, 1.0) == [2.0]
                (process,) = bench.pack.processes
                sizes.append(process.worker.memory().private)
                say(f"cycle {i:4}: {sizes[-1] / 1e6:7.2f} MB private")
        say(f"the last is {sizes[-1] / sizes[1] - 1:+.1%} of what it was after the first tenth")
        await stays.close()
        await bench.packs.close()


class Arrivals:
    """Requests at a fixed rate, whatever the answers take: `send` runs in one of 64 threads for each."""

    def __init__(self, send: Callable[[http.client.HTTPConnection, int], None], caller: Caller) -> None:
        self._send = send
        self._local = threading.local()
        self._caller = caller
        self.late = 0

    def run(self, rate: float, seconds: float, each_second: Callable[[int], None]) -> None:
        with ThreadPoolExecutor(64) as threads:
            started = time.perf_counter()
            for i in range(int(rate * seconds)):
                due = started + i / rate
                if (wait := due - time.perf_counter()) > 0:
                    time.sleep(wait)
                self.late += wait < -1.0
                threads.submit(self._one, i)
                if i % int(rate) == 0:
                    each_second(int(i / rate))

    def _one(self, i: int) -> None:
        if not hasattr(self._local, "connection"):
            self._local.connection = self._caller.connection()
        try:
            self._send(self._local.connection, i)
        except OSError:
            self._local.connection = self._caller.connection()
            raise


def total(text: str, name: str) -> float:
    """The sum of a metric's series."""
    return sum(
        float(line.split()[-1]) for line in text.splitlines() if line.startswith((name + "{", name + " "))
    )


def many(seconds: float, names: int, asked: int, megabytes: int, rate: float) -> None:
    directory = Path(tempfile.mkdtemp())
    body = log_packages(directory, asked)
    models = {
        f"m{i}": {
            "versions": {"1": {"source": str(directory / "packages" / str(i % asked))}},
            "aliases": {"champion": "1"},
        }
        for i in range(names)
    }
    (directory / "registry.json").write_text(json.dumps({"models": models}))
    environ = {"GATEWAY_MEMORY_LIMIT": f"{megabytes}MB"}
    server = Running(directory, ["--registry", str(directory / "registry.json")], environ)
    try:
        caller = Caller(server.url, body)
        shares = 1.0 / np.arange(1, asked + 1)
        chosen = np.random.default_rng(1).choice(asked, int(rate * seconds), p=shares / shares.sum())
        taken: list[tuple[int, float, int]] = []

        def send(connection: http.client.HTTPConnection, i: int) -> None:
            took, status = caller.one(connection, f"m{chosen[i]}")
            taken.append((i, took, status))

        def look(second: int) -> None:
            if second % 60 == 0:
                text = httpx.get(f"{server.url}/metrics", headers=server.key, timeout=30).text
                hits, misses = (total(text, f"gateway_cache_{kind}_total") for kind in ("hits", "misses"))
                held = proportional(server)
                say(f"  minute {second // 60:3}: {held:7.1f} MB, {hits:.0f} hits, {misses:.0f} misses")

        arrivals = Arrivals(send, caller)
        arrivals.run(rate, seconds, look)
        text = httpx.get(f"{server.url}/metrics", headers=server.key, timeout=30).text
        hits, misses = (total(text, f"gateway_cache_{kind}_total") for kind in ("hits", "misses"))
        first = {}
        for i, took, _ in sorted(taken):
            first.setdefault(int(chosen[i]), took)
        cold = sorted(first.values())
        everything = sorted(took for _, took, _ in taken)
        say(f"{names} names, Zipf(1.0) over {asked}, {rate:g} a second for {seconds:g} s in {megabytes} MB")
        failed = sum(status != 200 for _, _, status in taken)
        say(f"  answered {len(taken)}, failed {failed}, sent late {arrivals.late}")
        say(f"  hit ratio {hits / (hits + misses):.4f}; all: {_ms(everything)}")
        say(f"  the first request of each of {len(cold)} models: {_ms(cold)}")
    finally:
        server.stop()


def chaos(seconds: float, rate: float, count: int = 50) -> None:
    directory = Path(tempfile.mkdtemp())
    models = {}
    for i in range(count):
        package = write_package(
            directory / "packages" / str(i),
            at_predict="if float(data.iloc[0, 0]) < 0 or os.urandom(2) < b'\\x00\\x20':\n    os.abort()",
        )
        models[f"m{i}"] = {"versions": {"1": {"source": str(package.path)}}, "aliases": {"champion": "1"}}
    (directory / "registry.json").write_text(json.dumps({"models": models}))
    (directory / "gateway.yaml").write_text("models: {'*': {pack: chaos}}\n")
    arguments = ["--registry", str(directory / "registry.json"), "--config", str(directory / "gateway.yaml")]
    server = Running(directory, arguments, {})
    good, poison = (json.dumps({"dataframe_records": [{"x": x}]}).encode() for x in (1.0, -1.0))
    chance = np.random.default_rng(2)
    bad = chance.random(int(rate * seconds)) < 0.005
    chosen = chance.integers(0, count, int(rate * seconds))
    outcomes: Counter[tuple[str, int]] = Counter()
    taken: list[float] = []
    kills: Counter[str] = Counter()
    try:
        callers = {False: Caller(server.url, good), True: Caller(server.url, poison)}

        def send(connection: http.client.HTTPConnection, i: int) -> None:
            took, status = callers[bool(bad[i])].one(connection, f"m{chosen[i]}")
            outcomes["guilty" if bad[i] else "innocent", status] += 1
            if not bad[i]:
                taken.append(took)

        def kill(second: int) -> None:
            if second % 5 == 4 and (found := busiest(server)):
                os.kill(found, signal.SIGKILL)
                kills["processes of models"] += 1
            if second % 15 == 7:
                for found in zygotes(server):
                    os.kill(found, signal.SIGKILL)
                    kills["zygotes"] += 1

        Arrivals(send, callers[False]).run(rate, seconds, kill)
        say(f"{count} models in packs, {rate:g} requests a second for {seconds:g} s, killed: {dict(kills)}")
        for (kind, status), number in sorted(outcomes.items()):
            say(f"  {kind} requests with status {status}: {number}")
        say(f"  innocent requests: {_ms(sorted(taken))}")
    finally:
        server.stop()


def busiest(server: Running) -> int | None:
    """The process below the gateway, without children, that has used the most processor time."""
    below = descendants(server.process.pid)
    parents = set()
    used: dict[int, int] = {}
    for pid in below:
        try:
            fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.add(int(fields[1]))
        used[pid] = int(fields[11]) + int(fields[12])
    leaves = [pid for pid in used if pid not in parents]
    return max(leaves, key=used.__getitem__, default=None)


def zygotes(server: Running) -> list[int]:
    """The processes directly below the gateway that have processes below them."""
    parents: dict[int, int] = {}
    for pid in descendants(server.process.pid):
        with suppress(OSError):
            parents[pid] = int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[1])
    return [pid for pid in set(parents.values()) if parents.get(pid) == server.process.pid]


def _ms(ordered: list[float]) -> str:
    last = len(ordered) - 1
    p50, p99, most = (ordered[min(last, int(len(ordered) * share))] * 1e3 for share in (0.5, 0.99, 1.0))
    return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, most {most:.1f} ms"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", *rest]:
            serve(int(rest[0]) if rest else 100, float(rest[1]) if len(rest) > 1 else 10.0)
        case ["cycles", *rest]:
            asyncio.run(cycles(int(rest[0]) if rest else 500))
        case ["many", *rest]:
            given = [float(text) for text in rest]
            seconds, names, asked, megabytes, rate = given + [900, 10_000, 2_000, 2_000, 200][len(given) :]
            many(seconds, int(names), int(asked), int(megabytes), rate)
        case ["chaos", *rest]:
            chaos(float(rest[0]) if rest else 60.0, float(rest[1]) if len(rest) > 1 else 200.0)
        case _:
            say(__doc__ or "")
            sys.exit(2)
