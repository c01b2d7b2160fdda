"""Other projects' own clients, unchanged, against a real gateway.

They live in an environment of their own: kserve pins pandas 2. The client of MLflow is installed here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import platformdirs
import pytest

from gateway.environments.uv import Uv
from tests.support.served import Served, make_registry, settings

mlflow_deployments = pytest.importorskip("mlflow.deployments")

SCRIPT = Path(__file__).with_name("foreign_clients.py")
PACKAGES = ("tritonclient[grpc,http]", "kserve", "boto3")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("clients")
    with Served(settings(directory, grpc_port=0), make_registry(directory)) as running:
        yield running


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment with the clients."""
    place = tmp_path_factory.mktemp("environment")
    environ = {name: value for name, value in os.environ.items() if name != "UV_OFFLINE"}
    uv = Uv(Path(platformdirs.user_cache_dir("uv")), place / "scratch", environ)
    uv.run("venv", "--python", sys.executable, str(place / "env"), indexed=False)
    made = str(place / "env/bin/python")
    uv.run("pip", "install", "--only-binary", ":all:", "--python", made, *PACKAGES)
    return made


@pytest.mark.parametrize("client", ["tritonclient", "kserve", "boto3"])
def test_clients_of_triton_kserve_and_sagemaker(served: Served, python: str, client: str) -> None:
    url = f"http://127.0.0.1:{served.port}"
    asked = subprocess.run(
        [python, str(SCRIPT), client, url, served.key or "", served.grpc],
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode == 0, asked.stderr[-4000:]
    assert asked.stdout == f"{client} answered\n"


def test_mlflows_client_for_deployments(served: Served) -> None:
    client = mlflow_deployments.get_deploy_client(f"http://127.0.0.1:{served.port}")
    assert "iris" in [endpoint.name for endpoint in client.list_endpoints()]
    assert client.get_endpoint("iris").endpoint_type == "model"
    answer = client.predict(endpoint="iris", inputs={"instances": [[5.1, 3.5, 1.4, 0.2]]})
    assert answer["predictions"] == [0]
