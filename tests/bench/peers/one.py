"""One model, one row a request: every server is started once, checked, and then measured in turn.

Knows the order of the measurement and its figures. Does not know how a server is started or asked.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tests.bench.peers.load import Connection, measured
from tests.bench.peers.process import Server
from tests.bench.peers.stage import FAILURES, Stage
from tests.bench.peers.table import ONE

WARM = 100
"""Requests before each measurement, on one connection: a server that was frozen wakes up."""


@dataclass(frozen=True)
class Round:
    rate: float
    p50_ms: float
    p99_ms: float
    processor_us: float
    """Of all the server's processes, for each request."""


Rounds = dict[tuple[int, str], list[Round]]


@dataclass
class Outcome:
    rounds: Rounds
    unusable: dict[str, str]

    def drop(self, name: str, reason: str) -> None:
        self.unusable[name] = reason
        print(f"  {name}: {reason}", flush=True)
        for key in [key for key in self.rounds if key[1] == name]:
            del self.rounds[key]

    def raw(self) -> dict[str, object]:
        rounds = [
            {"connections": connections, "peer": name, "rounds": [asdict(one) for one in found]}
            for (connections, name), found in self.rounds.items()
        ]
        return {"rounds": rounds, "unusable": self.unusable}


def run(
    stage: Stage,
    names: Sequence[str],
    rounds: int,
    seconds: float,
    connections: Sequence[int],
    load_core: int,
) -> Outcome:
    servers: dict[str, tuple[Server, int]] = {}
    outcome = Outcome({}, {})
    try:
        for name in names:
            try:
                servers[name] = stage.start(name, ONE[name])
                if not ONE[name].constant:
                    for width in sorted({1, *connections}):
                        stage.check(ONE[name], servers[name][1], [0], width)
                    print(f"  {name}: answers {len(stage.rows)} distinct rows as the model does", flush=True)
            except FAILURES as reason:
                outcome.drop(name, str(reason) or repr(reason))
            if name in servers:
                servers[name][0].freeze()
                if name in outcome.unusable:
                    servers.pop(name)[0].stop()
        for number in range(rounds):
            for width in connections:
                for name in _turned(list(servers), number):
                    try:
                        found = _measure(stage, name, *servers[name], width, seconds, load_core)
                        outcome.rounds.setdefault((width, name), []).append(found)
                    except FAILURES as reason:
                        outcome.drop(name, str(reason) or repr(reason))
                        servers.pop(name)[0].stop()
            print(f"  round {number + 1} of {rounds}", flush=True)
    finally:
        for server, _ in servers.values():
            server.stop()
    return outcome


def _turned(names: list[str], number: int) -> list[str]:
    """Another one begins each round."""
    first = number % max(1, len(names))
    return names[first:] + names[:first]


def _measure(
    stage: Stage, name: str, server: Server, port: int, width: int, seconds: float, load_core: int
) -> Round:
    requests = [stage.asked(ONE[name], 0, row) for row in range(len(stage.rows))]
    server.thaw()
    connection = Connection(port)
    for i in range(WARM):
        connection.ask(requests[i % len(requests)])
    connection.close()
    before = server.processor_seconds()
    got = measured(port, requests, range(len(requests)), width, seconds, load_core)
    used = server.processor_seconds() - before
    server.freeze()
    return Round(got.rate, got.p50_ms, got.p99_ms, used / got.requests * 1e6)


def report(outcome: Outcome, names: Sequence[str], connections: Sequence[int]) -> None:
    for width in connections:
        print(f"\n{width} connection{'s' if width > 1 else ''}")
        print(
            f"{'':28} {'req/s':>8} {'× by hand':>22} {'× ceiling':>10} {'p50 ms':>8} {'p99 ms':>8}"
            f" {'CPU µs a request':>22}"
        )
        for name in names:
            title = ONE[name].title
            found = outcome.rounds.get((width, name))
            if not found:
                print(f"{title:28} {outcome.unusable.get(name, 'not measured').splitlines()[-1][:100]}")
                continue
            hand, most = (outcome.rounds.get((width, other)) for other in ("by_hand", "ceiling"))
            print(
                f"{title:28} {_middle(one.rate for one in found):8,.0f} {_ratio(found, hand):>22}"
                f" {_ratio(found, most).split(' ')[0]:>10}"
                f" {_middle(one.p50_ms for one in found):8.2f} {_middle(one.p99_ms for one in found):8.2f}"
                f" {_spread([one.processor_us for one in found]):>22}"
            )


def _middle(values: object) -> float:
    return statistics.median(values)  # type: ignore[arg-type]


def _ratio(found: list[Round], other: list[Round] | None) -> str:
    """Round by round, so that a noisy minute falls on both."""
    if not other:
        return "–"
    ratios = [one.rate / base.rate for one, base in zip(found, other, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})"
