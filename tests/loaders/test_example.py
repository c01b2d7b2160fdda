"""Input examples that cannot be written: the error names the column."""

from __future__ import annotations

import decimal
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from loaders import example
from tests.support.memory import at_most

DECIMAL = [decimal.Decimal("1.5"), decimal.Decimal("2")]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (DECIMAL, "column 'odd' holds a Decimal.*float or text"),
        (pd.to_timedelta([1, 2], unit="s"), "column 'odd' holds a Timedelta.*seconds"),
        ([1.0, np.inf], "column 'odd' holds an infinite number"),
        ([{"inner": DECIMAL}, {}], r"column 'odd'\.inner holds a Decimal"),
        ([object(), 1], "column 'odd' holds a object"),
        (pd.period_range("2026-01", periods=2, freq="M"), "column 'odd' holds a Period"),
    ],
)
def test_what_json_has_no_form_for_is_said_with_its_column(tmp_path: Path, column: Any, message: str) -> None:
    frame = pd.DataFrame({"plain": [1, 2], "odd": column})
    with pytest.raises(example.InvalidExample, match=message):
        example.write(tmp_path, frame)
    assert list(tmp_path.iterdir()) == []


def test_a_frame_without_columns_keeps_its_rows(tmp_path: Path) -> None:
    info = example.write(tmp_path, pd.DataFrame(index=pd.RangeIndex(2)))
    raw, _ = example.read(info, tmp_path / info.artifact_path)
    assert raw.data["data"] == [[], []]


def test_an_example_may_have_a_bound(tmp_path: Path) -> None:
    info = example.write(tmp_path, pd.DataFrame({"x": range(100)}))
    file = tmp_path / info.artifact_path
    assert example.read(info, file, file.stat().st_size)
    with pytest.raises(example.InvalidExample, match=r"input_example\.json is larger than"):
        example.read(info, file, file.stat().st_size - 1)


def test_a_sparse_example_that_is_huge_once_it_is_dense_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "input_example.json"
    file.write_text(json.dumps({"data": [], "indices": [], "indptr": [0], "shape": [3_000, 3_000]}))
    info = example.ExampleInfo(file.name, "sparse_matrix_csr")
    with at_most(2), pytest.raises(example.InvalidExample, match="too large"):
        example.read(info, file)


def test_sparse_columns_are_written_dense(tmp_path: Path) -> None:
    example.write(tmp_path, pd.DataFrame({"x": pd.arrays.SparseArray([0.0, 1.5])}))
    assert json.loads((tmp_path / example.FILE).read_text()) == {"columns": ["x"], "data": [[0.0], [1.5]]}
