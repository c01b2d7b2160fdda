"""A model in another environment than its own says so in every answer; a first one is refused."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.linear_model import LinearRegression

import gateway
import loaders
from tests.gateway.environments.test_check import by_value
from tests.support.mlflow_server import Server
from tests.support.packages import described
from tests.support.running import Running, running

ROWS = [{"x": 2.0}]
BODY = {"dataframe_split": {"columns": ["x"], "data": [[2.0]]}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`fits` was made here; `old` and `strict` say that they were made with an old scikit-learn; so does
    `broken`, whose pickle names a class that this scikit-learn does not have. `old` and `broken` run here by
    the operator's word."""
    directory = tmp_path_factory.mktemp("environments")
    frame = pd.DataFrame({"x": np.arange(3.0)})
    for name in ("fits", "old", "strict", "broken"):
        model = LinearRegression().fit(frame, frame["x"])
        gateway.log_model(
            model, name=name, registry=directory / "registry.yaml", input_example=frame, alias="champion"
        )
        place = directory / "models" / name / "1"
        if name != "fits":
            content = yaml.safe_load((place / "MLmodel").read_text())
            content["flavors"]["sklearn"]["sklearn_version"] = "1.0.2"
            (place / "MLmodel").write_text(yaml.safe_dump(content))
            (place / "requirements.txt").write_text("scikit-learn==1.0.2\n")
        if name == "broken":
            pickle = place / "model.pkl"
            pickle.write_bytes(pickle.read_bytes().replace(b"LinearRegression", b"LinearRegressyon"))
    registry = yaml.safe_load((directory / "registry.yaml").read_text())
    for model in registry["models"].values():
        model["versions"] = {"1": {"source": model["versions"].popitem()[1]["source"]}}
    (directory / "registry.yaml").write_text(yaml.safe_dump(registry))
    (directory / "gateway.yaml").write_text(
        "environments: {build: never}\nmodels: {old: {environment: same}, broken: {environment: same}}\n",
        encoding="utf-8",
    )
    with running(directory, "--registry", str(directory / "registry.yaml")) as found:
        yield found


def test_promise_10_every_answer_from_another_environment_says_so(server: Running) -> None:
    answer = server.predict("old", ROWS)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-model-warnings"] == "environment"
    [warning] = answer.json()["warnings"]
    assert "1.0.2" in warning
    bare = httpx.post(f"{server.url}/invocations", json=BODY, headers={"X-Model": "models:/old"}, timeout=60)
    assert bare.headers["x-model-warnings"] == "environment"
    assert set(bare.json()) == {"predictions"}
    assert server.metric("gateway_environment_mismatch", model="old", version="1") == 1


V2 = {"inputs": [{"name": "x", "datatype": "FP64", "shape": [1], "data": [2.0]}]}
SAID = "made with 1.0.2, here is "


@pytest.mark.parametrize(
    ("path", "body", "warnings"),
    [
        ("/predict/old", BODY, lambda answer: answer["warnings"]),
        ("/predict/old/versions/1", BODY, lambda answer: answer["warnings"]),
        ("/v2/models/old/infer", V2, lambda answer: [answer["parameters"]["warnings"]]),
        ("/v1/models/old:predict", {"instances": [{"x": 2.0}]}, lambda answer: answer["warnings"]),
        ("/endpoints/old/invocations", BODY, lambda answer: answer["warnings"]),
    ],
)
def test_promise_10_holds_on_every_route(server: Running, path: str, body: Any, warnings: Any) -> None:
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert "environment" in answer.headers["x-model-warnings"]
    assert any(SAID in text for text in warnings(answer.json()))


def test_promise_10_holds_for_tables_and_for_what_the_model_refuses(server: Running) -> None:
    csv = httpx.post(
        f"{server.url}/predict/old", content="x\n2.0\n", headers={"Content-Type": "text/csv"}, timeout=60
    )
    assert csv.headers["x-model-warnings"] == "environment"
    failed = server.predict("old", [{"x": None}])
    assert failed.status_code in (422, 500), failed.text
    assert failed.headers["x-model-warnings"] == "environment", "it may be why the model failed"


