"""The guards of a rollout over thousands of simulated rollouts: how often an identical version is rolled
back, and how many candidate requests a worse one needs.

    python -m tests.bench.bench_guards [ROLLOUTS] [canary|watch|steps]    default 2000 of each kind, all

A row is one kind of rollout. `p50` and `p95` are candidate requests until the verdict. Little traffic ends
blocks by the clock: at one request per minute each ten requests, which is ten minutes. A watch has ten
minutes of the version in service at the given rate as its reference; at 100 requests per second it is
simulated a tenth as often. `steps` are whole canaries at 10 requests/s, each kind without and with the wait
of a step for more evidence. All takes some minutes for a canary, and an hour for a watch, on one core.
"""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from typing import Any
from unittest import mock

from gateway.rollout_settings import RolloutPolicy
from gateway.rollouts import guards
from gateway.rollouts.phases import Phase
from tests.support.rollouts import after_swap, simulate, stepped

SHARES = (0.05, 0.25, 0.5)
LIMIT = 4_000


def row(name: str, rollouts: int, expected: str | None, rollout: Any = simulate, **kind: Any) -> None:
    draw = random.Random(name)
    runs = [rollout(draw, **kind) for _ in range(rollouts)]
    needed = sorted(run.requests for run in runs if run.breached)
    breached = len(needed)
    wrong = breached if expected is None else sum(run.breached not in (None, expected) for run in runs)
    shown = f"rolled back {breached:5d} of {rollouts} ({breached / rollouts:7.2%})"
    if expected is not None and needed:
        p95 = needed[int(0.95 * rollouts)] if breached > 0.95 * rollouts else f"> {LIMIT}"
        shown += f"  p50 {needed[len(needed) // 2]:5d}  p95 {p95:>6}  by another guard {wrong}"
    print(f"{name:60s} {shown}", flush=True)


def canary(rollouts: int) -> None:
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


def watch(rollouts: int) -> None:
    for name, rate in (("1 per minute", 1 / 60), ("1/s", 1), ("10/s", 10), ("100/s", 100)):
        runs = rollouts if rate < 100 else rollouts // 10
        most = 500 if rate >= 1 else 100
        for errors in (0.001, 0.01):
            for bursty in (False, True):
                kind = {"service": errors, "candidate": errors, "requests": most, "bursty": bursty}
                row(f"watch, identical, {name}, errors {errors}, bursty {bursty}", runs, None, after_swap,
                    rate=rate, **kind)  # fmt: skip
        if rate < 1:
            continue
        for errors in (0.001, 0.01, 0.05, 0.1):
            kind = {"service": errors, "candidate": errors + 0.05, "requests": LIMIT}
            row(f"watch, 5 % more errors, {name}, errors {errors}", runs // 4, "errors", after_swap,
                rate=rate, **kind)  # fmt: skip
        for spread in (0.1, 0.4):
            row(f"watch, 1.5 times slower, {name}, spread {spread}", runs // 4, "latency", after_swap,
                rate=rate, slower=1.5, spread=spread, requests=LIMIT)  # fmt: skip


def steps(rollouts: int, rate: float = 10.0) -> None:
    short = {"steps": [10], "every": 10, "requests": 100, "within": "1h"}
    usual = {"steps": [5, 25, 50], "every": 10, "requests": 100, "within": "1h"}
    kinds: dict[str, dict[str, Any]] = {
        "identical, errors 0.001": {},
        "identical, errors 0.01": {"service": 0.01, "candidate": 0.01},
        "5 % more errors, errors 0.001": {"candidate": 0.051},
        "5 % more errors, errors 0.01": {"service": 0.01, "candidate": 0.06},
        "1.5 times slower": {"slower": 1.5},
    }
    for canary in (short, usual):
        policy = RolloutPolicy.model_validate({"canary": canary})
        for name, kind in kinds.items():
            for level in (math.inf, guards.SUSPICION):
                draw = random.Random(name)
                with mock.patch.object(guards, "SUSPICION", level):
                    runs = [stepped(draw, policy=policy, rate=rate, **kind) for _ in range(rollouts)]
                ended = Counter(run.phase for run in runs)
                requests, seconds = (
                    sorted(values)[int(0.95 * rollouts)]
                    for values in zip(*((run.requests, run.seconds) for run in runs), strict=True)
                )
                shown = "  ".join(
                    f"{what} {ended[phase] / rollouts:7.2%}"
                    for what, phase in (
                        ("passed", Phase.DONE), ("rolled back", Phase.ROLLED_BACK), ("held", Phase.HELD),
                    )
                )  # fmt: skip
                waits = "ends" if level == math.inf else f"from {level:g}"
                print(
                    f"steps {canary['steps']!s:12s} {waits:7s} {name:30s} {shown}  "
                    f"p95 {requests:.0f} requests, {seconds:.0f} s", flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2_000
    kinds = sys.argv[2:] or ["canary", "watch", "steps"]
    if "canary" in kinds:
        canary(count)
    if "watch" in kinds:
        watch(count)
    if "steps" in kinds:
        steps(count)
