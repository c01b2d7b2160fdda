"""Other projects' own clients, unchanged, against a real gateway.

The client of MLflow is installed here.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import gateway
from loaders.signature import ColSpec, Scalar, Signature
from tests.gateway.http.test_v2 import mirror
from tests.support.served import Served, make_registry, settings

mlflow_deployments = pytest.importorskip("mlflow.deployments")

SCRIPT = Path(__file__).with_name("foreign_clients.py")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("clients")
    registry = make_registry(directory)
    columns = {
        "mixed": {"whole": "long", "number": "double", "flag": "boolean", "text": "string"},
        "others": {"content": "binary", "moment": "datetime"},
    }
    signatures = {
        name: Signature(inputs=tuple(ColSpec(Scalar(kind), column) for column, kind in types.items()))
        for name, types in columns.items()
    }
    signatures["texts"] = Signature(inputs=(ColSpec(Scalar.string),))
    for name, signature in signatures.items():
        gateway.log_model(mirror(), name, registry, signature=signature, alias="champion", verify=False)
    with Served(settings(directory, grpc_port=0), registry) as running:
        yield running


@pytest.mark.parametrize("client", ["tritonclient", "kserve", "boto3"])
def test_clients_of_triton_kserve_and_sagemaker(served: Served, clients: str, client: str) -> None:
    url = f"http://127.0.0.1:{served.port}"
    asked = subprocess.run(
        [clients, str(SCRIPT), client, url, served.key or "", served.grpc],
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode == 0, asked.stderr[-4000:]
    assert asked.stdout == f"{client} answered\n"


def test_the_codecs_of_mlserver(served: Served, mlserver: str) -> None:
    url = f"http://127.0.0.1:{served.port}"
    asked = subprocess.run(
        [mlserver, str(SCRIPT), "mlserver", url, "", served.grpc], capture_output=True, text=True, check=False
    )
    assert asked.returncode == 0, asked.stderr[-4000:]


def test_mlflows_client_for_deployments(served: Served) -> None:
    client = mlflow_deployments.get_deploy_client(f"http://127.0.0.1:{served.port}")
    assert "iris" in [endpoint.name for endpoint in client.list_endpoints()]
    assert client.get_endpoint("iris").endpoint_type == "model"
    answer = client.predict(endpoint="iris", inputs={"instances": [[5.1, 3.5, 1.4, 0.2]]})
    assert answer["predictions"] == [0]
