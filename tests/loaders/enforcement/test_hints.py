"""Input of models whose signature comes from type hints."""

from __future__ import annotations

import datetime

import pandas as pd

from loaders.batch import Value
from loaders.enforcement import CsvTable
from loaders.signature import (
    ColSpec,
    Object,
    Property,
    Scalar,
    Signature,
)
from tests.support.asking import cast, places

HINT = Signature(
    (
        ColSpec(
            Object(
                (
                    Property("when", Scalar.datetime),
                    Property("raw", Scalar.binary),
                    Property("n", Scalar.long, False),
                )
            )
        ),
    )
)


def test_hints_get_the_list_with_bytes_and_dates_read() -> None:
    item = {"when": "2024-01-02T03:04:05Z", "raw": "YWI=", "more": [1]}
    batch = cast(HINT, "inputs", [item], type_hints=True)
    assert isinstance(batch, Value)
    assert batch.rows == 1
    assert batch.value == [{"when": datetime.datetime(2024, 1, 2, 3, 4, 5), "raw": b"ab", "more": [1]}]
    assert cast(HINT, "inputs", [], type_hints=True).rows == 0


def test_hints_are_checked() -> None:
    good = {"when": "2024-01-02", "raw": ""}
    data = [good, {"when": 5, "raw": ""}, {"raw": "@"}, 7]
    assert places(HINT, "inputs", data, type_hints=True) == [
        "inputs[1].when",
        "inputs[2].raw",
        "inputs[2].when",
        "inputs[3]",
    ]
    assert places(HINT, "inputs", good, type_hints=True) == ["inputs"]
    for form, other in (
        ("instances", [good]),
        ("dataframe_records", [good]),
        ("dataframe_split", {"columns": ["when", "raw"], "data": [["2024-01-02", ""]]}),
    ):
        assert places(HINT, form, other, type_hints=True) == [form]


def test_hints_from_tables() -> None:
    table = CsvTable(["when", "raw", "n"], [["2024-01-02"], ["YWI="], [None]])
    assert cast(HINT, "csv", table, type_hints=True).value == [
        {"when": datetime.datetime(2024, 1, 2), "raw": b"ab", "n": None}
    ]
    texts = Signature((ColSpec(Scalar.string),))
    assert cast(texts, "csv", CsvTable(["x"], [["a", "b"]]), type_hints=True).value == ["a", "b"]
    assert cast(texts, "python", ["a"], type_hints=True).value == ["a"]
    assert cast(texts, "python", pd.DataFrame({"x": ["a"]}), type_hints=True).value == ["a"]
    assert cast(texts, "python", pd.Series(["a"]), type_hints=True).value == ["a"]
    assert places(texts, "python", [5], type_hints=True) == ["data[0]"]
    assert places(texts, "csv", CsvTable(["x", "y"], [["a"], ["b"]]), type_hints=True) == ["csv"]
