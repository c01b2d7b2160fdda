"""Goodput under three times the load that a model can take, and what its neighbour notices of it.

    python -m tests.bench.bench_overload [--rounds 3] [--seconds 5] [--service-ms 5] [--json]

One gateway on one core, the load on another. The model `busy` takes a known time for each request and merges
none, so its peak is known as well; it is measured by as many connections as keep it busy (1×). Then come
three times as many of them (closed loop), which wait as long as Retry-After says or, rude, ask again at once;
and requests at three times the rate of the peak, whoever waits (open loop). All give the gateway a deadline,
and only an answer in time is good. Meanwhile `neighbour` is asked at a steady, modest rate. Rounds are
interleaved; figures are medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

import gateway
from tests.bench.bench_serving import cores
from tests.support.hostile import write_package
from tests.support.running import Running, running

CONNECTIONS = 16
NEIGHBOUR_RATE = 25.0
MAX_QUEUE = 32
#: The least part of the peak that must be left.
FLOOR = 0.9
OVERLOADS = ("3× closed", "3× rude", "3× open")
BODY = json.dumps({"dataframe_records": [{"x": 1.0}]}).encode()


@dataclass(frozen=True)
class Load:
    """`connections` that ask again and again, or requests at `rate` a second. What comes in the first `warm`
    seconds does not count."""

    url: str
    model: str
    seconds: float
    connections: int = 0
    rate: float = 0.0
    rude: bool = False
    deadline_ms: int = 1000
    warm: float = 1.0


class Client:
    """Keep-alive connections to one path."""

    def __init__(self, load: Load) -> None:
        self._load = load
        url = httpx.URL(load.url)
        self._address = url.host, url.port
        head = f"POST /predict/{load.model} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        head += f"X-Request-Timeout-Ms: {load.deadline_ms}\r\nContent-Length: {len(BODY)}\r\n\r\n"
        self._request = head.encode() + BODY
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._began = time.perf_counter()
        self._statuses: Counter[int] = Counter()
        self._times: list[float] = []

    async def run(self) -> dict[str, Any]:
        load = self._load
        self._began = time.perf_counter()
        if load.rate:
            asked = []
            for number in range(round(load.rate * (load.warm + load.seconds))):
                due = self._began + number / load.rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                asked.append(asyncio.create_task(self._ask(due)))
            await asyncio.wait(asked, timeout=10)
        else:
            await asyncio.gather(*(self._again_and_again() for _ in range(load.connections)))
        self._times.sort()
        return {
            "goodput": len(self._times) / load.seconds,
            "statuses": self._statuses,
            "p50_ms": self._percentile(0.5),
            "p99_ms": self._percentile(0.99),
        }

    def _percentile(self, share: float) -> float:
        return self._times[int(len(self._times) * share)] * 1e3 if self._times else float("nan")

    async def _again_and_again(self) -> None:
        while (now := time.perf_counter()) < self._began + self._load.warm + self._load.seconds:
            wait = await self._ask(now)
            if not self._load.rude:
                await asyncio.sleep(wait)

    async def _ask(self, due: float) -> float:
        """One request; how long it took counts from when it was due. Returns its Retry-After."""
        reader, writer = (
            self._idle.pop() if self._idle else await asyncio.open_connection(*self._address, limit=1 << 16)
        )
        writer.write(self._request)
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(_number(head, b"content-length: "))
        self._idle.append((reader, writer))
        status, now = int(head[9:12]), time.perf_counter()
        if 0 <= now - self._began - self._load.warm < self._load.seconds:
            self._statuses[status] += 1
            if status == 200 and now - due <= self._load.deadline_ms / 1e3:
                self._times.append(now - due)
        return _number(head, b"retry-after: ")


def _number(head: bytes, name: bytes) -> int:
    return int(head.lower().partition(name)[2].partition(b"\r\n")[0] or 0)


def client_main(load: str) -> None:
    try:
        from uvloop import run
    except ImportError:
        from asyncio import run
    print(json.dumps(run(Client(Load(**json.loads(load))).run())))


def started(load: Load, core: int, nice: int) -> subprocess.Popen[str]:
    command = ["nice", "-n", str(nice), "taskset", "-c", str(core), sys.executable, "-m", __spec__.name]
    return subprocess.Popen([*command, "load", json.dumps(vars(load))], stdout=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = process.communicate(timeout=120)
    if process.returncode:
        raise SystemExit("the load failed")
    found: dict[str, Any] = json.loads(output)
    return found


def measured(server: Running, seconds: float, core: int, deadline_ms: int, **load: Any) -> dict[str, Any]:
    """One load on `busy`, if there is one, with the neighbour asked meanwhile: the load's client is the one
    that waits where both want the core."""
    beside = started(Load(server.url, "neighbour", seconds, rate=NEIGHBOUR_RATE), core, nice=0)
    asked = Load(server.url, "busy", seconds, deadline_ms=deadline_ms, **load)
    busy = result(started(asked, core, nice=10)) if load else {}
    neighbour = result(beside)
    return {**busy, "neighbour_p50_ms": neighbour["p50_ms"], "neighbour_p99_ms": neighbour["p99_ms"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--service-ms", type=float, default=5, help="how long `busy` takes for a request")
    parser.add_argument("--json", action="store_true", help="print the medians as JSON")
    options = parser.parse_args()
    server_core, load_core = cores()
    rounds: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="gateway-bench-") as place:
        directory = Path(place)
        registry = str(directory / "registry.yaml")
        for name, milliseconds in {"busy": options.service_ms, "neighbour": 1}.items():
            write_package(directory / name, at_predict=f"import time\ntime.sleep({milliseconds / 1e3})")
            gateway.push(directory / name, name=name, registry=registry, alias="champion")
        with running(directory, GATEWAY_MAX_QUEUE=str(MAX_QUEUE), GATEWAY_LOG_LEVEL="info") as server:
            os.sched_setaffinity(server.process.pid, {server_core})  # before it has started any other
            for name in ("busy", "neighbour"):
                httpx.post(
                    f"{server.url}/models/{name}/load", headers=server.key, timeout=60
                ).raise_for_status()
            for number in range(-1, options.rounds):
                seconds = 1.0 if number < 0 else options.seconds
                asked = partial(measured, server, seconds, load_core, _deadline(options))
                peak = asked(connections=CONNECTIONS)
                found = {
                    "neighbour alone": asked(),
                    "1× closed": peak,
                    "3× closed": asked(connections=3 * CONNECTIONS),
                    "3× rude": asked(connections=3 * CONNECTIONS, rude=True),
                    "3× open": asked(rate=3 * peak["goodput"]),
                }
                if number >= 0:  # the first one warms up
                    for name, one in found.items():
                        rounds.setdefault(name, []).append(one)
    report(rounds, options)


def _deadline(options: argparse.Namespace) -> int:
    """Milliseconds, enough for a full queue several times over: a slow machine must not look like a slow
    gateway."""
    return max(1000, round(4 * MAX_QUEUE * options.service_ms))


def report(rounds: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    figures = ("goodput", "p50_ms", "p99_ms", "neighbour_p50_ms", "neighbour_p99_ms")
    rows: dict[str, dict[str, Any]] = {}
    for name, ones in rounds.items():
        rows[name] = {key: statistics.median(one[key] for one in ones) for key in figures if key in ones[0]}
        statuses: Counter[str] = Counter()
        for one in ones:
            statuses.update(one.get("statuses", {}))
        rows[name]["statuses"] = dict(statuses)
    for name in OVERLOADS:
        rows[name]["of_peak"] = rows[name]["goodput"] / rows["1× closed"]["goodput"]
    if options.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    print(
        f"{options.service_ms:g} ms a request, {MAX_QUEUE} may wait, deadline {_deadline(options)} ms; "
        f"medians of {options.rounds} rounds of {options.seconds:g} s; times in ms"
    )
    form = "{:16} {:>9} {:>8} {:>8} {:>8} {:>14} {:>14}   {}"
    print(form.format("", "goodput/s", "of peak", "p50", "p99", "neighbour p50", "neighbour p99", "answers"))
    for name, row in rows.items():
        cells = [f"{row[key]:.1f}" if key in row else "" for key in figures]
        share = f"{row['of_peak']:.2f}" if "of_peak" in row else ""
        answers = ", ".join(f"{status}: {count}" for status, count in sorted(row["statuses"].items()))
        print(form.format(name, cells[0], share, *cells[1:], answers))
    least = min(rows[name]["of_peak"] for name in OVERLOADS)
    print(f"floor, {FLOOR} of the peak: {'met' if least >= FLOOR else 'NOT met'} ({least:.2f})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["load"]:
        client_main(sys.argv[2])
    else:
        main()
