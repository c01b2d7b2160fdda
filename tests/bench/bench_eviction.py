"""Eviction policies on traces: how many requests find their model loaded, and how long models load.

    python -m tests.bench.bench_eviction [REQUESTS]     REQUESTS (100,000) per trace, 200 a second

A simulation: the real ledger, a clock of numbers, no models. `lfu` exists only here: it evicts the model with
the fewest recent requests, whatever it costs to load again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from gateway.serving.eviction import POLICIES, Candidate, Policy, decayed
from gateway.serving.ledger import Ledger
from tests.support.ledgers import load

RATE = 200.0
MB = 1_000_000
COUNT = 100


def lfu(account: Candidate, now: float) -> tuple[bool, float, float]:
    uses = decayed(account.uses, now - account.last_used)
    return (not account.lingering, uses, account.last_used)


class Trace(NamedTuple):
    """The models that requests name, in order. `costs`: the bytes and the load seconds of each model. `room`:
    the share of all bytes that fits."""

    asked: Iterator[int]
    costs: list[tuple[int, float]]
    room: float


def draws(weights: np.ndarray[Any, Any], requests: int, seed: int) -> Iterator[int]:
    generator = np.random.default_rng(seed)
    return iter(generator.choice(len(weights), size=requests, p=weights / weights.sum()).tolist())


def zipf(requests: int) -> Iterator[int]:
    return draws(1.0 / np.arange(1, COUNT + 1), requests, 1)


def cyclic(requests: int) -> Iterator[int]:
    return iter([number % COUNT for number in range(requests)])


def scanned(requests: int) -> Iterator[int]:
    """Zipf over the first 50; every ten seconds, the other 50 one after the other."""
    hot = draws(1.0 / np.arange(1, COUNT // 2 + 1), requests, 2)
    period, scan = int(10 * RATE), COUNT // 2
    for number, model in enumerate(hot):
        place = number % period - (period - scan)
        yield scan + place if place >= 0 else model


def drifting(requests: int) -> Iterator[int]:
    """Zipf whose most wanted model is another one every two minutes."""
    period = int(120 * RATE)
    for number, model in enumerate(zipf(requests)):
        yield (model + 37 * (number // period)) % COUNT


SMALL = [(4 * MB, 0.03)] * COUNT
#: Small pickles, forests, and one in ten large and slow. A large model is not wanted more often.
MIXED = [
    (400 * MB, 4.0) if n % 10 == 7 else (40 * MB, 0.4) if n % 3 == 1 else (4 * MB, 0.03) for n in range(COUNT)
]


def traces(requests: int) -> Mapping[str, Trace]:
    return {
        "Zipf(1.0), room for 20 %": Trace(zipf(requests), SMALL, 0.2),
        "Zipf, mixed sizes, 20 %": Trace(zipf(requests), MIXED, 0.2),
        "Zipf, mixed sizes, 50 %": Trace(zipf(requests), MIXED, 0.5),
        "Zipf and scans, 20 %": Trace(scanned(requests), SMALL, 0.2),
        "Zipf that drifts, 20 %": Trace(drifting(requests), SMALL, 0.2),
        "Drift, mixed sizes, 50 %": Trace(drifting(requests), MIXED, 0.5),
        "cyclic, 20 %": Trace(cyclic(requests), SMALL, 0.2),
    }


def play(trace: Trace, policy: Policy) -> tuple[float, float]:
    """Returns the share of requests that find their model loaded, and the seconds of all loads."""
    costs = trace.costs
    ledger: Ledger[int] = Ledger(int(trace.room * sum(size for size, _ in costs)), policy=policy)
    hits, total, loading = 0, 0, 0.0
    for total, key in enumerate(trace.asked, 1):
        now = total / RATE
        if key in ledger:
            hits += 1
            ledger.lease(key)
        else:
            size, seconds = costs[key]
            load(ledger, key, size, seconds, now)
            loading += seconds
        ledger.release(key, now)
    ledger.check()
    return hits / total, loading


def main(requests: int) -> None:
    policies = {**POLICIES, "lfu": lfu}
    print(f"{'':26}" + "".join(f"{name:>20}" for name in policies))
    for name in traces(requests):
        cells = []
        for policy in policies.values():
            share, seconds = play(traces(requests)[name], policy)
            cells.append(f"{share:>9.1%} {seconds:>7.0f} s")
        print(f"{name:26}" + "".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 100_000)
