"""Answers that are not as declared: a warning at the start, and in the log where live answers are sampled."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pandas as pd

import gateway
from loaders.signature import ColSpec, Signature
from tests.support.running import running


class Worded:
    """Declared to answer numbers, answers words."""

    def predict(self, model_input: Any) -> Any:
        return model_input["x"].astype(int).astype(str).to_frame("y")


def test_an_answer_that_is_not_as_declared_is_given_and_said(tmp_path: Path) -> None:
    declared = Signature(inputs=(ColSpec("double", "x"),), outputs=(ColSpec("double", "y"),))
    gateway.log_model(
        Worded(),
        name="worded",
        registry=str(tmp_path / "registry.yaml"),
        input_example=pd.DataFrame({"x": [1.0]}),
        signature=declared,
        alias="champion",
    )
    (tmp_path / "gateway.yaml").write_text("models: {worded: {check_output: 1, isolation: inline}}\n")
    with running(tmp_path) as server:
        answer = server.predict("worded", [{"x": 7.0}])
        assert answer.json()["predictions"] == [{"y": "7"}]
        version = httpx.get(f"{server.url}/models/worded/versions/1").json()
        assert any("declared double" in warning for warning in version["warnings"])
        end = time.monotonic() + 60
        while not server.events("OutputDiffers"):
            assert time.monotonic() < end
        assert "declared double" in server.events("OutputDiffers")[0]["message"]
