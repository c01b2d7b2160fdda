"""A registry document and its models in a real object store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gateway.artifacts.base import ArtifactError, Meter
from gateway.artifacts.cache import Artifacts
from gateway.artifacts.remote import asked
from gateway.artifacts.sources import Sources, sources_for
from gateway.registries import open_registry
from gateway.registries.base import RegistryUnavailable, Version
from loaders.package import digest
from tests.conftest import needs
from tests.support.object_store import ObjectStore
from tests.support.tcp_proxy import CUT, RESET, proxy

pytestmark = pytest.mark.all


@pytest.fixture
def files(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The store as s3fs sees it, with the credentials in the environment, where operators have them."""
    for name, value in object_store.environ().items():
        monkeypatch.setenv(name, value)
    s3fs = needs("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()
    yield object_store.files()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_registry_in_a_bucket(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.artifacts.ranges.RANGED", 1_000_000)
    monkeypatch.setattr("gateway.artifacts.ranges.RANGE", 500_000)
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
    verbs: list[str] = []
    monkeypatch.setattr(
        "gateway.registries.remote.asked",
        lambda files, verb, *rest: verbs.append(verb) or asked(files, verb, *rest),
    )
    assert registry.read().models["iris"].aliases.keys() == {"champion"}
    assert verbs == ["info"]  # it is not sent again
    files.pipe("models/registry.yaml", (document % digest(package)).replace("champion", "moved").encode())
    assert registry.read().models["iris"].aliases.keys() == {"moved"}
    files.rm("models/registry.yaml")
    with pytest.raises(RegistryUnavailable, match="does not exist"):
        registry.read()


@pytest.mark.parametrize("fault", [RESET, CUT, "500"])
def test_a_break_in_a_download_is_made_good(
    fault: str, object_store: ObjectStore, files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.artifacts.ranges.RANGED", 100_000)
    monkeypatch.setattr("gateway.artifacts.ranges.RANGE", 100_000)
    content = os.urandom(350_000)
    files.pipe({"models/broken/MLmodel": b"flavors: {}", "models/broken/weights": content})
    with proxy(object_store.port) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
        files.clear_instance_cache()
        version = Version("iris", "1", "s3://models/broken")
        source = Sources().open(version)
        listed = source.files(version)
        between.lets_through = 50_000
        between.breaks(fault, times=2)
        source.copy(version, listed, tmp_path, room=lambda count: None, meter=Meter(listed))
        assert between.times is not None
        assert between.times < 0  # it did break
    assert (tmp_path / "weights").read_bytes() == content


def test_wrong_keys_are_said(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    files.clear_instance_cache()
    with pytest.raises(RegistryUnavailable, match="cannot be read"):
        open_registry("s3://models/registry.yaml").read()
