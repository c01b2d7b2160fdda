"""Enforcement of data that is text (CSV) or has dtypes (frames, numpy)."""

from __future__ import annotations

import datetime
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from loaders.enforcement import CsvTable
from loaders.signature import (
    AnyType,
    Array,
    ColSpec,
    Scalar,
    Signature,
)
from tests.support.asking import cast, places, same


def one(kind: Any, required: bool = True) -> Signature:
    """A signature with one column under test, and another column."""
    return Signature((ColSpec(Scalar.double, "k"), ColSpec(kind, "x", required)))


def stamp(text: str) -> np.datetime64:
    return np.datetime64(text, "ns")


# --- CSV

CSV: list[tuple[Any, str, Any]] = [
    (Scalar.boolean, "TRUE", True),
    (Scalar.boolean, " false ", False),
    (Scalar.long, " 7 ", 7),
    (Scalar.long, "-7", -7),
    (Scalar.double, "1e3", 1000.0),
    (Scalar.double, "7", 7.0),
    (Scalar.string, "NA", "NA"),
    (Scalar.string, "7", "7"),
    (Scalar.binary, "YWI=", b"ab"),
]


@pytest.mark.parametrize(("kind", "text", "wanted"), CSV)
def test_csv_text_is_read_by_the_type(kind: Any, text: str, wanted: Any) -> None:
    batch = cast(one(kind), "csv", CsvTable(["k", "x"], [["1"], [text]]))
    assert batch.arrays["x"].tolist() == [wanted]
    assert batch.arrays["x"].dtype == kind.dtype


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Scalar.boolean, "1"),
        (Scalar.boolean, "yes"),
        (Scalar.long, "1.7"),
        (Scalar.long, "3.0"),
        (Scalar.long, "1_000"),
        (Scalar.long, "٣"),
        (Scalar.long, "9223372036854775808"),
        (Scalar.long, "9" * 5000),
        (Scalar.integer, "2147483648"),
        (Scalar.double, "1,5"),
        (Scalar.double, "1_0"),
        (Scalar.double, "NA"),
        (Scalar.float, "1e39"),
        (Scalar.datetime, "01/02/2024"),
        (Scalar.binary, "@"),
        (Scalar.long, None),
        (Scalar.boolean, None),
        (Scalar.binary, None),
    ],
)
def test_csv_text_that_is_not_the_type_is_refused(kind: Any, text: str | None) -> None:
    assert places(one(kind), "csv", CsvTable(["k", "x"], [["1"], [text]])) == ["csv.data[0].x"]


def test_empty_csv_cells_are_null() -> None:
    signature = Signature(
        (
            ColSpec(Scalar.double, "d"),
            ColSpec(Scalar.string, "s"),
            ColSpec(Scalar.datetime, "t"),
            ColSpec(Scalar.long, "l", False),
        )
    )
    batch = cast(signature, "csv", CsvTable(["d", "s", "t", "l"], [[None], [None], [None], [None]]))
    assert np.isnan(batch.arrays["d"][0])
    assert batch.arrays["s"][0] is None
    assert np.isnat(batch.arrays["t"][0])
    assert np.ma.getmaskarray(batch.arrays["l"])[0]


def test_csv_cannot_hold_nested_columns() -> None:
    for kind in (Array(Scalar.long), AnyType()):
        assert places(one(kind), "csv", CsvTable(["k", "x"], [["1"], ["[1]"]])) == ["csv"]


# --- typed data from Python


@pytest.mark.parametrize(
    ("kind", "required", "column", "wanted"),
    [
        (Scalar.integer, True, np.array([1], np.int16), [1]),
        (Scalar.integer, True, np.array([1], np.uint16), [1]),
        (Scalar.long, True, np.array([1], np.uint32), [1]),
        (Scalar.double, True, np.array([1.5], np.float32), [1.5]),
        (Scalar.double, True, np.array([5], np.int64), [5.0]),
        (Scalar.float, True, np.array([1.5], np.float64), [1.5]),
        (Scalar.float, True, np.array([np.nan], np.float64), [math.nan]),
        (Scalar.float, True, np.array([5], np.int64), [5.0]),
        (Scalar.string, True, np.array(["a"]), ["a"]),
        (Scalar.string, True, pd.Series(["a", None]), ["a", None]),
        (Scalar.string, True, pd.Series(["a", None], dtype="string"), ["a", None]),
        (Scalar.string, True, pd.Series(["a", np.nan], dtype=object), ["a", None]),
        (Scalar.string, True, pd.Series(pd.Categorical(["a", None])), ["a", None]),
        (Scalar.string, True, np.array([np.nan, np.nan]), [None, None]),
        (Scalar.binary, True, np.array([b"ab"]), [b"ab"]),
        (Scalar.binary, True, pd.Series([b"ab", bytearray(b"c")]), [b"ab", b"c"]),
        (Scalar.boolean, True, pd.Series([True, False], dtype="boolean"), [True, False]),
        (Scalar.boolean, False, pd.Series([True, None], dtype="boolean"), [True, None]),
        (Scalar.boolean, False, pd.Series([True, None], dtype=object), [True, None]),
        (Scalar.long, False, pd.Series([2**53 + 1, None], dtype="Int64"), [2**53 + 1, None]),
        (Scalar.long, False, pd.Series([1, None], dtype="Int8"), [1, None]),
        (Scalar.long, False, pd.Series([1.0, np.nan]), [1, None]),
        (Scalar.integer, False, pd.Series([1.0, np.nan]), [1, None]),
        (Scalar.double, True, pd.Series([1, None], dtype="Int64"), [1.0, math.nan]),
        (Scalar.double, True, pd.Series([1.5, None], dtype="Float64"), [1.5, math.nan]),
        (Scalar.double, True, pd.Series([1, 2.5], dtype=object), [1.0, 2.5]),
        (Array(Scalar.double), True, pd.Series([np.array([1, 2])]), [[1.0, 2.0]]),
        (Array(Array(Scalar.long)), True, pd.Series([np.array([[1], [2]])]), [[[1], [2]]]),
        (AnyType(), True, np.array([1.5]), [1.5]),
    ],
)
def test_typed_columns_are_widened(kind: Any, required: bool, column: Any, wanted: list[Any]) -> None:
    batch = cast(one(kind, required), "python", pd.DataFrame({"k": np.ones(len(column)), "x": column}))
    array = batch.arrays["x"]
    assert same(array.tolist(), wanted)
    if isinstance(kind, Scalar):
        assert array.dtype == kind.dtype


