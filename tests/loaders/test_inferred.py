"""The signature that data shows, as MLflow infers it."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from loaders.inferred import infer_signature
from loaders.signature import (
    AnyType,
    Array,
    ColSpec,
    Object,
    Property,
    Scalar,
    Signature,
    SignatureError,
    TensorSpec,
)
from tests.conftest import needs


def cols(*specs: tuple[Any, ...]) -> tuple[ColSpec, ...]:
    return tuple(ColSpec(*spec) for spec in specs)


INFERENCE: list[tuple[Any, Any]] = [
    (pd.DataFrame({"a": [1], "b": [1.5]}), cols((Scalar.long, "a"), (Scalar.double, "b"))),
    (pd.DataFrame([[1, 2.5]]), cols((Scalar.long, 0), (Scalar.double, 1))),
    (pd.DataFrame({"a": pd.array([1, None], dtype="Int64")}), cols((Scalar.long, "a", False))),
    (pd.DataFrame({"a": pd.array([True, None], dtype="boolean")}), cols((Scalar.boolean, "a", False))),
    (pd.DataFrame({"a": pd.Series([True, None], dtype=object)}), cols((Scalar.boolean, "a", False))),
    (pd.DataFrame({"a": [1.5, None]}), cols((Scalar.double, "a", False))),
    (pd.DataFrame({"a": ["x", None]}), cols((Scalar.string, "a", False))),
    (pd.DataFrame({"a": pd.Categorical(["x", "y"])}), cols((Scalar.string, "a"))),
    (pd.DataFrame({"a": pd.to_datetime(["2024-01-01"])}), cols((Scalar.datetime, "a"))),
    (pd.DataFrame({"a": [datetime.date(2024, 1, 1)]}), cols((Scalar.datetime, "a"))),
    (
        pd.DataFrame({"a": np.array([1], np.int8), "b": np.array([1], np.uint32)}),
        cols((Scalar.integer, "a"), (Scalar.long, "b")),
    ),
    (pd.DataFrame({"a": [b"x"], "b": [[1.5]]}), cols((Scalar.binary, "a"), (Array(Scalar.double), "b"))),
    (pd.DataFrame({"a": pd.Series([], dtype=object)}), cols((Scalar.string, "a"))),
    (pd.Series([1.5], name="s"), cols((Scalar.double, "s"))),
    (np.zeros((3, 4), np.float32), (TensorSpec(np.dtype(np.float32), (-1, 4)),)),
    (scipy.sparse.csr_matrix(np.eye(3)), (TensorSpec(np.dtype(np.float64), (-1, 3)),)),
    (
        {"a": np.zeros((2, 2)), "b": np.array(["xyz"])},
        (TensorSpec(np.dtype(np.float64), (-1, 2), "a"), TensorSpec(np.dtype(str), (-1,), "b")),
    ),
    ({"a": 1, "b": None}, cols((Scalar.long, "a"), (AnyType(), "b", False))),
    (
        [{"a": 1}, {"a": 2, "b": {"c": [1.5]}}],
        cols((Scalar.long, "a"), (Object((Property("c", Array(Scalar.double)),)), "b", False)),
    ),
    (["a"], cols((Scalar.string,))),
    ([], cols((Scalar.string,))),
    ([[1], []], cols((Array(Scalar.long),))),
    (5, cols((Scalar.long,))),
    (np.float32(1), cols((Scalar.float,))),
]

# MLflow takes integers with gaps for doubles, which loses them, and refuses the other two.
OURS_ALONE: list[tuple[Any, Any]] = [
    (pd.DataFrame({"a": pd.Series([2**53 + 1, None], dtype=object)}), cols((Scalar.long, "a", False))),
    (pd.Series([1.5, None]), cols((Scalar.double,))),
    (np.array(1.5), (TensorSpec(np.dtype(np.float64), ()),)),
]


@pytest.mark.parametrize(("data", "expected"), INFERENCE + OURS_ALONE)
def test_inference(data: Any, expected: Any) -> None:
    assert infer_signature(data).inputs == expected
    assert infer_signature(None, data).outputs == expected


@pytest.mark.all
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("data", [data for data, _ in INFERENCE])
def test_inference_is_mlflows(data: Any) -> None:
    models = needs("mlflow.models")
    assert Signature.from_json(models.infer_signature(data).to_dict()) == infer_signature(data)


@pytest.mark.parametrize(
    "data",
    [
        pd.DataFrame({"a": pd.to_timedelta([1])}),
        pd.DataFrame({"a": [1 + 2j]}),
        pd.DataFrame({"a": np.array([1], np.uint64)}),
        pd.DataFrame({"a": [1, "x"]}, dtype=object),
        pd.DataFrame([[1, 2]], columns=["a", "a"]),
        pd.DataFrame([[1]], columns=[(1, 2)]),
        {1: 2},
        [1, "a"],
        object(),
        np.zeros(2, dtype=[("x", int)]),
    ],
)
def test_what_no_signature_describes_is_refused(data: Any) -> None:
    with pytest.raises(SignatureError):
        infer_signature(data)


def test_params_are_inferred() -> None:
    given = {
        "a": 1,
        "b": 1.5,
        "c": "x",
        "d": [1, 2],
        "e": [1, 2.5],
        "f": datetime.datetime(2024, 1, 1),
        "g": {"z": 1},
        "h": True,
    }
    inferred = infer_signature(None, None, given).params
    assert inferred is not None
    assert [(p.name, str(p.type), p.shape) for p in inferred] == [
        ("a", "long", None),
        ("b", "double", None),
        ("c", "string", None),
        ("d", "long", (-1,)),
        ("e", "double", (-1,)),
        ("f", "datetime", None),
        ("g", "object<z: long>", None),
        ("h", "boolean", None),
    ]
    for bad in ({"a": None}, {"a": [[1]]}, {"a": []}, {"a": {}}, {"a": b"x"}):
        with pytest.raises(SignatureError):
            infer_signature(None, None, bad)
