"""The commands about a running gateway: a real server, started and operated from the command line."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.access import control_key
from gateway.commands.options import connect
from tests.support.cli import ROW, aliases
from tests.support.shell import PATIENCE, Shell, free_port
from tests.support.traffic import until


def predict(url: str, path: str = "/predict/iris") -> dict[str, Any]:
    answer = httpx.post(url + path, json=ROW, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_registry_served_and_operated(iris: Shell, packages: dict[str, Path]) -> None:
    iris.called("push", packages["wider"], "--name", "iris")
    port = free_port()
    with iris.running("serve", "--registry", "registry.yaml", port=port) as url:
        assert "--to V" in iris.called("rollback", "iris@champion", "--url", url).failed()
        empty = iris.called("status", "--url", url, "-o", "json").json()
        assert empty["ready"] is True
        assert empty["versions"] == []
        loaded = iris.gateway("load", "iris@champion", "--url", url, "-o", "json").json()
        assert (loaded["state"], loaded["version"]) == ("READY", "1")
        assert predict(url)["model"]["version"] == "1"

        there = iris.gateway(
            "promote", "iris@champion", "2", "--expect", "1", "--wait", "--url", url, "-o", "json"
        )
        assert there.json()["serving"] == "2"
        assert there.json()["target"] == url
        assert predict(url)["model"]["version"] == "2"
        assert aliases(iris)["champion"] == "2"
        assert (
            "PRECONDITION_FAILED"
            in iris.called("promote", "iris@champion", "1", "--expect", "1", "--url", url).failed()
        )
        refused = iris.called("promote", "iris@champion", "3", GATEWAY_URL=url).failed()
        assert "colour" in refused
        assert "ROLLOUT_REFUSED" in refused
        assert predict(url)["model"]["version"] == "2"

        (row,) = iris.called("status", "-o", "json", GATEWAY_URL=url).json()["versions"][-1:]
        assert (row["model"], row["state"]) == ("iris", "READY")
        text = iris.gateway("status", "--url", url)
        assert f"{url} ready" in text.out
        assert "champion" in text.out

        assert (
            "champion is 1 and served" in iris.called("rollback", "iris@champion", "--wait", "--url", url).out
        )
        assert predict(url)["model"]["version"] == "1"
        assert iris.gateway("unload", "iris/2", "--url", url, "-o", "json").json()["state"] == "UNLOADED"
        for call in (("load", "rose"), ("promote", "rose@champion", "1")):
            complaint = iris.called(*call, "--url", url).failed()
            assert "MODEL_NOT_FOUND" in complaint
            assert "`gateway models`" in complaint
    assert "no gateway answers" in iris.gateway("status", "--url", url).failed()


def test_the_admin_key(iris: Shell) -> None:
    key = iris.directory / "key"
    key.write_text("open sesame\n")
    port = free_port()
    with iris.running("serve", port=port, GATEWAY_ADMIN_KEY_FILE=str(key)) as url:
        refused = iris.called("load", "iris", "--url", url).failed()
        assert "UNAUTHENTICATED" in refused
        assert "--admin-key-file FILE" in refused
        assert iris.gateway("load", "iris", "--url", url, "--admin-key-file", key).code == 0
        assert iris.called("unload", "iris", "--url", url, GATEWAY_ADMIN_KEY="open sesame").code == 0


def test_a_settings_file_leads_commands_to_its_gateway(iris: Shell) -> None:
    key, config, port = iris.directory / "key", iris.directory / "settings.yaml", free_port()
    key.write_text("open sesame\n")
    config.write_text(f"port: {port}\nadmin_key_file: {key}\n")
    with iris.running("serve", "--config", config, port=port) as url:
        begun = iris.called("load", "iris", "--no-wait", "--config", config)
        assert begun.code == 0, begun.err
        assert begun.out == f"the load of iris has begun at {url}\n"
        until(lambda: "READY" in iris.called("status", "--config", config).out, PATIENCE)
        assert (
            iris.called("unload", "iris", "--no-wait", "--config", config, "-o", "json").json()["target"]
            == url
        )
        until(lambda: "READY" not in iris.called("status", "--config", config).out, PATIENCE)
        other = iris.called("status", GATEWAY_PORT=str(free_port())).failed()
        assert "no gateway answers" in other
        assert "nowhere.yaml: cannot be read" in iris.called(
            "load", "iris", "--config", "nowhere.yaml"
        ).failed(2)


def test_the_key_that_a_gateway_made_is_found_by_commands_of_its_user(iris: Shell) -> None:
    port = free_port()
    with iris.running("serve", port=port) as url:
        assert iris.called("load", "iris", "--url", url).code == 0
        assert iris.called("load", "iris", GATEWAY_PORT=str(port)).code == 0, "the port in force is called"
        elsewhere = {"GATEWAY_STATE_DIR": str(iris.directory / "nowhere")}
        complaint = iris.called("unload", "iris", "--url", url, **elsewhere).failed()
        assert "control.key" in complaint
        shown = iris.called("status", "--url", url, **elsewhere)
        assert shown.code == 0, shown.err
        assert "registry read" in shown.out
        assert "registry.yaml read" in iris.called("status", "--url", url).out


def test_the_key_of_this_machine_is_not_sent_to_others(iris: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    state = iris.directory / "held"
    assert control_key(state) is not None
    monkeypatch.chdir(iris.directory)
    monkeypatch.setenv("GATEWAY_STATE_DIR", str(state))
    for url, sent in [("http://127.0.0.1:9", True), ("http://[::1]:9", True), ("http://gw.example", False)]:
        with connect(url, None) as client:
            assert ("authorization" in client._http.headers) is sent, url


def test_a_bare_directory_is_served_without_a_registry(shell: Shell, packages: dict[str, Path]) -> None:
    with shell.running("serve", packages["v1"], port=free_port()) as url:
        assert predict(url, "/predict/v1")["predictions"] == [2]
        assert httpx.post(f"{url}/invocations", json=ROW).json() == {"predictions": [2]}
        log = next(shell.directory.glob("serve-*.log")).read_text()
        assert f"POST {url}/predict/v1" in log
        assert "REGISTRY_READ_ONLY" in shell.called("promote", "v1@champion", "1", "--url", url).failed()


def test_what_cannot_be_served(iris: Shell) -> None:
    complaint = iris.gateway("serve", "-r", "nowhere.yaml", "--port", 0).failed()
    assert "does not exist" in complaint
    assert "hint: --registry names a registry file" in complaint
    assert "does not exist" in iris.gateway("serve", "nowhere", "--port", 0).failed()
    assert "is a directory" in iris.gateway("serve", "-r", ".", "--port", 0).failed()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "--port" in iris.gateway("serve", "--port", port).failed()
        assert "--port" in iris.gateway("demo", "--port", port).failed()
    assert not (iris.directory / "gateway-demo").exists()


def test_the_demo_from_predict_to_promotion(shell: Shell) -> None:
    port = free_port()
    with shell.running("demo", "--dir", "d", port=port) as url:
        said = (shell.directory / f"serve-{port}.log").read_text()
        key = "--admin-key-file d/state/control.key"
        assert f"gateway promote iris@champion 2 --url {url} {key}" in said
        first = predict(url)
        assert first["model"] == {"name": "iris", "version": "1", "alias": "champion"}
        assert shell.gateway("promote", "iris@champion", "2", "--wait", "--url", url, *key.split()).code == 0
        second = predict(url)
        assert second["model"]["version"] == "2"
        assert first["predictions"] != second["predictions"]
        for line in said.splitlines():
            if line.startswith("  curl "):
                path = next(word for word in line.split() if word.startswith(url)).removeprefix(url)
                body = line.split(" -d ")[1].strip("'")
                answer = httpx.post(url + path, content=body, headers={"content-type": "application/json"})
                assert answer.status_code == 200, (path, answer.text)
    pushed = sorted(path.name for path in (shell.directory / "d" / "models").iterdir())
    assert pushed == ["diabetes", "iris", "tickets"]
    registry = (shell.directory / "d" / "registry.yaml").read_bytes()
    placed = {"GATEWAY_HOST": "0.0.0.0", "GATEWAY_PORT": str(port)}
    with shell.running("demo", "--dir", "d", port=port, **placed) as url:
        assert predict(url)["model"]["version"] == "2"
        assert " on http://0.0.0.0:" in (shell.directory / f"serve-{port}.log").read_text()
        assert (
            f"gateway promote iris@champion 1 --url {url}"
            in (shell.directory / f"serve-{port}.log").read_text()
        )
    assert (shell.directory / "d" / "registry.yaml").read_bytes() == registry
