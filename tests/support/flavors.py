"""Sample models for the contract of flavors: at least one live model a flavor, small and trained here.

A sample has a factory, an input, and the framework's own answer to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Sample:
    """`make(directory)` returns the live model (files it needs go into the directory), `answer` what the
    framework says to `data`. `framework`: the import that loading cannot do without, and the package that
    provides it. `needs`: modules beyond the light test set. `brings`: the module that its package ships."""

    name: str
    flavor: str
    make: Callable[[Path], Any]
    answer: Callable[[Any, Any], Any]
    data: Any
    framework: tuple[str, str] | None
    needs: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def table(rows: int = 12, seed: int = 0) -> pd.DataFrame:
    values = np.random.default_rng(seed).normal(size=(rows, 3))
    return pd.DataFrame(values, columns=["a", "b", "c"])


def labels(frame: pd.DataFrame) -> np.ndarray[Any, Any]:
    return (frame["a"] > frame["b"]).to_numpy().astype(int)


TRAIN = table(60, seed=1)
FRAME = table()
MATRIX = FRAME.to_numpy(dtype=np.float32)


def logistic(_: Path) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression().fit(TRAIN, labels(TRAIN))


def forest(_: Path) -> Any:
    from sklearn.ensemble import RandomForestRegressor

    return RandomForestRegressor(n_estimators=5, random_state=0).fit(TRAIN.to_numpy(), labels(TRAIN))


def graph(_: Path) -> Any:
    """y = x @ w, with a free first dimension."""
    from onnx import TensorProto, helper

    weights = helper.make_tensor("w", TensorProto.FLOAT, [3, 2], [1, 2, 3, 4, 5, 6])
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])
    body = helper.make_graph([node], "g", [x], [y], [weights])
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def graph_answer(_: Any, data: np.ndarray[Any, Any]) -> Any:
    return {"y": data @ np.array([[1, 2], [3, 4], [5, 6]], dtype=np.float32)}


class Scaled:
    """A custom model with files and configuration."""

    def load_context(self, context: Any) -> None:
        self.factor = float(Path(context.artifacts["factor"]).read_text()) * context.model_config["times"]

    def predict(self, model_input: Any, params: Any = None) -> Any:
        return model_input["a"].to_numpy() * self.factor


def scaled(directory: Path) -> Any:
    (directory / "factor.txt").write_text("2.5")
    return Scaled()


def row_sums(frame: pd.DataFrame) -> list[float]:
    return [float(total) for total in frame.sum(axis=1)]


LOADER = """
from pathlib import Path

class Shifted:
    def __init__(self, shift):
        self.shift = shift

    def predict(self, model_input, params=None):
        return model_input["a"].to_numpy() + self.shift

def _load_pyfunc(path):
    return Shifted(float(Path(path).read_text()))
