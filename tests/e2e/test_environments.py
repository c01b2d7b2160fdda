"""A model in another environment than its own says so in every answer; a first one is refused."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.linear_model import LinearRegression

import gateway
from tests.support.running import Running, running

ROWS = [{"x": 2.0}]
BODY = {"dataframe_split": {"columns": ["x"], "data": [[2.0]]}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`fits` was made here; `old` and `strict` say that they were made with an old scikit-learn."""
    directory = tmp_path_factory.mktemp("environments")
    frame = pd.DataFrame({"x": np.arange(3.0)})
    for name in ("fits", "old", "strict"):
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
    registry = yaml.safe_load((directory / "registry.yaml").read_text())
    for model in registry["models"].values():
        model["versions"] = {"1": {"source": model["versions"].popitem()[1]["source"]}}
    (directory / "registry.yaml").write_text(yaml.safe_dump(registry))
    (directory / "gateway.yaml").write_text(
        "environments: {build: never}\nmodels: {old: {environment: same}}\n", encoding="utf-8"
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


def test_an_answer_from_the_model_s_own_environment_says_nothing(server: Running) -> None:
    answer = server.predict("fits", ROWS)
    assert answer.status_code == 200, answer.text
    assert "x-model-warnings" not in answer.headers
    assert "warnings" not in answer.json()


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