def test_a_model_that_cannot_be_loaded_elsewhere_says_why_and_what_helps(server: Running) -> None:
    problem = server.predict("broken", ROWS).json()
    assert problem["error_code"] == "MODEL_UNAVAILABLE"
    assert "LinearRegressyon" in problem["message"]
    assert SAID in problem["message"]
    assert problem["retryable"] is False
    assert "gateway env build models:/broken/1" in problem["hint"]


def test_a_first_version_without_its_environment_is_refused_with_what_helps(server: Running) -> None:
    answer = server.predict("strict", ROWS)
    problem = answer.json()
    assert (answer.status_code, problem["error_code"]) == (503, "MODEL_UNAVAILABLE")
    assert problem["retryable"] is False
    assert "made with 1.0.2, here is " in problem["message"]
    assert "gateway env build models:/strict/1" in problem["hint"]
    view = httpx.get(f"{server.url}/models/strict/versions/1", timeout=60).json()
    assert view["state"] == "FAILED"
    assert view["environment"]["verdict"] == "differs", "the check is shown of a refused version too"
    assert view["environment"]["sentence"] in view["reason"]
    assert view["hint"] == problem["hint"]


def ran(server: Running, *arguments: str) -> tuple[int, str]:
    """A command for this gateway, with what it said."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
    environ |= {"GATEWAY_STATE_DIR": str(server.directory / "state")}
    environ |= {"GATEWAY_CACHE_DIR": str(server.directory / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "gateway", *arguments],
        cwd=server.directory, env=environ, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_an_index_that_is_away_is_said_to_callers_with_what_helps(server: Running, tmp_path: Path) -> None:
    """Where environments are built, and nothing answers: no wait for the timeout of each request."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        index = f"http://joe:hunter2@127.0.0.1:{taken.getsockname()[1]}/simple"
        settings = {"GATEWAY_ENVIRONMENTS__BUILD": "auto", "UV_OFFLINE": "0", "UV_HTTP_RETRIES": "0"}
        registry = str(server.directory / "registry.yaml")
        with running(tmp_path, "--registry", registry, UV_DEFAULT_INDEX=index, **settings) as alone:
            problem = alone.predict("strict", ROWS).json()
            assert problem["error_code"] == "MODEL_UNAVAILABLE", problem
            assert SAID in problem["message"]
            assert "package index does not answer" in problem["message"]
            assert "hunter2" not in str(problem)
            assert problem["retryable"] is False
            assert "gateway env build models:/strict/1" in problem["hint"]
            assert alone.predict("fits", ROWS).status_code == 200, "others are not concerned"


def test_status_push_and_promote_say_it_too(server: Running, tmp_path: Path) -> None:
    server.predict("old", ROWS)
    server.predict("strict", ROWS)
    _, text = ran(server, "status", "--url", server.url)
    assert "old/1: the model runs in another environment than its own" in text
    assert "old/1: help: gateway env build models:/old/1" in text
    assert "strict/1: help: gateway env build models:/strict/1" in text
    _, text = ran(server, "status", "--url", server.url, "--output", "json")
    rows = {row["model"]: row for row in json.loads(text)["versions"]}
    assert SAID in rows["old"]["environment"]["mismatch"]

    code, text = ran(server, "promote", "old@next", "1", "--url", server.url, "--dry-run")
    assert code == 0, text
    assert "warning: the model runs in another environment than its own: " in text
    assert SAID in text
    code, text = ran(server, "promote", "strict@next", "1", "--url", server.url)
    assert code == 1
    assert SAID in text
    assert "gateway env build models:/strict/1" in text
    code, text = ran(server, "promote", "strict@forced", "1", "--url", server.url, "--force", "--wait")
    assert code == 0, text
    assert SAID in text

    shutil.copytree(server.directory / "models" / "strict" / "1", tmp_path / "pushed")
    code, text = ran(
        server, "push", str(tmp_path / "pushed"), "--name", "pushed", "--registry", str(tmp_path / "r.yaml")
    )
    assert code == 0, text
    assert SAID in text
    assert "gateway env build models:/pushed/1" in text
    code, text = ran(
        server, "promote", "pushed@champion", "1", "--registry", str(tmp_path / "r.yaml"),
        "--config", str(server.directory / "gateway.yaml"), "--force",
    )  # fmt: skip
    assert code == 0, text
    assert SAID in text


