"""Packages that the real MLflow wrote, asked where mlflow cannot be imported, answer as MLflow answers.

Each package is called in every payload form of the scoring protocol. Whatever MLflow's own scoring code
answers with 200, the product must answer with equal predictions (to 1e-6).
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import loaders
from tests.conftest import needs
from tests.contracts.test_flavors import in_blocked
from tests.support.flavors import FRAME, TRAIN, labels
from tests.support.flavors import cat_classifier as make_catboost
from tests.support.flavors import graph as make_graph

pytestmark = [pytest.mark.all, pytest.mark.filterwarnings("ignore")]

FEW = FRAME[:4]
MIXED = pd.DataFrame(
    {"age": [30, 41, 52, 23], "city": ["Oslo", "Rome", "Oslo", "Bonn"], "income": [1.5, 2.5, 3.25, 0.5]}
)


@dataclass(frozen=True)
class Logged:
    """`save(mlflow, path)` writes the package; `data` and `params` are the input of its calls."""

    save: Callable[[Any, Path], None]
    data: Any
    params: dict[str, Any] | None = None
    needs: tuple[str, ...] = ()


def estimator(kind: str, data: Any = FEW, **options: Any) -> Logged:
    def save(mlflow: Any, path: Path) -> None:
        from sklearn.linear_model import LogisticRegression

        train = TRAIN if isinstance(data, pd.DataFrame) else TRAIN.to_numpy()
        model = LogisticRegression().fit(train, labels(TRAIN))
        mlflow.sklearn.save_model(
            model, path, serialization_format=kind, input_example=data, pip_requirements=[], **options
        )

    return Logged(save, data, needs=("skops",) if kind == "skops" else ())


def pipeline(mlflow: Any, path: Path) -> None:
    from sklearn.compose import make_column_transformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    steps = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore"), ["city"]), (StandardScaler(), ["age", "income"])
    )
    model = make_pipeline(steps, LogisticRegression()).fit(MIXED, [0, 1, 0, 1])
    mlflow.sklearn.save_model(
        model, path, input_example=MIXED, serialization_format="cloudpickle", pip_requirements=[]
    )


def graph(mlflow: Any, path: Path, data: Any) -> None:
    mlflow.onnx.save_model(make_graph(path), path, input_example=data, pip_requirements=[])


def columns_graph(mlflow: Any, path: Path) -> None:
    """One input a column, added: MLflow feeds them by name."""
    from onnx import TensorProto, helper

    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("a", "b", "c")]
    total = helper.make_tensor_value_info("total", TensorProto.FLOAT, ["n"])
    body = helper.make_graph([helper.make_node("Sum", ["a", "b", "c"], ["total"])], "g", infos, [total])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    mlflow.onnx.save_model(model, path, input_example=FEW.astype(np.float32), pip_requirements=[])


def with_context(mlflow: Any, path: Path) -> None:
    class Scaled(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
        def load_context(self, context: Any) -> None:
            with open(context.artifacts["factor"]) as file:
                self.factor = float(file.read())

        def predict(self, context: Any, model_input: Any, params: Any = None) -> Any:
            return model_input["a"] * self.factor * context.model_config["times"]

    factor = path.parent / "factor.txt"
    factor.write_text("2.5")
    mlflow.pyfunc.save_model(
        path,
        python_model=Scaled(),
        artifacts={"factor": str(factor)},
        model_config={"times": 3},
        input_example=FEW,
        pip_requirements=[],
    )


def with_params(mlflow: Any, path: Path) -> None:
    class Powered(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
        def predict(self, model_input: Any, params: Any = None) -> Any:
            return {"total": float(model_input["a"].sum()) ** params["power"], "params": params}

    signature = mlflow.models.infer_signature(FEW, {"total": 1.0}, {"power": 1, "name": "x"})
    mlflow.pyfunc.save_model(path, python_model=Powered(), signature=signature, pip_requirements=[])


def function(mlflow: Any, path: Path) -> None:
    def total(model_input: Any) -> Any:
        return model_input.sum(axis=1)

    mlflow.pyfunc.save_model(path, python_model=total, input_example=FEW, pip_requirements=[])


def hinted_function(mlflow: Any, path: Path) -> None:
    def upper(model_input: list[str]) -> list[str]:
        return [text.upper() for text in model_input]

    mlflow.pyfunc.save_model(path, python_model=upper, pip_requirements=[])


def hinted_numbers(mlflow: Any, path: Path) -> None:
    class Doubled(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
        def predict(self, model_input: list[dict[str, float]]) -> list[float]:
            return [sum(item.values()) * 2 for item in model_input]

    mlflow.pyfunc.save_model(path, python_model=Doubled(), pip_requirements=[])


PEOPLE_CODE = """
import datetime
from typing import Optional

