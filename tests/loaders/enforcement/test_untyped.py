"""Input of models without a signature."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse

from loaders.batch import Value
from loaders.enforcement import CsvTable
from tests.support.asking import cast, places


def untyped(form: Any, data: Any) -> Any:
    return cast(None, form, data)


def test_frames_without_a_signature_get_the_dtypes_that_pandas_would_give() -> None:
    cells = {
        "i": [1, 2],
        "f": [1.5, None],
        "g": [1, None],
        "s": ["a", None],
        "b": [True, False],
        "o": [1, "a"],
    }
    cells |= {"l": [[1], []], "n": [None, None], "big": [2**70, 1]}
    rows = [{name: column[i] for name, column in cells.items()} for i in range(2)]
    for form, data in (
        ("dataframe_records", rows),
        ("dataframe_split", {"columns": list(cells), "data": [list(row.values()) for row in rows]}),
    ):
        batch = untyped(form, data)
        kinds = {name: array.dtype.kind for name, array in batch.arrays.items()}
        assert kinds == {
            "i": "i",
            "f": "f",
            "g": "i",  # masked: a frame makes it a double where that is exact
            "s": "O",
            "b": "b",
            "o": "O",
            "l": "O",
            "n": "O",
            "big": "O",
        }
        assert batch.arrays["s"].tolist() == ["a", None]
    assert untyped("dataframe_records", []).rows == 0
    assert list(untyped("dataframe_split", {"data": [[1, 2]]}).arrays) == [0, 1]
    table = CsvTable(
        ["i", "f", "s", "b", "e"], [["1", "2"], ["1", None], ["a", None], ["True", "false"], [None, None]]
    )
    batch = untyped("csv", table)
    assert {name: array.dtype.kind for name, array in batch.arrays.items()} == {
        "i": "i",
        "f": "i",
        "s": "O",
        "b": "b",
        "e": "f",
    }


def test_inputs_without_a_signature_are_tensors_where_numpy_has_a_dtype() -> None:
    assert untyped("inputs", [[1, 2.5]]).arrays[""].tolist() == [[1.0, 2.5]]
    assert untyped("inputs", [["a"]]).arrays[""].dtype.kind == "U"
    assert untyped("inputs", 5).arrays[""].shape == ()
    both = untyped("inputs", {"a": [1, 2], "b": [[1.5], [2.5]]})
    assert both.rows == 2
    assert both.arrays["b"].shape == (2, 1)
    assert untyped("inputs", {"a": [1, 2], "b": [1]}).rows is None
    stacked = untyped("instances", [{"a": 1, "b": [1, 2]}, {"a": 2, "b": [3, 4]}])
    assert stacked.arrays["b"].tolist() == [[1, 2], [3, 4]]
    for value in ([1, "a"], [{"a": 1}], [1, None], None, {"a": {"b": 1}}, [True, 1]):
        batch = untyped("inputs", value)
        assert isinstance(batch, Value)
        assert batch.value == value
    assert places(None, "inputs", [[1], [1, 2]]) == ["inputs"]
    assert places(None, "instances", [{"a": 1}, {"b": 1}]) == ["instances[1]"]
    assert places(None, "dataframe_records", {"a": 1}) == ["dataframe_records"]


def test_python_without_a_signature_passes() -> None:
    data = pd.DataFrame({"a": [1, 2], "b": ["x", None]}, index=[5, 6])
    batch = untyped("python", data)
    assert batch.index.tolist() == [5, 6]
    assert batch.arrays["b"].tolist() == ["x", None]
    assert untyped("python", np.ones((2, 2))).rows == 2
    assert untyped("python", {"a": np.ones(2), "b": np.ones(3)}).rows is None
    assert untyped("python", scipy.sparse.csr_matrix(np.eye(2))).arrays[""].tolist() == [[1, 0], [0, 1]]
    assert untyped("python", pd.Series([1.5], name="s")).arrays["s"].tolist() == [1.5]
    assert untyped("python", ["a", 1]).value == ["a", 1]
