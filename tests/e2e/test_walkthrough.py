"""The walk-through in `deploy/rollouts` is true: its policy is valid, its bad version is what it says, its
callers tell which version answered."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import gateway
from gateway.rollout_settings import RolloutPolicy
from tests.conftest import needs
from tests.support.running import running

HERE = Path(__file__).parents[2] / "deploy" / "rollouts"
ANSWERED = r"\d+ × 200 by version 1"
FLOWER = {"sepal_length": 5.9, "sepal_width": 3.1, "petal_length": 1.4, "petal_width": 0.2}


def test_its_policy_is_valid() -> None:
    given = re.search(r"GATEWAY_ROLLOUT='(.*)'", (HERE / "README.md").read_text(encoding="utf-8"))
    assert given is not None
    assert RolloutPolicy.model_validate(json.loads(given[1])).canary.steps == [5, 25, 50]


def test_its_scripts_do_what_it_says(tmp_path: Path) -> None:
    needs("sklearn")
    registry = tmp_path / "registry.yaml"
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("GATEWAY_", "MLFLOW_"))
    }
    made = subprocess.run(
        [sys.executable, HERE / "bad_iris.py", str(registry)],
        cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("iris/1 is in ")
    model = gateway.load_model("models:/iris/1", registry=str(registry))
    assert list(model.predict(pd.DataFrame([FLOWER]))) == ["setosa"]
    with pytest.raises(Exception, match="no flower has such petals"):
        model.predict(pd.DataFrame([{**FLOWER, "petal_length": 6.0}]))
    # As in step 2, with a version that answers: the last line of each second names the version.
    with running(tmp_path, "iris=models/iris/1") as server:
        callers = subprocess.Popen(
            [sys.executable, HERE / "callers.py", server.url], env=clean, stdout=subprocess.PIPE, text=True
        )
        try:
            assert callers.stdout is not None
            lines: list[str] = []
            while len(lines) < 60 and not re.search(ANSWERED, "".join(lines)):
                lines.append(callers.stdout.readline())  # one a second; a busy machine loads slowly
        finally:
            callers.kill()
            callers.wait(30)
            callers.stdout.close()  # type: ignore[union-attr]
    assert re.search(ANSWERED, "".join(lines)), lines
