"""Loads and calls one small model in a zygote, so that its children skip the one-time work of a first model.

The first load and the first prediction of a process search for plugins, fill caches, make objects and import
modules. Each child would repeat this in its own memory, which takes time and megabytes. Runs no model code
but that of its own small models, and does nothing if the framework is not imported. Must not know processes.
"""

from __future__ import annotations

import json
import pickle
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np

_MODEL: Final = "model.pkl"
_COLUMNS: Final = ("a", "b")


def predict_once() -> None:
    """Raises what the frameworks raise."""
    if "sklearn.linear_model" in sys.modules and "pandas" in sys.modules:
        with tempfile.TemporaryDirectory() as directory:
            _sklearn(Path(directory))


def _sklearn(directory: Path) -> None:
    import pandas as pd
    from sklearn.linear_model import LinearRegression, LogisticRegression

    from loaders.batch import Array, Columns
    from loaders.model import open_model
    from loaders.package import Package

    columns: dict[str | int, Array] = {"a": np.array([0.0, 1.0, 3.0]), "b": np.array([1.0, 0.0, 2.0])}
    table, target = pd.DataFrame(columns), np.array([0, 1, 1])
    # Loading the usual form imports cloudpickle.
    form = "pickle" if find_spec("cloudpickle") is None else "cloudpickle"
    for estimator in (LinearRegression(), LogisticRegression(max_iter=2, tol=1.0)):
        (directory / _MODEL).write_bytes(pickle.dumps(estimator.fit(table, target)))
        model = open_model(Package.from_json(_described(form), directory), {}, threads=1)
        model.run(Columns(columns, 3), {})
        model.close()


def _described(form: str) -> dict[str, Any]:
    """The content of the small models' `MLmodel`."""
    inputs = [{"type": "double", "name": name, "required": True} for name in _COLUMNS]
    return {
        "flavors": {
            "python_function": {"loader_module": "mlflow.sklearn", "model_path": _MODEL},
            "sklearn": {"pickled_model": _MODEL, "serialization_format": form},
        },
        "signature": {"inputs": json.dumps(inputs)},
    }
