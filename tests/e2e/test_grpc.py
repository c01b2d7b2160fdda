"""A gateway process with a port for gRPC: how it starts, and how it stops."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import gateway
from tests.support.running import Running, log_scaled, running
from tests.support.traffic import until

grpc = pytest.importorskip("grpc", reason="the extra grpc is not installed")
pytest.importorskip("grpc_health", reason="the extra grpc is not installed")

from tests.support import rpc  # noqa: E402
from tests.support.http2 import Unfinished  # noqa: E402

X = {"x": ("FP64", np.array([1.0]))}


def address(server: Running) -> str:
    lines = "".join(server.lines)
    found = re.search(r"serving V2 over gRPC on ([\d.:]+)", lines)
    assert found, lines
    return found[1]


def resident(server: Running) -> int:
    """The memory of the gateway's process, in bytes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split(None, 1)[0]) * 1024


def held() -> Any:
    """A model that answers once the listener that `port` names closes the model's connection."""

    class Held:
        def predict(self, model_input: Any) -> Any:
            import socket

            if port := int(model_input["port"].iloc[0]):
                with socket.create_connection(("127.0.0.1", port)) as listener:
                    listener.recv(1)
            return model_input["port"].to_numpy()

    return Held()


def test_promise_8_a_call_in_flight_ends_an_idle_stream_too_and_the_exit_is_0(tmp_path: Path) -> None:
    import socket

    registry = str(tmp_path / "registry.yaml")
    example = pd.DataFrame({"port": [0]})
    gateway.log_model(held(), "held", registry, input_example=example, alias="champion", verify=False)
    with (
        running(tmp_path, GATEWAY_GRPC_PORT="0", GATEWAY_ISOLATION="inline") as server,
        rpc.caller(address(server)) as called,
        socket.create_server(("127.0.0.1", 0)) as listener,
        ThreadPoolExecutor(1) as pool,
    ):
        port = listener.getsockname()[1]
        asked = rpc.request("held", {"port": ("INT64", np.array([port]))})
        waits = threading.Event()
        quick = rpc.request("held", {"port": ("INT64", np.array([0]))})

        def one_then_nothing() -> Any:
            yield quick
            waits.wait(60)

        stream = called.stream(one_then_nothing())
        assert not next(stream).error_message
        in_flight = pool.submit(called.infer, asked)
        connection, _ = listener.accept()
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as ended:  # it does not wait for a message that may never come
            next(stream)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        connection.close()
        assert rpc.outputs(in_flight.result(60))["predictions"] == [port]
        waits.set()
        assert server.process.wait(60) == 0


def test_promise_8_callers_that_follow_health_see_no_failure(tmp_path: Path) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    log_scaled(tmp_path / "registry.yaml", "scaled", 2.0, alias="champion")
    in_rotation = threading.Event()
    in_rotation.set()
    failures: list[str] = []
    answered: list[float] = []

    def call(place: str) -> None:
        with rpc.caller(place, grpc__use_local_subchannel_pool=1) as called:
            while in_rotation.is_set():
                try:
                    answered.extend(rpc.outputs(called.infer(rpc.request("scaled", X)))["predictions"])
                except grpc.RpcError as error:
                    failures.append(str(error))
                    return

    environ = {"GATEWAY_GRPC_PORT": "0", "GATEWAY_DRAIN_DELAY": "8s"}
    with running(tmp_path, **environ) as server, ThreadPoolExecutor(4) as pool:
        place = address(server)
        callers = [pool.submit(call, place) for _ in range(4)]
        until(lambda: bool(failures) or len(answered) >= 20)
        with grpc.insecure_channel(place) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            server.process.send_signal(signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        before = len(answered)
        until(lambda: bool(failures) or len(answered) >= before + 20)
        in_rotation.clear()
        for caller in callers:
            caller.result(60)
        assert server.process.wait(60) == 0
    assert failures == []
    assert set(answered) == {2.0}


def test_connections_and_their_calls_are_limited(tmp_path: Path) -> None:
    """By `max_connections`, and by what the server says when a connection begins (HTTP/2, RFC 9113, 6.5)."""
    import socket

    log_scaled(tmp_path / "registry.yaml", "scaled", 3.0, alias="champion")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    most_streams = bytes([0, 3]) + (100).to_bytes(4, "big")

    def greeting(connection: socket.socket) -> bytes:
        connection.settimeout(30)
        connection.sendall(preface)
        return connection.recv(100)

    with running(
        tmp_path, GATEWAY_GRPC_PORT="0", GATEWAY_ISOLATION="inline", GATEWAY_MAX_CONNECTIONS="2"
    ) as server:
        host, _, port = address(server).rpartition(":")
        with (
            socket.create_connection((host, int(port))) as first,
            socket.create_connection((host, int(port))) as second,
            socket.create_connection((host, int(port))) as third,
        ):
            assert most_streams in greeting(first)
            assert most_streams in greeting(second)
            try:
                refused = greeting(third)
            except ConnectionError:
                refused = b""
            assert refused == b""


@pytest.mark.parametrize(("method", "kept"), [("ModelInfer", 2), ("ModelStreamInfer", 4)])
def test_promise_11_unfinished_messages_take_a_bounded_memory(tmp_path: Path, method: str, kept: int) -> None:
    """`max_inflight_bytes` is four messages: two slow calls may wait for the rest of one, four streams."""
    import socket

    size = 4 << 20
    limits = {"GATEWAY_MAX_BODY_BYTES": str(size), "GATEWAY_MAX_INFLIGHT_BYTES": str(4 * size)}
    log_scaled(tmp_path / "registry.yaml", "scaled", 3.0, alias="champion")
    with running(tmp_path, GATEWAY_GRPC_PORT="0", GATEWAY_ISOLATION="inline", **limits) as server:
        host, _, port = address(server).rpartition(":")
        with rpc.caller(address(server)) as called:
            called.infer(rpc.request("scaled", X))
            before = resident(server)
            with socket.create_connection((host, int(port))) as connection:
                calls = Unfinished(connection)
                for _ in range(20):
                    calls.begin(f"{rpc.SERVICE}{method}", size - 1000)
                while calls.go_on() or len(calls.open) > kept:
                    assert resident(server) - before < 14 * size, "without a bound it is 20 messages"
                answer = called.infer(rpc.request("scaled", X))  # while some of them still wait
                assert rpc.outputs(answer)["predictions"] == [3.0]
                assert len(calls.open) == kept


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    import socket

    log_scaled(tmp_path / "registry.yaml", "scaled", 2.0, alias="champion")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(AssertionError, match=f"cannot listen on 127.0.0.1:{port} \\(grpc_port\\)"),
            running(tmp_path, GATEWAY_GRPC_PORT=str(port)),
        ):
            pass


def test_without_the_extra_the_setting_names_what_to_install(tmp_path: Path) -> None:
    log_scaled(tmp_path / "registry.yaml", "scaled", 2.0, alias="champion")
    without = "import sys; sys.modules['grpc'] = None; from gateway.cli import main; main()"
    environ = {"GATEWAY_GRPC_PORT": "0", "GATEWAY_STATE_DIR": str(tmp_path / "state")}
    asked = subprocess.run(
        [sys.executable, "-c", without, "serve", "--port", "0"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "GATEWAY_CACHE_DIR": str(tmp_path / "cache"), **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode == 2
    assert "pip install 'model-gateway[grpc]'" in asked.stderr
    assert "GATEWAY_GRPC_PORT" in asked.stderr
    assert "Traceback" not in asked.stderr
