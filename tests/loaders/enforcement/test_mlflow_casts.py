"""The mode `mlflow` against the real MLflow, for the structures that bodies can have."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pandas as pd
import pytest

from loaders.batch import Batch, Columns, Tensors
from loaders.enforcement import CsvTable, InvalidInput, RawInput, enforce
from loaders.enforcement.scalars import is_null
from loaders.signature import AnyType, Array, ColSpec, Map, Object, Property, Scalar, Signature, TensorSpec
from tests.conftest import needs
from tests.support.verdicts import mlflow_result

LONG = Signature((ColSpec(Scalar.long, "a"),))
NAMED = Signature(
    (ColSpec(Scalar.long, "a"), ColSpec(Scalar.string, "b"), ColSpec(Scalar.double, "c", False))
)
UNNAMED = Signature((ColSpec(Scalar.long), ColSpec(Scalar.double)))
TEXT = Signature((ColSpec(Scalar.string),))
NESTED = Signature((ColSpec(Array(Scalar.double), "a"), ColSpec(Object((Property("p", Scalar.long),)), "b")))
MAP = Signature((ColSpec(Map(Scalar.double), "a"), ColSpec(AnyType(), "b")))
INTEGERS = Signature((ColSpec(Scalar.long, 0), ColSpec(Scalar.double, 1)))
TENSOR = Signature((TensorSpec(np.dtype(np.float32), (-1, 2)),))
PAIR = Signature((TensorSpec(np.dtype(np.float32), (-1, 2), "a"), TensorSpec(np.dtype(np.int64), (-1,), "b")))
ONE = Signature((TensorSpec(np.dtype(np.float32), (-1, 2), "a"),))
BYTES = Signature((TensorSpec(np.dtype(bytes), (-1,), "a"),))
RAGGED = Signature((TensorSpec(np.dtype(np.float64), (-1, -1)),))
SIGNATURES = {
    name: value for name, value in globals().items() if name.isupper() and isinstance(value, Signature)
}

BODIES: list[tuple[str, Any]] = [
    ("dataframe_split", {"columns": ["a", "b"], "data": [[1, "x"], [2, "y"]]}),
    ("dataframe_split", {"columns": ["a", "b"], "data": [[1, 2], [2, 1.5]], "index": [5, 6]}),
    ("dataframe_split", {"columns": ["b", "a", "z"], "data": [["x", 1, 0]]}),
    ("dataframe_split", {"columns": ["a", "a"], "data": [[1, 2]]}),
    ("dataframe_split", {"columns": ["a"], "data": [1, 2]}),
    ("dataframe_split", {"columns": ["a", "b"], "data": []}),
    ("dataframe_split", {"columns": ["a", "b"], "data": [[1, 2], [3]]}),
    ("dataframe_split", {"columns": ["a"]}),
    ("dataframe_split", {"columns": ["a"], "data": [[1]], "extra": 1}),
    ("dataframe_split", {"data": [[1, 2.5], [3, 4]]}),
    ("dataframe_split", {"data": [[[1, 2.5]], [[3, 4]]]}),
    ("dataframe_split", {"columns": ["a", "b"], "data": [[[1.5, 2], 1], [[3, 4], 2]]}),
    ("dataframe_split", {"columns": ["a", "b"], "data": [[[1.5, 2.5], {"p": 1}]]}),
    ("dataframe_split", {"columns": ["a", "b"], "data": [[{"k": 1.5}, [1]]]}),
    ("dataframe_split", [[1]]),
    ("dataframe_records", [{"a": 1, "b": "x"}, {"b": "y", "a": 2}]),
    ("dataframe_records", [{"a": 1, "b": "x"}, {"a": 2}]),
    ("dataframe_records", [{"a": 1, "b": "x"}, {"b": "y"}]),
    ("dataframe_records", [{"a": [1.5, 2.5], "b": {"p": 1}}]),
    ("dataframe_records", []),
    ("dataframe_records", {"a": 1}),
    ("dataframe_records", [[1, 2.5]]),
    ("inputs", {"a": [1, 2], "b": ["x", "y"]}),
    ("inputs", {"a": [1, 2], "b": ["x"]}),
    ("inputs", {"a": 1, "b": "x"}),
    ("inputs", {"a": 1, "b": ["x", "y"]}),
    ("inputs", {"a": [1.5, 2.5], "b": {"p": 1}}),
    ("inputs", {"a": {"k": 1.5}, "b": 5}),
    ("inputs", {"a": [[1, 2]], "b": [1]}),
    ("inputs", {"a": [[1, 2]], "b": [1, 2]}),
    ("inputs", {"a": [[1, 2]]}),
    ("inputs", {"a": [[1, 2]], "b": [1], "z": [0]}),
    ("inputs", {"a": ["x", "y"]}),
    ("inputs", {}),
    ("inputs", [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]),
    ("inputs", [{"a": 1, "b": "x"}, {"a": 2}]),
    ("inputs", [1, 2]),
    ("inputs", ["x", "y"]),
    ("inputs", [[1, 2.5]]),
    ("inputs", [[1, 2, 3]]),
    ("inputs", [[1, 2], [3]]),
    ("inputs", []),
    ("inputs", 5),
    ("inputs", "x"),
    ("inputs", None),
    ("instances", [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]),
    ("instances", [{"a": 1, "b": "x"}, {"a": 2}]),
    ("instances", [{"a": [1, 2], "b": 1}, {"a": [3, 4], "b": 2}]),
    ("instances", [{"a": [1, 2], "b": 1}, {"a": [3, 4]}]),
    ("instances", {"a": [1, 2], "b": ["x", "y"]}),
    ("instances", {"a": [[1, 2]], "b": [1, 2]}),
    ("instances", [[1, 2.5], [3, 4]]),
    ("instances", [1, 2]),
    ("instances", []),
    ("csv", CsvTable(["a", "b"], [["1", "2"], ["x", "y"]])),
    ("csv", CsvTable(["b", "a", "c"], [["x"], ["1"], ["1.5"]])),
    ("csv", CsvTable(["a", "b"], [["1", None], ["x", None]])),
    ("csv", CsvTable(["0", "1"], [["1"], ["2.5"]])),
    ("csv", CsvTable(["b"], [["x"]])),
    ("python", pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}, index=[5, 6])),
    ("python", pd.DataFrame({"a": [1.0, np.nan], "b": ["x", None]})),
    ("python", pd.DataFrame({"a": pd.array([1, None], dtype="Int64"), "b": ["x", None]})),
    ("python", pd.DataFrame([[1, 2.5]])),
    ("python", pd.DataFrame({"a": [[1.5, 2.5]], "b": [{"p": 1}]})),
    ("python", pd.DataFrame({"a": [[1.5, 2.5]], "b": [1]})),
    ("python", pd.DataFrame({"a": [np.array([1.5, 2.5], np.float32)], "b": [1]})),
    ("python", pd.Series([1, 2], name="a")),
    ("python", pd.Series(["x"])),
    ("python", {"a": [1, 2], "b": ["x", "y"]}),
    ("python", {"a": 1, "b": "x"}),
    ("python", {"a": np.ones((1, 2), np.float32), "b": np.array([1])}),
    ("python", {"a": np.ones((1, 2)), "b": np.array([1])}),
    ("python", np.ones((1, 2), np.float32)),
    ("python", np.ones((1, 2))),
    ("python", np.array(["x"])),
    ("python", ["x", "y"]),
    ("python", "x"),
    ("python", [{"a": 1, "b": "x"}]),
    ("python", None),
]


def plain(batch: Batch | None) -> Any:
    """A batch in a form that compares."""
    if batch is None:
        return "refused"
    if isinstance(batch, Columns):
        index = None if batch.index is None else batch.index.tolist()
        return {name: _listed(array) for name, array in batch.arrays.items()}, batch.rows, index
    if isinstance(batch, Tensors):
        return {name: (str(array.dtype), _listed(array)) for name, array in batch.arrays.items()}
    return repr(batch)


def _listed(column: Any) -> Any:
    kind = "object" if column.dtype.kind in "OU" else str(column.dtype)
    return kind, _plain(column.astype(str) if column.dtype.kind == "M" else column)


def _plain(item: Any) -> Any:
    """Python's lists and scalars, which compare equal to numpy's."""
    if isinstance(item, np.ndarray | np.generic):
        return _plain(item.tolist())
    if isinstance(item, list):
        return [_plain(part) for part in item]
    if isinstance(item, dict):
        return {name: _plain(part) for name, part in item.items()}
    return "null" if is_null(item) else item


@pytest.mark.all
@pytest.mark.filterwarnings("ignore")  # MLflow's own
@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_the_mode_mlflow_is_mlflow(name: str) -> None:
    needs("mlflow.pyfunc.scoring_server")
    signature = SIGNATURES[name]
    differences = []
    for form, data in BODIES:
        raw = RawInput(form, data)  # type: ignore[arg-type]
        theirs = plain(mlflow_result(signature, RawInput(raw.form, deepcopy(data))))
        try:
            ours = plain(enforce(signature, raw, None, "mlflow").batch)
        except InvalidInput:
            ours = "refused"
        if str(ours) != str(theirs):
            differences.append((form, data, "ours", ours, "MLflow's", theirs))
    assert differences == []
