"""What every server without a format of its own does with a model's file: the same, so the rest differs."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = ("sepal length", "sepal width", "petal length", "petal width")


def loaded(file: Path) -> Callable[..., Any]:
    """From rows (and the names of their columns, for a model that was fitted with names) to an array."""
    if file.suffix == ".onnx":
        return _session(file)
    model = pickle.loads(file.read_bytes())
    if not hasattr(model, "feature_names_in_"):
        return lambda rows: model.predict(np.asarray(rows, np.float64))
    import pandas as pd

    return lambda rows, columns=COLUMNS: model.predict(pd.DataFrame(rows, columns=list(columns)))


def _session(file: Path) -> Callable[..., Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    return lambda rows: session.run(None, {name: np.asarray(rows, np.float32)})[0]
