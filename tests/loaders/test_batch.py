"""What is asked of a batch on behalf of a message: which of its columns have missing values."""

from __future__ import annotations

import numpy as np

from loaders.batch import Columns, Tensors, incomplete

WHOLE = {
    "whole": np.ma.MaskedArray([1, 2], [False, False]),
    "number": np.array([1.0, np.inf]),
    "text": np.array(["a", ""], object),
    "moment": np.array([0, 1], "datetime64[ns]"),
    "flag": np.array([True, False]),
}
GAPS = {
    "no whole": np.ma.MaskedArray([1, 2], [False, True]),
    "no number": np.array([1.0, np.nan]),
    "no text": np.array(["a", None], object),
    "no moment": np.array([0, "NaT"], "datetime64[ns]"),
}


def test_columns_with_missing_values_are_named_where_that_is_cheap() -> None:
    table = Columns({**WHOLE, **GAPS}, 2)
    assert incomplete(table, 18) == list(GAPS)
    assert incomplete(table, 17) == []
    assert incomplete(Tensors({"x": np.array([np.nan])}, 1), 10) == []
