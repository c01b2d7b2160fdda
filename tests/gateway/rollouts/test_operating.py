"""How `gateway status` shows a load that is under way, a model that fails, one that is stuck, an eviction."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gateway
from gateway.runners.process import ProcessRunner
from gateway.settings import ModelSettings
from tests.support.hostile import eventually, write_package
from tests.support.served import Served, settings


def status(server: Served) -> str:
    command = [sys.executable, "-m", "gateway", "status", "--url"]
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
    usual = f"loading {later['load']['seconds']} s of about {expected:.1f} s"
    longer = f"loading {later['load']['seconds']} s, longer than usual ({expected:.1f} s)"
    assert later["reason"] == (usual if later["load"]["seconds"] <= expected else longer)
    assert "LOADING: loading " in shown


def fields(shown: str, name: str) -> str:
    return next(line for line in shown.splitlines() if line.startswith(name))


@pytest.mark.skipif(sys.platform != "linux", reason="model processes need Linux")
def test_status_shows_failures_stuck_processes_evictions_and_a_sum_that_adds_up(tmp_path: Path) -> None:
    registry = str(tmp_path / "registry.yaml")
    failing = "if len(data) > 1: raise ValueError('row 17 of the caller')"
    for name, line in {"fails": failing, "other": "pass", "inside": "pass"}.items():
        write_package(tmp_path / name, at_predict=line)
        gateway.push(tmp_path / name, name=name, registry=registry)
    inside = {"inside": ModelSettings(isolation="inline")}
    with Served(settings(tmp_path, isolation="auto", models=inside), registry) as server:
        for name in ("fails", "other", "inside"):
            assert server.post(f"/models/{name}/versions/1/load").json["state"] == "READY"
        for _ in range(3):
            body = {"instances": [1, 2]}
            assert server.post("/predict/fails/versions/1", body).code == "PREDICTION_FAILED"
        assert server.post("/predict/fails/versions/1", {"instances": [1]}).status == 200
        view = server.get("/models/fails/versions/1").json
        assert (view["recent"]["requests"], view["recent"]["error_rate"]) == (4, 0.75)
        assert view["last_error"]["kind"] == "ValueError"
        assert "row 17" not in server.get("/models").body.decode(), "the text of an exception may hold rows"
        assert view["placement"]["isolation"] == "process"

        manager = server.gateway.manager
        other = next(s for s in manager if s.version.name == "other")
        assert isinstance(other.runner, ProcessRunner)
        (pid,) = other.runner.pids
        os.kill(pid, signal.SIGSTOP)
        assert eventually(lambda: server.get("/models/other/versions/1").json["stuck"])
        shown = status(server)
        metrics = server.get("/metrics").body.decode()
        os.kill(pid, signal.SIGCONT)
        assert "STUCK: process" in fields(shown, "other")
        assert " 75.0 " in fields(shown, "fails")
        assert "ValueError (" in fields(shown, "fails")
        assert "3 failed since it was loaded" in fields(shown, "fails")
        assert "not contained, in the gateway's own process (isolation: inline): inside/1" in shown
        assert 'gateway_stuck{model="other"} 1' in metrics

        def adds_up() -> bool:
            views = [model["versions"][0] for model in server.get("/models").json["models"]]
            memory = server.get("/readyz").json["memory"]
            held = sum(view["bytes"] for view in views) + memory["shared"]
            return bool(held == memory["reserved"] + memory["resident"] + memory["closing"])

        assert eventually(adds_up)  # models may be measured between the two calls


def test_status_says_for_which_version_a_model_was_evicted_and_why(tmp_path: Path) -> None:
    registry = str(tmp_path / "registry.yaml")
    for name in ("one", "two"):
        write_package(tmp_path / name)
        gateway.push(tmp_path / name, name=name, registry=registry)
    # In processes of their own: what a model adds to this process depends on what earlier tests left free.
    chosen = settings(tmp_path, models={"*": {"isolation": "process"}})
    with Served(chosen, registry) as server:
        assert server.post("/models/one/versions/1/load").json["state"] == "READY"
        ledger = server.gateway.ledger
        assert eventually(lambda: ledger.shared > 0)  # from now on the zygote counts, too
        ledger.limit = ledger.shared + next(iter(ledger)).bytes * 3 // 2
        assert server.post("/models/two/versions/1/load").json["state"] == "READY"
        evicted = server.get("/models/one/versions/1").json["evicted"]
        shown = status(server)
    assert evicted["for"] == "two/1"
    assert evicted["why"].startswith("least valuable of 1 idle")
    assert "evicted: one/1, " in shown
    assert "for two/1: least valuable of 1 idle" in shown


def test_a_promotion_takes_the_room_for_its_trial_from_others_than_the_version_in_service(
    tmp_path: Path,
) -> None:
    registry = str(tmp_path / "registry.yaml")
    for version in ("one", "two"):
        write_package(tmp_path / version, at_load=f"version = {version!r}")
        gateway.push(tmp_path / version, name="same", registry=registry)
    chosen = settings(tmp_path, models={"*": {"isolation": "process"}})
    with Served(chosen, registry) as server:
        alias = "/models/same/aliases/champion"
        assert server.request("PUT", f"{alias}?wait=true", {"version": "1"}).status == 200
        assert server.post("/predict/same", {"instances": [1]}).status == 200
        ledger = server.gateway.ledger
        assert eventually(lambda: ledger.shared > 0)  # from now on the zygote counts, too
        ledger.limit = ledger.accounted + next(iter(ledger)).bytes // 2
        server.request("PUT", f"{alias}?dry_run=true", {"version": "2"})
        assert server.get("/models/same/versions/1").json["state"] == "READY"
