"""SIGTERM: not ready, still accepting for a while, then what is in flight ends, exit 0."""

from __future__ import annotations

import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pandas as pd

import gateway
from tests.support.running import log_scaled, running
from tests.support.traffic import until


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
    end = time.monotonic() + 90
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

    with running(tmp_path, GATEWAY_DRAIN_DELAY="8s") as server, ThreadPoolExecutor(8) as pool:
        assert server.predict("scaled", [{"x": 1.0}]).status_code == 200
        callers = [pool.submit(call, server.url) for _ in range(8)]
        until(lambda: bool(failures) or len(answered) >= 50)
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{server.url}/readyz").status_code == 200:
            pass
        before = len(answered)
        until(lambda: bool(failures) or len(answered) >= before + 50)
        in_rotation.clear()
        for caller in callers:
            caller.result(60)
        assert server.process.wait(60) == 0
    assert failures == []
    assert "close" in answered[before:], "answers while draining ask the client to go elsewhere"


def test_promise_8_a_request_whose_body_comes_slowly_is_in_flight(tmp_path: Path) -> None:
    log_scaled(tmp_path / "registry.yaml", "scaled", 2.0, alias="champion")
    body = b'{"dataframe_records": [{"x": 1.5}]}'
    head = b"POST /predict/scaled HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(body)
    with running(tmp_path) as server:
        assert server.predict("scaled", [{"x": 0.0}]).status_code == 200
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        with (
            socket.create_connection(address, timeout=60) as idle,
            socket.create_connection(address, timeout=60) as slow,
        ):
            idle.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
            assert b"200 OK" in idle.recv(65536)
            slow.sendall(head + body[:5])
            assert httpx.get(f"{server.url}/livez").status_code == 200  # what came before it was read
            server.process.send_signal(signal.SIGTERM)
            while idle.recv(65536):
                pass  # closed when new work is refused
            slow.sendall(body[5:])
            assert b'"predictions":[3.0]' in slow.makefile("rb").read()
        assert server.stop() == 0


class Endless:
    """Does not come back from x > 0."""

    def predict(self, model_input: Any) -> Any:
        if float(model_input["x"].iloc[0]) > 0:
            time.sleep(600)
        return model_input["x"].to_numpy()


def test_who_waits_when_the_time_is_over_is_told_to_go_elsewhere(tmp_path: Path) -> None:
    registry = str(tmp_path / "registry.yaml")
    example = pd.DataFrame({"x": [0.0]})
    gateway.log_model(Endless(), "endless", registry, input_example=example, alias="champion")
    with running(tmp_path, GATEWAY_DRAIN_TIMEOUT="1s") as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.predict, "endless", [{"x": 1.0}])
        end = time.monotonic() + 60
        while not server.metric("gateway_inflight_requests", model="endless"):
            assert time.monotonic() < end
        assert server.stop() == 0
        assert (answer.result().status_code, answer.result().json()["error_code"]) == (503, "SHUTTING_DOWN")
        assert not [line for line in server.lines if "Traceback" in line]


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    log_scaled(tmp_path / "registry.yaml", "scaled", 2.0, alias="champion")
    with running(tmp_path, GATEWAY_DRAIN_DELAY="600s") as server:
        server.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{server.url}/readyz").status_code == 200:
            pass
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)


def test_promise_8_the_port_closes_before_the_last_answer(tmp_path: Path) -> None:
    """Callers that open a connection for each request get an answer or find the port closed; callers on open
    connections are answered until they are told to leave. No caller gets 503."""
    log_scaled(tmp_path / "registry.yaml", "scaled", 2.0, alias="champion")
    body = {"dataframe_records": [{"x": 1.0}]}
    statuses: list[int] = []
    broken: list[str] = []
    started = threading.Barrier(9)

    def connecting(url: str) -> None:
        started.wait(60)
        while True:
            try:
                statuses.append(httpx.post(f"{url}/predict/scaled", json=body, timeout=30).status_code)
            except httpx.ConnectError:
                return
            except httpx.HTTPError as error:
                broken.append(repr(error))
                return

    def kept_open(url: str) -> None:
        with httpx.Client(base_url=url, timeout=30) as client:
            client.post("/predict/scaled", json=body)
            started.wait(60)
            while True:
                try:
                    answer = client.post("/predict/scaled", json=body)
                except httpx.ConnectError:
                    return
                except httpx.HTTPError as error:
                    broken.append(repr(error))
                    return
                statuses.append(answer.status_code)

    with running(tmp_path) as server, ThreadPoolExecutor(8) as pool:
        assert server.predict("scaled", [{"x": 1.0}]).status_code == 200
        callers = [pool.submit(kind, server.url) for kind in (connecting, kept_open) for _ in range(4)]
        started.wait(60)
        until(lambda: bool(broken) or len(statuses) >= 100)
        server.process.send_signal(signal.SIGTERM)
        for caller in callers:
            caller.result(60)
        assert server.process.wait(60) == 0
    assert set(statuses) == {200}
    assert broken == []


def test_a_hang_up_reloads_and_drops_no_request(tmp_path: Path) -> None:
    mark = tmp_path / "asked"
    example = pd.DataFrame({"x": [0.0]})
    registry = str(tmp_path / "registry.yaml")
    gateway.log_model(
        Slow(str(mark)), name="slow", registry=registry, input_example=example, alias="champion"
    )
    config = tmp_path / "gateway.yaml"
    config.write_text("log_level: info\n")
    with running(tmp_path, GATEWAY_ISOLATION="inline") as server, ThreadPoolExecutor(1) as pool:
        assert server.predict("slow", [{"x": 0.0}]).status_code == 200
        answer = pool.submit(server.predict, "slow", [{"x": 1.0}])
        wait_for(mark)
        config.write_text("drain_delay: 7s\nlog_level: debug\n")
        server.process.send_signal(signal.SIGHUP)
        assert answer.result().status_code == 200
        until(lambda: any("after a restart: drain_delay" in line for line in server.lines))
        until(lambda: any("the registry was read" in line for line in server.lines))
        assert any("log level debug" in line for line in server.lines)
        config.write_text("nonsense: 1\n")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: any("were ignored" in line for line in server.lines))
        assert server.predict("slow", [{"x": 0.0}]).status_code == 200
        assert server.stop() == 0
