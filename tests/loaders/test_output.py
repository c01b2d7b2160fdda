"""The output schema compared with a model's answer: differences are named in every form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from loaders.batch import Batch, Columns, Tensors, Value
from loaders.output import AnswerTooLarge, check_size, mismatches
from loaders.signature import Array, ColSpec, Object, Property, Scalar, Signature, TensorSpec

COLUMNS = (ColSpec("long", "label"), ColSpec("double", "score", required=False))
ONE = (ColSpec("long"),)
NESTED = (
    ColSpec(Array(Scalar.string), "tags"),
    ColSpec(Object((Property("x", Scalar.double),)), "at"),
)
TENSOR = (TensorSpec(np.dtype("float32"), (-1, 2)),)


@pytest.mark.parametrize(
    ("outputs", "answer", "expected"),
    [
        (None, Value({"any": 1}), []),
        (ONE, Tensors({"": np.array([1, 2])}, 2), []),
        (ONE, Tensors({"": np.array([0.5])}, 1), ["the output is float64, declared long"]),
        (ONE, Tensors({"": np.ones((2, 3), int)}, 2), ["the output has 3 columns, declared 1"]),
        (COLUMNS, Columns({"label": np.array([1]), "score": np.array([0.5], np.float32)}, 1), []),
        (COLUMNS, Columns({"label": np.array([1])}, 1), []),
        (
            COLUMNS,
            Columns({"score": np.array(["high"], object)}, 1),
            [
                "output label is declared but missing from the answer",
                "output score is object, declared double",
            ],
        ),
        (TENSOR, Tensors({"": np.ones((4, 2), np.float32)}, 4), []),
        (TENSOR, Tensors({"": np.ones((4, 2))}, 4), []),
        (
            TENSOR,
            Tensors({"": np.ones((4, 3), int)}, 4),
            ["the output is int64, declared float32", "the output has the shape (4, 3), declared (-1, 2)"],
        ),
        (
            (TensorSpec(np.dtype("float32"), (-1,), "p"),),
            Tensors({"q": np.ones(1, np.float32)}, 1),
            ["output p is declared but missing from the answer"],
        ),
        (ONE, Value([1, 2], 2), []),
        (ONE, Value([1, "high"], 2), ["the output is text, declared long"]),
        (ONE, Value([True], 1), ["the output is a boolean, declared long"]),
        (ONE, Value([None], 1), []),
        (ONE, Value({"label": 1}), ["the output is an object, declared long"]),
        (COLUMNS, Value([{"label": 1, "score": 0.5}, {"label": 2}], 2), []),
        (
            COLUMNS,
            Value([{"label": 1}, {"score": "high"}, {"score": "low"}], 3),
            ["output label is declared but missing from the answer", "output score is text, declared double"],
        ),
        (COLUMNS, Value([[1, 0.5]], 1), []),
        (COLUMNS, Value(["up"], 1), ["the output is text for a row, declared 2 columns"]),
        (NESTED, Value([{"tags": ["a"], "at": {"x": 1.0}}], 1), []),
        (
            NESTED,
            Value([{"tags": ["a", 1], "at": {}}], 1),
            [
                "an item of output tags is a whole number, declared string",
                "output at.x is declared but missing from the answer",
            ],
        ),
        (TENSOR, Value([[0.5, 1], [1, 2]], 2), []),
        (TENSOR, Value([[0.5, 1, 2]], 1), ["the output has the shape (1, 3), declared (-1, 2)"]),
        (TENSOR, Value([["a", "b"]], 1), ["the output is <U1, declared float32"]),
        (
            TENSOR,
            Value([[0.5], [1, 2]], 2),
            ["the output is object, declared float32", "the output has the shape (2,), declared (-1, 2)"],
        ),
    ],
)
def test_differences_are_named(outputs: object, answer: Batch, expected: list[str]) -> None:
    assert mismatches(Signature(outputs=outputs), answer) == expected  # type: ignore[arg-type]


class Rows(list[Any]):
    """Counts the items that are looked at one by one."""

    looked = 0

    def __getitem__(self, place: Any) -> Any:
        Rows.looked += 1
        return super().__getitem__(place)

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            Rows.looked += 1
            yield item


MANY = 100_000
COLUMN = (ColSpec(Scalar.double, "share"),)
LISTS = (ColSpec(Array(Scalar.double), "scores"),)
PAIRS = (TensorSpec(np.dtype("f8"), (-1, 2)),)


@pytest.mark.parametrize(
    ("outputs", "value", "problems"),
    [
        (COLUMN, Rows([{"share": 0.5}] * MANY), 0),
        (COLUMN, Rows([{"share": 0.5}] * MANY + [{"share": "half"}] * MANY), 1),
        (LISTS, Rows([{"scores": [0.5] * 10}] * MANY), 0),
        (LISTS, [{"scores": Rows([0.5] * MANY)}] * 2, 0),
        (LISTS, [{"scores": Rows([0.5] * MANY + ["half"] * MANY)}], 1),
        (PAIRS, Rows([[0.5, 0.5]] * MANY), 0),
        (PAIRS, Rows([[0.5, 0.5, 0.5]] * MANY), 1),
        (PAIRS, Rows([["a", "b"]] * MANY), 1),
        (PAIRS, Rows([[0.5, 0.5]] * MANY + [[0.5]] * MANY), 2),
    ],
)
def test_few_values_of_a_long_answer_are_compared(outputs: object, value: Any, problems: int) -> None:
    Rows.looked = 0
    found = mismatches(Signature(outputs=outputs), Value(value))  # type: ignore[arg-type]
    assert len(found) == problems, found
    assert 0 < Rows.looked <= 2 * 4096


@pytest.mark.parametrize(
    "result",
    [
        pd.DataFrame(index=pd.RangeIndex(2_000_000_000)),
        np.empty((2_000_000_000, 0)),
        {"a": np.empty((2_000_000_000, 0)), "b": np.zeros(1)},
        csr_matrix((1_000_000, 1_000_000)),
        np.broadcast_to(0.0, (1 << 40,)),
        ["x" * 1_000_000] * 2000,
        {"a": [b"x" * 1_000_000] * 2000},
        pd.Series(pd.Categorical.from_codes(np.zeros(100_000, np.int8), ["x" * 100_000])),
        pd.DataFrame({"a": pd.Categorical.from_codes(np.zeros(100_000, np.int8), ["x" * 100_000])}),
        pd.Categorical.from_codes(np.zeros(100_000, np.int8), ["x" * 100_000]),
        range(2_000_000_000),
        {"a": range(2_000_000_000)},
    ],
    ids=range(12),
)
def test_a_result_with_too_many_rows_or_cells_is_refused_before_it_is_converted(result: Any) -> None:
    with pytest.raises(AnswerTooLarge):
        check_size(result, 256 << 20)


@pytest.mark.parametrize(
    "result",
    [
        np.zeros(10),
        np.float64(1),
        [1],
        "x",
        None,
        pd.Series([1, 2]),
        ["x", None, 1],
        [],
        range(3),
        pd.Series(["x", None], dtype="category"),
        pd.Series([1, 2], dtype="category"),
        pd.DataFrame({"a": pd.Series(pd.date_range("2024", periods=2)), "b": pd.interval_range(0, 2)}),
    ],
    ids=range(12),
)
def test_a_result_of_a_common_size_is_not(result: Any) -> None:
    check_size(result, 1000)
