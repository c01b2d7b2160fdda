"""Made-up rows: typed, and with values that the model takes where it tells them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder

import loaders
from loaders import madeup
from loaders.enforcement import enforce
from loaders.signature import Signature
from tests.support.processes import Processes, run

FRAME = pd.DataFrame({"city": ["Bonn", "Rome"], "floor": [3, 4], "x": [0.5, 1.5]})


def signature(*columns: tuple[str, str]) -> Signature:
    inputs = ",".join(f'{{"name": "{name}", "type": "{kind}"}}' for name, kind in columns)
    return Signature.from_json({"inputs": f"[{inputs}]"})


@pytest.mark.parametrize(
    ("kind", "value", "taken"),
    [
        ("string", "Bonn", "Bonn"),
        ("string", 5, "a"),
        ("string", ["Bonn"], "a"),
        ("long", 3, 3),
        ("long", True, 1),
        ("double", 3, 3),
        ("boolean", False, False),
    ],
)
def test_what_a_model_knows_is_taken_where_it_is_of_the_column_s_type(
    kind: str, value: Any, taken: Any
) -> None:
    """The reports of a model process are not trusted."""
    row = madeup.row(signature(("c", kind)), {"c": value})
    assert row is not None
    assert row.data["data"] == [[taken]]


def test_a_hostile_process_changes_no_row() -> None:
    assert madeup.row(signature(("c", "string")), "no mapping") == madeup.row(signature(("c", "string")))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "encode",
    [
        ColumnTransformer([("one", OneHotEncoder(), ["city"]), ("two", OrdinalEncoder(), ["floor"])]),
        ColumnTransformer(
            [("both", make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder()), ["city"])],
            remainder="passthrough",
        ),
        OneHotEncoder(),
    ],
    ids=["encoders", "pipeline", "alone"],
)
def test_a_pipeline_that_refuses_unknown_categories_answers_a_made_up_row(
    tmp_path: Path, encode: Any
) -> None:
    model = make_pipeline(encode, LinearRegression()).fit(FRAME, [1.0, 2.0])
    columns = signature(("city", "string"), ("floor", "long"), ("x", "double"))
    package = loaders.save_model(model, tmp_path / "model", signature=columns, verify=False)

    async def work(h: Processes) -> None:
        runner = await h.started(package)
        assert runner.known["city"] == "Bonn"
        row = madeup.row(package.signature, runner.known)
        assert row is not None
        answer = await runner.prewarm(enforce(package.signature, row, None, "strict").batch, {})
        assert np.asarray(next(iter(answer.arrays.values()))).shape[0] == 1  # type: ignore[union-attr]

    run(tmp_path / "tmp", work)
