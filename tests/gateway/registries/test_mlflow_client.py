"""Signing in to a real MLflow server behind a reverse proxy, and whom to trust there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from gateway.artifacts.base import ArtifactError
from gateway.artifacts.cache import Artifacts
from gateway.artifacts.sources import sources_for
from gateway.names import Reference
from gateway.registries.base import Move, RegistryUnavailable, Version
from gateway.registries.mlflow import MLflowRegistry
from gateway.registries.mlflow_client import MLflowClient
from loaders.package import digest
from tests.support.front import Authority, Front, front
from tests.support.mlflow_server import Server

pytestmark = pytest.mark.all
#: A cold process signs in once; nothing here is worth trying again.
ONCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("package")
    (directory / "MLmodel").write_text("flavors: {python_function: {loader_module: mine}}\n")
    (directory / "weights").write_bytes(b"w" * 100_000)
    return directory


@pytest.fixture(scope="module")
def guarded(mlflow_server: Server, package: Path) -> Iterator[str]:
    registry = MLflowRegistry(mlflow_server.url, environ={})
    registry.add_version("guarded", str(package), digest(package), alias="here")
    registry.close()
    yield "guarded"
    mlflow_server.remove("guarded")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def found(before: Front, environ: Mapping[str, str], name: str) -> Version:
    registry = MLflowRegistry(before.url, environ={**ONCE, **environ})
    try:
        registry.find(Reference(name, alias="here"))
        return registry.known().models[name].versions["1"]
    finally:
        registry.close()


def fetched(before: Front, environ: Mapping[str, str], version: Version, cache: Path) -> str:
    sources = sources_for(before.url, environ={**ONCE, **environ})
    return Artifacts(cache, 10**9, sources).fetch(version).digest


def test_a_token(mlflow_server: Server, guarded: str, package: Path, tmp_path: Path) -> None:
    signed = {"MLFLOW_TRACKING_TOKEN": "of-the-test"}
    with front(mlflow_server.url, token="of-the-test") as before:
        version = found(before, signed, guarded)
        assert fetched(before, signed, version, tmp_path / "cache") == digest(package)
        registry = MLflowRegistry(before.url, environ=signed)
        registry.move(Move(guarded, "there", "1"))  # and what writes is signed as well
        registry.close()
        assert set(before.authorizations) == {"Bearer of-the-test"}
        for wrong in ({}, {"MLFLOW_TRACKING_TOKEN": "another"}):
            with pytest.raises(RegistryUnavailable, match="MLFLOW_TRACKING_TOKEN"):
                found(before, wrong, guarded)
            with pytest.raises(ArtifactError, match="refuses this gateway's credentials"):
                fetched(before, wrong, version, tmp_path / "other")
        before.authorizations.clear()
        both = signed | {"MLFLOW_TRACKING_USERNAME": "u", "MLFLOW_TRACKING_PASSWORD": "p"}
        with pytest.raises(RegistryUnavailable):
            found(before, both, guarded)
        assert before.authorizations == ["Basic dTpw"]  # as MLflow's client has it: the password wins


@pytest.mark.parametrize(
    "trusting",
    [
        lambda file: {"MLFLOW_TRACKING_SERVER_CERT_PATH": str(file)},
        lambda file: {"REQUESTS_CA_BUNDLE": str(file)},
        lambda file: {"CURL_CA_BUNDLE": str(file)},
        lambda file: {"SSL_CERT_FILE": str(file)},
        lambda file: {"MLFLOW_TRACKING_INSECURE_TLS": "true"},
        lambda file: {"MLFLOW_TRACKING_SERVER_CERT_PATH": str(file), "REQUESTS_CA_BUNDLE": "/nowhere"},
    ],
    ids=["mlflow", "requests", "curl", "openssl", "insecure", "the first of two"],
)
def test_an_authority_of_ones_own(
    trusting: Callable[[Path], dict[str, str]],
    mlflow_server: Server,
    guarded: str,
    package: Path,
    authority: Authority,
    tmp_path: Path,
) -> None:
    with front(mlflow_server.url, tls=authority.server("127.0.0.1")) as before:
        environ = trusting(authority.file)
        version = found(before, environ, guarded)
        assert version.source.startswith("mlflow+https://127.0.0.1:")
        assert fetched(before, environ, version, tmp_path / "cache") == digest(package)


def test_others_are_not_trusted(
    mlflow_server: Server, guarded: str, authority: Authority, tmp_path: Path
) -> None:
    with front(mlflow_server.url, tls=authority.server("127.0.0.1")) as before:
        another = Authority(tmp_path / "another", "others")
        for environ in ({}, {"MLFLOW_TRACKING_SERVER_CERT_PATH": str(another.file)}):
            with pytest.raises(RegistryUnavailable, match="certificate"):
                found(before, environ, guarded)
    with front(mlflow_server.url, tls=authority.server("registry.example")) as before:
        with pytest.raises(RegistryUnavailable, match="certificate"):
            found(before, {"MLFLOW_TRACKING_SERVER_CERT_PATH": str(authority.file)}, guarded)
        assert found(before, {"MLFLOW_TRACKING_INSECURE_TLS": "true"}, guarded)
    assert before.authorizations  # only of the last


def test_a_certificate_of_the_client(mlflow_server: Server, guarded: str, authority: Authority) -> None:
    trusting = {"MLFLOW_TRACKING_SERVER_CERT_PATH": str(authority.file)}
    with front(mlflow_server.url, tls=authority.server("127.0.0.1", clients=True)) as before:
        with pytest.raises(RegistryUnavailable):
            found(before, trusting, guarded)
        shown = trusting | {"MLFLOW_TRACKING_CLIENT_CERT_PATH": str(authority.issue("client"))}
        assert found(before, shown, guarded)


def test_a_password_of_the_credentials_file(mlflow_server: Server, tmp_path: Path) -> None:
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_text(
        "[mlflow]\nmlflow_tracking_username = u\nmlflow_tracking_password = p%\n"
    )
    with front(mlflow_server.url) as before:
        client = MLflowClient(before.url, {"HOME": str(tmp_path), "MLFLOW_TRACKING_TOKEN": "unused"})
        client.call("GET", "registered-models/search", {"max_results": 1})
        client.close()
        assert before.authorizations == ["Basic dTpwJQ=="]
