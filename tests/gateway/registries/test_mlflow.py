"""The MLflow registry against a real server, and against a network that goes wrong."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gateway.artifacts.base import ArtifactError
from gateway.artifacts.cache import Artifacts
from gateway.artifacts.sources import sources_for
from gateway.commands.checking import _versions
from gateway.names import Reference
from gateway.registries.base import (
    Move,
    NotInRegistry,
    RegistryError,
    RegistryReadOnly,
    RegistryUnavailable,
    Version,
)
from gateway.registries.mlflow import MLflowRegistry
from gateway.registries.mlflow_client import MLflowClient, MLflowUnavailable
from loaders.package import digest
from tests.conftest import needs
from tests.support.mlflow_server import Server, another
from tests.support.tcp_proxy import CUT, DRIP, FAULTS, HALF_OPEN, HANG, PASS, RESET, proxy

pytestmark = pytest.mark.all
QUICK = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


def make_package(directory: Path, content: bytes) -> str:
    (directory / "deep" / "data").mkdir(parents=True)
    (directory / "MLmodel").write_text("flavors: {python_function: {loader_module: mine}}\n")
    (directory / "deep" / "data" / "weights").write_bytes(content)
    (directory / "nothing in it").touch()
    return str(directory)


@pytest.fixture(scope="module")
def stored(mlflow_server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of two versions; the alias `here` points to 1."""
    registry = MLflowRegistry(mlflow_server.url, environ={})
    for content in (b"one", b"two" * 100_000):
        package = make_package(tmp_path_factory.mktemp("package") / "p", content)
        registry.add_version("stored", package, digest(package))
    registry.move(Move("stored", "here", "1"))
    registry.close()
    return "stored"


def test_nothing_is_listed_that_is_not_used(mlflow_server: Server, stored: str) -> None:
    with proxy(mlflow_server.port) as between:
        registry = MLflowRegistry(between.url, environ={})
        assert registry.read().models == {}
        registry.find(Reference("stored", alias="here"))
        model = registry.known().models["stored"]
        assert registry.known().models.keys() == {"stored"}
        assert model.aliases["here"].version == "1"
        assert model.latest().version == "2"  # type: ignore[union-attr]
        before = registry.known().stamp
        assert registry.read().stamp == before
        registry.find(Reference("no such model"))
        assert registry.known().stamp == before
        registry.close()


def test_a_check_finds_what_aliases_point_to_also_where_it_is_not_the_latest(
    mlflow_server: Server, stored: str
) -> None:
    registry = MLflowRegistry(mlflow_server.url, environ={})
    assert registry.listing().models[stored].versions.keys() == {"2"}
    checked = {subject: version for version, subject in _versions(registry, None)}
    version = checked[f"{stored}/1 (here)"]
    assert isinstance(version, Version)
    assert version == registry.known().models[stored].versions["1"]
    registry.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_registry_that_fails_changes_nothing(fault: str, mlflow_server: Server, stored: str) -> None:
    with proxy(mlflow_server.port) as between:
        registry = MLflowRegistry(between.url, environ=QUICK)
        registry.find(Reference("stored"))
        before = registry.known()
        between.breaks(fault)
        for ask in (registry.read, lambda: registry.find(Reference("other"))):
            began = time.monotonic()
            with pytest.raises(RegistryUnavailable) as error:
                ask()
            assert time.monotonic() - began < 40
            assert between.url in str(error.value)
        assert registry.known() == before
        between.breaks(PASS)
        assert registry.read() == before
        registry.close()


@pytest.mark.parametrize("fault", [RESET, CUT, HALF_OPEN, "500", "429"])
def test_a_break_in_a_download_is_made_good(
    fault: str, mlflow_server: Server, stored: str, tmp_path: Path
) -> None:
    with proxy(mlflow_server.port) as between:
        registry = MLflowRegistry(between.url, environ={})
        registry.find(Reference("stored", version="2"))
        version = registry.known().models["stored"].versions["2"]
        cache = Artifacts(tmp_path / "cache", 10**9, sources_for(between.url, environ=QUICK))
        between.lets_through = 20_000
        between.breaks(fault, times=1)
        local = cache.fetch(version)
        assert local.digest == version.digest
        registry.close()


def test_what_comes_broken_is_never_visible(mlflow_server: Server, stored: str, tmp_path: Path) -> None:
    with proxy(mlflow_server.port) as between:
        registry = MLflowRegistry(between.url, environ={})
        registry.find(Reference("stored", version="2"))
        version = registry.known().models["stored"].versions["2"]
        cache = Artifacts(tmp_path / "cache", 10**9, sources_for(between.url, environ={}))
        between.lets_through = 20_000
        for fault in (CUT, RESET, "500", "a page", "bad JSON"):
            between.breaks(fault)
            with pytest.raises(ArtifactError) as error:
                cache.fetch(version)
            assert "127.0.0.1" not in error.value.public
            assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
        between.breaks(PASS)
        assert cache.fetch(version).digest == version.digest
        registry.close()


