"""Many different small models: a cold answer, memory of all, one hot model, Zipf with room for all or some.

Servers are started one at a time, and again for each round. Only the run with little room starts with what
the server kept of the one before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from tests.bench.bench_packs import room_for
from tests.bench.peers.load import Asked, Connection, Measured, measured
from tests.bench.peers.process import Server
from tests.bench.peers.stage import FAILURES, Stage, Unusable
from tests.bench.peers.table import MANY, Peer

CONNECTIONS = 16
SETTLE = 3.0
"""Seconds before memory is read: what a load leaves behind is given back by then."""
ROWS = 4
"""Different rows for each model under load."""


@dataclass(frozen=True)
class Load:
    rate: float
    p50_ms: float
    p99_ms: float
    processor_us: float


@dataclass
class Round:
    cold_p50_ms: float
    cold_p99_ms: float
    megabytes: float
    hot: Load | None = None
    zipf: Load | None = None
    little_room: Load | None = None


@dataclass
class Outcome:
    rounds: dict[str, list[Round]] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)

    def raw(self) -> dict[str, object]:
        rounds = {name: [asdict(one) for one in found] for name, found in self.rounds.items()}
        return {"rounds": rounds, "unusable": self.unusable}


def run(
    stage: Stage, names: Sequence[str], rounds: int, seconds: float, count: int, room: int, load_core: int
) -> Outcome:
    outcome = Outcome()
    for number in range(rounds):
        for name in names:
            if name in outcome.unusable:
                continue
            try:
                found = _round(stage, name, number, seconds, count, room, load_core)
                outcome.rounds.setdefault(name, []).append(found)
                print(
                    f"  round {number + 1}, {name}: cold {found.cold_p50_ms:.1f} ms,"
                    f" {found.megabytes:.0f} MB",
                    flush=True,
                )
            except FAILURES as reason:
                outcome.unusable[name] = str(reason) or repr(reason)
                print(f"  round {number + 1}, {name}: {reason}", flush=True)
    return outcome


def _round(
    stage: Stage, name: str, number: int, seconds: float, count: int, room: int, load_core: int
) -> Round:
    peer = MANY[name]
    server, port = stage.start(f"{name}-all", peer, number)
    environ = {}
    try:
        cold = sorted(_cold(stage, peer, port, count))
        stage.check(peer, port, range(count), CONNECTIONS, rows=2)
        time.sleep(SETTLE)
        found = Round(
            statistics.median(cold) * 1e3, cold[int(len(cold) * 0.99)] * 1e3, server.proportional_megabytes()
        )
        if name == "gateway":
            environ["GATEWAY_MEMORY_LIMIT"] = str(room_for(f"http://127.0.0.1:{port}", room / count))
        hot = [peer.asked("m0", row) for row in stage.rows]
        found.hot = _load(server, port, hot, range(len(hot)), seconds, load_core)
        requests, order = _zipf(stage, peer, count)
        found.zipf = _load(server, port, requests, order, seconds, load_core)
    finally:
        server.stop()
    if peer.load is None and room < count:
        # In the same directory: the gateway knows then how much each model takes, and reserves no more.
        server, port = stage.start(f"{name}-all", peer, number, room, environ)
        try:
            stage.check(peer, port, range(count), CONNECTIONS, rows=1)
            found.little_room = _load(server, port, requests, order, seconds, load_core)
        finally:
            server.stop()
    return found


def _cold(stage: Stage, peer: Peer, port: int, count: int) -> list[float]:
    """Seconds from the first request for a model to its answer, which must be the model's own."""
    taken = []
    connection = Connection(port)
    connection.ask(stage.asked(peer, 0, 0))  # the first model also brings the libraries
    for i in range(1, count):
        row = i % len(stage.rows)
        asked = stage.asked(peer, i, row)
        started = time.perf_counter()
        if peer.load:
            connection.ask(peer.load(f"m{i}"))
        body = connection.ask(asked)
        taken.append(time.perf_counter() - started)
        if not stage.right(peer, i, row, body):
            raise Unusable(f"WRONG: the first answer of m{i} is not what the model says")
    connection.close()
    return taken


def _zipf(stage: Stage, peer: Peer, count: int) -> tuple[list[Asked], list[int]]:
    requests = [stage.asked(peer, model, model * ROWS + row) for model in range(count) for row in range(ROWS)]
    shares = 1.0 / np.arange(1, count + 1)
    chance = np.random.default_rng(1)
    models = chance.choice(count, 50_000, p=shares / shares.sum())
    return requests, (models * ROWS + chance.integers(0, ROWS, len(models))).tolist()


def _load(
    server: Server, port: int, requests: Sequence[Asked], order: Sequence[int], seconds: float, core: int
) -> Load:
    before = server.processor_seconds()
    got: Measured = measured(port, requests, order, CONNECTIONS, seconds, core)
    used = server.processor_seconds() - before
    return Load(got.rate, got.p50_ms, got.p99_ms, used / got.requests * 1e6)


def report(outcome: Outcome, names: Sequence[str], count: int, room: int) -> None:
    print(
        f"\n{'':32} {'cold p50 ms':>16} {'cold p99 ms':>16} {f'{count} resident MB':>18} {'hot req/s':>10}"
        f" {'Zipf req/s':>11} {'p99 ms':>7} {f'room for {room} req/s':>18} {'p99 ms':>7}"
    )
    for name in names:
        title, found = MANY[name].title, outcome.rounds.get(name)
        if not found:
            print(f"{title:32} {outcome.unusable[name].splitlines()[-1][:140]}")
            continue
        hot, zipf, little = (
            [load for one in found if (load := getattr(one, what))] for what in ("hot", "zipf", "little_room")
        )
        print(
            f"{title:32} {_spread([one.cold_p50_ms for one in found]):>16}"
            f" {_spread([one.cold_p99_ms for one in found]):>16}"
            f" {_spread([one.megabytes for one in found]):>18}"
            f" {_rate(hot):>10} {_rate(zipf):>11} {_p99(zipf):>7}"
            f" {_rate(little) if little else 'no eviction':>18} {_p99(little):>7}"
        )
    hand = outcome.rounds.get("by_hand")
    for name in names:
        found = outcome.rounds.get(name)
        if not found or not hand or name == "by_hand":
            continue
        ratios = []
        for what in ("hot", "zipf", "little_room"):
            pairs = [
                getattr(one, what).rate / getattr(base, what).rate
                for one, base in zip(found, hand, strict=False)
                if getattr(one, what) and getattr(base, what)
            ]
            if pairs:
                ratios.append(f"{what} {statistics.median(pairs):.3f} ({min(pairs):.3f}–{max(pairs):.3f})")
        print(f"{MANY[name].title}, × by hand, round by round: {', '.join(ratios)}")


def _rate(loads: list[Load]) -> str:
    return f"{statistics.median(load.rate for load in loads):,.0f}"


def _p99(loads: list[Load]) -> str:
    return f"{statistics.median(load.p99_ms for load in loads):.1f}" if loads else ""


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.0f}–{max(values):.0f})"
