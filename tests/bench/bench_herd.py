"""Many gateways on one MLflow server: how many calls it gets when all start, in between, and after an outage.

    python -m tests.bench.bench_herd [--gateways 20] [--models 5] [--seconds 60]

Each gateway has a state and a cache of its own, as a new pod has, and loads every model at the start. The
calls are counted by a proxy in front of the server. Three parts: all start at once; nothing happens; the
server is away for half a minute, and comes back. For each: the calls of all gateways per second (mean, and
the most in any second), and of what kind they are. Without a herd, the most is near the mean.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support import running
from tests.support.front import Front, front
from tests.support.mlflow_server import Server
from tests.support.running import Running, log_scaled
from tests.support.tcp_proxy import PASS, REFUSE, proxy


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@contextmanager
def tracking_server(directory: Path) -> Iterator[Server]:
    directory.mkdir()
    server = Server(directory)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def register(server: Server, directory: Path, models: int) -> list[str]:
    """The names of registered models, with packages that lie in the server's store."""
    import mlflow

    package = log_scaled(directory / "registry.yaml", "scaled", 2.0).source
    client = mlflow.MlflowClient(server.url)
    names = [f"herd-{number}" for number in range(models)]
    for name in names:
        run = client.create_run(client.create_experiment(name))
        client.log_artifacts(run.info.run_id, package, "model")
        client.create_registered_model(name)
        made = client.create_model_version(name, f"{run.info.artifact_uri}/model", run.info.run_id)
        client.set_registered_model_alias(name, "champion", made.version)
    return names


def report(what: str, counted: Front, began: float, ended: float) -> None:
    """Prints the calls between two times."""
    calls = [(at - began, call) for at, call in list(counted.requests) if began <= at < ended]
    seconds = max(1, int(ended - began))
    each = Counter(int(at) for at, _ in calls)
    kinds = Counter(re.sub(r"/[0-9a-f]{32}.*", "/ID…", call) for _, call in calls)
    most = max(each.values(), default=0)
    say(f"{what}: {len(calls)} calls in {seconds} s, mean {len(calls) / seconds:.1f}/s, most {most}/s")
    for kind, count in kinds.most_common(6):
        say(f"    {count:5} {kind}")


def ready(servers: list[Running], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    for server in servers:
        while httpx.get(f"{server.url}/readyz", timeout=60).status_code != 200:
            assert time.monotonic() < end, httpx.get(f"{server.url}/readyz").text
            time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gateways", type=int, default=20)
    parser.add_argument("--models", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=60)
    given: Any = parser.parse_args()
    running.READY_WITHIN = 300.0  # so many starts at once take long on a small machine
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(tracking_server(directory / "server"))
        names = register(server, directory, given.models)
        counted = stack.enter_context(front(server.url))
        way = stack.enter_context(proxy(int(counted.url.rpartition(":")[2])))
        environ = {
            "GATEWAY_REGISTRY": way.url,
            "GATEWAY_ISOLATION": "inline",
            "GATEWAY_PRELOAD": ",".join(f"{name}@champion" for name in names),
        }

        def start(number: int) -> Running:
            place = directory / str(number)
            place.mkdir()
            made = Running(place, [], environ)
            stack.callback(made.stop)
            return made

        began = time.monotonic()
        with ThreadPoolExecutor(given.gateways) as pool:
            servers = list(pool.map(start, range(given.gateways)))
        ready(servers)
        report(f"{given.gateways} gateways start", counted, began, time.monotonic())
        time.sleep(5)
        began = time.monotonic()
        time.sleep(given.seconds)
        report("nothing happens", counted, began, time.monotonic())
        way.breaks(REFUSE)
        time.sleep(30)
        began = time.monotonic()
        way.breaks(PASS)
        time.sleep(given.seconds)
        report("the server is back", counted, began, time.monotonic())
        ages = [server.metric("gateway_registry_age_seconds") for server in servers]
        say(f"the oldest view of the registry: {max(ages):.1f} s")


if __name__ == "__main__":
    main()