@pytest.mark.parametrize("fault", [DRIP, HANG])
def test_a_call_has_a_deadline(fault: str, mlflow_server: Server) -> None:
    with proxy(mlflow_server.port) as between:
        client = MLflowClient(between.url, QUICK)
        between.breaks(fault)
        began = time.monotonic()
        with pytest.raises(MLflowUnavailable):
            client.call("GET", "registered-models/search", {"max_results": 1})
        assert 0.5 < time.monotonic() - began < 40
        client.close()


def test_large_files_come_in_ranges(
    mlflow_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.artifacts.ranges.RANGED", 100_000)
    monkeypatch.setattr("gateway.artifacts.ranges.RANGE", 64_000)
    package = make_package(tmp_path / "package", bytes(range(256)) * 4000)
    registry = MLflowRegistry(mlflow_server.url, environ={})
    version = registry.add_version("ranged", package, digest(package))
    with proxy(mlflow_server.port) as between:
        source = version.source.replace(str(mlflow_server.port), str(between.port))
        cache = Artifacts(tmp_path / "cache", 10**9)
        moved = type(version)("ranged", "1", source, version.digest)
        between.lets_through = 30_000
        assert cache.fetch(moved).digest == version.digest
        assert between.connections > 3
    registry.close()


def test_an_answer_to_an_earlier_question_does_not_win(mlflow_server: Server, stored: str) -> None:
    registry = MLflowRegistry(mlflow_server.url, environ={})
    registry.find(Reference("stored"))
    late = registry._names["stored"]
    registry.move(Move("stored", "late", "2"))
    registry._keep("stored", late, late.order)
    assert registry.known().models["stored"].aliases["late"].version == "2"
    registry._keep("stored", None, late.order)
    assert "stored" in registry.known().models
    registry.delete_alias("stored", "late")
    registry.close()


def test_an_alias_is_deleted_also_if_its_model_is_forgotten_meanwhile(
    mlflow_server: Server, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = MLflowRegistry(mlflow_server.url, environ={})
    registry.move(Move("stored", "brief", "2"))
    write = registry._calls.write

    def written(*args: Any) -> Any:
        answer = write(*args)
        registry.forget({"stored"})  # by the event loop
        return answer

    monkeypatch.setattr(registry._calls, "write", written)
    assert "brief" not in registry.delete_alias("stored", "brief").models["stored"].aliases
    registry.close()


def test_a_forgotten_name_is_not_queried_any_more(mlflow_server: Server, stored: str) -> None:
    with proxy(mlflow_server.port) as between:
        registry = MLflowRegistry(between.url, environ={})
        registry.find(Reference("stored"))
        stamp = registry.known().stamp
        registry.forget({"stored", "never known"})
        assert registry.known().models == {}
        assert registry.known().stamp != stamp
        assert registry.read().models == {}
        registry.find(Reference("stored"))
        assert registry.known().models.keys() == {"stored"}
        registry.close()


def test_where_digests_are_required_one_that_is_written_later_is_seen(
    mlflow_server: Server, tmp_path: Path
) -> None:
    package = make_package(tmp_path / "p", b"x")
    registry = MLflowRegistry(mlflow_server.url, environ={}, digests=True)
    registry.add_version("digested later", package, digest(package), alias="here")
    tag = {"name": "digested later", "version": "1", "key": "gateway.digest"}
    mlflow_server.call("DELETE", "model-versions/delete-tag", **tag)
    fresh = MLflowRegistry(mlflow_server.url, environ={}, digests=True)
    fresh.find(Reference("digested later"))
    assert fresh.known().models["digested later"].versions["1"].digest is None
    registry.record_digest(fresh.known().models["digested later"].versions["1"], digest(package))
    assert fresh.read().models["digested later"].versions["1"].digest == digest(package)
    for opened in (registry, fresh):
        opened.close()


def test_a_restart_goes_on_with_the_names_in_use(mlflow_server: Server, stored: str) -> None:
    first = MLflowRegistry(mlflow_server.url, environ={})
    first.find(Reference("stored"))
    second = MLflowRegistry(mlflow_server.url, environ={})
    second.resume(first.known())
    assert second.known().models == first.known().models
    assert second.read().models == first.known().models
    first.close()
    second.close()


def test_passwords(mlflow_server: Server, tmp_path: Path) -> None:
    needs("flask_wtf")
    environ = {
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of-this-test",
        "MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "ini"),
    }
    (tmp_path / "ini").write_text(
        "[mlflow]\ndefault_permission = READ\nadmin_username = admin\nadmin_password = of-the-test-1\n"
        f"database_uri = sqlite:///{tmp_path}/auth.db\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    with another(mlflow_server, tmp_path / "server", "--app-name", "basic-auth", **environ) as server:
        server.auth = ("admin", "of-the-test-1")
        _hash_lightly(tmp_path / "auth.db", *server.auth)
        signed = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "of-the-test-1"}
        package = make_package(tmp_path / "package", b"one")
        registry = MLflowRegistry(server.url, environ=signed)
        registry.add_version("guarded", package, digest(package), alias="here")
        version = registry.read().models["guarded"].versions["1"]
        cache = Artifacts(tmp_path / "cache", 10**9, sources_for(server.url, environ=signed))
        with pytest.raises(ArtifactError):  # credentials of the environment are not there
            Artifacts(tmp_path / "other", 10**9, sources_for(server.url, environ={})).fetch(version)
        assert cache.fetch(version).digest == version.digest
        in_the_url = server.url.replace("://", "://admin:of-the-test-1@")
        assert MLflowRegistry(in_the_url, environ={}).read().models == {}
        for environ in ({}, {**signed, "MLFLOW_TRACKING_PASSWORD": "wrong"}):
            with pytest.raises(RegistryUnavailable, match="MLFLOW_TRACKING_USERNAME"):
                MLflowRegistry(server.url, environ=environ).read()
        server.call("POST", "users/create", username="reader", password="password5678")
        _hash_lightly(tmp_path / "auth.db", "reader", "password5678")
        reader = {"MLFLOW_TRACKING_USERNAME": "reader", "MLFLOW_TRACKING_PASSWORD": "password5678"}
        reading = MLflowRegistry(server.url, environ=reader)
        reading.find(Reference("guarded"))
        assert reading.known().models["guarded"].aliases["here"].version == "1"
        with pytest.raises(RegistryReadOnly):
            reading.move(Move("guarded", "there", "1"))
        reading.record_digest(version, "sha256:" + "0" * 64)  # not allowed, and no failure
        assert server.call("GET", "model-versions/get", name="guarded", version="1")["model_version"][
            "tags"
        ] == [{"key": "gateway.digest", "value": version.digest}]


def _hash_lightly(database: Path, user: str, password: str) -> None:
    """The server checks a password with each call; with the hash it makes, for a third of a second."""
    light = needs("werkzeug.security").generate_password_hash(password, method="pbkdf2:sha256:1")
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as users:
        users.execute("UPDATE users SET password_hash = ? WHERE username = ?", (light, user))


@pytest.mark.parametrize(
    "make",
    [
        lambda: MLflowRegistry("http://", environ={}),
        lambda: MLflowRegistry("http://h", environ={"MLFLOW_HTTP_REQUEST_TIMEOUT": "soon"}),
        lambda: MLflowRegistry("http://h", environ={"MLFLOW_TRACKING_AWS_SIGV4": "true"}),
        lambda: MLflowRegistry("https://h", environ={"MLFLOW_TRACKING_SERVER_CERT_PATH": "/nowhere"}),
        lambda: MLflowRegistry("https://h", environ={"MLFLOW_TRACKING_CLIENT_CERT_PATH": "/nowhere"}),
    ],
)
def test_what_cannot_be_meant(make: Callable[[], MLflowRegistry]) -> None:
    with pytest.raises(RegistryError, match=r"MLFLOW_|not an MLflow server"):
        make()


def test_a_server_that_refuses_the_first_question_is_a_registry_error() -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such workspace"}'
            self.send_response(404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Not on the tests' output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        registry = MLflowRegistry(f"http://127.0.0.1:{server.server_port}", environ={})
        with pytest.raises(RegistryError, match=r"refuses: .*no such workspace"):
            registry.read()
        server.shutdown()


def test_an_alias_keeps_its_past_though_mlflow_moves_it(mlflow_server: Server, stored: str) -> None:
    registry = MLflowRegistry(mlflow_server.url, environ={})
    registry.move(Move("stored", "past", "1"))
    registry.move(Move("stored", "past", "2", forced=True))
    moved = {"name": "stored", "alias": "past", "version": "1"}
    mlflow_server.call("POST", "registered-models/alias", **moved)
    past = registry.read().models["stored"].aliases["past"]
    assert (past.version, past.previous, past.forced) == ("1", (), False)
    with pytest.raises(NotInRegistry):
        registry.move(Move("stored", "past", "9"))
    registry.delete_alias("stored", "past")
    registry.close()


def test_stages_are_aliases_where_they_are_wanted(mlflow_server: Server, stored: str) -> None:
    staged = {"name": "stored", "version": "2", "stage": "Production", "archive_existing_versions": False}
    mlflow_server.call("POST", "model-versions/transition-stage", **staged)
    registry = MLflowRegistry(mlflow_server.url, environ={}, stages=True)
    registry.find(Reference("stored", alias="Production"))
    assert registry.known().models["stored"].aliases["Production"].version == "2"
    registry.close()
