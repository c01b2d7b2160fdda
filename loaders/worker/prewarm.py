"""Makes one prediction in a zygote, so that its children skip the one-time work of a first prediction.

A framework's first prediction in a process searches for plugins, fills caches and imports modules. Each child
would repeat this in its own memory. Runs no model code, and does nothing if the framework is not imported.
Must not know processes.
"""

from __future__ import annotations

import sys

import numpy as np


def predict_once() -> None:
    """Raises what the frameworks raise."""
    if "sklearn.linear_model" in sys.modules and "pandas" in sys.modules:
        _sklearn()


def _sklearn() -> None:
    import pandas as pd
    from sklearn.linear_model import LinearRegression

    from loaders.batch import Array, Columns
    from loaders.flavors.sklearn import Estimator

    columns: dict[str | int, Array] = {"a": np.array([0.0, 1.0, 3.0]), "b": np.array([1.0, 0.0, 2.0])}
    estimator = Estimator(LinearRegression().fit(pd.DataFrame(columns), columns["a"]), "predict")
    estimator.predict(Columns(columns, 3), {})
