"""The HTTP layer's part of the hot path has a budget, counted in function calls: a time depends on the
machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
import pytest

from loaders.batch import Tensors
from tests.bench.bench_http import COLUMNS, asking, calls

#: A request calls 100 functions in Python and in C. Raise this only with a reason.
MOST = 104


@pytest.mark.anyio
@pytest.mark.parametrize("rows", [1, 100])
async def test_a_prediction_calls_few_functions_however_many_rows_it_has(rows: int, tmp_path: Path) -> None:
    split = {"columns": COLUMNS, "data": [[5.1, 3.5, 1.4, 0.2]] * rows}
    body = orjson.dumps({"dataframe_split": split})
    async with asking(body, Tensors({"": np.arange(rows)}, rows), tmp_path) as ask:
        assert await calls(ask) <= MOST
