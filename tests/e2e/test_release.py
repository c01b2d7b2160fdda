"""What a release consists of: one version everywhere, an sdist with its tests, a wheel that installs and
serves on every Python that it names."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

import gateway
from gateway.environments.interpreters import SUPPORTED, Interpreters
from gateway.http.documents import service
from gateway.metrics import Metrics
from tests.conftest import needs
from tests.support.flavors import graph
from tests.support.running import Running

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@cache
def tracked() -> frozenset[str]:
    """The files of the repository. Skips outside of a clone."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout:
        pytest.skip("needs a clone of the repository")
    return frozenset(filter(None, done.stdout.split("\0")))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the sdist and the wheel. The wheel is made from the sdist, as an index may do it."""
    needs("hatchling")
    directory = tmp_path_factory.mktemp("dist")
    build(ROOT, directory, "sdist")
    (sdist,) = directory.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(directory / "unpacked", filter="data")
    (source,) = (directory / "unpacked").iterdir()
    build(source, directory, "wheel")
    return directory


def build(source: Path, directory: Path, target: str) -> None:
    run(sys.executable, "-m", "hatchling", "build", "-d", directory, "-t", target, where=source)


def run(*command: object, where: Path | None = None) -> str:
    """What the command printed; it must succeed."""
    done = subprocess.run(
        [str(word) for word in command], cwd=where, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def test_the_version_is_the_same_everywhere() -> None:
    version = gateway.__version__
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "gateway/__init__.py"
    chart = yaml.safe_load((ROOT / "deploy/helm/Chart.yaml").read_text(encoding="utf-8"))
    assert chart["version"] == chart["appVersion"] == version
    assert service.document()["info"]["version"] == version
    text = b"".join(asyncio.run(Metrics().render())[0]).decode()
    (build,) = [f for f in text_string_to_metric_families(text) if f.name == "gateway_build_info"]
    assert build.samples[0].labels["version"] == version
    assert re.search(r"(?m)^ARG VERSION=(.*)$", (ROOT / "Dockerfile").read_text()).group(1) == version  # type: ignore[union-attr]
    named = [ROOT / "README.md", *(ROOT / "deploy").rglob("*.*")]
    found = {
        (str(file.relative_to(ROOT)), tag)
        for file in named
        for tag in re.findall(r"(?:model-gateway:|newTag: )(\d[\w.]*)", file.read_text(encoding="utf-8"))
    }
    assert len(found) > 3
    assert {tag for _, tag in found} == {version}, found


def test_the_changelog_begins_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first = re.search(r"(?m)^## (.*)$", text)
    assert first is not None
    assert first[1].split()[0] == gateway.__version__


@pytest.mark.all
def test_the_sdist_is_the_repository(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        files = {member.name.partition("/")[2] for member in archive if not member.isdir()}
    assert sdist.name == f"model_gateway-{gateway.__version__}.tar.gz"
    assert files == tracked() | {"PKG-INFO"}


@pytest.mark.all
def test_the_wheel_has_both_packages_whole_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert wheel.name == f"model_gateway-{gateway.__version__}-py3-none-any.whl"
    assert files == {name for name in tracked() if name.startswith(("gateway/", "loaders/"))}


@pytest.mark.all
def test_the_wheel_installs_and_serves_on_every_python_here(built: Path, tmp_path: Path) -> None:
    """With its own dependencies and nothing else. The interpreters are those that a gateway finds."""
    needs("onnx")
    (wheel,) = built.glob("*.whl")
    rows = np.ones((2, 3), np.float32)
    registry = str(tmp_path / "registry.yaml")
    gateway.log_model(
        graph(tmp_path), name="graph", registry=registry, input_example=rows, alias="champion", verify=False
    )
    known = Interpreters()
    found = [known.find((3, minor)) for minor in range(11, SUPPORTED[1][1] + 1)]
    assert any(found)
    for interpreter in filter(None, found):
        place = tmp_path / interpreter.version
        python = str(place / "venv/bin/python")
        run(interpreter.path, "-m", "venv", "--without-pip", place / "venv")
        pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
        run(*pip, "install", "--no-compile", "--constraint", ROOT / "constraints.txt", wheel)
        assert run(place / "venv/bin/gateway", "--version").strip() == gateway.__version__
        server = Running(place, ["--registry", registry], {}, python=python)
        try:
            answer = httpx.post(f"{server.url}/predict/graph", json={"inputs": rows.tolist()}, timeout=60)
            assert answer.status_code == 200, (interpreter, answer.text)
            assert answer.json()["predictions"] == {"y": [[9.0, 12.0], [9.0, 12.0]]}
            assert httpx.get(f"{server.url}/docs").status_code == 200  # it reads packaged files
        finally:
            assert server.stop() == 0