def test_a_directory_that_was_named_gets_no_command_for_a_registry(server: Running, tmp_path: Path) -> None:
    with running(tmp_path, str(server.directory / "models" / "strict" / "1")) as alone:
        [model] = httpx.get(f"{alone.url}/models", timeout=60).json()["models"]
        problem = alone.predict(model["name"], ROWS).json()
    assert SAID in problem["message"]
    assert "models:/" not in problem["hint"]
    assert "gateway env build DIRECTORY" in problem["hint"]


def test_an_answer_from_the_model_s_own_environment_says_nothing(server: Running) -> None:
    answer = server.predict("fits", ROWS)
    assert answer.status_code == 200, answer.text
    assert "x-model-warnings" not in answer.headers
    assert "warnings" not in answer.json()


@pytest.mark.all
def test_champions_of_several_years_in_mlflow_name_the_python_that_is_missing(
    mlflow_server: Server, tmp_path: Path
) -> None:
    """A registry on a real server, and a machine with one Python."""
    frame = pd.DataFrame({"x": np.arange(3.0)})
    model = LinearRegression().fit(frame, frame["x"])
    loaders.save_model(model, tmp_path / "now", input_example=frame, verify=False)
    champions = {"years-now": tmp_path / "now"}
    for year, python in (("2022", "3.8.18"), ("2024", "3.12.1")):
        champions[f"years-{year}"] = described(
            tmp_path / year, loader="mlflow.pyfunc.model", requirements="cloudpickle", python=python,
            created=f"{year}-05-20 12:00:00.000000", function={"python_model": "python_model.pkl"},
            files={"python_model.pkl": by_value()},
        ).path  # fmt: skip
    run = mlflow_server.call("POST", "runs/create", experiment_id="0")["run"]["info"]
    place = run["artifact_uri"].removeprefix("mlflow-artifacts:/")
    for name, path in champions.items():
        for file in path.rglob("*"):
            if file.is_file():
                target = f"{place}/{name}/{file.relative_to(path)}"
                url = f"{mlflow_server.url}/api/2.0/mlflow-artifacts/artifacts/{target}"
                httpx.put(url, content=file.read_bytes(), timeout=60).raise_for_status()
        mlflow_server.call("POST", "registered-models/create", name=name)
        source = f"{run['artifact_uri']}/{name}"
        mlflow_server.call("POST", "model-versions/create", name=name, source=source, run_id=run["run_id"])
        mlflow_server.call("POST", "registered-models/alias", name=name, alias="champion", version="1")
    alone = {"PATH": "/usr/bin:/bin", "PYENV_ROOT": "/nonexistent", "UV_PYTHON_INSTALL_DIR": "/nonexistent"}
    with running(
        tmp_path, "--registry", mlflow_server.url, GATEWAY_ENVIRONMENTS__BUILD="auto", **alone
    ) as gateway_there:
        assert gateway_there.predict("years-now", ROWS).status_code == 200
        for year, python in (("2022", "3.8"), ("2024", "3.12")):
            problem = gateway_there.predict(f"years-{year}", ROWS).json()
            assert f"made with {python}" in problem["message"], problem
            assert f"uv python install {python}" in problem["hint"]
            assert problem["retryable"] is False
