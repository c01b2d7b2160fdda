"""Many environments behind one gateway: what they take, and whether models of one feel those of others.

    python -m tests.bench.bench_environments load [ROUNDS]    three Pythons, three scikit-learn minors and two
                                                              pandas majors behind one port; each alone and
                                                              all together, ROUNDS (6) times in turn
    python -m tests.bench.bench_environments sizes [N LOCKS]  N (200) packages with LOCKS (40) locks

Environments are built with this machine's index under GATEWAY_CACHE_DIR, or a temporary directory; a later
run finds them. Each model is trained by the Python and the libraries that it names. In `load` every model is
asked at a fixed rate: alone with as many requests a second as all of them get together, so that the machine
has the same to do, round by round. The ratios count, not the milliseconds of a shared machine.
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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from gateway import environments
from gateway.environments.lock import Wanted
from gateway.settings import Settings
from tests.bench.bench_packs import proportional, say
from tests.support import wheels
from tests.support.hostile import descendants
from tests.support.running import Running, running

STACKS = {
    "old": ("3.9", "2022-11-01", ("scikit-learn==1.0.2", "pandas==1.5.1", "cloudpickle==2.2.0")),
    "middle": ("3.11", "2024-05-20", ("scikit-learn==1.4.2", "pandas==2.2.2", "cloudpickle==3.0.0")),
    "new": ("3.13", "2026-03-20", ("scikit-learn==1.8.0", "pandas==3.0.0", "cloudpickle==3.1.2")),
}
RATE = 6
SECONDS = 6.0
TRAIN = """
import pickle, sys
import numpy as np, pandas as pd
from sklearn.linear_model import LogisticRegression
rows = np.random.default_rng(0).random((200, 4))
frame = pd.DataFrame(rows, columns=list("abcd"))
model = LogisticRegression().fit(frame, rows[:, 0] > 0.5)
with open(sys.argv[1], "wb") as file:
    pickle.dump(model, file)