"""


def shifted(directory: Path) -> Any:
    (directory / "shift_loader.py").write_text(LOADER)
    (directory / "shift.txt").write_text("10")
    return directory / "shift.txt"


def booster(_: Path) -> Any:
    import xgboost

    return xgboost.train({"nthread": 1, "seed": 0}, xgboost.DMatrix(TRAIN, labels(TRAIN)), 5)


def booster_answer(model: Any, data: Any) -> Any:
    import xgboost

    return model.predict(xgboost.DMatrix(data))


def xgb_classifier(_: Path) -> Any:
    import xgboost

    return xgboost.XGBClassifier(n_estimators=5, n_jobs=1).fit(TRAIN, labels(TRAIN))


def lgb_booster(_: Path) -> Any:
    import lightgbm

    options = {"num_threads": 1, "verbose": -1, "min_data_in_leaf": 2}
    return lightgbm.train(options, lightgbm.Dataset(TRAIN, labels(TRAIN)), 5)


def lgb_classifier(_: Path) -> Any:
    import lightgbm

    return lightgbm.LGBMClassifier(n_estimators=5, n_jobs=1, verbose=-1).fit(TRAIN, labels(TRAIN))


def cat_classifier(_: Path) -> Any:
    import catboost

    model = catboost.CatBoostClassifier(iterations=5, thread_count=1, verbose=0, allow_writing_files=False)
    return model.fit(TRAIN, labels(TRAIN))


def least_squares(_: Path) -> Any:
    import statsmodels.api

    return statsmodels.api.OLS(labels(TRAIN), TRAIN).fit()


def layers(_: Path) -> Any:
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))


def exported(_: Path) -> Any:
    import torch

    rows = torch.export.Dim("rows", min=1, max=1000)
    return torch.export.export(layers(_), (torch.zeros(4, 3),), dynamic_shapes=({0: rows},))


def torch_answer(model: Any, data: Any) -> Any:
    import torch

    module = model.module() if hasattr(model, "module") else model
    with torch.no_grad():
        return module(torch.from_numpy(data)).numpy()


def predicted(model: Any, data: Any) -> Any:
    return model.predict(data)


SKLEARN = ("sklearn", "scikit-learn")
SAMPLES = [
    Sample("sklearn-frame", "sklearn", logistic, predicted, FRAME, SKLEARN),
    Sample("sklearn-array", "sklearn", forest, predicted, FRAME.to_numpy(), SKLEARN),
    Sample(
        "sklearn-proba-pickle",
        "sklearn",
        logistic,
        lambda model, data: model.predict_proba(data),
        FRAME,
        SKLEARN,
        options={"serialization_format": "pickle", "predict_fn": "predict_proba"},
    ),
    Sample(
        "sklearn-skops",
        "sklearn",
        logistic,
        predicted,
        FRAME,
        ("skops", "skops"),
        ("skops",),
        {"serialization_format": "skops"},
    ),
    Sample("onnx", "onnx", graph, graph_answer, MATRIX, ("onnxruntime", "onnxruntime")),
    Sample(
        "python-object",
        "python",
        scaled,
        lambda _, data: data["a"].to_numpy() * 5,
        FRAME,
        ("cloudpickle", "cloudpickle"),
        options={"artifacts": {"factor": "{directory}/factor.txt"}, "model_config": {"times": 2}},
    ),
    Sample(
        "python-function",
        "python",
        lambda _: row_sums,
        lambda _, data: row_sums(data),
        FRAME,
        ("cloudpickle", "cloudpickle"),
    ),
    Sample(
        "loader",
        "loader",
        shifted,
        lambda _, data: data["a"].to_numpy() + 10,
        FRAME,
        None,
        options={"loader_module": "shift_loader", "code_paths": ["{directory}/shift_loader.py"]},
    ),
    Sample("xgboost-booster", "xgboost", booster, booster_answer, FRAME, ("xgboost",) * 2, ("xgboost",)),
    Sample("xgboost-model", "xgboost", xgb_classifier, predicted, FRAME, ("xgboost",) * 2, ("xgboost",)),
    Sample("lightgbm-booster", "lightgbm", lgb_booster, predicted, FRAME, ("lightgbm",) * 2, ("lightgbm",)),
    Sample("lightgbm-model", "lightgbm", lgb_classifier, predicted, FRAME, ("lightgbm",) * 2, ("lightgbm",)),
    Sample("catboost", "catboost", cat_classifier, predicted, FRAME, ("catboost",) * 2, ("catboost",)),
    Sample(
        "statsmodels",
        "statsmodels",
        least_squares,
        predicted,
        FRAME,
        ("statsmodels",) * 2,
        ("statsmodels",),
    ),
    Sample("pytorch-module", "pytorch", layers, torch_answer, MATRIX, ("torch",) * 2, ("torch",)),
    Sample("pytorch-exported", "pytorch", exported, torch_answer, MATRIX, ("torch",) * 2, ("torch",)),
]


def formatted(value: Any, directory: Path) -> Any:
    """Options with the sample's directory put in."""
    if isinstance(value, str):
        return value.replace("{directory}", str(directory))
    if isinstance(value, list):
        return [formatted(item, directory) for item in value]
    if isinstance(value, dict):
        return {key: formatted(item, directory) for key, item in value.items()}
    return value
