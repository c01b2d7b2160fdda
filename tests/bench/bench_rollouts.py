"""Rollouts on a real server, under an open loop of requests: what callers notice of them.

    python -m tests.bench.bench_rollouts flips [--rate 200] [--flips 50]
    python -m tests.bench.bench_rollouts identical [--rate 200] [--runs 50]
    python -m tests.bench.bench_rollouts shadow [--rate 100] [--rounds 5]

`flips`: an alias moves between two versions, once per second; seconds with and without flips alternate.
`identical`: a canary of a version that is equal, again and again: how many are rolled back, and why.
`shadow`: a candidate answers copies of all requests, and then one that sleeps for 10 s; rounds alternate.
For comparison, `work` is without a rollout: a process of the lowest priority, which is not the gateway's,
does the work of the candidate. The difference between `work` and `shadow` is the gateway's, the rest the
machine's.

The load comes from this process. On a busy machine the times say little; the failures still count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd

import gateway
from gateway.registries import open_registry
from gateway.registries.base import Move
from tests.support.running import Running, running

EXAMPLE = pd.DataFrame({"x": [2.0]})
HEAD = b"POST /predict/m HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
#: A connection that was idle for longer is not used again: the server closes it after 75 s.
IDLE_SECONDS = 30.0
CANARY: dict[str, Any] = {"canary": {"steps": [20, 50], "every": "2s", "requests": 100, "within": "10m"}}
SHADOW = {"shadow": {"share": 1.0, "requests": 10_000_000, "within": "10h"}}


class Worked:
    """Doubles x, after 2 ms of work. `sleeps`: 10 s, except for its example."""

    def __init__(self, sleeps: bool = False) -> None:
        self.sleeps = sleeps

    def predict(self, model_input: Any) -> Any:
        if self.sleeps and (model_input["x"] != 2.0).any():
            time.sleep(10)
        until = time.perf_counter() + 0.002
        while time.perf_counter() < until:
            pass
        return (model_input["x"] * 2).to_numpy()


class Load:
    """An open loop: a request begins when it is due, whatever the earlier ones do. They arrive at random
    (Poisson), the same in each run of the bench. `seconds`: of each answer since it was due. `seen`:
    statuses."""

    def __init__(self, url: str) -> None:
        self._host, _, port = url.removeprefix("http://").partition(":")
        self._port = int(port)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter, float]] = []
        self.seen: Counter[str] = Counter()
        self._chance = random.Random(1)

    async def run(self, rate: float, seconds: float) -> list[float]:
        taken: list[float] = []
        due = time.perf_counter()
        asked = []
        for number in range(int(rate * seconds)):
            due += self._chance.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            asked.append(asyncio.create_task(self._ask(number, due, taken)))
        await asyncio.gather(*asked)
        return taken

    async def _ask(self, number: int, due: float, taken: list[float]) -> None:
        body = b'{"dataframe_records":[{"x":%d.0}]}' % (10 + number)
        try:
            reader, writer = await self._connected()
            writer.write(HEAD % len(body) + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            self.seen[answer[9:12].decode()] += 1
            self._idle.append((reader, writer, time.monotonic()))
        except (OSError, asyncio.IncompleteReadError) as error:
            self.seen[type(error).__name__] += 1
        taken.append(time.perf_counter() - due)

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer, since = self._idle.pop()
            if time.monotonic() - since < IDLE_SECONDS:
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, self._port)

    @property
    def failures(self) -> int:
        return sum(count for what, count in self.seen.items() if what != "200")


def registry_of(directory: Path, *sleeps: bool) -> str:
    registry = str(directory / "registry.yaml")
    for number, how in enumerate((False, *sleeps), 1):
        gateway.log_model(
            Worked(how), "m", registry, input_example=EXAMPLE, verify=False, metadata={"number": number}
        )
    move(registry, "1")
    return registry


def move(registry: str, version: str) -> None:
    open_registry(registry).move(Move("m", "champion", version))


async def view_of(server: Running, client: httpx.AsyncClient) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get(f"{server.url}/rollouts/m@champion")).json()
    return found


async def until(server: Running, client: httpx.AsyncClient, version: str, *phases: str) -> dict[str, Any]:
    while True:
        view = await view_of(server, client)
        if view["desired"] == version and view["phase"] in phases:
            return view
        await asyncio.sleep(0.05)


def told(name: str, taken: list[float]) -> str:
    p50, p99 = (float(np.quantile(taken, share)) * 1000 for share in (0.5, 0.99))
    return f"{name:10s} {len(taken):6d} requests, p50 {p50:6.2f} ms, p99 {p99:6.2f} ms"


async def flips(server: Running, registry: str, rate: float, count: int) -> None:
    load, steady, flipping = Load(server.url), [], []
    async with httpx.AsyncClient(timeout=60) as client:
        await load.run(rate, 3)
        version, done = "1", 0
        while done < count:
            for _ in range(5):
                steady += await load.run(rate, 1)
            for _ in range(5):
                version = "2" if version == "1" else "1"
                asked = asyncio.create_task(load.run(rate, 1))
                await asyncio.to_thread(move, registry, version)
                headers = server.key
                await client.post(f"{server.url}/registry/refresh", headers=headers)
                await until(server, client, version, "done", "serving")
                flipping += await asked
                done += 1
    print(told("steady", steady))
    print(told("flips", flipping))
    print(f"{done} flips, {load.failures} failures of {sum(load.seen.values())} requests {dict(load.seen)}")


async def identical(server: Running, rate: float, count: int) -> None:
    load, ended = Load(server.url), Counter[str]()
    async with httpx.AsyncClient(timeout=60) as client:
        await load.run(rate, 1)
        stop = False

        async def forever() -> None:
            while not stop:
                await load.run(rate, 1)

        asked = asyncio.create_task(forever())
        for run in range(count):
            if run:
                body = {"version": "1"}
                path = f"{server.url}/models/m/aliases/champion"
                await client.put(path, params={"wait": "true"}, headers=server.key, json=body)
                await until(server, client, "1", "done", "serving")
            # A version that has served takes only the steps that its promotion names.
            body = {"version": "2", "canary": CANARY["canary"]["steps"]}
            path = f"{server.url}/models/m/aliases/champion"
            (await client.put(path, headers=server.key, json=body)).raise_for_status()
            view = await until(server, client, "2", "done", "rolled_back", "held")
            ended[view["phase"]] += 1
            if view["phase"] != "done":
                print(run, view["phase"], view["rollout"]["reason"], flush=True)
        stop = True
        await asked
    print(
        f"{count} canaries of an identical version: {dict(ended)}; {load.failures} failures {dict(load.seen)}"
    )


WORK = """
import random, sys, time
rate = float(sys.argv[1])
due = time.perf_counter()
while True:
    due += random.expovariate(rate)
    time.sleep(max(0.0, due - time.perf_counter()))
    until = time.perf_counter() + 0.002
    while time.perf_counter() < until:
        pass
