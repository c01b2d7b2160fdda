"""A model behind BentoML. Its environment: MODEL is the file, BATCH is 1 if BentoML may merge requests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import bentoml
import numpy as np

sys.path.insert(0, os.environ["APPS"])
from fitted import loaded

BATCH = os.environ["BATCH"] == "1"


@bentoml.service(logging={"access": {"enabled": False}}, traffic={"timeout": 60})
class Model:
    def __init__(self) -> None:
        self.predict_rows = loaded(Path(os.environ["MODEL"]))

    @bentoml.api(batchable=BATCH)
    def predict(self, rows: np.ndarray) -> np.ndarray:
        return self.predict_rows(rows)
