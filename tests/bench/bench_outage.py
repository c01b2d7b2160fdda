"""Registry and artifact store gone for two minutes under traffic, the gateway restarted in the middle.

    python -m tests.bench.bench_outage [--seconds 120] [--registry mlflow|document] [--connections 4]

A real MLflow server (or a registry document in the store) and a real object store, each behind a proxy that
refuses every connection in the first half and lets them hang in the second. One model is loaded and asked
without pause; another lies on disk, and is asked for and unloaded again each second; a third is not here. An
alias is moved meanwhile. The exit is 1 if any request to the first two fails.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from tests.e2e.test_outage import MODELS, PATIENCE, MoveAlias, in_mlflow, put_packages, unload
from tests.support.mlflow_server import Server
from tests.support.object_store import BUCKET, ObjectStore, running_store
from tests.support.running import Running, running
from tests.support.tcp_proxy import HANG, PASS, REFUSE, proxy
from tests.support.traffic import Traffic, served, traffic, until

STEP = 1.0


@contextmanager
def in_a_document(store: ObjectStore, port: int) -> Iterator[tuple[str, MoveAlias]]:
    """The registry is a document in the store that is reached at `port`, without digests."""
    aliases = dict.fromkeys(MODELS, "1")
    versions = "{1: {source: outage/1}, 2: {source: outage/2}}"

    def move(name: str, number: str) -> None:
        aliases[name] = number
        lines = [f"  {n}: {{versions: {versions}, aliases: {{champion: {v}}}}}" for n, v in aliases.items()]
        store.files().pipe(f"{BUCKET}/outage.yaml", "\n".join(["models:", *lines, ""]).encode())

    move("out-loaded", "1")
    yield f"s3://{BUCKET}/outage.yaml", move


@contextmanager
def tracking_server(directory: Path) -> Iterator[Server]:
    directory.mkdir()
    server = Server(directory)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class Cold:
    """Asks for a model that lies on disk, and unloads it again, once in each `STEP` seconds."""

    def __init__(self, server: Running) -> None:
        self.failures: list[str] = []
        self.seconds: list[float] = []
        self._server = server
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(STEP):
            began = time.monotonic()
            told = served(self._server, "out-stored")
            self.seconds.append(time.monotonic() - began)
            if told != "1":
                self.failures.append(told)
            unload(self._server, "out-stored")

    def __enter__(self) -> Cold:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def passing(gateway: Running, seconds: float) -> tuple[float, int]:
    """Lets that much of the outage pass; the greatest age that the metrics showed, and how often the gateway
    was not ready."""
    end, oldest, unready = time.monotonic() + seconds, 0.0, 0
    while (left := end - time.monotonic()) > 0:
        oldest = max(oldest, gateway.metric("gateway_registry_age_seconds"))
        with contextlib.suppress(httpx.HTTPError):
            unready += httpx.get(f"{gateway.url}/readyz", timeout=10).status_code != 200
        time.sleep(min(STEP, left))
    return oldest, unready


def line(what: str, hot: Traffic, cold: Cold | None = None) -> str:
    ordered = sorted(hot.seconds)
    p99 = ordered[int(len(ordered) * 0.99)]
    text = f"{what}: {hot.answers} answers, {len(hot.failures)} failures"
    text += f", p50 {statistics.median(ordered) * 1000:.1f} ms, p99 {p99 * 1000:.1f} ms"
    if cold is not None and cold.seconds:
        slow = f"median {statistics.median(cold.seconds):.2f} s, longest {max(cold.seconds):.2f} s"
        text += f"; from disk {len(cold.seconds)} loads, {len(cold.failures)} failures, {slow}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--registry", choices=["mlflow", "document"], default="mlflow")
    parser.add_argument("--connections", type=int, default=4)
    given = parser.parse_args()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (scratch / "store").mkdir()
        store = stack.enter_context(running_store(scratch / "store"))
        put_packages(store, "outage", scratch / "packages")
        between = stack.enter_context(proxy(store.port))
        proxies = [between]
        if given.registry == "mlflow":
            server = stack.enter_context(tracking_server(scratch / "mlflow"))
            proxies.append(stack.enter_context(proxy(server.port)))
            registry, move = stack.enter_context(in_mlflow(server, proxies[1]))
        else:
            registry, move = stack.enter_context(in_a_document(store, between.port))

        def breaks(fault: str) -> None:
            for each in proxies:
                each.breaks(fault)

        environ = store.environ(between.port) | PATIENCE | {"GATEWAY_POLL_INTERVAL": "5s"}
        with running(scratch, "--registry", registry, **environ) as gateway:
            assert [served(gateway, name) for name in ("out-loaded", "out-stored")] == ["1", "1"]
            unload(gateway, "out-stored")
            with traffic(gateway.url, "out-loaded", given.connections) as calm:
                time.sleep(10)
            with traffic(gateway.url, "out-loaded", given.connections) as first, Cold(gateway) as first_cold:
                breaks(REFUSE)
                first_age, unready = passing(gateway, given.seconds / 2)
                absent = served(gateway, "out-absent")
        breaks(HANG)
        move("out-loaded", "2")
        began = time.monotonic()
        with running(scratch, "--registry", registry, **environ) as gateway:
            again = time.monotonic() - began
            with traffic(gateway.url, "out-loaded", given.connections) as second:
                with Cold(gateway) as second_cold:
                    second_age, more = passing(gateway, given.seconds / 2)
                breaks(PASS)
                moved = until(lambda: served(gateway, "out-loaded") == "2", 120)
                found = until(lambda: served(gateway, "out-absent") == "1", 120)
    print(line("before", calm))
    print(line("refused", first, first_cold))
    print(
        f"  a model that is not here: {absent}; registry's age {first_age:.0f} s; not ready: {unready} times"
    )
    print(f"restarted while everything hangs: serving after {again:.1f} s")
    print(line("hanging, and the return", second, second_cold))
    print(f"  registry's age {second_age:.0f} s; not ready: {more} times")
    print(f"after the return: the moved alias {moved:.1f} s, the model that was not here {found:.1f} s later")
    failures = calm.failures + first.failures + second.failures + first_cold.failures + second_cold.failures
    for failure in failures[:5]:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
