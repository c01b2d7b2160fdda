"""The gateway as a managed host starts it: SageMaker, for one model and for many, and Vertex AI."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

import gateway
import loaders
from gateway.commands.hosting import asked
from gateway.commands.terminal import Failure
from tests.support.running import Running
from tests.support.shell import free_port

ROWS = {"instances": [{"x": 1.0}, {"x": 3.0}]}


def save(place: Path, factor: float) -> None:
    import pandas as pd

    frame = pd.DataFrame({"x": np.arange(4.0)})
    loaders.save_model(LinearRegression().fit(frame, frame["x"] * factor), place, input_example=frame)


@contextmanager
def started(directory: Path, *arguments: str, **environ: str) -> Iterator[httpx.Client]:
    """A gateway process on a port that the host chose, not the command line."""
    chosen = {"GATEWAY_HOST": "127.0.0.1", "GATEWAY_ISOLATION": "inline"}
    server = Running(directory, arguments, {**chosen, **environ}, port=None)
    try:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            yield client
        assert server.stop() == 0
    finally:
        server.stop()


def predictions(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return np.round(answer.json()["predictions"], 6).tolist()


def test_sagemaker_serves_the_model_that_it_unpacked(tmp_path: Path) -> None:
    save(tmp_path / "ml/model", 2.0)
    port = str(free_port())
    environ = {"SAGEMAKER_BIND_TO_PORT": port, "SAGEMAKER_BASE_DIR": str(tmp_path / "ml")}
    with started(tmp_path, "serve", **environ) as client:
        assert client.base_url.port == int(port)
        assert client.get("/ping").status_code == 200
        assert predictions(client.post("/invocations", json=ROWS)) == [2.0, 6.0]
        table = client.post("/invocations", content="x\n1\n", headers={"Content-Type": "text/csv"})
        assert predictions(table) == [2.0]


def test_an_archive_of_the_directory_itself_is_found(tmp_path: Path) -> None:
    save(tmp_path / "model/iris", 1.0)
    found = asked({"SAGEMAKER_BASE_DIR": str(tmp_path)}, ["serve"], tmp_path)
    assert found.models == [f"model={tmp_path / 'model/iris'}"]
    assert found.flags == {"port": 8080, "host": "0.0.0.0"}


def test_a_directory_called_serve_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "serve").mkdir()
    assert asked({}, ["serve"], tmp_path).models == ["serve"]


def test_sagemaker_adds_and_removes_models(tmp_path: Path) -> None:
    models = tmp_path / "ml/models"
    for name, factor in (("a", 2.0), ("b", 3.0)):
        save(models / name / "model", factor)
    (models / "empty").mkdir()
    environ = {"SAGEMAKER_MULTI_MODEL": "true", "SAGEMAKER_BIND_TO_PORT": str(free_port())}
    with started(tmp_path, "serve", SAGEMAKER_BASE_DIR=str(tmp_path / "ml"), **environ) as client:
        assert client.get("/ping").status_code == 200
        assert client.get("/models").json()["models"] == []
        for name in "ab":
            body = {"model_name": name, "url": str(models / name / "model")}
            assert client.post("/models", json=body).status_code == 200
            assert client.post("/models", json=body).status_code == 409
            assert client.get(f"/models/{name}").json() == {"modelName": name, "modelUrl": body["url"]}
        assert [one["modelName"] for one in client.get("/models").json()["models"]] == ["a", "b"]
        assert predictions(client.post("/models/a/invoke", json=ROWS)) == [2.0, 6.0]
        assert predictions(client.post("/models/b/invoke", json=ROWS)) == [3.0, 9.0]
        assert client.delete("/models/a").status_code == 200
        assert client.delete("/models/a").status_code == 404
        assert client.post("/models/a/invoke", json=ROWS).status_code == 404
        # The same name again is another model.
        shutil.copytree(models / "b/model", models / "a2")
        body = {"model_name": "a", "url": str(models / "a2")}
        assert client.post("/models", json=body).status_code == 200
        assert predictions(client.post("/models/a/invoke", json=ROWS)) == [3.0, 9.0]
        for url in (str(models / "empty"), str(models / "nothing"), "/etc", f"{models}/../model", "s3://b/m"):
            refused = client.post("/models", json={"model_name": "c", "url": url})
            assert (refused.status_code, refused.json()["error_code"]) == (400, "INVALID_REFERENCE"), url
        for body in ({}, {"model_name": "c"}, {"model_name": 1, "url": "x"}, []):
            assert client.post("/models", json=body).status_code == 400
        assert client.post("/models", json={"model_name": "c:d", "url": str(models)}).status_code == 400
        assert client.put("/models/a").status_code == 405
        assert client.get("/models/c").status_code == 404


def test_a_token_for_control_alone_adds_and_removes_whole_models(tmp_path: Path) -> None:
    save(tmp_path / "ml/models/a/model", 2.0)
    tokens = {"whole": ["a"], "partly": ["a@champion"]}
    entries = [
        {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "control": control}
        for name, control in tokens.items()
    ]
    (tmp_path / "tokens.json").write_text(json.dumps(entries))
    environ = {"SAGEMAKER_MULTI_MODEL": "true", "SAGEMAKER_BIND_TO_PORT": str(free_port())}
    environ["GATEWAY_ACCESS__TOKENS_FILE"] = str(tmp_path / "tokens.json")
    body = {"model_name": "a", "url": str(tmp_path / "ml/models/a/model")}
    whole, partly = ({"authorization": f"Bearer {name}"} for name in tokens)
    with started(tmp_path, "serve", SAGEMAKER_BASE_DIR=str(tmp_path / "ml"), **environ) as client:
        assert client.post("/models", json=body).status_code == 401
        assert client.post("/models", json=body, headers=partly).status_code == 403
        assert client.post("/models", json=body, headers=whole).status_code == 200
        for path in ("/models/a", "/models/a@champion"):
            assert client.delete(path, headers=partly).status_code == 403
        assert client.delete("/models/a", headers=whole).status_code == 200


def test_a_model_that_does_not_fit_is_507_and_one_that_is_broken_is_not_kept(tmp_path: Path) -> None:
    models = tmp_path / "ml/models"
    save(models / "a", 2.0)
    save(models / "broken", 2.0)
    for file in (models / "broken").glob("model.*"):
        file.write_bytes(b"no model")
    environ = {"SAGEMAKER_MULTI_MODEL": "true", "SAGEMAKER_BIND_TO_PORT": str(free_port())}
    environ |= {"SAGEMAKER_BASE_DIR": str(tmp_path / "ml"), "GATEWAY_MEMORY_LIMIT": "1"}
    with started(tmp_path, "serve", **environ) as client:
        full = client.post("/models", json={"model_name": "a", "url": str(models / "a")})
        assert full.status_code == 507, full.text
        assert client.get("/models").json()["models"] == []
    environ["GATEWAY_MEMORY_LIMIT"] = "2Gi"
    with started(tmp_path, "serve", **environ) as client:
        broken = client.post("/models", json={"model_name": "b", "url": str(models / "broken")})
        assert broken.status_code == 503, broken.text
        assert client.get("/models").json()["models"] == []
        assert client.post("/models", json={"model_name": "b", "url": str(models / "a")}).status_code == 200


def test_vertex_serves_on_the_paths_that_it_names(tmp_path: Path) -> None:
    save(tmp_path / "artifacts", 2.0)
    environ = {
        "AIP_HTTP_PORT": str(free_port()),
        "AIP_HEALTH_ROUTE": "/v1/endpoints/1/deployedModels/2",
        "AIP_PREDICT_ROUTE": "/v1/endpoints/1/deployedModels/2:predict",
        "AIP_STORAGE_URI": str(tmp_path / "artifacts"),
    }
    with started(tmp_path, **environ) as client:
        assert client.base_url.port == int(environ["AIP_HTTP_PORT"])
        assert client.get(environ["AIP_HEALTH_ROUTE"]).status_code == 200
        path = environ["AIP_PREDICT_ROUTE"]
        assert predictions(client.post(path, json={**ROWS, "parameters": None})) == [2.0, 6.0]
        by_position = client.post(path, json={"instances": [[1.0]]})
        assert predictions(by_position) == [2.0]
        assert "position" in by_position.json()["warnings"][0]
        unknown = client.post(path, json={**ROWS, "parameters": {"no": 1}})
        assert predictions(unknown) == [2.0, 6.0]
        for body in ({}, {"inputs": []}, {**ROWS, "parameters": 5}, {"instances": [{"x": "a"}]}):
            assert client.post(path, json=body).status_code == 400


def test_what_a_host_says_wrongly_is_said() -> None:
    for environ in ({"AIP_HTTP_PORT": "x"}, {"AIP_HTTP_PORT": "80", "AIP_PREDICT_ROUTE": "predict"}):
        with pytest.raises(Failure):
            asked(environ, [])
    with pytest.raises(Failure):
        asked({"SAGEMAKER_BIND_TO_PORT": "70000"}, ["serve"])


def test_params_are_parameters(tmp_path: Path) -> None:
    import pandas as pd

    class Scaled:
        def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
            return (model_input["x"] * (params or {})["factor"]).to_numpy()

    gateway.log_model(
        Scaled(),
        "scaled",
        str(tmp_path / "registry.yaml"),
        input_example=pd.DataFrame({"x": [1.0]}),
        params={"factor": 2.0},
        alias="champion",
        verify=False,
    )
    environ = {"AIP_HTTP_PORT": str(free_port()), "AIP_PREDICT_ROUTE": "/ask", "AIP_HEALTH_ROUTE": "/up"}
    environ["AIP_STORAGE_URI"] = str(tmp_path / "models/scaled/1")
    with started(tmp_path, **environ) as client:
        assert predictions(client.post("/ask", json=ROWS)) == [2.0, 6.0]
        assert predictions(client.post("/ask", json={**ROWS, "parameters": {"factor": 5.0}})) == [5.0, 15.0]