"""
BODY = json.dumps({"dataframe_split": {"columns": list("abcd"), "data": [[0.1, 0.2, 0.3, 0.4]]}}).encode()


def package(directory: Path, python: str, day: str, requirements: tuple[str, ...], model: bytes) -> None:
    directory.mkdir(parents=True)
    columns = json.dumps([{"name": name, "type": "double"} for name in "abcd"])
    content = {
        "flavors": {
            "python_function": {
                "loader_module": "mlflow.sklearn", "model_path": "model.pkl", "python_version": python,
            },
            "sklearn": {"sklearn_version": requirements[0].partition("==")[2]},
        },
        "signature": {"inputs": columns},
        "utc_time_created": f"{day} 12:00:00.000000",
    }  # fmt: skip
    (directory / "MLmodel").write_text(json.dumps(content), encoding="utf-8")
    (directory / "requirements.txt").write_text("\n".join(requirements), encoding="utf-8")
    (directory / "model.pkl").write_bytes(model)


def trained(root: Path, cache: Path) -> dict[str, bytes]:
    """A pickle of each stack, made by that stack."""
    store = environments.store(Settings(cache_dir=cache))
    found = {}
    for name, (python, day, requirements) in STACKS.items():
        minor = tuple(map(int, python.split(".")))
        created = datetime.fromisoformat(f"{day}T12:00:00").replace(tzinfo=UTC)
        wanted = Wanted((*requirements, "numpy", "setuptools"), created=created, python=minor)  # type: ignore[arg-type]
        built = store.build(store.resolve(wanted))
        subprocess.run([built.python, "-c", TRAIN, str(root / f"{name}.pkl")], check=True)
        found[name] = (root / f"{name}.pkl").read_bytes()
    return found


def registered(root: Path, names: list[str]) -> Path:
    models = {
        name: {"versions": {"1": {"source": f"m/{name}"}}, "aliases": {"champion": "1"}} for name in names
    }
    (root / "registry.yaml").write_text(json.dumps({"version": 1, "models": models}))
    return root / "registry.yaml"


def places() -> tuple[Path, Path, dict[str, str]]:
    root = Path(tempfile.mkdtemp())
    cache = Path(os.environ.get("GATEWAY_CACHE_DIR", root / "cache"))
    settings = {
        "GATEWAY_CACHE_DIR": str(cache),
        "GATEWAY_ENVIRONMENTS__BUILD": "auto",
        "GATEWAY_COLD_WAIT": "600",
    }
    return root, cache, settings


def paced(server: Running, name: str, rate: float, taken: dict[str, list[float]]) -> None:
    """Asks one model at a fixed rate, each request in its turn; a late one counts from when it was due."""
    address = httpx.URL(server.url)
    connection = http.client.HTTPConnection(address.host, address.port, timeout=60)
    began = time.perf_counter()
    for i in range(int(SECONDS * rate)):
        due = began + i / rate
        time.sleep(max(0.0, due - time.perf_counter()))
        connection.request("POST", f"/predict/{name}", BODY, {"content-type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200, answer.status
        taken.setdefault(name, []).append(time.perf_counter() - due)
    connection.close()


def asked(server: Running, names: list[str]) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {}
    rate = RATE * len(STACKS) / len(names)
    threads = [threading.Thread(target=paced, args=(server, name, rate, taken)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken


def p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)] * 1e3


def load(rounds: int) -> None:
    root, cache, settings = places()
    for name, model in trained(root, cache).items():
        package(root / "m" / name, *STACKS[name], model)
    with running(root, "--registry", str(registered(root, list(STACKS))), **settings) as server:
        for name in STACKS:
            answer = httpx.post(f"{server.url}/predict/{name}", content=BODY, headers=_JSON, timeout=900)
            view = httpx.get(f"{server.url}/models/{name}/versions/1", timeout=60).json()["environment"]
            say(f"{name}: {answer.status_code}, runs in {view.get('place')}")
            assert answer.status_code == 200, answer.text
        names = list(STACKS)
        alone: dict[str, list[float]] = {}
        together: dict[str, list[float]] = {}
        for turn in range(rounds):
            for name in names[turn % 3 :] + names[: turn % 3]:
                alone.setdefault(name, []).extend(asked(server, [name])[name])
            for name, values in asked(server, names).items():
                together.setdefault(name, []).extend(values)
        for name in names:
            one, all_ = p99(alone[name]), p99(together[name])
            middle = statistics.median(together[name]) / statistics.median(alone[name])
            say(
                f"{name}: p99 alone {one:.1f} ms, together {all_:.1f} ms: × {all_ / one:.2f};"
                f" median × {middle:.2f}"
            )


_JSON = {"content-type": "application/json"}


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def sizes(count: int, locks: int) -> None:
    root, cache, settings = places()
    models = trained(root, cache)
    names = list(STACKS)
    for i in range(locks):
        wheels.wheel(root / "index", "acme", f"{i + 1}.0")
    for i in range(count):
        lock = i % locks  # decides the stack too, so that there are as many environments as locks
        python, day, requirements = STACKS[names[lock % 3]]
        package(
            root / "m" / f"m{i}", python, day, (*requirements, f"acme=={lock + 1}.0"), models[names[lock % 3]]
        )
    registry = registered(root, [f"m{i}" for i in range(count)])
    # In addition to the machine's own index.
    links = " ".join(filter(None, [os.environ.get("PIP_FIND_LINKS", ""), str(root / "index")]))
    with running(root, "--registry", str(registry), PIP_FIND_LINKS=links, **settings) as server:
        began = time.monotonic()
        places_: dict[str, Any] = {}
        for i in range(count):
            answer = httpx.post(f"{server.url}/predict/m{i}", content=BODY, headers=_JSON, timeout=900)
            assert answer.status_code == 200, answer.text
            places_[f"m{i}"] = httpx.get(f"{server.url}/models/m{i}", timeout=60).json()["versions"][0]
        seconds = time.monotonic() - began
        below = [server.process.pid, *descendants(server.process.pid)]
        zygotes = sum("zygote" in _command(pid) and "zygote" not in _command(_parent(pid)) for pid in below)
        models_bytes = sum(view["bytes"] or 0 for view in places_.values())
        locks_used = {view["environment"].get("lock") for view in places_.values()}
        say(
            f"{count} packages in {len(locks_used)} environments: {zygotes} zygotes, {len(below)} processes,"
            f" {proportional(server):.0f} MB in all, {models_bytes / 1e6:.0f} MB of it of the models;"
            f" {seconds:.0f} s from the first request to the last answer, builds included"
        )
    total = environments.store(Settings(cache_dir=cache))
    say(f"on disk: {total.bytes() / 1e6:.0f} MB with the cache, {len(total.keys())} environments")


if __name__ == "__main__":
    command, *numbers = sys.argv[1:] or ["load"]
    if command == "load":
        load(*(int(number) for number in numbers or ["6"]))
    else:
        sizes(*(int(number) for number in numbers or ["200", "40"]))