"""


@contextmanager
def work(rate: float) -> Iterator[None]:
    """A process that does the work of a candidate, `rate` times per second, with the lowest priority."""
    process = subprocess.Popen([sys.executable, "-c", WORK, str(rate)])
    os.setpriority(os.PRIO_PROCESS, process.pid, 19)
    try:
        yield
    finally:
        process.kill()
        process.wait()


async def shadow(server: Running, rate: float, rounds: int) -> None:
    load = Load(server.url)
    taken: dict[str, list[list[float]]] = {"none": [], "work": [], "shadow": [], "sleeps": []}
    async with httpx.AsyncClient(timeout=60) as client:
        await load.run(rate, 3)
        for _ in range(rounds):
            for (kind, runs), version in zip(taken.items(), "1123", strict=True):
                copies = {"shadow": 1.0} if version != "1" else {}
                path = f"{server.url}/models/m/aliases/champion"
                await client.put(path, headers=server.key, json={"version": version, **copies})
                phases = ("shadowing",) if copies else ("done", "serving")
                await until(server, client, version, *phases)
                with work(rate) if kind == "work" else nullcontext():
                    await load.run(rate, 2)  # what the load of the version has left behind
                    runs.append(await load.run(rate, 10))
                if copies:
                    view = await view_of(server, client)
                    evidence = view["rollout"]["evidence"]["shadow"]
                    print(told(kind, runs[-1]), evidence["requests"], "compared", evidence["not_compared"])
    for kind, runs in taken.items():
        each = [float(np.quantile(run, 0.99)) * 1000 for run in runs]
        print(
            told(kind, [one for run in runs for one in run]),
            f"median of the rounds' p99 {np.median(each):.2f} ms ({min(each):.2f} to {max(each):.2f})",
        )
    print(f"{load.failures} failures {dict(load.seen)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("flips", "identical", "shadow"))
    parser.add_argument("--rate", type=float)
    parser.add_argument("--flips", type=int, default=50)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    policy = {"flips": {}, "identical": CANARY, "shadow": SHADOW}[given.what]
    with tempfile.TemporaryDirectory() as place:
        registry = registry_of(Path(place), False, given.what == "shadow")
        with running(Path(place), GATEWAY_ROLLOUT=json.dumps(policy)) as server:
            server.predict("m", [{"x": 1.0}])
            match given.what:
                case "flips":
                    asyncio.run(flips(server, registry, given.rate or 200.0, given.flips))
                case "identical":
                    asyncio.run(identical(server, given.rate or 200.0, given.runs))
                case _:
                    asyncio.run(shadow(server, given.rate or 100.0, given.rounds))


if __name__ == "__main__":
    main()
