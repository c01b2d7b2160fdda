"""The models of a managed host: calls that overlap touch only their own model."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.registries.base import RegistryError
from gateway.registries.hosted import HostedModels
from tests.support.hostile import write_package


def test_a_late_failure_removes_only_what_it_added(tmp_path: Path) -> None:
    models = HostedModels(tmp_path)
    place = models.checked("m", str(write_package(tmp_path / "m").path))
    first = models.add("m", place)
    models.remove("m")
    second = models.add("m", place)
    models.remove("m", first)
    assert models.places == {"m": str(place)}
    assert models.read().models["m"].versions == {second.version: second}
    models.remove("m", second)
    assert models.places == {}
    models.remove("m", second)


def test_a_directory_elsewhere_is_refused(tmp_path: Path) -> None:
    write_package(tmp_path / "outside")
    with pytest.raises(RegistryError, match="not below"):
        HostedModels(tmp_path / "inside").checked("m", str(tmp_path / "outside"))
