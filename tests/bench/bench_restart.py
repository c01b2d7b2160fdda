"""How many requests fail while all gateways are replaced, one after the other, behind each balancer.

    python -m tests.bench.bench_restart [--values chart,aging,bare] [--pods 3] [--rounds 2]

`chart`: the values that Helm renders for the chart (`drain_delay`, `keep_alive`, `preStop`, the grace
period). `aging`: the same, but each connection to a gateway ends after two seconds. `bare`: a gateway without
settings in a pod without `preStop`. Each balancer has its file of `deploy/routing`, and clients that keep
their connections and send without pause. The exit is 1 if a request fails with the values of the chart.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.balancers import BALANCERS, balancing
from tests.support.pods import BARE, Chart, Pods
from tests.support.running import log_scaled

MODELS = 4
CHARTS = {
    "chart": Chart.of,
    "aging": lambda: Chart.of({"settings": {"max_connection_age": "2s"}}),
    "bare": lambda: BARE,
}


class Callers:
    """Keep-alive clients that send without pause. `seen` counts what came back."""

    def __init__(self, url: str) -> None:
        self.seen: Counter[str] = Counter()
        self._url = url
        self._stop = threading.Event()

    def run(self, first: int) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            for turn in itertools.count(first):
                if self._stop.is_set():
                    return
                body = {"dataframe_records": [{"x": float(turn)}]}
                try:
                    answer = client.post(f"/predict/m{turn % MODELS}", json=body)
                except httpx.TransportError as error:
                    self.seen[type(error).__name__] += 1
                    continue
                right = answer.status_code == 200 and answer.json()["predictions"] == [turn * 2.0]
                self.seen["ok" if right else f"{answer.status_code} {answer.text[:60]}"] += 1

    @contextmanager
    def calling(self, connections: int) -> Iterator[Callers]:
        with ThreadPoolExecutor(connections) as pool:
            running = [pool.submit(self.run, number * 7) for number in range(connections)]
            try:
                yield self
            finally:
                self._stop.set()
        for one in running:
            one.result()


def measured(values: str, given: Any) -> int:
    """Returns how many requests failed."""
    chart = CHARTS[values]()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        registry = directory / "registry.yaml"
        for number in range(MODELS):
            log_scaled(registry, f"m{number}", 2.0, alias="champion")
        pods = Pods(directory, registry, chart, given.pods)
        stack.callback(pods.stop)
        callers = {}
        for kind in given.balancers.split(","):
            url = stack.enter_context(balancing(kind, directory / kind, pods.ports))
            callers[kind] = stack.enter_context(Callers(url).calling(given.connections))
        for _ in range(given.rounds):
            for port in pods.ports:
                if not pods.replace(port):
                    sys.stdout.write(f"{values}: a gateway was killed\n")
    failed = 0
    for kind, one in callers.items():
        wrong = one.seen.total() - one.seen["ok"]
        failed += wrong
        sys.stdout.write(f"{values:6} {kind:8} {one.seen.total():7} requests, {wrong} failed")
        sys.stdout.write(f": {dict(one.seen - Counter(ok=one.seen['ok']))}\n" if wrong else "\n")
    sys.stdout.flush()
    return failed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--values", default="chart,aging,bare")
    parser.add_argument("--balancers", default=",".join(BALANCERS))
    parser.add_argument("--pods", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--connections", type=int, default=3)
    given = parser.parse_args()
    failed = {values: measured(values, given) for values in given.values.split(",")}
    sys.exit(1 if failed.get("chart") or failed.get("aging") else 0)


if __name__ == "__main__":
    main()
