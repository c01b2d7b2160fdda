"""What a scrape of `/metrics` costs, by the number of versions that have served.

    python tests/bench/bench_scrape.py [--versions 100,2000,10000] [--rounds 5]

Each version is loaded, has three requests with two codes, and an alias. `processor`: processor milliseconds
of a whole scrape; `longest`: those of the longest step on the event loop; both the least of the rounds,
because other work on the machine makes them longer. `steps`: how often the loop gets a turn. `first`: the
first scrape after requests to all versions, which counts them. `otlp`: the same families as OTLP takes them
from the event loop; a thread makes messages of them. No server and no network; Python's collector of garbage
runs as rarely as in a server.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import pairwise

from gateway.metrics import Metrics
from gateway.server import GC_THRESHOLDS

PHASES = (0.0002, 0.0001, 0.003, 0.0001)


def served(versions: int) -> Metrics:
    metrics = Metrics()
    names = [f"model-{number:06d}" for number in range(versions)]
    for name in names:
        metrics.load(name, "success", 0.05)
        metrics.swap(name, "champion", "success")
        asked(metrics, name)
    metrics.watch(
        models=lambda: {(name, "1"): 1_000_000.0 for name in names},
        queue=lambda: dict.fromkeys(names, (0, 1)),
        aliases=lambda: (((name, "champion"), ("1", False)) for name in names),
    )
    return metrics


def asked(metrics: Metrics, name: str) -> None:
    for code in ("2xx", "2xx", "INVALID_INPUT"):
        metrics.request(name, "1", code, 0.004, PHASES)
        metrics.batch(name, 3)


@dataclass(frozen=True)
class Cost:
    processor: float
    longest: float
    steps: int


async def cost(work: Callable[[], Awaitable[object]]) -> Cost:
    """What an awaitable costs; another task notes when the loop gives it a turn."""
    turns = [time.thread_time()]

    async def turn() -> None:
        while True:
            await asyncio.sleep(0)
            turns.append(time.thread_time())

    watching = asyncio.create_task(turn())
    await asyncio.sleep(0)
    began = time.process_time()
    await work()
    used = time.process_time() - began
    turns.append(time.thread_time())
    watching.cancel()
    longest = max(after - before for before, after in pairwise(turns))
    return Cost(used * 1e3, longest * 1e3, len(turns) - 1)


async def measure(versions: int, rounds: int) -> None:
    metrics = served(versions)
    first = await cost(metrics.render)
    scrapes = [await cost(metrics.render) for _ in range(rounds)]
    sent = [await cost(metrics.collect) for _ in range(rounds)]
    size = sum(map(len, (await metrics.render())[0])) // 1000
    print(
        f"{versions:>8} {first.processor:>10.0f} {least(scrapes, 'processor'):>10.0f} "
        f"{least(scrapes, 'longest'):>10.1f} {scrapes[0].steps:>7} {size:>8} "
        f"{least(sent, 'processor'):>10.0f} {least(sent, 'longest'):>10.1f}"
    )


def least(costs: list[Cost], of: str) -> float:
    return min(float(getattr(cost, of)) for cost in costs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--versions", default="100,2000,10000")
    parser.add_argument("--rounds", type=int, default=5)
    asked_for = parser.parse_args()
    gc.set_threshold(*GC_THRESHOLDS)
    print(
        f"{'versions':>8} {'first':>10} {'processor':>10} {'longest':>10} {'steps':>7} {'kB':>8} "
        f"{'otlp':>10} {'longest':>10}"
    )
    for versions in map(int, asked_for.versions.split(",")):
        asyncio.run(measure(versions, asked_for.rounds))


if __name__ == "__main__":
    main()
