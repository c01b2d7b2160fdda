"""The store of a registry file: what belongs to no version goes, and nothing else."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from gateway.registries.base import RegistryError, RegistryReadOnly
from gateway.registries.file import FileRegistry
from gateway.registries.store import Collected
from gateway.staging import PREFIX, Staging
from loaders.package import digest

WEEK = 7 * 86400.0


def make_package(directory: Path, content: str) -> Path:
    directory.mkdir(parents=True)
    (directory / "MLmodel").write_text("flavors: {python_function: {loader_module: mine}}\n")
    (directory / "weights").write_text(content)
    return directory


@pytest.fixture
def registry(tmp_path: Path) -> FileRegistry:
    """Versions 1 to 3 of iris; no entry speaks of 1 and 3 any more."""
    file = tmp_path / "registry.yaml"
    made = FileRegistry(str(file), create=True)
    for number in ("1", "2", "3"):
        package = make_package(tmp_path / "packages" / number, number * 100)
        made.add_version("iris", str(package), digest(package))
    taken_out = re.sub(r"(?ms)^      ['\"]?[13]['\"]?:.*?(?=^      ['\"]?2|\Z)", "", file.read_text())
    file.write_text(taken_out)
    assert made.read().models["iris"].versions.keys() == {"2"}
    return made


def collect(registry: FileRegistry, *, days: float = 8, delete: bool = True) -> Collected:
    """Collects as in `days` days, everything older than a week."""
    return registry.collect(WEEK, delete=delete, now=lambda: time.time() + days * 86400)


def names(collected: Collected) -> list[str]:
    return [str(one.path.relative_to(collected.store)) for one in collected.found]


def test_what_no_version_refers_to_is_removed(registry: FileRegistry, tmp_path: Path) -> None:
    store = tmp_path / "models" / "iris"
    said = collect(registry, delete=False)
    assert names(said) == ["iris/1", "iris/3"]
    assert sum(one.bytes for one in said.found) == 2 * (100 + (store / "2" / "MLmodel").stat().st_size)
    assert (store / "1" / "weights").exists()
    assert names(collect(registry)) == ["iris/1", "iris/3"]
    assert not (store / "1").exists()
    assert os.listdir(store / "3") == []  # its number is not given again
    assert digest(store / "2") == registry.read().models["iris"].versions["2"].digest
    assert os.listdir(tmp_path / "models") == ["iris"]
    assert names(collect(registry)) == []
    package = make_package(tmp_path / "packages" / "4", "4")
    assert registry.add_version("iris", str(package), digest(package)).version == "4"


def test_what_is_young_stays(registry: FileRegistry, tmp_path: Path) -> None:
    early = collect(registry, days=6)
    assert (early.found, early.younger) == ((), 2)
    weights = tmp_path / "models" / "iris" / "1" / "weights"
    os.utime(weights, (0, 0))  # as a copy that keeps times would have it
    assert collect(registry, days=6).found == ()
    os.utime(weights, (time.time() + 5 * 86400,) * 2)
    assert names(collect(registry)) == ["iris/3"]


@pytest.mark.parametrize(
    "source",
    [
        "models/iris/1",
        "./models//iris/./1/",
        "models/iris/1/deeper/down",
        "models/iris",
        "models",
        "{here}/models/iris/1",
        "file://{here}/models/iris/1",
        "file://{here}/models/%69ris/1",
        "{here}/link/iris/1",
        "file://{here}/link/iris/1",
        "file:{here}/link/iris/1",
        "file:///{here}/link/iris/1",
    ],
)
def test_whatever_a_version_refers_to_stays(registry: FileRegistry, tmp_path: Path, source: str) -> None:
    (tmp_path / "link").symlink_to("models")
    with (tmp_path / "registry.yaml").open("a") as file:
        file.write(f"  other:\n    versions:\n      1: {{source: '{source.format(here=tmp_path)}'}}\n")
    assert "iris/1" not in names(collect(registry))
    assert (tmp_path / "models" / "iris" / "1" / "weights").exists()


@pytest.mark.parametrize(
    "text",
    ["a: models/iris/1", '{"models": "broken, models/iris/1"', "x: iris/1\n", "x: iris/.//1", r'"iris\/1"'],
)
def test_what_a_document_next_to_it_names_stays(registry: FileRegistry, tmp_path: Path, text: str) -> None:
    (tmp_path / "staging.yaml").write_text(text)
    assert names(collect(registry)) == ["iris/3"]
    (tmp_path / "staging.yaml").write_text("a: models/iris/10")
    assert names(collect(registry)) == ["iris/1"]


def test_nothing_is_removed_through_a_link_or_that_no_push_made(
    registry: FileRegistry, tmp_path: Path
) -> None:
    store = tmp_path / "models"
    outside = make_package(tmp_path / "outside" / "1", "kept")
    (store / "linked").symlink_to(outside.parent)
    (store / "iris" / "9").symlink_to(outside)
    (store / f"{PREFIX}linked").symlink_to(outside)
    (store / "iris" / "notes").mkdir()
    (store / "iris" / "08").mkdir()
    (store / "by hand").mkdir()
    (store / "file").touch()
    (store / "iris" / "1" / "away").symlink_to(outside / "weights")
    assert names(collect(registry)) == ["iris/1", "iris/3"]
    assert (outside / "weights").read_text() == "kept"
    assert {"linked", f"{PREFIX}linked", "by hand", "file"} < set(os.listdir(store))
    assert {"9", "notes", "08"} < set(os.listdir(store / "iris"))


def test_an_interrupted_push_is_collected_and_a_living_one_is_not(
    registry: FileRegistry, tmp_path: Path
) -> None:
    (tmp_path / "models" / f"{PREFIX}dead-0").mkdir()
    with Staging(tmp_path / "models") as living:
        found = collect(registry)
        assert names(found) == [f"{PREFIX}dead-0", "iris/1", "iris/3"]
        assert living.path.exists()
    assert os.listdir(tmp_path / "models") == ["iris"]


def test_a_store_that_is_a_link_and_a_registry_that_is_read_only_are_refused(
    registry: FileRegistry, tmp_path: Path
) -> None:
    (tmp_path / "registry.yaml").chmod(0o444)
    with pytest.raises(RegistryReadOnly):
        collect(registry)
    (tmp_path / "registry.yaml").chmod(0o644)
    (tmp_path / "models").rename(tmp_path / "elsewhere")
    (tmp_path / "models").symlink_to("elsewhere")
    with pytest.raises(RegistryError, match="is a link"):
        collect(registry)
    assert (tmp_path / "elsewhere" / "iris" / "1" / "weights").exists()


def test_an_invalid_registry_removes_nothing(registry: FileRegistry, tmp_path: Path) -> None:
    with (tmp_path / "registry.yaml").open("a") as file:
        file.write("  broken: 5\n")
    with pytest.raises(RegistryError, match=r"models\.broken"):
        collect(registry)
    assert (tmp_path / "models" / "iris" / "1" / "weights").exists()
