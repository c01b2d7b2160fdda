"""Work done once in a zygote need not be repeated in its children."""

from __future__ import annotations

import subprocess
import sys

FIRST = """
import sys
import pandas
import sklearn.linear_model
from loaders.worker.prewarm import predict_once
predict_once()
model = sklearn.linear_model.LogisticRegression()
known = set(sys.modules)
frame = pandas.DataFrame({"x": [0.0, 1.0]})
from loaders.batch import Columns
from loaders.flavors.sklearn import Estimator
estimator = Estimator(model.fit(frame, [0, 1]), "predict")
estimator.predict(Columns({"x": frame["x"].to_numpy()}, 2), {})
estimator.predict(Columns({"x": frame["x"].to_numpy() > 0.5}, 2), {})
print(sorted(set(sys.modules) - known))
"""
NOTHING = """
import sys
from loaders.worker.prewarm import predict_once
predict_once()
print("sklearn" in sys.modules, "pandas" in sys.modules)
"""


def printed(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_a_prediction_after_it_imports_nothing_more() -> None:
    assert printed(FIRST).strip() == "[]"


def test_it_imports_no_framework_itself() -> None:
    assert printed(NOTHING).strip() == "False False"
