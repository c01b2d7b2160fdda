"""SIGTERM: not ready, still accepting for a while, then what is in flight ends, exit 0."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pandas as pd

import gateway
from tests.support.running import log_scaled, running


class Slow:
    """Takes a second, and leaves a mark when it has begun."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def predict(self, model_input: Any) -> Any:
        if float(model_input["x"].iloc[0]) > 0:
            Path(self.mark).touch()
            time.sleep(1.0)
        return model_input["x"].to_numpy()


def wait_for(mark: Path) -> None:
    end = time.monotonic() + 30
    while not mark.exists():
        assert time.monotonic() < end, "the model was not asked"


def test_promise_8_a_request_in_flight_ends_and_the_exit_is_0(tmp_path: Path) -> None:
    mark = tmp_path / "asked"
    example = pd.DataFrame({"x": [0.0]})
    registry = str(tmp_path / "registry.yaml")
    gateway.log_model(
        Slow(str(mark)), name="slow", registry=registry, input_example=example, alias="champion"
    )
    with running(tmp_path, GATEWAY_ISOLATION="inline") as server, ThreadPoolExecutor(1) as pool:
        assert server.predict("slow", [{"x": 0.0}]).status_code == 200
        answer = pool.submit(server.predict, "slow", [{"x": 1.0}])
        wait_for(mark)
        assert server.stop(signal.SIGTERM) == 0
        assert answer.result().status_code == 200
        assert answer.result().json()["predictions"] == [1.0]


def test_promise_8_a_balancer_takes_it_out_without_a_failed_request(tmp_path: Path) -> None:
    log_scaled(tmp_path / "registry.yaml", "scaled", 2.0, alias="champion")
    in_rotation = threading.Event()
    in_rotation.set()
    failures: list[str] = []
    answered: list[str | None] = []

    def call(url: str) -> None:
        with httpx.Client(base_url=url, timeout=30) as client:
            while in_rotation.is_set():
                try:
                    answer = client.post("/predict/scaled", json={"dataframe_records": [{"x": 1.0}]})
                except httpx.HTTPError as error:
                    failures.append(repr(error))
                    return
                answered.append(answer.headers.get("connection"))
                if answer.status_code != 200:
                    failures.append(answer.text)

    with running(tmp_path, GATEWAY_DRAIN_DELAY="1s") as server, ThreadPoolExecutor(8) as pool:
        assert server.predict("scaled", [{"x": 1.0}]).status_code == 200
        callers = [pool.submit(call, server.url) for _ in range(8)]
        while len(answered) < 50:
            assert not failures, failures
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{server.url}/readyz").status_code == 200:
            pass
        before = len(answered)
        while len(answered) < before + 50:
            assert not failures, failures
        in_rotation.clear()
        for caller in callers:
            caller.result(30)
        assert server.process.wait(30) == 0
    assert failures == []
    assert "close" in answered[before:], "answers while draining ask the client to go elsewhere"


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    log_scaled(tmp_path / "registry.yaml", "scaled", 2.0, alias="champion")
    with running(tmp_path, GATEWAY_DRAIN_DELAY="600s") as server:
        server.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{server.url}/readyz").status_code == 200:
            pass
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(20)
