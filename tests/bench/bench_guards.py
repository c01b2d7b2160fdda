"""The guards of a rollout over thousands of simulated rollouts: how often an identical version is rolled
back, and how many candidate requests a worse one needs.

    python tests/bench/bench_guards.py [ROLLOUTS]        default 2000 of each kind; minutes on one core

A row is one kind of rollout. `p50` and `p95` are candidate requests until the verdict. Little traffic ends
blocks by the clock: at one request per minute each ten requests, which is ten minutes.
"""

from __future__ import annotations

import random
import sys
from typing import Any

from tests.support.rollouts import simulate

SHARES = (0.05, 0.25, 0.5)
LIMIT = 4_000


def row(name: str, rollouts: int, expected: str | None, **kind: Any) -> None:
    draw = random.Random(name)
    runs = [simulate(draw, **kind) for _ in range(rollouts)]
    needed = sorted(run.requests for run in runs if run.breached)
    breached = len(needed)
    wrong = breached if expected is None else sum(run.breached not in (None, expected) for run in runs)
    shown = f"rolled back {breached:5d} of {rollouts} ({breached / rollouts:7.2%})"
    if expected is not None and needed:
        p95 = needed[int(0.95 * rollouts)] if breached > 0.95 * rollouts else f"> {LIMIT}"
        shown += f"  p50 {needed[len(needed) // 2]:5d}  p95 {p95:>6}  by another guard {wrong}"
    print(f"{name:60s} {shown}", flush=True)


def main(rollouts: int) -> None:
    for share in SHARES:
        for rate in (0.001, 0.01, 0.05):
            for bursty in (False, True):
                kind = {"share": share, "service": rate, "candidate": rate, "requests": 500, "bursty": bursty}
                row(f"identical, share {share}, errors {rate}, bursty {bursty}", rollouts, None, **kind)
        little = {"share": share, "service": 0.01, "candidate": 0.01, "requests": 200, "block_every": 10}
        row(f"identical, share {share}, one request per minute", rollouts, None, **little)
        for rate in (0.001, 0.01, 0.05, 0.1):
            kind = {"share": share, "service": rate, "candidate": rate + 0.05, "requests": LIMIT}
            row(f"5 % more errors, share {share}, errors {rate}", rollouts // 4, "errors", **kind)
        for spread in (0.1, 0.4):
            kind = {"share": share, "slower": 1.5, "spread": spread, "requests": LIMIT}
            row(f"1.5 times slower, share {share}, spread {spread}", rollouts // 4, "latency", **kind)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2_000)
