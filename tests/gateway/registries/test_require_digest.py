"""What `require_digest` demands: a digest from the registry, or one taken while none was demanded."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.artifacts.cache import Artifacts
from gateway.artifacts.packages import FormatPolicy, Packages, Prepared
from gateway.errors import Problem
from gateway.registries.base import Version
from loaders.package import digest


@pytest.fixture
def version(tmp_path: Path) -> Version:
    package = tmp_path / "package"
    package.mkdir()
    (package / "MLmodel").write_text("flavors: {python_function: {loader_module: mlflow.sklearn}}\n")
    return Version("iris", "1", str(package))


def prepared(tmp_path: Path, version: Version, known: dict[Version, str], *, required: bool) -> Prepared:
    with ThreadPoolExecutor(1) as io:
        packages = Packages(
            Artifacts(tmp_path / "cache", 10**9), io, io,
            policy=lambda name, digest: FormatPolicy(require_digest=required),
            remembered=known.get, remember=known.__setitem__, lasting=True,
        )  # fmt: skip
        return asyncio.run(packages.get(version))


def test_without_a_digest_nothing_is_fetched_and_nothing_remembered(tmp_path: Path, version: Version) -> None:
    known: dict[Version, str] = {}
    for _ in range(2):  # a refused download does not prove itself
        with pytest.raises(Problem, match=r"require_digest is set; .* the tag gateway\.digest"):
            prepared(tmp_path, version, known, required=True)
    assert known == {}
    assert not any((tmp_path / "cache").rglob("MLmodel"))


def test_with_the_registrys_digest_it_is_served(tmp_path: Path, version: Version) -> None:
    said = replace(version, digest=digest(version.source))
    assert prepared(tmp_path, said, {}, required=True).digest == said.digest


def test_a_digest_taken_while_none_was_demanded_holds(tmp_path: Path, version: Version) -> None:
    known: dict[Version, str] = {}
    first = prepared(tmp_path, version, known, required=False)
    assert known == {version: first.digest}
    assert prepared(tmp_path, version, known, required=True).digest == first.digest
    known[version] = "sha256:" + "0" * 64
    with pytest.raises(Problem, match="changed since they were first loaded"):
        prepared(tmp_path, version, known, required=True)
