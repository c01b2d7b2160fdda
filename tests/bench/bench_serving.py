"""One-row scikit-learn predictions through the gateway, a constant answer and a handwritten server.

    python tests/bench/bench_serving.py [--rounds 5] [--seconds 3] [--connections 1 16 64] [--model logistic]

The server has one core, the load another; the rounds of the three servers are interleaved, so that a
noisy minute falls on all of them; every figure is the median of its rounds. The load is `wrk` where it is
installed, else the small client below. A round with an answer that is not 200 ends the run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pickle
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).parent
SERVERS = ("ceiling", "by_hand", "gateway")
PATH = "/predict/iris"
FLOOR = 0.4
"""The least part of the ceiling that the gateway must reach at the highest number of connections."""


@dataclass(frozen=True)
class Round:
    requests_per_second: float
    p99_ms: float


def cores() -> tuple[int, int]:
    """The server's core and the load's; the same one where the machine has no second."""
    usable = sorted(os.sched_getaffinity(0))
    return usable[0], usable[-1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train(kind: str) -> tuple[Any, Any]:
    """A fitted classifier and its input frame."""
    from sklearn.datasets import load_iris
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression

    frame, target = load_iris(return_X_y=True, as_frame=True)
    model = LogisticRegression(max_iter=500) if kind == "logistic" else RandomForestClassifier(random_state=0)
    return model.fit(frame, target), frame


@contextmanager
def running(command: list[str], port: int, core: int, body: bytes, log: Path) -> Iterator[str]:
    """The base URL of a server that answers the request with 200; stopped with SIGTERM at the end."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *command], stdout=output, stderr=output, env=environment
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{command} does not serve:\n{log.read_text()[-2000:]}")
            try:
                answer = httpx.post(url + PATH, content=body, headers={"content-type": "application/json"})
                if answer.status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def output_of(command: list[str], core: int) -> str:
    pinned = ["taskset", "-c", str(core), *command]
    return subprocess.run(pinned, stdout=subprocess.PIPE, text=True, check=True).stdout


