"""How many requests are cold behind a balancer: gateways with less room than there are models.

    python -m tests.bench.bench_routing [--balancers none,envoy,haproxy,nginx] [--parts kill,grow]

`none` is HAProxy with the balancing of requests in turn. Each gateway has room for 40 of 200 models. The
requests are Zipf(1.0) over the models, from 8 connections. `kill`: five gateways; one of them is killed; it
is back, empty. `grow`: three gateways become six. A request is cold if its version is not loaded when it
comes; there are three kinds, in percent of the requests. `new`: the first for a model at a gateway that was
never asked for it, because it moved or came for the first time: it must be loaded once, whatever the
balancer does. `gone`: the first for a model that was at this gateway and evicted before this phase began.
`again`: each other one: the model was evicted in this phase, or others asked for it during the same load.
The exit is 1 if a request fails, other than those that were under way at the gateway that was killed.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support import balancers
from tests.support.running import Running, log_scaled
from tests.support.shell import free_port

MODELS = 200
ROOM = 40
CONNECTIONS = 8
#: The port of a gateway, and a model.
Place = tuple[int, str]


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Fleet:
    """Gateways over one registry whose models are all the same package."""

    def __init__(self, directory: Path, models: int) -> None:
        self.directory = directory
        self.models = models
        self.registry = directory / "registry.yaml"
        packed = log_scaled(self.registry, "m0", 2.0, alias="champion", ballast=2_000_000)
        version = {"source": packed.source, "digest": packed.digest}
        names = {f"m{n}": {"versions": {1: version}, "aliases": {"champion": 1}} for n in range(models)}
        self.registry.write_text(yaml.safe_dump({"version": 1, "models": names}))
        self.running: dict[int, Running] = {}
        self.limit = 0
        probe = self.start(free_port())
        probe.predict("m0", [{"x": 1.0}])
        self.limit = int(probe.metric("gateway_model_bytes", model="m0") * (ROOM + 0.5))
        self.stop()

    def start(self, port: int) -> Running:
        place = self.directory / str(port)
        place.mkdir(exist_ok=True)
        environ = {
            "GATEWAY_ISOLATION": "inline",
            "GATEWAY_REGISTRY": str(self.registry),
            "GATEWAY_CACHE_DIR": str(self.directory / "cache"),
            **({"GATEWAY_MEMORY_LIMIT": str(self.limit)} if self.limit else {}),
        }
        self.running[port] = Running(place, ["--port", str(port)], environ, port=None)
        return self.running[port]

    def stop(self) -> None:
        for server in self.running.values():
            server.stop()
        self.running.clear()

    def counts(self) -> tuple[Counter[Place], set[Place], set[Place]]:
        """For each gateway and model: the cold requests so far, whether it was asked for, whether it is
        loaded."""
        cold: Counter[Place] = Counter()
        asked, loaded = set(), set()
        for port, server in self.running.items():
            text = httpx.get(f"{server.url}/metrics", timeout=60).text
            for kind, name, count in re.findall(
                r'gateway_cache_(hits|misses)_total{model="(m\d+)"} (\S+)', text
            ):
                asked.add((port, name))
                if kind == "misses":
                    cold[port, name] = int(float(count))
            loaded |= {(port, name) for name in re.findall(r'gateway_model_bytes{.*model="(m\d+)"', text)}
        return cold, asked, loaded


class Load:
    """Zipf over the models. `failed` counts what was not answered with 200."""

    def __init__(self, models: int) -> None:
        self._models = models
        self._weights = [1 / (rank + 1) for rank in range(models)]
        self._draw = random.Random(5)
        self.failed: list[str] = []

    def run(self, url: str, requests: int) -> None:
        chosen = iter(self._draw.choices(range(self._models), self._weights, k=requests))
        turn = threading.Lock()

        def caller() -> None:
            with httpx.Client(base_url=url, timeout=60) as client:
                while True:
                    with turn:
                        number = next(chosen, None)
                    if number is None:
                        return
                    body = {"dataframe_records": [{"x": 1.0}]}
                    try:
                        answer = client.post(f"/predict/m{number}", json=body)
                    except httpx.TransportError as error:
                        self.failed.append(type(error).__name__)
                        continue
                    if answer.status_code != 200:
                        self.failed.append(answer.text[:200])

        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for done in [pool.submit(caller) for _ in range(CONNECTIONS)]:
                done.result()


@contextmanager
def balanced(kind: str, place: Path, ports: Sequence[int]) -> Iterator[str]:
    """As shipped; `none`: HAProxy without hashing."""
    if kind != "none":
        with balancers.balancing(kind, place, ports) as url:
            yield url
        return

    def in_turn(place: Path, port: int, backends: Sequence[int]) -> list[str]:
        command = balancers.BALANCERS["haproxy"](place, port, backends)
        file = place / "haproxy.cfg"
        text = re.sub(r"(?m)^ +balance .*$", "    balance roundrobin", file.read_text())
        file.write_text(re.sub(r"(?m)^ +hash-.*$", "", text))
        return command

    with contextlib.ExitStack() as stack:
        before = dict(balancers.BALANCERS)
        stack.callback(balancers.BALANCERS.update, before)
        balancers.BALANCERS["in turn"] = in_turn
        yield stack.enter_context(balancers.balancing("in turn", place, ports))


class Phases:
    """Measures one phase after the other."""

    def __init__(self, fleet: Fleet, load: Load, kind: str) -> None:
        self._fleet = fleet
        self._load = load
        self._kind = kind
        self.failures = 0

    def run(self, name: str, url: str, requests: int, *, may_fail: int = 0) -> None:
        cold_before, asked, loaded = self._fleet.counts()
        self._load.failed.clear()
        self._load.run(url, requests)
        cold, _, _ = self._fleet.counts()
        fresh = cold - cold_before
        first = fresh.keys() - loaded
        new = len(first - asked)
        gone = len(first & asked)
        again = fresh.total() - new - gone
        failed = len(self._load.failed)
        say(
            f"{self._kind:8} {name:18} {requests} requests: cold {100 * fresh.total() / requests:5.1f} %: "
            f"new {100 * new / requests:4.1f}, gone {100 * gone / requests:4.1f}, "
            f"again {100 * again / requests:4.1f}; failed {failed}"
        )
        if failed > may_fail:
            self.failures += failed
            say(f"  {self._load.failed[0]}")


def kill(kind: str, place: Path, fleet: Fleet, requests: int) -> int:
    """Five gateways; one of them is killed, and comes back empty. Returns how many requests failed."""
    phases, ports = Phases(fleet, Load(fleet.models), kind), [free_port() for _ in range(5)]
    for port in ports:
        fleet.start(port)
    with balanced(kind, place, ports) as url:
        phases.run("five, from cold", url, requests)
        phases.run("five", url, requests)
        fleet.running[ports[4]].stop(signal.SIGKILL)
        del fleet.running[ports[4]]
        phases.run("one killed", url, requests, may_fail=CONNECTIONS)
        phases.run("four", url, requests)
        fleet.start(ports[4])
        phases.run("it is back, empty", url, requests)
    return phases.failures


def grow(kind: str, place: Path, fleet: Fleet, requests: int) -> int:
    """Three gateways become six. Returns how many requests failed."""
    phases, ports = Phases(fleet, Load(fleet.models), kind), [free_port() for _ in range(6)]
    for port in ports[:3]:
        fleet.start(port)
    with balanced(kind, place / "3", ports[:3]) as url:
        phases.run("three, from cold", url, requests)
        phases.run("three", url, requests)
    for port in ports[3:]:
        fleet.start(port)
    with balanced(kind, place / "6", ports) as url:
        phases.run("six", url, requests)
        phases.run("six, later", url, requests)
    return phases.failures


PARTS = {"kill": kill, "grow": grow}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--balancers", default="none,envoy,haproxy,nginx")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--parts", default="kill,grow")
    given: Any = parser.parse_args()
    failures = 0
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fleet = Fleet(directory, MODELS)
        for kind in given.balancers.split(","):
            for part in given.parts.split(","):
                try:
                    failures += PARTS[part](kind, directory / f"{kind}-{part}", fleet, given.requests)
                finally:
                    fleet.stop()
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
