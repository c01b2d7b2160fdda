"""What `gateway status` makes of a histogram, and how it shows a load that is under way."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import gateway
from gateway.commands.operating import _p99
from gateway.metrics import Metrics
from tests.support.hostile import write_package
from tests.support.served import Served, settings

INFINITE = float("inf")


@pytest.mark.parametrize(
    ("buckets", "expected"),
    [
        ({}, None),
        ({0.1: 0, INFINITE: 0}, None),
        ({0.1: 18, 5.0: 19, INFINITE: 19}, None),  # too few: the cold load alone would show
        ({0.1: 20, INFINITE: 20}, 0.099),
        ({0.1: 100, 0.5: 100, INFINITE: 100}, 0.099),  # 99 % of the way through the first
        ({0.1: 98, 0.5: 100, INFINITE: 100}, 0.3),  # in the middle of the second
        ({0.1: 0, 0.5: 0, 1.0: 200, INFINITE: 200}, 0.995),
        ({0.1: 90, 0.5: 90, 1.0: 90, INFINITE: 100}, 1.0),  # beyond the last bound nobody knows
    ],
)
def test_p99_is_what_prometheus_makes_of_the_buckets(
    buckets: dict[float, float], expected: float | None
) -> None:
    assert _p99(buckets) == (None if expected is None else pytest.approx(expected))


@given(st.lists(st.floats(0.0001, 50), min_size=20, max_size=300))
def test_p99_is_in_the_bucket_of_the_true_one(values: list[float]) -> None:
    metrics = Metrics()
    for value in values:
        metrics.request("iris", "1", "2xx", value)
    buckets = {
        float(sample.labels["le"]): sample.value
        for family in text_string_to_metric_families(metrics.render()[0].decode())
        for sample in family.samples
        if sample.name == "gateway_request_seconds_bucket"
    }
    found = _p99(buckets)
    assert found is not None
    true = sorted(values)[-(-99 * len(values) // 100) - 1]
    below = max((bound for bound in buckets if bound < true), default=0.0)
    assert below <= found <= min(bound for bound in buckets if bound >= true)


def status(server: Served) -> str:
    command = [sys.executable, "-m", "gateway", "status", "--interval", "0.1", "--url"]
    done = subprocess.run(
        [*command, f"http://127.0.0.1:{server.port}"], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="model processes need Linux")
def test_how_far_a_load_is_can_be_seen(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        lines = f"import socket\nsocket.create_connection(('127.0.0.1', {port})).recv(1)"
        write_package(tmp_path / "slow", at_load=lines)
        registry = str(tmp_path / "registry.yaml")
        gateway.push(tmp_path / "slow", name="slow", registry=registry)
        with Served(settings(tmp_path, isolation="auto"), registry) as server:
            path = "/models/slow/versions/1"
            assert server.post(f"{path}/load?wait=false").status == 202
            connection, _ = listener.accept()  # it is in the middle of its load now
            first = server.get(path).json
            connection.close()
            assert server.post(f"{path}/load").json["state"] == "READY"
            assert "load" not in server.get(path).json
            server.post(f"{path}/unload")

            assert server.post(f"{path}/load?wait=false").status == 202
            connection, _ = listener.accept()
            second = server.get(path).json
            while (later := server.get(path).json)["load"]["seconds"] <= second["load"]["seconds"]:
                time.sleep(0.05)
            shown = status(server)
            connection.close()
            assert server.post(f"{path}/load").json["state"] == "READY"
    assert first["load"]["phase"] == "loading"
    assert first["load"]["expected_seconds"] is None
    assert first["reason"] == f"loading {first['load']['seconds']} s"
    expected = later["load"]["expected_seconds"]
    assert expected > 0
    assert later["reason"] == f"loading {later['load']['seconds']} s of about {expected:.1f} s"
    assert "LOADING: loading " in shown
    assert f" s of about {expected:.1f} s " in shown
