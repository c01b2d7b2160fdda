"""Moving an alias under load: not one failed request, every answer from the version it names."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from gateway.registries import open_registry
from gateway.registries.base import Move
from tests.support.running import log_scaled, running

CONNECTIONS = 8
MOVES = 50
FACTORS = {"1": 10.0, "2": 1000.0}


def test_promise_2_an_alias_moves_fifty_times_under_load(tmp_path: Path) -> None:
    registry = tmp_path / "registry.yaml"
    for factor in FACTORS.values():
        log_scaled(registry, "scaled", factor)
    open_registry(str(registry)).move(Move("scaled", "champion", "1"))
    stop = threading.Event()
    # The version that serves by what was reported so far; None while a move is under way.
    reported: list[str | None] = ["1"]
    failures: list[str] = []
    answered = {"1": 0, "2": 0}
    lock = threading.Lock()

    def ask(connection: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            for turn in itertools.count():
                if stop.is_set():
                    return
                x = connection * 100_000.0 + turn
                before = len(reported)
                response = client.post("/predict/scaled", json={"dataframe_records": [{"x": x}]})
                after = len(reported)
                if response.status_code != 200:
                    failures.append(f"{response.status_code} {response.text}")
                    continue
                version = response.json()["model"]["version"]
                if response.headers["x-model-version"] != version:
                    failures.append("header and body name two versions")
                if response.json()["predictions"] != [x * FACTORS[version]]:
                    failures.append(f"version {version} did not answer {x}: {response.text}")
                # No move was under way at the two looks, or between them.
                serving = reported[before - 1]
                if before == after and serving not in {version, None}:
                    failures.append(f"started after the swap to {serving}, answered by {version}")
                with lock:
                    answered[version] += 1

    with running(tmp_path) as server:
        assert server.predict("scaled", [{"x": 1.0}]).status_code == 200
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            callers = [pool.submit(ask, n) for n in range(CONNECTIONS)]
            control = httpx.Client(base_url=server.url, headers=server.key, timeout=60)
            try:
                for move in range(MOVES):
                    target = "2" if move % 2 == 0 else "1"
                    reported.append(None)
                    answer = control.put(
                        "/models/scaled/aliases/champion", params={"wait": "true"}, json={"version": target}
                    )
                    assert answer.status_code == 200, answer.text
                    assert answer.json()["serving"] == target
                    # From here on the swap is reported: what starts now must come from the new version.
                    reported.append(target)
                    seen = sum(answered.values())
                    while sum(answered.values()) < seen + CONNECTIONS and not failures:
                        stop.wait(0.001)
            finally:
                stop.set()
            for caller in callers:
                caller.result(60)
            control.close()
        assert failures == []
        assert min(answered.values()) > 100, answered
        swaps = server.metric("gateway_swaps_total", model="scaled", alias="champion", result="success")
        assert swaps == MOVES + 1
        history = httpx.get(f"{server.url}/rollouts/scaled@champion").json()["history"]
        assert [entry["version"] for entry in history[-2:]] == ["2", "1"]
    assert server.process.returncode == 0
