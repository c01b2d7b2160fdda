"""The output schema beside what a model answered: differences are named, whatever their form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from loaders.batch import Batch, Columns, Tensors, Value
from loaders.output import AnswerTooLarge, check_size, mismatches
from loaders.signature import ColSpec, Signature, TensorSpec

COLUMNS = (ColSpec("long", "label"), ColSpec("double", "score", required=False))
ONE = (ColSpec("long"),)
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
            ["output label is declared and was not answered", "output score is object, declared double"],
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
            ["output p is declared and was not answered"],
        ),
    ],
)
def test_differences_are_named(outputs: object, answer: Batch, expected: list[str]) -> None:
    assert mismatches(Signature(outputs=outputs), answer) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "result",
    [
        pd.DataFrame(index=pd.RangeIndex(2_000_000_000)),
        np.empty((2_000_000_000, 0)),
        {"a": np.empty((2_000_000_000, 0)), "b": np.zeros(1)},
        csr_matrix((1_000_000, 1_000_000)),
        np.broadcast_to(0.0, (1 << 40,)),
    ],
    ids=range(5),
)
def test_a_result_with_too_many_rows_or_cells_is_refused_before_it_is_converted(result: Any) -> None:
    with pytest.raises(AnswerTooLarge):
        check_size(result, 256 << 20)


@pytest.mark.parametrize("result", [np.zeros(10), np.float64(1), [1], "x", None, pd.Series([1, 2])])
def test_a_result_of_a_common_size_is_not(result: Any) -> None:
    check_size(result, 1000)
