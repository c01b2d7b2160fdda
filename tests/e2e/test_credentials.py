"""Credentials as an operator sets them up: tokens from the command line, an issuer, no secret in the log."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import needs
from tests.support.running import log_scaled, running


def made(*arguments: str) -> tuple[str, dict[str, Any]]:
    command = [sys.executable, "-m", "gateway", "token", "create", *arguments, "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    content = json.loads(done.stdout)
    return content["token"], content["entry"]


def test_a_token_from_the_command_line_opens_its_models_alone(tmp_path: Path) -> None:
    for name in ("one", "two"):
        log_scaled(tmp_path / "registry.yaml", name, 2.0, alias="champion")
    token, entry = made("build", "--predict", "on*", "--control", "one@champion", "--team", "blue")
    assert token not in json.dumps(entry)
    file = tmp_path / "tokens.yaml"
    file.write_text(json.dumps([entry]))
    with running(tmp_path, GATEWAY_ACCESS__TOKENS_FILE=str(file), GATEWAY_ACCESS_LOG="true") as server:
        body = {"dataframe_records": [{"x": 2.0}]}
        head = {"Authorization": f"Bearer {token}"}
        answers = [
            httpx.post(f"{server.url}/predict/{name}", json=body, headers=given, timeout=60).status_code
            for name, given in (
                ("one", {}),
                ("one", head),
                ("two", head),
                ("none", head),
                ("two", server.key),
            )
        ]
        assert answers == [401, 200, 403, 403, 200]
        assert httpx.get(f"{server.url}/livez").status_code == 200
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        listed = httpx.get(f"{server.url}/models", headers=head).json()["models"]
        assert [model["name"] for model in listed] == ["one"]
        moved = httpx.put(
            f"{server.url}/models/one/aliases/champion", json={"version": "1"}, headers=head, timeout=60
        )
        assert moved.status_code == 202
        env = {"GATEWAY_ADMIN_KEY": token, "GATEWAY_URL": server.url, "PATH": ""}
        command = [sys.executable, "-m", "gateway", "status", "-o", "json"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=tmp_path)
        assert "two" not in shown.stdout
        server.stop()
        said = "".join(server.lines)
        assert token not in said
        assert entry["sha256"] not in said


@pytest.mark.skipif(sys.platform != "linux", reason="model processes need Linux")
def test_models_of_different_teams_share_no_process(tmp_path: Path) -> None:
    names = ("blue-1", "blue-2", "green", "nobodys")
    for name in names:
        log_scaled(tmp_path / "registry.yaml", name, 2.0, alias="champion")
    entries = [
        made("reader", "--predict", "blue-*", "--team", "blue")[1],
        made("second", "--predict", "blue-*", "--team", "blue")[1],
        made("other", "--predict", "green", "--team", "green")[1],
        made("everything", "--predict", "*", "--team", "operators")[1],
    ]
    file = tmp_path / "tokens.yaml"
    file.write_text(json.dumps(entries))
    environ = {
        "GATEWAY_ACCESS__TOKENS_FILE": str(file),
        "GATEWAY_MODELS": json.dumps({"*": {"pack": "small"}}),
    }
    with running(tmp_path, **environ) as server:
        pids = {}
        for name in names:
            path = f"{server.url}/models/{name}"
            loaded = httpx.post(f"{path}/load", headers=server.key, timeout=60)
            assert loaded.status_code == 200, loaded.text
            runner = httpx.get(f"{path}/versions/1", headers=server.key).json()["runner"]
            assert runner["isolation"] == "pack"
            (process,) = runner["processes"]
            pids[name] = process["pid"]
    assert pids["blue-1"] == pids["blue-2"]
    assert len(set(pids.values())) == 3, pids


def test_control_and_metrics_on_a_listener_of_their_own(tmp_path: Path) -> None:
    log_scaled(tmp_path / "registry.yaml", "one", 2.0, alias="champion")
    token, entry = made("build", "--predict", "one", "--control", "*")
    file = tmp_path / "tokens.yaml"
    file.write_text(json.dumps([entry]))
    environ = {"GATEWAY_ACCESS__TOKENS_FILE": str(file), "GATEWAY_ADMIN_LISTEN": "127.0.0.1:0"}
    with running(tmp_path, **environ) as server:
        (said,) = [line for line in server.lines if "control calls and metrics on" in line]
        admin = re.findall(r"http://[\d.:]+", said)[0]
        head = {"Authorization": f"Bearer {token}"}
        for path in ("/metrics", "/registry.yaml"):
            assert httpx.get(server.url + path, headers=head).status_code == 404
            assert httpx.get(admin + path).status_code == 200, "who reaches the listener may read"
        load = "/models/one/load"
        assert httpx.post(server.url + load, headers=head).status_code == 404
        assert httpx.post(admin + load).status_code == 401
        assert httpx.post(admin + load, headers=head, timeout=60).status_code == 200
        v2 = "/v2/repository/models/one/load"
        assert httpx.post(server.url + v2, headers=head).status_code == 404
        body = {"dataframe_records": [{"x": 2.0}]}
        assert httpx.post(f"{server.url}/predict/one", json=body, headers=head, timeout=60).status_code == 200
        assert httpx.get(f"{server.url}/models").status_code == 401
        for url in (server.url, admin):
            assert httpx.get(f"{url}/readyz").status_code == 200
        assert server.stop() == 0


def test_what_is_wrong_with_the_tokens_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "registry.yaml").write_text("models: {}\n")
    file = tmp_path / "tokens.yaml"
    environ = {"GATEWAY_ACCESS__TOKENS_FILE": str(file), "PATH": ""}
    command = [sys.executable, "-m", "gateway", "serve", "--port", "0"]

    def said() -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert "No such file" in said()
    file.write_text("- {name: a, sha256: b}\n")
    assert "[0].sha256" in said()


def test_a_wrong_pattern_or_name_is_wrong_usage() -> None:
    for arguments in (
        ["a", "--predict", "x/y"],
        ["a", "--until", "soon"],
        ["a", "--until", "2020-01-01"],
        ["a\nb"],
    ):
        command = [sys.executable, "-m", "gateway", "token", "create", *arguments]
        assert subprocess.run(command, capture_output=True, timeout=120).returncode == 2


def test_jwts_of_an_issuer_whose_keys_rotate(tmp_path: Path) -> None:
    needs("jwt")
    from tests.support.issuer import SigningKey, issuer

    for name in ("fraud", "other"):
        log_scaled(tmp_path / "registry.yaml", name, 2.0, alias="champion")
    first, second = SigningKey("one"), SigningKey("two", "ES256")
    with issuer() as real:
        real.publish(first)
        access = {
            "jwt": real.settings(),
            "teams": {"fraud": {"predict": ["fraud"]}, "*": {"predict": ["none"]}},
        }
        (tmp_path / "gateway.yaml").write_text(json.dumps({"access": access}))
        with running(tmp_path) as server:

            def status(name: str, token: str) -> int:
                body = {"dataframe_records": [{"x": 2.0}]}
                head = {"Authorization": f"Bearer {token}"}
                return httpx.post(
                    f"{server.url}/predict/{name}", json=body, headers=head, timeout=60
                ).status_code

            old = real.sign(first)
            assert [status(name, old) for name in ("fraud", "other")] == [200, 403]
            assert status("fraud", real.sign(first, groups=["blue"])) == 403
            assert status("fraud", real.sign(first, exp=1)) == 401
            real.publish(second)
            end = time.monotonic() + 60
            while status("fraud", real.sign(second)) != 200:  # at most one look at the keys in five seconds
                assert time.monotonic() < end
            assert status("fraud", old) == 401, "its key is gone"
            real.broken = True
            assert status("fraud", real.sign(second)) == 200
            assert not any(old in line for line in server.lines)


@pytest.mark.parametrize("key", ["anonymus", "token_file"])
def test_a_mistyped_key_is_an_error(tmp_path: Path, key: str) -> None:
    environ = {f"GATEWAY_ACCESS__{key.upper()}": "none", "PATH": ""}
    command = [sys.executable, "-m", "gateway", "config"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ, cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean" in done.stderr
