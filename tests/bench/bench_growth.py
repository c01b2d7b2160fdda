"""How cost grows: with registered models, with rows, with resident models; and what is cold.

    python -m tests.bench.bench_growth registered [ROUNDS]
        requests per second of one model among 10, 1,000 and 100,000
    python -m tests.bench.bench_growth rows [ROUNDS]
        1 to 30,000 rows of 30 columns as JSON, compared with what `orjson.loads` needs for the same body
    python -m tests.bench.bench_growth resident [N]
        memory with 0 to N (100) models, in packs and in processes of their own, and what each model adds
    python -m tests.bench.bench_growth cold [ROUNDS]
        from the start of the command to the first answer, compared with `mlflow models serve`; the first
        answer of a model in a process of its own; what 100 models that load at once cost a loaded one

Rounds (5) of what is compared are interleaved, and figures are medians. CPU is that of all processes of the
gateway.
"""

from __future__ import annotations

import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import orjson
import yaml

import gateway
from loaders.signature import ColSpec, Scalar, Signature
from tests.bench.bench_packs import Caller, log_models, proportional, say
from tests.bench.bench_protocols import COLUMNS, cpu_seconds, summing
from tests.support.running import Running, running
from tests.support.shell import free_port
from tests.support.traffic import until

REGISTERED = (10, 1_000, 100_000)
ROWS = (1, 10, 100, 1_000, 10_000, 30_000)


