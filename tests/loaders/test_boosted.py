"""Boosted trees with categorical columns: logged, saved and asked as their libraries answer."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import loaders
from loaders.batch import Tensors
from loaders.enforcement import RawInput, enforce
from tests.conftest import needs

pytestmark = pytest.mark.all

ROWS = list(itertools.product(["red", "green", "blue"], [10, 20, 30], [0.0, 1.0, 2.0])) * 4


def training() -> tuple[Any, Any]:
    table = pd.DataFrame(ROWS, columns=["the colour", "size", "x"])
    price = table["the colour"].map({"red": 1.0, "green": 50.0, "blue": 900.0}) + table["size"] + table["x"]
    return table.astype({"the colour": "category", "size": "category"}), price


def lightgbm(kind: str) -> Any:
    library = needs("lightgbm")
    model = library.LGBMRegressor(min_child_samples=2, n_estimators=30, verbose=-1).fit(*training())
    return model.booster_ if kind == "booster" else model


def xgboost(kind: str) -> Any:
    library = needs("xgboost")
    table, price = training()
    if kind == "booster":
        return library.train({}, library.DMatrix(table, label=price, enable_categorical=True), 30)
    return library.XGBRegressor(n_estimators=30, enable_categorical=True).fit(table, price)


def asked(model: Any, table: Any) -> Any:
    if type(model).__module__ == "xgboost.core":
        table = needs("xgboost").DMatrix(table, enable_categorical=True)
    return model.predict(table)


@pytest.mark.parametrize("kind", ["booster", "estimator"])
@pytest.mark.parametrize("library", [lightgbm, xgboost])
def test_categories_are_those_of_training(library: Any, kind: str, tmp_path: Path) -> None:
    table, _ = training()
    model = library(kind)
    loaders.save_model(model, tmp_path / "m", input_example=table.head(9))
    served = loaders.load_model(tmp_path / "m")
    some = table.iloc[::5].reset_index(drop=True)
    some.loc[0, "the colour"] = None
    wanted = asked(model, some)
    np.testing.assert_allclose(served.predict(some), wanted)
    records = [
        {"the colour": None if pd.isna(c) else c, "size": int(s), "x": x}
        for c, s, x in some.itertuples(index=False, name=None)
    ]
    one_by_one = [enforce(served.signature, RawInput("dataframe_records", [record])) for record in records]
    answers = [served.run(enforced.batch, {}) for enforced in one_by_one]
    found = np.concatenate([a.arrays[""] for a in answers if isinstance(a, Tensors)])
    np.testing.assert_allclose(found, wanted)
