"""After a swap on a real server: a version that is fine on its example and bad on what callers send is taken
back, without a failed request, and stays out after kill -9."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pytest

import gateway
from gateway.registries import open_registry
from gateway.registries.base import Move
from tests.support.running import Running, running

POLICY = {"watch": "10m", "guards": {"latency": "off"}}  # a busy machine is not a slow version
EXAMPLE = pd.DataFrame({"x": [2.0]})


class Doubles:
    """Doubles x. On any row but its example it does what `how` says."""

    def __init__(self, how: str = "works") -> None:
        self.how = how

    def predict(self, model_input: Any) -> Any:
        if self.how != "works" and (model_input["x"] != 2.0).any():
            if self.how == "raises":
                raise RuntimeError("no such region")
            if self.how == "exits":
                os._exit(3)
            if self.how == "hangs":
                time.sleep(3600)
            if self.how == "answers text":
                return ["twice " + str(x) for x in model_input["x"]]
        return (model_input["x"] * 2).to_numpy()


class Traffic:
    """Callers who ask until the block ends; `seen` counts (status, version)."""

    def __init__(self, server: Running, callers: int = 2) -> None:
        self.seen: Counter[tuple[int, str]] = Counter()
        self.slowest = 0.0
        self._server = server
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(callers)]

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self._server.url, timeout=60) as client:
            x = 10.0 + number
            while not self._stop.is_set():
                x += 10.0
                began = time.monotonic()
                answer = client.post("/predict/twice", json={"dataframe_records": [{"x": x}]})
                self.slowest = max(self.slowest, time.monotonic() - began)
                self.seen[answer.status_code, answer.headers.get("x-model-version", "")] += 1

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def until(self, enough: int) -> None:
        wanted = sum(self.seen.values()) + enough
        while sum(self.seen.values()) < wanted:
            time.sleep(0.01)


def view_of(server: Running) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/rollouts/twice@champion").json()
    return found


def until_phase(server: Running, phase: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while (view := view_of(server))["phase"] != phase:
        assert time.monotonic() < deadline, view
        time.sleep(0.02)
    return view


def registry_of(directory: Path, *how: str) -> Path:
    registry = directory / "registry.yaml"
    for number, kind in enumerate(("works", *how), 1):
        gateway.log_model(
            Doubles(kind), "twice", str(registry), input_example=EXAMPLE, verify=False,
            metadata={"number": number},
        )  # fmt: skip
    open_registry(str(registry)).move(Move("twice", "champion", "1"))
    return registry


@pytest.mark.parametrize("by", ["gateway", "file"])
def test_a_bad_version_is_taken_back_after_the_swap_without_a_failed_request(tmp_path: Path, by: str) -> None:
    registry = registry_of(tmp_path, "raises", "exits", "answers text", "hangs")
    with running(tmp_path, GATEWAY_ROLLOUT=json.dumps(POLICY)) as server:
        assert server.predict("twice", [{"x": 1.0}]).status_code == 200
        with Traffic(server) as traffic:
            traffic.until(150)
            for number in ("2", "3", "4", "5"):
                if by == "gateway":
                    moved = httpx.put(
                        f"{server.url}/models/twice/aliases/champion", params={"wait": "true"},
                        headers=server.key, json={"version": number}, timeout=60,
                    )  # fmt: skip
                    assert moved.status_code == 200, moved.text
                else:
                    open_registry(str(registry)).move(Move("twice", "champion", number))
                while view_of(server)["desired"] != number:
                    time.sleep(0.02)
                view = until_phase(server, "rolled_back")
                assert (view["serving"], view["desired"], view["last_good"]) == ("1", number, "1")
                assert view["rollout"]["evidence"]["felt"] == 0, view
                assert f"twice/{number} was rolled back: " in view["error"]
                assert view["history"][-2]["ended_because"].startswith("rolled back: ")
                traffic.until(20)
        assert {status for status, _ in traffic.seen} == {200}
        assert server.metric("gateway_swaps_total", model="twice", result="rolled_back") == 4
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        document = httpx.get(f"{server.url}/registry.yaml").json()["models"]["twice"]
        assert document["aliases"]["champion"]["x-verdict"]["outcome"] == "rolled_back"
        assert any("was rolled back" in line or "rolled_back" in line for line in server.lines)
        status = httpx.get(f"{server.url}/rollouts").json()["rollouts"][0]
        assert "rolled back" in status["error"]


def test_kill_9_during_a_watch_goes_on_watching_and_after_a_rollback_stays_back(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, "raises")
    with running(tmp_path, GATEWAY_ROLLOUT=json.dumps(POLICY)) as server:
        with Traffic(server) as traffic:
            traffic.until(150)
        open_registry(str(registry)).move(Move("twice", "champion", "2"))
        until_phase(server, "serving (watching)")
        server.stop(signal.SIGKILL)
    with running(tmp_path, GATEWAY_ROLLOUT=json.dumps(POLICY)) as server:
        view = until_phase(server, "serving (watching)")
        assert view["rollout"]["evidence"]["service"]["requests"] >= 100  # the reference is kept
        while server.predict("twice/versions/1", [{"x": 2.0}]).status_code != 200:
            time.sleep(0.02)
        with Traffic(server) as traffic:
            until_phase(server, "rolled_back")
        assert {status for status, _ in traffic.seen} == {200}
        server.stop(signal.SIGKILL)
    with running(tmp_path, GATEWAY_ROLLOUT=json.dumps(POLICY)) as server:
        with Traffic(server) as traffic:
            traffic.until(20)
        assert set(traffic.seen) == {(200, "1")}
        assert view_of(server)["phase"] == "rolled_back"


def test_without_a_policy_a_crash_loop_after_the_swap_is_rolled_back(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, "exits")
    with running(tmp_path) as server:
        assert server.predict("twice", [{"x": 1.0}]).status_code == 200
        open_registry(str(registry)).move(Move("twice", "champion", "2"))
        until_phase(server, "serving")
        while view_of(server)["serving"] != "2":
            time.sleep(0.02)
        with Traffic(server) as traffic:
            view = until_phase(server, "rolled_back")
            assert "crash loop" in view["error"]
            traffic.until(20)
        assert (200, "1") in traffic.seen
