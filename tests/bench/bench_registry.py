"""What a registry file with many models costs: start, memory, polls, writes and the saved snapshot.

    python tests/bench/bench_registry.py [--models 100000] [--forms yaml,json]

Each model has three versions with digests and two aliases. Seconds, where nothing else is said. `ready`:
from the start of `gateway serve` to its first good `/readyz`, on an empty state; `restart`: once more with
what was remembered. `seen`: from a write in place that moves one alias to the answer of `/models/NAME`;
`stall`: the largest `gateway_loop_lag_seconds` meanwhile. `processor`: processor seconds, which other work on
the machine does not change; of polls, those of all the process. `cold` writes are those of a process that has
read nothing before, as a command is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gateway.registries.base import Move
from gateway.registries.file import FileRegistry
from gateway.state import State
from loaders.package import digest

POLL = 0.5
STARTED_WITHIN = 600.0


def write(path: Path, models: int) -> None:
    """A registry file as its ending says, YAML as people write it, JSON as programs do."""
    digests = [hashlib.sha256(str(k).encode()).hexdigest() for k in (1, 2, 3)]
    if path.suffix == ".json":
        entries = {}
        for i in range(models):
            versions = {
                str(k): {
                    "source": f"models/model-{i:06d}/{k}",
                    "digest": f"sha256:{digests[k - 1]}",
                    "created": "2026-11-21T20:00:00Z",
                }
                for k in (1, 2, 3)
            }
            entries[f"model-{i:06d}"] = {
                "versions": versions,
                "aliases": {"champion": "2", "challenger": "3"},
            }
        path.write_text(json.dumps({"version": 1, "models": entries}, indent=2) + "\n")
        return
    with path.open("w") as file:
        file.write("# kept by team A\nversion: 1\nmodels:\n")
        for i in range(models):
            file.write(f"  model-{i:06d}:\n    versions:\n")
            for k in (1, 2, 3):
                place = f"source: models/model-{i:06d}/{k}"
                facts = f'digest: "sha256:{digests[k - 1]}", created: 2026-11-21T20:00:00Z'
                file.write(f"      {k}: {{{place}, {facts}}}\n")
            file.write("    aliases: {champion: 2, challenger: 3}  # live\n")


def rest(path: Path) -> None:
    """Waits until the file's times are old enough to be trusted."""
    time.sleep(max(0.0, path.stat().st_ctime + 3.2 - time.time()))


def cost(name: str, work: Callable[[], object]) -> Iterator[tuple[str, float]]:
    began, used = time.perf_counter(), time.process_time()
    work()
    yield name, time.perf_counter() - began
    yield f"{name}, processor", time.process_time() - used


def move(path: Path, name: str, version: int) -> None:
    """Moves the champion of a model as an editor would that writes in place."""
    text = path.read_bytes()
    at = text.index(b"champion", text.index(name.encode()))
    at = next(i for i in range(at, at + 40) if text[i : i + 1].isdigit())
    with path.open("r+b") as file:
        file.seek(at)
        file.write(str(version).encode())


@contextmanager
def served(path: Path, state: Path) -> Iterator[tuple[str, int, float]]:
    """(URL, process, seconds until ready) of a gateway over a registry file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gateway", "serve", "--registry", str(path), "--port", str(port)]
    environ = os.environ | {
        "GATEWAY_STATE_DIR": str(state), "GATEWAY_CACHE_DIR": str(state / "cache"),
        "GATEWAY_POLL_INTERVAL": str(POLL), "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                get(f"{url}/readyz")
                break
            except (OSError, urllib.error.URLError):
                assert process.poll() is None, "the gateway ended"
                assert time.perf_counter() - began < STARTED_WITHIN, "the gateway does not become ready"
                time.sleep(0.02)
        yield url, process.pid, time.perf_counter() - began
    finally:
        process.terminate()
        process.wait(60)


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        text: str = answer.read().decode()
        return text


def memory(process: int) -> float:
    """Returns the memory of a process, in MB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def processor(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def lag(url: str) -> float:
    found = re.search(r"^gateway_loop_lag_seconds (\S+)", get(f"{url}/metrics"), re.M)
    assert found is not None
    return float(found[1])


def running(path: Path, scratch: Path) -> Iterator[tuple[str, float]]:
    state = scratch / "state"
    with served(path, state) as (url, process, ready):
        yield "ready", ready
        yield "ready, processor", processor(process)
        yield "memory, MB", memory(process)
        rest(path)
        time.sleep(35)  # the worst of the start must not count as a poll's
        yield "stall, no change", lag(url)
        before, polls = processor(process), 20
        time.sleep(polls * POLL)
        yield "round without change, processor", (processor(process) - before) / polls
        times, stalls = [], []
        for version in (1, 3, 2):
            move(path, "model-000500", version)
            began = time.perf_counter()
            while json.loads(get(f"{url}/models/model-000500"))["aliases"]["champion"] != str(version):
                time.sleep(0.01)
            times.append(time.perf_counter() - began)
            time.sleep(1)  # for what is written behind
            stalls.append(lag(url))
        yield "seen, one alias moved", sorted(times)[1]
        yield "stall, one alias moved", max(stalls)
        yield "memory after, MB", memory(process)
    with served(path, state) as (_, _, ready):
        yield "restart", ready


def in_process(path: Path, scratch: Path) -> Iterator[tuple[str, float]]:
    package = scratch / "package"
    package.mkdir()
    (package / "MLmodel").write_text("flavors: {python_function: {loader_module: mine}}\n")
    found = digest(package)
    target = str(path)
    yield from cost("push, cold", lambda: FileRegistry(target).add_version("new", str(package), found))
    move_to_3 = ("model-000500", "champion", "3")
    yield from cost("promotion, cold", lambda: FileRegistry(target).move(Move(*move_to_3)))
    registry = FileRegistry(target)
    registry.read()
    yield from cost("promotion", lambda: registry.move(Move("model-000500", "champion", "1")))
    (package / "weights").write_text("others")
    found = digest(package)
    yield from cost("push", lambda: registry.add_version("new", str(package), found))
    rest(path)
    registry.read()
    yield from cost("poll without change", registry.read)
    state = State(scratch / "alone")
    one, two = registry.read(), registry.move(Move("model-000500", "champion", "2"))
    yield from cost("snapshot saved, all", lambda: state.save_snapshot("r", one.stamp, one.entries()))
    yield from cost("snapshot saved, one alias", lambda: state.save_snapshot("r", two.stamp, two.entries()))
    state.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=100_000)
    parser.add_argument("--forms", default="yaml,json")
    options = parser.parse_args()
    forms = options.forms.split(",")
    rows: dict[str, dict[str, float]] = {}
    for form in forms:
        scratch = Path(tempfile.mkdtemp(prefix="bench-registry-"))
        try:
            path = scratch / f"registry.{form}"
            write(path, options.models)
            rows.setdefault("file, MB", {})[form] = path.stat().st_size / 1e6
            for measure in (running, in_process):
                for name, value in measure(path, scratch):
                    rows.setdefault(name, {})[form] = value
                    print(f"{form} {name}: {value:.4g}", file=sys.stderr, flush=True)
        finally:
            shutil.rmtree(scratch)
    print(f"\n{options.models:,} models".ljust(33) + "".join(form.rjust(12) for form in forms))
    for name, values in rows.items():
        print(name.ljust(32) + "".join(f"{values[form]:.3g}".rjust(12) for form in forms))


if __name__ == "__main__":
    main()
