"""Fixtures of the end-to-end tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import platformdirs
import pytest

import gateway
import loaders
from gateway.environments.uv import Uv
from tests.support.cli import FLOWER, Adder, Unloadable
from tests.support.containers import TOOLS, Containers, tool
from tests.support.shell import Shell, clean_shell


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return clean_shell(tmp_path)


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model directories: two of iris, one with a column more, one that cannot be loaded, two small ones."""
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression
    from sklearn.tree import DecisionTreeClassifier

    directory = tmp_path_factory.mktemp("packages")
    table, target = load_iris(return_X_y=True, as_frame=True)
    table.columns = list(FLOWER)
    example = table.head(2)
    loaders.save_model(
        LogisticRegression(max_iter=500).fit(table, target), directory / "v1", input_example=example
    )
    loaders.save_model(DecisionTreeClassifier().fit(table, target), directory / "v2", input_example=example)
    loaders.save_model(Adder(0.0), directory / "wider", input_example=table.assign(colour=1.0).head(2))
    loaders.save_model(Unloadable(), directory / "unloadable", verify=False)
    for number in (1.0, 2.0):
        loaders.save_model(
            Adder(number), directory / f"add{number:g}", input_example=np.array([[1.0], [2.0]])
        )
    return {path.name: path for path in directory.iterdir()}


@pytest.fixture
def iris(shell: Shell, packages: dict[str, Path]) -> Shell:
    """A shell with ./registry.yaml: iris 1 (champion) and 2 (challenger)."""
    for name, alias in (("v1", "champion"), ("v2", "challenger")):
        gateway.push(packages[name], "iris", alias=alias, registry=str(shell.directory / "registry.yaml"))
    return shell


@pytest.fixture(scope="session")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    """With the image built, once for all tests or ahead of them (IMAGE_UNDER_TEST). It takes minutes: not
    where only some tests are wanted."""
    if not os.environ.get("GATEWAY_TEST_ALL"):
        pytest.skip("builds an image for minutes: only where GATEWAY_TEST_ALL is set")
    for name in TOOLS:
        tool(name)
    ahead = os.environ.get("IMAGE_UNDER_TEST")
    made = Containers(Path(ahead) if ahead else tmp_path_factory.mktemp("containers"))
    try:
        if not ahead:
            made.build()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def clients(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment with other projects' clients. They do not fit into this one: kserve
    pins pandas 2."""
    return environment(tmp_path_factory, "clients", "tritonclient[grpc,http]", "kserve", "boto3")


@pytest.fixture(scope="session")
def mlserver(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment with MLServer. Its codecs know the types of pandas 2."""
    return environment(tmp_path_factory, "mlserver", "mlserver", "pandas<3")


@pytest.fixture(scope="session")
def schemathesis(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The command of schemathesis, in an environment of its own: it brings a pytest plugin."""
    python = environment(tmp_path_factory, "schemathesis", "schemathesis")
    return str(Path(python).with_name("schemathesis"))


def environment(tmp_path_factory: pytest.TempPathFactory, name: str, *packages: str) -> str:
    """The interpreter of a new environment with these packages, which takes a while to make."""
    if not os.environ.get("GATEWAY_TEST_ALL"):
        pytest.skip("installs other projects' packages: only where GATEWAY_TEST_ALL is set")
    place = tmp_path_factory.mktemp(name)
    environ = {name: value for name, value in os.environ.items() if name != "UV_OFFLINE"}
    uv = Uv(Path(platformdirs.user_cache_dir("uv")), place / "scratch", environ)
    uv.run("venv", "--python", sys.executable, str(place / "env"), indexed=False)
    made = str(place / "env/bin/python")
    uv.run("pip", "install", "--only-binary", ":all:", "--python", made, *packages)
    return made