import mlflow
import pydantic


class Person(pydantic.BaseModel):
    name: str
    age: int
    tags: Optional[list[str]] = None


class Greeter(mlflow.pyfunc.PythonModel):
    def predict(self, model_input: list[Person], params=None) -> list[str]:
        return [f"{person.name} {person.age + 1} {person.tags}" for person in model_input]


class Dated(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: list[dict[str, Optional[datetime.datetime]]]) -> list[list[str]]:
        return [[key + str(item and item.year) for key, item in row.items()] for row in model_input]


class Sized(mlflow.pyfunc.PythonModel):
    def predict(self, model_input: list[bytes]):
        return [len(item) for item in model_input]
"""


def hinted_classes(kind: str) -> Callable[[Any, Path], None]:
    """Real annotations (this file's are text), of classes that pickle by value."""

    def save(mlflow: Any, path: Path) -> None:
        namespace: dict[str, Any] = {"__name__": "nowhere"}
        exec(compile(PEOPLE_CODE, "nowhere.py", "exec", dont_inherit=True), namespace)
        mlflow.pyfunc.save_model(path, python_model=namespace[kind](), pip_requirements=[])

    return save


def hinted_people_code(mlflow: Any, path: Path) -> None:
    (path.parent / "people.py").write_text(PEOPLE_CODE + "\n\nmlflow.models.set_model(Greeter())\n")
    mlflow.pyfunc.save_model(path, python_model=str(path.parent / "people.py"), pip_requirements=[])


CODE = """
from mlflow.models import ModelConfig, set_model
from mlflow.pyfunc import PythonModel

FACTOR = ModelConfig(development_config={"factor": 1}).get("factor")


class Coded(PythonModel):
    def predict(self, context, model_input, params=None):
        return model_input["a"] * FACTOR


set_model(Coded())
"""


def coded(mlflow: Any, path: Path) -> None:
    (path.parent / "model_code.py").write_text(CODE)
    mlflow.pyfunc.save_model(
        path,
        python_model=str(path.parent / "model_code.py"),
        model_config={"factor": 4},
        input_example=FEW,
        pip_requirements=[],
    )


HINTED_CODE = """
import mlflow


def shout(model_input: list[str]) -> list[str]:
    return [text + "!" for text in model_input]


mlflow.models.set_model(shout)
"""


def hinted_code(mlflow: Any, path: Path) -> None:
    (path.parent / "hinted_code.py").write_text(HINTED_CODE)
    mlflow.pyfunc.save_model(path, python_model=str(path.parent / "hinted_code.py"), pip_requirements=[])


def helped(mlflow: Any, path: Path) -> None:
    """A class of a module that travels in code/, and one that it imports only when asked."""
    directory = path.parent / "modules"
    directory.mkdir()
    (directory / "outer_part.py").write_text(
        "import mlflow\n\n\nclass Helped(mlflow.pyfunc.PythonModel):\n"
        "    def predict(self, context, model_input, params=None):\n"
        "        import inner_part\n\n        return model_input['a'] + inner_part.SHIFT\n"
    )
    (directory / "inner_part.py").write_text("SHIFT = 7\n")
    sys.path.insert(0, str(directory))
    try:
        import outer_part  # type: ignore[import-not-found]

        mlflow.pyfunc.save_model(
            path,
            python_model=outer_part.Helped(),
            code_paths=[str(directory / "outer_part.py"), str(directory / "inner_part.py")],
            input_example=FEW,
            pip_requirements=[],
        )
    finally:
        sys.path.remove(str(directory))


def own_loader(mlflow: Any, path: Path) -> None:
    (path.parent / "own_loader.py").write_text(
        "class Added:\n    def __init__(self, path):\n        self.shift = float(open(path).read())\n\n"
        "    def predict(self, model_input, params=None):\n        return model_input['a'] + self.shift\n\n\n"
        "def _load_pyfunc(path):\n    return Added(path)\n"
    )
    (path.parent / "shift.txt").write_text("12")
    mlflow.pyfunc.save_model(
        path,
        loader_module="own_loader",
        data_path=str(path.parent / "shift.txt"),
        code_paths=[str(path.parent / "own_loader.py")],
        signature=mlflow.models.infer_signature(FEW),
        pip_requirements=[],
    )


def network(mlflow: Any, path: Path, **options: Any) -> None:
    import torch

    class Net(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)

        def forward(self, x: Any) -> Any:
            return torch.relu(self.layer(x))

    torch.manual_seed(0)
    mlflow.pytorch.save_model(Net(), path, pip_requirements=[], **options)


def boosted(kind: str) -> Callable[[Any, Path], None]:
    def save(mlflow: Any, path: Path) -> None:
        from tests.support import flavors

        model = getattr(flavors, kind)(path)
        flavor = {"x": "xgboost", "b": "xgboost", "l": "lightgbm"}[kind[0]]
        getattr(mlflow, flavor).save_model(model, path, input_example=FEW, pip_requirements=[])

    return save


def catboost(mlflow: Any, path: Path) -> None:
    mlflow.catboost.save_model(make_catboost(path), path, input_example=FEW, pip_requirements=[])


def least_squares(mlflow: Any, path: Path) -> None:
    import statsmodels.api

    results = statsmodels.api.OLS(labels(TRAIN), TRAIN).fit()
    mlflow.statsmodels.save_model(results, path, input_example=FEW, pip_requirements=[])


SPAN = pd.DataFrame({"start": [60], "end": [63]})


def series(mlflow: Any, path: Path) -> None:
    from statsmodels.tsa.arima.model import ARIMA

    results = ARIMA(TRAIN["a"].to_numpy(), order=(1, 0, 0)).fit()
    signature = mlflow.models.infer_signature(SPAN)
    mlflow.statsmodels.save_model(results, path, signature=signature, pip_requirements=[])


MATRIX = FEW.to_numpy()
NARROW = MATRIX.astype(np.float32)
PEOPLE = [{"name": "Ada", "age": 36, "tags": ["x"]}, {"name": "Bo", "age": 5}]
LOGGED = {
    "sklearn-skops": estimator("skops"),
    "sklearn-cloudpickle": estimator("cloudpickle"),
    "sklearn-proba": estimator("pickle", pyfunc_predict_fn="predict_proba"),
    "sklearn-array": estimator("cloudpickle", MATRIX),
    "sklearn-pipeline": Logged(pipeline, MIXED),
    "onnx-frame": Logged(lambda mlflow, path: graph(mlflow, path, FEW), FEW),
    "onnx-array": Logged(lambda mlflow, path: graph(mlflow, path, NARROW), NARROW),
    "onnx-named": Logged(lambda mlflow, path: graph(mlflow, path, {"x": NARROW}), {"x": NARROW}),
    "onnx-columns": Logged(columns_graph, FEW),
    "python-context": Logged(with_context, FEW),
    "python-params": Logged(with_params, FEW, {"power": 3}),
    "python-function": Logged(function, FEW),
    "python-hinted-function": Logged(hinted_function, ["a", "b"]),
    "python-hinted-numbers": Logged(hinted_numbers, [{"a": 1.5, "b": 2.0}, {"c": 4.0}]),
    "python-hinted-model": Logged(hinted_classes("Greeter"), PEOPLE),
    "python-hinted-times": Logged(hinted_classes("Dated"), [{"a": "2024-01-02T03:04:05", "b": "2025-01-02"}]),
    "python-hinted-bytes": Logged(hinted_classes("Sized"), ["AAEC", ""]),
    "python-hinted-people": Logged(hinted_people_code, PEOPLE),
    "python-code": Logged(coded, FEW),
    "python-hinted-code": Logged(hinted_code, ["a", "b"]),
    "python-modules": Logged(helped, FEW),
    "own-loader": Logged(own_loader, FEW),
    "pytorch-pickle": Logged(
        lambda mlflow, path: network(mlflow, path, serialization_format="pickle", input_example=NARROW),
        NARROW,
        needs=("torch",),
    ),
    "pytorch-frame": Logged(
        lambda mlflow, path: network(mlflow, path, serialization_format="pickle", input_example=FEW),
        FEW,
        needs=("torch",),
    ),
    "pytorch-pt2": Logged(
        lambda mlflow, path: network(mlflow, path, serialization_format="pt2", input_example=NARROW),
        NARROW,
        needs=("torch",),
    ),
    "xgboost-booster": Logged(boosted("booster"), FEW, needs=("xgboost",)),
    "xgboost-model": Logged(boosted("xgb_classifier"), FEW, needs=("xgboost",)),
    "lightgbm-booster": Logged(boosted("lgb_booster"), FEW, needs=("lightgbm",)),
    "lightgbm-model": Logged(boosted("lgb_classifier"), FEW, needs=("lightgbm", "skops")),
    "catboost": Logged(catboost, FEW, needs=("catboost",)),
    "statsmodels": Logged(least_squares, FEW, needs=("statsmodels",)),
    "statsmodels-series": Logged(series, SPAN, needs=("statsmodels",)),
}


def requests(data: Any) -> list[dict[str, Any]]:
    """The same data in every form that could carry it."""
    if isinstance(data, pd.DataFrame):
        rows = [list(row) for row in data.itertuples(index=False, name=None)]
        split = {"columns": list(data.columns), "data": rows}
        records = data.to_dict(orient="records")
        columns = data.to_dict(orient="list")
        cells = [[str(item) for item in data[name]] for name in data]
        return [
            {"form": "dataframe_split", "data": split},
            {"form": "dataframe_split", "data": {**split, "index": [10 * i for i in range(len(rows))]}},
            {"form": "dataframe_records", "data": records},
            {"form": "instances", "data": records},
            {"form": "inputs", "data": columns},
            {"form": "inputs", "data": records[0]},
            {"form": "csv", "data": {"columns": list(data.columns), "cells": cells}},
        ]
    if isinstance(data, np.ndarray):
        return [{"form": form, "data": data.tolist()} for form in ("inputs", "instances")]
    if isinstance(data, dict):
        named = {name: array.tolist() for name, array in data.items()}
        rows = [dict(zip(named, row, strict=True)) for row in zip(*named.values(), strict=True)]
        return [{"form": "inputs", "data": named}, {"form": "instances", "data": rows}]
    return [{"form": "inputs", "data": data}]


def scored(mlflow: Any, path: Path, asked: list[dict[str, Any]]) -> list[Any]:
    """What MLflow's scoring code answers: the predictions, or None where it refuses."""
    from mlflow.pyfunc import scoring_server
    from mlflow.pyfunc.utils.environment import _simulate_serving_environment

    before = list(sys.path)
    try:
        model = mlflow.pyfunc.load_model(str(path))
        answers: list[Any] = []
        for request in asked:
            if request["form"] == "csv":
                text = io.StringIO()
                csv.writer(text).writerow(request["data"]["columns"])
                csv.writer(text).writerows(zip(*request["data"]["cells"], strict=True))
                body, kind = text.getvalue(), "text/csv"
            else:
                payload = {request["form"]: request["data"]}
                if request["params"]:
                    payload["params"] = request["params"]
                body, kind = json.dumps(payload), "application/json"
            with _simulate_serving_environment():
                try:
                    done = scoring_server.invocations(body, kind, model, model.metadata.get_input_schema())
                except mlflow.exceptions.MlflowException:
                    answers.append(None)
                    continue
            answers.append(json.loads(done.response)["predictions"] if done.status == 200 else None)
        return answers
    finally:
        sys.path[:] = before


Answers = list[tuple[dict[str, Any], Any, Any]]


@dataclass(frozen=True)
class Written:
    """The packages that MLflow wrote, the input of each, and MLflow's answer."""

    jobs: dict[str, dict[str, Any]]
    theirs: dict[str, list[Any]]

    def answers(self, names: list[str], block: list[str]) -> dict[str, Answers]:
        """(request, MLflow's answer, ours) of packages; ours all from one process without some modules."""
        ours = in_blocked(block, [self.jobs[name] for name in names])
        found = {}
        for name, answers in zip(names, ours, strict=True):
            asked = self.jobs[name]["requests"]
            if not isinstance(answers, list):
                answers = [answers] * len(asked)
            found[name] = list(zip(asked, self.theirs[name], answers, strict=True))
        return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    mlflow = needs("mlflow")
    for module in {name for logged in LOGGED.values() for name in logged.needs}:
        needs(module)
    root = tmp_path_factory.mktemp("logged")
    done = Written({}, {})
    logging.disable(logging.CRITICAL)
    try:
        for name, logged in LOGGED.items():
            path = root / name / "package"
            path.parent.mkdir()
            logged.save(mlflow, path)
            asked = [
                {**request, "params": None if request["form"] == "csv" else logged.params}
                for request in requests(logged.data)
            ]
            done.jobs[name] = {"package": str(path), "requests": asked}
            done.theirs[name] = scored(mlflow, path, asked)
    finally:
        logging.disable(logging.NOTSET)
    return done


@pytest.fixture(scope="module")
def without_mlflow(written: Written) -> dict[str, Answers]:
    return written.answers(list(LOGGED), ["mlflow"])


PYTHON = [name for name in LOGGED if name.startswith(("python", "own"))]


@pytest.fixture(scope="module")
def with_mlflow(written: Written) -> dict[str, Answers]:
    return written.answers(PYTHON, [])


def same(left: Any, right: Any) -> bool:
    if isinstance(left, float | int) and isinstance(right, float | int):
        return math.isclose(left, right, rel_tol=1e-6, abs_tol=1e-6)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


def assert_answered_alike(answers: Answers) -> None:
    admitted = [(asked, theirs, ours) for asked, theirs, ours in answers if theirs is not None]
    assert admitted, "MLflow refused every form: the test asks the wrong thing"
    different = [(asked["form"], theirs, ours) for asked, theirs, ours in admitted if not same(theirs, ours)]
    assert different == []


@pytest.mark.parametrize("name", LOGGED)
def test_a_package_of_mlflow_answers_here_without_mlflow_as_it_answers_there(
    name: str, without_mlflow: dict[str, Answers]
) -> None:
    answers = without_mlflow[name]
    if name == "onnx-frame":
        # MLflow makes a row of each value of a wide output; here a record stays a row.
        answers = [(asked, theirs, flattened(ours)) for asked, theirs, ours in answers]
    assert_answered_alike(answers)


def flattened(records: Any) -> Any:
    if not isinstance(records, list):
        return records
    return [{key: value} for record in records for key, values in record.items() for value in values]


@pytest.mark.parametrize("name", PYTHON)
def test_a_python_model_answers_the_same_where_mlflow_is_installed(
    name: str, with_mlflow: dict[str, Answers]
) -> None:
    assert_answered_alike(with_mlflow[name])


def _numbers(model_input: Any) -> Any:
    return model_input["a"].to_numpy(dtype=np.float32)


def _table(model_input: Any) -> Any:
    return model_input[["a"]]


@pytest.mark.parametrize("kind", ["labels", "numbers", "array", "float32", "table"])
def test_the_signature_is_the_one_that_mlflow_infers(tmp_path: Path, kind: str) -> None:
    """The same model, logged by either, replaces the other."""
    needs("mlflow")
    import mlflow
    from sklearn.linear_model import LinearRegression, LogisticRegression

    from loaders import package
    from loaders.compatibility import compatible

    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    example = FEW.to_numpy() if kind == "array" else FEW
    if kind in ("float32", "table"):
        function = _numbers if kind == "float32" else _table
        mlflow.pyfunc.save_model(theirs, python_model=function, input_example=example, pip_requirements=[])
        loaders.save_model(function, ours, input_example=example)
    else:
        train = TRAIN.to_numpy() if kind == "array" else TRAIN
        words = np.where(labels(TRAIN) > 0, "yes", "no").astype(object)
        model: Any = LinearRegression().fit(train, TRAIN["a"])
        if kind == "labels":
            model = LogisticRegression().fit(train, words)
        mlflow.sklearn.save_model(model, theirs, input_example=example, pip_requirements=[])
        loaders.save_model(model, ours, input_example=example)
    found, expected = package.read(ours).signature, package.read(theirs).signature
    assert found is not None
    assert expected is not None
    assert str(found) == str(expected)
    assert compatible(found, expected) == []
    assert compatible(expected, found) == []


def test_what_earlier_versions_declared_of_one_value_a_row_is_the_same() -> None:
    from loaders.compatibility import compatible
    from loaders.signature import ColSpec, Scalar, Signature, TensorSpec

    column = Signature(outputs=(ColSpec(Scalar.long),))
    tensor = Signature(outputs=(TensorSpec(np.dtype("int64"), (-1,)),))
    assert compatible(tensor, column) == compatible(column, tensor) == []
    other = Signature(outputs=(TensorSpec(np.dtype("float64"), (-1,)),))
    assert compatible(other, column) == ["the output was double and is long now"]
    wide = Signature(outputs=(TensorSpec(np.dtype("int64"), (-1, 2)),))
    assert compatible(wide, column) == ["outputs were tensors and are columns now"]
