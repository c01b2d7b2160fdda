"""Models named on the command line: what each is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.registries.base import RegistryError
from gateway.registries.listed import ListedModels


def package(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "MLmodel").write_text("flavors: {}\n")
    return directory


@pytest.mark.parametrize(
    ("place", "text", "name"),
    [
        ("rent", "{}", "rent"),
        ("rent", "{}/", "rent"),
        ("models/rent/1", "{}", "rent"),
        ("models/rent/1", "price={}", "price"),
        ("a=b", "{}", "a=b"),
        ("rent", "two words={}", "two words"),
    ],
)
def test_what_a_directory_is_called(tmp_path: Path, place: str, text: str, name: str) -> None:
    directory = package(tmp_path / place)
    registry = ListedModels([text.format(directory)])
    assert registry.names == [name]
    assert registry.read().models[name].versions["1"].source == str(directory)


def test_two_of_one_name_and_names_that_are_none(tmp_path: Path) -> None:
    one, two = package(tmp_path / "a" / "rent"), package(tmp_path / "b" / "rent")
    with pytest.raises(RegistryError, match="two models have the name rent"):
        ListedModels([str(one), str(two)])
    assert ListedModels([str(one), f"other={two}"]).names == ["rent", "other"]
    with pytest.raises(RegistryError, match="MLmodel"):
        ListedModels([f"name={tmp_path}"])
    with pytest.raises(RegistryError, match="write NAME=FILE-OR-DIR"):
        ListedModels(["price="])
    with pytest.raises(RegistryError, match="nowhere does not exist"):
        ListedModels([str(tmp_path / "nowhere")])