@pytest.mark.parametrize(
    ("kind", "required", "column", "path"),
    [
        (Scalar.integer, True, np.array([1], np.int64), "data.x"),
        (Scalar.integer, True, np.array([1], np.uint32), "data.x"),
        (Scalar.long, True, np.array([1], np.uint64), "data.x"),
        (Scalar.long, True, np.array([1.0]), "data.x"),
        (Scalar.long, True, np.array([1.0, np.nan]), "data.x[1]"),
        (Scalar.long, False, np.array([1.0, 2.0]), "data.x"),
        (Scalar.long, False, np.array([1.5, np.nan]), "data.x"),
        (Scalar.long, False, np.array([1e300, np.nan]), "data.x"),
        (Scalar.integer, False, np.array([2.0**31, np.nan]), "data.x"),
        (Scalar.long, True, pd.Series([1, None], dtype="Int64"), "data.x[1]"),
        (Scalar.long, True, np.array([True]), "data.x"),
        (Scalar.boolean, True, np.array([1]), "data.x"),
        (Scalar.boolean, True, pd.Series([True, None], dtype="boolean"), "data.x[1]"),
        (Scalar.double, True, np.array([True]), "data.x"),
        (Scalar.double, True, np.array(["1"]), "data.x[0]"),
        (Scalar.float, True, np.array([0.1]), "data.x[0]"),
        (Scalar.float, True, np.array([1e39]), "data.x[0]"),
        (Scalar.float, True, np.array([2**24 + 1]), "data.x[0]"),
        (Scalar.string, True, np.array([1.5]), "data.x"),
        (Scalar.string, True, pd.Series(["a", 5], dtype=object), "data.x[1]"),
        (Scalar.binary, True, np.array(["YWI="]), "data.x[0]"),
        (Scalar.datetime, True, np.array(["2024-01-01"]), "data.x[0]"),
        (Scalar.datetime, True, np.array(["3000-01-01"], "datetime64[s]"), "data.x[0]"),
        (Scalar.datetime, True, np.array([5]), "data.x"),
        (Array(Scalar.double), True, np.array([1.5]), "data.x"),
        (Array(Scalar.long), True, pd.Series([np.array([1.5])]), "data.x[0]"),
    ],
)
def test_typed_columns_are_not_narrowed(kind: Any, required: bool, column: Any, path: str) -> None:
    frame_ = pd.DataFrame({"k": np.ones(len(column)), "x": column})
    assert places(one(kind, required), "python", frame_) == [path]


def test_dates_from_frames_are_utc_nanoseconds() -> None:
    moment = datetime.datetime(2024, 1, 2, 3, 4, 5, 6)
    zoned = moment.replace(tzinfo=datetime.timezone(datetime.timedelta(hours=2)))
    for column, hours in (
        (pd.Series([moment]), 3),
        (pd.Series([zoned]), 1),
        (pd.Series([moment], dtype=object), 3),
        (pd.Series([zoned], dtype=object), 1),
        (pd.Series([pd.Timestamp(moment)], dtype=object), 3),
        (pd.Series(np.array([moment], "datetime64[us]")), 3),
    ):
        batch = cast(one(Scalar.datetime), "python", pd.DataFrame({"k": [1.0], "x": column}))
        assert batch.arrays["x"].tolist() == [stamp(f"2024-01-02T0{hours}:04:05.000006").astype(int)]
    exact = pd.Series([pd.Timestamp("2024-01-02T03:04:05.000000007")], dtype=object)
    batch = cast(one(Scalar.datetime), "python", pd.DataFrame({"k": [1.0], "x": exact}))
    assert batch.arrays["x"][0] == stamp("2024-01-02T03:04:05.000000007")
