"""Models that answer too much, through a real server: their own failure, and nothing happens to others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pytest

import gateway
from tests.support.served import Served, settings

LIMIT = 4_000_000


def generous() -> Any:
    """A model that answers what its parameter says. Its class is local, so that it is pickled by value."""

    class Generous:
        def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
            import numpy as np
            import pandas as pd

            give = (params or {}).get("give", "one")
            if give == "index":
                return pd.DataFrame(index=pd.RangeIndex(2_000_000_000))
            if give == "axis":
                return np.empty((2_000_000_000, 0))
            if give == "lists":
                return [[] for _ in range(200_000)]
            if give == "text":
                return ["x" * 1000] * 5000
            if give == "array":
                return np.zeros(1_000_000)
            if give == "large":
                return [[0.5, 1, None]] * 15_000
            return [1]

    return Generous()


@pytest.fixture(scope="module", params=["auto", "inline"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory: Path = tmp_path_factory.mktemp("generous")
    registry = str(directory / "registry.yaml")
    example = pd.DataFrame({"x": [1.0]})
    gateway.log_model(
        generous(), "generous", registry, input_example=example, params={"give": "one"}, alias="champion"
    )
    isolation: Literal["auto", "inline"] = request.param
    with Served(settings(directory, isolation, max_answer_bytes=LIMIT), registry) as running:
        yield running


def ask(served: Served, give: str) -> Any:
    body = {"dataframe_records": [{"x": 1.0}], "params": {"give": give}}
    return served.post("/predict/generous", body)


@pytest.mark.parametrize("give", ["index", "axis", "text", "array", "lists"])
def test_an_answer_that_is_too_large_is_the_models_failure(served: Served, give: str) -> None:
    if give == "lists" and served.gateway.settings.isolation == "inline":
        return  # they are in this process already, and their JSON is short
    reply = ask(served, give)
    assert (reply.status, reply.code, reply.json["retryable"]) == (500, "PREDICTION_FAILED", False)
    assert "max_answer_bytes" in reply.json["hint"]
    assert ask(served, "one").json["predictions"] == [1]
    assert [s.runner.status().get("crashes", 0) for s in served.gateway.manager if s.runner] == [0]


def test_a_large_answer_within_the_limit_comes_whole(served: Served) -> None:
    reply = ask(served, "large")
    assert reply.status == 200
    assert reply.json["predictions"] == [[0.5, 1, None]] * 15_000
    assert reply.json["model"]["name"] == "generous"
    assert int(reply.headers["content-length"]) == len(reply.body)