def wrk(url: str, connections: int, seconds: float, script: Path, core: int) -> Round:
    load = ["-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--latency"]
    load += ["--timeout", "30s", "-s", str(script)]
    output = output_of(["wrk", *load, url + PATH], core)
    if "Non-2xx" in output or "Socket errors" in output:
        raise SystemExit(f"failed answers from {url}:\n{output}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", output)
    tail = re.search(r"99%\s+([\d.]+)(us|ms|s)", output)
    if rate is None or tail is None:
        raise SystemExit(f"unreadable output of wrk:\n{output}")
    return Round(float(rate[1]), float(tail[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[tail[2]])


async def client(host: str, port: int, body: bytes, connections: int, seconds: float) -> Round:
    """Keep-alive connections that each post, read the whole answer, and post again."""
    request = (
        f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def one() -> None:
        reader, writer = await asyncio.open_connection(host, port)
        while (start := time.perf_counter()) < end:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"failed answer: {head!r}")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            times.append(time.perf_counter() - start)
        writer.close()

    await asyncio.gather(*(one() for _ in range(connections)))
    times.sort()
    return Round(len(times) / seconds, times[int(len(times) * 0.99)] * 1000)


def small_client(url: str, body: Path, connections: int, seconds: float, core: int) -> Round:
    load = [url, str(body), str(connections), str(seconds)]
    return Round(*json.loads(output_of([sys.executable, __file__, "client", *load], core)))


def client_main(url: str, body: str, connections: str, seconds: str) -> None:
    import uvloop

    host, _, port = url.removeprefix("http://").partition(":")
    measured = uvloop.run(client(host, int(port), Path(body).read_bytes(), int(connections), float(seconds)))
    print(json.dumps([measured.requests_per_second, measured.p99_ms]))


def registry_with(model: Any, frame: Any, directory: Path) -> Path:
    import gateway

    registry = directory / "registry.yaml"
    gateway.log_model(
        model, name="iris", registry=str(registry), input_example=frame.head(3), alias="champion"
    )
    return registry


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--model", choices=["logistic", "forest"], default="logistic")
    parser.add_argument("--json", action="store_true", help="print the medians as JSON")
    options = parser.parse_args()
    server_core, load_core = cores()
    directory = Path(tempfile.mkdtemp(prefix="gateway-bench-"))
    model, frame = train(options.model)
    body = json.dumps({"dataframe_split": frame.head(1).to_dict(orient="split")}).encode()
    (directory / "body.json").write_bytes(body)
    (directory / "post.lua").write_text(
        'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\n'
        f'wrk.body = io.open("{directory / "body.json"}", "rb"):read("*a")\n'
    )
    (directory / "model.pkl").write_bytes(pickle.dumps(model))
    registry = registry_with(model, frame, directory)

    def command(server: str, port: int) -> list[str]:
        if server == "gateway":
            state = [f"--registry={registry}", f"--config={directory / 'gateway.yaml'}"]
            return [sys.executable, "-m", "gateway", "serve", *state, "--port", str(port)]
        return [
            sys.executable,
            str(HERE / "plain_servers.py"),
            server,
            str(port),
            str(directory / "model.pkl"),
        ]

    settings = {
        "cache_dir": str(directory / "cache"),
        "state_dir": str(directory / "state"),
        "log_level": "warning",
    }
    (directory / "gateway.yaml").write_text(json.dumps(settings))
    rounds: dict[tuple[str, int], list[Round]] = {}
    try:
        with ExitStack() as stack:
            urls = {}
            for server in SERVERS:
                port = free_port()
                log = directory / f"{server}.log"
                urls[server] = stack.enter_context(
                    running(command(server, port), port, server_core, body, log)
                )
            for number in range(-1, options.rounds):
                for connections in options.connections:
                    for server in SERVERS:
                        seconds = 1 if number < 0 else options.seconds
                        if shutil.which("wrk"):
                            one = wrk(urls[server], connections, seconds, directory / "post.lua", load_core)
                        else:
                            one = small_client(
                                urls[server], directory / "body.json", connections, seconds, load_core
                            )
                        if number >= 0:  # the first one warms up
                            rounds.setdefault((server, connections), []).append(one)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    report(rounds, options, server_core, load_core)


def report(
    rounds: dict[tuple[str, int], list[Round]], options: argparse.Namespace, server_core: int, load_core: int
) -> None:
    def median(server: str, connections: int, what: str) -> float:
        return statistics.median(getattr(one, what) for one in rounds[server, connections])

    rows = []
    for connections in options.connections:
        rate = {server: median(server, connections, "requests_per_second") for server in SERVERS}
        tail = {server: median(server, connections, "p99_ms") for server in SERVERS}
        rows.append(
            {
                "connections": connections,
                "requests_per_second": {server: round(value) for server, value in rate.items()},
                "p99_ms": {server: round(value, 2) for server, value in tail.items()},
                "gateway_to_ceiling": round(rate["gateway"] / rate["ceiling"], 3),
                "gateway_to_by_hand": round(rate["gateway"] / rate["by_hand"], 3),
            }
        )
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    load = "wrk" if shutil.which("wrk") else "small client"
    print(
        f"{options.model}, one row a request; {load} on core {load_core}, servers on core {server_core}; ",
        end="",
    )
    print(f"medians of {options.rounds} rounds of {options.seconds:g} s")
    row_form = "{:>11} {:>10} {:>10} {:>10} {:>9} {:>9}   {}"
    print(
        row_form.format(
            "connections", "ceiling/s", "by hand/s", "gateway/s", "÷ceiling", "÷by hand", "p99 ms"
        )
    )
    for row in rows:
        rates, tails = row["requests_per_second"].values(), row["p99_ms"].values()
        ratios = row["gateway_to_ceiling"], row["gateway_to_by_hand"]
        print(row_form.format(row["connections"], *rates, *ratios, " / ".join(map(str, tails))))
    reached, most = rows[-1]["gateway_to_ceiling"], rows[-1]["connections"]
    verdict = "met" if reached >= FLOOR else "NOT met"
    print(f"floor, {FLOOR} of the ceiling at {most} connections: {verdict} ({reached})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["client"]:
        client_main(*sys.argv[2:])
    else:
        main()
