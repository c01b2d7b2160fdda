from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression

import gateway
import loaders
from gateway.artifacts.base import ArtifactError
from gateway.artifacts.cache import Artifacts
from gateway.names import InvalidReference
from gateway.registries import open_registry
from gateway.registries.base import Move, NotInRegistry, RegistryError
from gateway.settings import SettingsError
from loaders.package import digest

ROWS = pd.DataFrame({"length": [1.0, 2.0, 3.0, 4.0], "width": [0.5, 1.0, 1.0, 2.0]})


def trained(flip: bool = False) -> LogisticRegression:
    labels = np.array([0, 0, 1, 1])
    return LogisticRegression().fit(ROWS, 1 - labels if flip else labels)


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("GATEWAY_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GATEWAY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    target = directory / "registry.yaml"
    gateway.log_model(trained(), name="iris", registry=target, input_example=ROWS[:3], alias="champion")
    gateway.log_model(trained(flip=True), name="iris", registry=target, input_example=ROWS[:3])
    return directory


@pytest.fixture
def registry(made: Path, tmp_path: Path) -> str:
    """iris: version 1 is the champion, version 2 says the opposite. A registry moves with its store."""
    shutil.copytree(made, tmp_path / "team")
    return str(tmp_path / "team" / "registry.yaml")


def answers(uri: str, **more: Any) -> list[int]:
    return [int(value) for value in gateway.load_model(uri, **more).predict(ROWS)]


def test_a_model_goes_in_and_comes_out(tmp_path: Path) -> None:
    logged = gateway.log_model(
        trained(),
        name="iris",
        registry="registry.yaml",
        input_example=ROWS[:3],
        alias="challenger",
        metadata={"team": "a"},
        tags={"git": "abc"},
    )
    assert logged == gateway.ModelVersion(
        "iris", "1", str(tmp_path / "models/iris/1"), logged.digest, "challenger"
    )
    assert logged.digest == digest(tmp_path / "models/iris/1")
    model = gateway.load_model("models:/iris@challenger", registry="registry.yaml")
    assert list(model.predict(ROWS)) == [0, 0, 1, 1]
    assert model.metadata["team"] == "a"
    assert model.signature is not None
    pd.testing.assert_frame_equal(model.input_example, ROWS[:3])
    snapshot = open_registry("registry.yaml").read()
    assert snapshot.models["iris"].versions["1"].tags == {"git": "abc"}
    assert model.package.path.parent == tmp_path / "cache"


@pytest.mark.parametrize(
    ("uri", "first"),
    [
        ("models:/iris", True),
        ("models:/iris@champion", True),
        ("models:/iris/1", True),
        ("models:/iris/2", False),
        ("models:/iris/latest", False),
        ("iris", True),
        ("iris@champion", True),
        ("iris/2", False),
    ],
)
def test_every_form_of_a_reference(uri: str, first: bool, registry: str) -> None:
    assert answers(uri, registry=registry) == ([0, 0, 1, 1] if first else [1, 1, 0, 0])


def test_an_alias_is_followed_from_call_to_call(registry: str) -> None:
    assert answers("models:/iris@champion", registry=registry) == [0, 0, 1, 1]
    open_registry(registry).move(Move("iris", "champion", "2"))
    assert answers("models:/iris@champion", registry=registry) == [1, 1, 0, 0]


def test_directories_and_urls_need_no_registry(registry: str, tmp_path: Path) -> None:
    directory = tmp_path / "team/models/iris/2"
    assert answers(str(directory)) == [1, 1, 0, 0]
    assert answers(directory.as_uri()) == [1, 1, 0, 0]
    assert answers("team/models/iris/2") == [1, 1, 0, 0]
    memory = fsspec.filesystem("memory")
    memory.put(str(directory), "/bucket/api", recursive=True)
    assert answers("memory://bucket/api") == [1, 1, 0, 0]
    memory.rm("/bucket", recursive=True)


def test_the_registry_may_come_from_the_settings(
    registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    (tmp_path / "gateway.yaml").write_text(f"registry: {registry}\n")
    assert gateway.load_model("models:/iris@champion").signature is not None
    (tmp_path / "gateway.yaml").write_text("port: high\n")
    package = Path(registry).parent / "models/iris/1"
    assert gateway.push(package, "iris", registry=registry).version == "1"  # no settings are needed


def test_the_registry_may_come_from_the_environment(registry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RegistryError, match="no registry: give --registry"):
        gateway.load_model("models:/iris")
    monkeypatch.setenv("GATEWAY_REGISTRY", registry)
    assert answers("models:/iris") == [0, 0, 1, 1]
    monkeypatch.setenv("GATEWAY_DEFAULT_ALIAS", "nobody")
    with pytest.raises(NotInRegistry, match="no alias nobody"):
        gateway.load_model("models:/iris")


def test_changed_files_are_not_loaded(registry: str, tmp_path: Path) -> None:
    with (tmp_path / "team/models/iris/1/MLmodel").open("a") as handle:
        handle.write("# edited\n")
    with pytest.raises(ArtifactError, match="digest mismatch of iris/1: the registry has sha256:"):
        gateway.load_model("models:/iris/1", registry=registry)


def test_the_cache_keeps_what_a_model_reads(registry: str, tmp_path: Path) -> None:
    model = gateway.load_model("models:/iris/1", registry=registry)
    small = Artifacts(tmp_path / "cache", disk_limit=Artifacts(tmp_path / "cache", 10**9).bytes() + 1)
    second = open_registry(registry).read().models["iris"].versions["2"]
    with pytest.raises(ArtifactError, match="no space"):
        small.fetch(second)
    path = model.package.path
    assert path.exists()
    del model
    gc.collect()
    small.fetch(second)
    assert not path.exists()


def test_push_takes_a_directory_once(tmp_path: Path) -> None:
    loaders.save_model(trained(), tmp_path / "one", input_example=ROWS[:3])
    first = gateway.push(tmp_path / "one", "iris", registry="registry.json")
    assert (first.version, first.alias) == ("1", None)
    again = gateway.push("one", "iris", "champion", "registry.json")
    assert (again.version, again.digest, again.alias) == ("1", first.digest, "champion")
    assert os.listdir(tmp_path / "models/iris") == ["1"]
    assert answers("models:/iris", registry="registry.json") == [0, 0, 1, 1]


def test_push_refuses_a_directory_that_is_not_a_package(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(loaders.PackageError, match="this is not a model directory"):
        gateway.push("empty", "iris", registry="registry.yaml")
    assert not (tmp_path / "registry.yaml").exists()


@pytest.mark.parametrize(
    ("uri", "error", "message"),
    [
        ("models:/irsi", NotInRegistry, "there is no model 'irsi'"),
        ("models:/iris@", InvalidReference, "is not an alias"),
        ("models:/m-" + "0" * 32, RegistryError, "MLflow registry"),
        ("runs:/abc/model", RegistryError, "MLflow registry"),
        (
            "no/such/directory",
            InvalidReference,
            "no/such/directory is neither a directory nor a model reference",
        ),
        ("", InvalidReference, "empty"),
    ],
)
def test_what_cannot_be_loaded(uri: str, error: type[Exception], message: str, registry: str) -> None:
    with pytest.raises(error, match=message):
        gateway.load_model(uri, registry=registry)


@pytest.mark.parametrize(("name", "alias"), [("a/b", None), ("", None), ("iris", "latest"), ("iris", "v1")])
def test_names_are_checked_before_anything_is_written(name: str, alias: str | None, tmp_path: Path) -> None:
    with pytest.raises(InvalidReference):
        gateway.log_model(trained(), name=name, registry="registry.yaml", alias=alias)
    assert os.listdir(tmp_path) == []


def test_wrong_settings_are_said(registry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_DISK_LIMT", "5GB")
    with pytest.raises(SettingsError, match="did you mean GATEWAY_DISK_LIMIT"):
        gateway.load_model("models:/iris", registry=registry)


def test_importing_the_package_imports_nothing_else() -> None:
    script = (
        "import sys, gateway; print([m for m in ('numpy', 'fsspec', 'yaml', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert not hasattr(gateway, "nothing")