def asked(
    server: Running, connection: http.client.HTTPConnection, path: str, body: bytes, count: int
) -> tuple[float, float]:
    """Wall and CPU seconds per request."""
    cpu, began = cpu_seconds(server.process.pid), time.perf_counter()
    for _ in range(count):
        connection.request("POST", f"/predict/{path}", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == 200, content[:500]
    return (time.perf_counter() - began) / count, (cpu_seconds(server.process.pid) - cpu) / count


def connect(server: Running) -> http.client.HTTPConnection:
    address = httpx.URL(server.url)
    return http.client.HTTPConnection(address.host, address.port, timeout=600)


def registered(rounds: int) -> None:
    with ExitStack() as stack:
        servers = {}
        for count in REGISTERED:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            body = log_models(directory, 1)
            plain = yaml.safe_load((directory / "registry.yaml").read_text())
            one = plain["models"]["m0"]
            plain["models"] |= {f"other-{number:06d}": one for number in range(count - 1)}
            (directory / "registry.json").write_text(json.dumps(plain))
            registry = str(directory / "registry.json")
            server = stack.enter_context(running(directory, GATEWAY_REGISTRY=registry))
            until(lambda: httpx.get(f"{server.url}/readyz", timeout=60).status_code == 200, 300.0)  # noqa: B023
            servers[count] = (server, connect(server))
            asked(*servers[count], "m0", body, 300)
        seen: dict[int, list[tuple[float, float]]] = {count: [] for count in servers}
        for _ in range(rounds):
            for count, (server, connection) in servers.items():
                seen[count].append(asked(server, connection, "m0", body, 1000))
        for count, figures in seen.items():
            wall, cpu = (statistics.median(column) for column in zip(*figures, strict=True))
            say(f"{count:>7} registered: {1 / wall:6.0f} requests/s at 1 connection, {cpu * 1e6:5.0f} CPU µs")


def rows(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        signature = Signature(inputs=tuple(ColSpec(Scalar.double, column) for column in COLUMNS))
        registry = str(directory / "registry.yaml")
        gateway.log_model(summing(), "table", registry, signature=signature, alias="champion", verify=False)
        random = np.random.default_rng(3)
        bodies = {
            count: json.dumps(
                {"dataframe_split": {"columns": COLUMNS, "data": random.random((count, 30)).tolist()}}
            ).encode()
            for count in ROWS
        }
        with running(directory, GATEWAY_REGISTRY=registry) as server:
            connection = connect(server)
            asked(server, connection, "table", bodies[1], 100)
            for count, body in bodies.items():
                number = max(3, min(300, 30_000 // count))
                seen, parsed = [], []
                for _ in range(rounds):
                    seen.append(asked(server, connection, "table", body, number))
                    began = time.perf_counter()
                    for _ in range(number):
                        orjson.loads(body)
                    parsed.append((time.perf_counter() - began) / number)
                wall, cpu = (statistics.median(column) for column in zip(*seen, strict=True))
                alone = statistics.median(parsed)
                say(
                    f"{count:>6} rows, {len(body) / 1e6:6.2f} MB: {wall * 1e3:8.2f} ms, "
                    f"CPU {cpu * 1e3:8.2f} ms, orjson.loads {alone * 1e3:8.3f} ms ({cpu / alone:4.1f} times)"
                )


def resident(count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        body = log_models(directory, count)
        registry = str(directory / "registry.yaml")
        for isolation in ("auto", "process"):
            with running(directory, GATEWAY_REGISTRY=registry, GATEWAY_ISOLATION=isolation) as server:
                time.sleep(3.0)  # what a start leaves behind
                say(f"isolation: {isolation}, nothing loaded: {proportional(server):.0f} MB")
                caller = Caller(server.url, body)
                connection = caller.connection()
                points = []
                for number in range(count):
                    assert caller.one(connection, f"m{number}")[1] == 200
                    if number + 1 in {1, count // 10, count // 4, count // 2, count}:
                        time.sleep(2.5)  # the memory that a load takes and gives back
                        points.append((number + 1, proportional(server)))
                        say(f"  {points[-1][0]:>5} loaded: {points[-1][1]:7.1f} MB")
                slope, base = np.polyfit(*zip(*points, strict=True), 1)
                say(f"  each model {slope:.2f} MB, all else {base:.0f} MB")


def first_answer(
    command: list[str], directory: Path, port: int, path: str, body: bytes, **environ: str
) -> float:
    """Seconds from the start of a server to its first good answer."""
    began = time.perf_counter()
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("GATEWAY_", "MLFLOW_"))}
    clean["PATH"] = f"{Path(sys.executable).parent}:{clean['PATH']}"  # mlflow starts commands by their names
    process = subprocess.Popen(
        command, cwd=directory, env=clean | environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while True:
            assert process.poll() is None, f"{command} ended"
            try:
                answer = httpx.post(
                    f"http://127.0.0.1:{port}{path}",
                    content=body,
                    headers={"content-type": "application/json"},
                    timeout=60,
                )
            except httpx.TransportError:
                time.sleep(0.005)
                continue
            if answer.status_code == 200:
                return time.perf_counter() - began
    finally:
        process.terminate()
        process.wait(60)


def starts(directory: Path, body: bytes, rounds: int) -> None:
    package = str(next((directory / "models" / "m0").glob("*")))
    seen: dict[str, list[float]] = {}
    for number in range(rounds):
        port = free_port()
        ours = [sys.executable, "-m", "gateway", "serve", "--registry", "registry.yaml", "--port", str(port)]
        own = {
            "GATEWAY_CACHE_DIR": str(directory / f"c{number}"),
            "GATEWAY_STATE_DIR": str(directory / f"s{number}"),
        }
        seen.setdefault("gateway", []).append(first_answer(ours, directory, port, "/predict/m0", body, **own))
        port = free_port()
        theirs = [sys.executable, "-m", "mlflow", "models", "serve", "-m", package, "--env-manager", "local"]
        theirs += ["-h", "127.0.0.1", "-p", str(port)]
        seen.setdefault("mlflow", []).append(first_answer(theirs, directory, port, "/invocations", body))
    gateway_seconds, mlflow_seconds = (statistics.median(times) for times in seen.values())
    say(
        f"start to first answer: gateway {gateway_seconds:.2f} s, mlflow models serve {mlflow_seconds:.2f} s "
        f"({gateway_seconds / mlflow_seconds:.2f} times; {rounds} rounds)"
    )


def loads(directory: Path, body: bytes, rounds: int, count: int) -> None:
    """A loaded model at 100 requests a second, while nothing loads, and while all others load at once."""
    quiet: list[float] = []
    loading: list[float] = []
    cold: list[float] = []

    def paced(
        caller: Caller, connection: http.client.HTTPConnection, done: Callable[[], bool], kept: list[float]
    ) -> None:
        due = time.perf_counter()
        while not done():
            due += 0.01
            time.sleep(max(0.0, due - time.perf_counter()))
            took, status = caller.one(connection, "m0")
            assert status == 200
            kept.append(took)

    for number in range(rounds):
        own = {"GATEWAY_ISOLATION": "process", "GATEWAY_STATE_DIR": str(directory / f"l{number}")}
        with running(directory, GATEWAY_REGISTRY=str(directory / "registry.yaml"), **own) as server:
            caller = Caller(server.url, body)
            connection = caller.connection()
            for model in range(10):
                took, status = caller.one(connection, f"m{model}")
                assert status == 200
                if model:  # the first one starts the zygote
                    cold.append(took)
            began = time.perf_counter()
            paced(caller, connection, lambda: time.perf_counter() - began > 5, quiet)  # noqa: B023
            threads = [
                threading.Thread(target=lambda name=f"m{model}": caller.one(caller.connection(), name))  # noqa: B023
                for model in range(10, count)
            ]
            for thread in threads:
                thread.start()
            paced(caller, connection, lambda: not any(thread.is_alive() for thread in threads), loading)  # noqa: B023
    p99 = [float(np.quantile(times, 0.99)) * 1e3 for times in (quiet, loading)]
    own_process = [float(np.quantile(cold, share)) * 1e3 for share in (0.5, 0.99)]
    say("cold model, process of its own: p50 {:.0f} ms, p99 {:.0f} ms".format(*own_process))
    say(
        f"a loaded model's p99: {p99[0]:.1f} ms, while {count - 10} others load at once {p99[1]:.1f} ms "
        f"({p99[1] / p99[0]:.2f} times; {len(quiet)} and {len(loading)} requests)"
    )


def cold(rounds: int, count: int = 110) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        body = log_models(directory, count)
        starts(directory, body, rounds)
        loads(directory, body, rounds, count)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["registered", *number]:
            registered(int(number[0]) if number else 5)
        case ["rows", *number]:
            rows(int(number[0]) if number else 5)
        case ["resident", *number]:
            resident(int(number[0]) if number else 100)
        case ["cold", *number]:
            cold(int(number[0]) if number else 5)
        case _:
            sys.exit(__doc__)
