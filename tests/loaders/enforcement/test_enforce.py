"""Enforcement, settled cell by settled cell: the same verdict in every JSON form."""

from __future__ import annotations

import datetime
import math
from typing import Any

import numpy as np
import pytest

from loaders.batch import Columns, frame
from loaders.enforcement import InvalidInput, RawInput, enforce
from loaders.signature import (
    AnyType,
    Array,
    ColSpec,
    Map,
    Object,
    Property,
    Scalar,
    Signature,
)
from tests.support.asking import cast, faults, same

JSON_FORMS = ("dataframe_split", "dataframe_records", "inputs columns", "inputs records", "instances")


def one(kind: Any, required: bool = True) -> Signature:
    """A signature with one column under test, and another column."""
    return Signature((ColSpec(Scalar.double, "k"), ColSpec(kind, "x", required)))


def sent(form: str, cells: list[Any]) -> RawInput:
    records = [{"k": 0.5, "x": cell} for cell in cells]
    if form == "dataframe_split":
        return RawInput("dataframe_split", {"columns": ["k", "x"], "data": [[0.5, cell] for cell in cells]})
    if form == "dataframe_records":
        return RawInput("dataframe_records", records)
    if form == "inputs columns":
        return RawInput("inputs", {"k": [0.5] * len(cells), "x": cells})
    return RawInput("inputs" if form == "inputs records" else "instances", records)


def stamp(text: str) -> np.datetime64:
    return np.datetime64(text, "ns")


def test_a_misspelt_column_is_named_next_to_the_missing_one() -> None:
    wanted = Signature(tuple(ColSpec(Scalar.double, name) for name in ("sepal_length", "sepal_width", "Age")))
    row = {"sepal_length": 1.0, "sepal_w": 2.0, "AGE": 3.0, "colour": 4.0, "w" * 99: 5.0}
    with pytest.raises(InvalidInput) as refused:
        enforce(wanted, RawInput("dataframe_records", [row]))
    found = [(one.path, one.problem, one.expected, one.got) for one in refused.value.violations]
    assert found == [
        ("dataframe_records.sepal_width", "is missing", "double", "the unknown column sepal_w"),
        ("dataframe_records.Age", "is missing", "double", "the unknown column AGE"),
    ]
    with pytest.raises(InvalidInput) as refused:
        enforce(wanted, RawInput("dataframe_records", [{"sepal_length": 1.0, "colour": 4.0}]))
    assert [one.got for one in refused.value.violations] == [None, None]


def test_misspelt_columns_are_looked_for_a_few_times_only() -> None:
    wanted = Signature(tuple(ColSpec(Scalar.double, f"column_number_{i}") for i in range(60)))
    with pytest.raises(InvalidInput) as refused:
        enforce(wanted, RawInput("dataframe_records", [{f"colum_number_{i}": 1.0 for i in range(60)}]))
    assert [one.got is not None for one in refused.value.violations] == [True] * 10 + [False] * 50


ACCEPTED: list[tuple[Any, bool, Any, Any]] = [
    (Scalar.boolean, True, True, np.True_),
    (Scalar.integer, True, 2**31 - 1, np.int32(2**31 - 1)),
    (Scalar.integer, True, -(2**31), np.int32(-(2**31))),
    (Scalar.long, True, 2**63 - 1, np.int64(2**63 - 1)),
    (Scalar.long, True, 0, np.int64(0)),
    (Scalar.float, True, 0.1, np.float32(0.1)),
    (Scalar.float, True, 3, np.float32(3)),
    (Scalar.float, True, None, np.float32("nan")),
    (Scalar.double, True, 1, np.float64(1)),
    (Scalar.double, True, 1.0, np.float64(1)),
    (Scalar.double, True, 0.1, np.float64(0.1)),
    (Scalar.double, True, 2**60 + 1, np.float64(2**60 + 1)),
    (Scalar.double, True, None, np.float64("nan")),
    (Scalar.string, True, "", ""),
    (Scalar.string, True, "null", "null"),
    (Scalar.string, True, None, None),
    (Scalar.binary, True, "YWI=", b"ab"),
    (Scalar.binary, True, "YW\nI=\n", b"ab"),
    (Scalar.binary, True, "", b""),
    (Scalar.datetime, True, "2024-01-02", stamp("2024-01-02")),
    (Scalar.datetime, True, "2024-01-02 03:04", stamp("2024-01-02T03:04")),
    (Scalar.datetime, True, "2024-01-02T03:04:05Z", stamp("2024-01-02T03:04:05")),
    (Scalar.datetime, True, "2024-01-02T03:04:05.5+02:00", stamp("2024-01-02T01:04:05.5")),
    (Scalar.datetime, True, "2024-01-02T03:04:05.123456789", stamp("2024-01-02T03:04:05.123456789")),
    (Scalar.datetime, True, "2024-01-02T03:04:05.123456789-00:30", stamp("2024-01-02T03:34:05.123456789")),
    (Scalar.datetime, True, "2024-01-02T03:04:05,123456789", stamp("2024-01-02T03:04:05.123456789")),
    (Scalar.datetime, True, None, np.datetime64("NaT", "ns")),
    (Array(Scalar.double), True, [1, 2.5], [1.0, 2.5]),
    (Array(Scalar.double), True, [1.5, None], [1.5, math.nan]),
    (Array(Scalar.double), True, [], []),
    (Array(Scalar.float), True, [0.1], [float(np.float32(0.1))]),
    (Array(Scalar.integer), True, [7], [7]),
    (Array(Scalar.string), True, ["a", None], ["a", None]),
    (Array(Scalar.binary), True, ["YWI="], [b"ab"]),
    (Array(Scalar.datetime), True, ["2024-01-02T00:00:00Z"], [datetime.datetime(2024, 1, 2)]),
    (Array(Array(Scalar.long)), True, [[1], [], [2, 3]], [[1], [], [2, 3]]),
    (Array(AnyType()), True, [1, None, "a", {"b": []}], [1, None, "a", {"b": []}]),
    (Object((Property("p", Scalar.double),)), True, {"p": 1}, {"p": 1.0}),
    (Object((Property("p", Scalar.long, False),)), True, {}, {}),
    (Object((Property("p", Scalar.long, False),)), True, {"p": None}, {"p": None}),
    (Map(Scalar.long), True, {"a": 1}, {"a": 1}),
    (Map(Scalar.long), True, {}, {}),
    (AnyType(), True, None, None),
    (AnyType(), True, {"a": [1, "b"]}, {"a": [1, "b"]}),
    (Scalar.binary, False, None, None),
    (Array(Scalar.long), False, None, None),
    (Map(Scalar.long), False, None, None),
    (Map(Scalar.long), False, {"a": None}, {"a": None}),
    (Object((Property("p", Scalar.long),)), False, None, None),
]

REFUSED: list[tuple[Any, bool, Any, str, str]] = [
    (Scalar.boolean, True, "false", "string", ""),
    (Scalar.boolean, True, 0, "long", ""),
    (Scalar.boolean, True, 1.0, "double", ""),
    (Scalar.boolean, True, None, "null", ""),
    (Scalar.integer, True, 1.7, "double", ""),
    (Scalar.integer, True, 3.0, "double", ""),
    (Scalar.integer, True, True, "boolean", ""),
    (Scalar.integer, True, "1", "string", ""),
    (Scalar.integer, True, 2**31, "long", ""),
    (Scalar.integer, False, 2**31, "long", ""),
    (Scalar.integer, True, None, "null", ""),
    (Scalar.long, True, 1.7, "double", ""),
    (Scalar.long, True, 3.0, "double", ""),
    (Scalar.long, False, 3.0, "double", ""),
    (Scalar.long, True, True, "boolean", ""),
    (Scalar.long, True, False, "boolean", ""),
    (Scalar.long, True, "1", "string", ""),
    (Scalar.long, True, 2**63, "long", ""),
    (Scalar.long, True, None, "null", ""),
    (Scalar.long, True, [1], "array", ""),
    (Scalar.float, True, 1e39, "double", ""),
    (Scalar.float, True, "1.5", "string", ""),
    (Scalar.float, True, True, "boolean", ""),
    (Scalar.double, True, "1.5", "string", ""),
    (Scalar.double, True, True, "boolean", ""),
    (Scalar.double, True, False, "boolean", ""),
    (Scalar.double, True, 10**400, "long", ""),
    (Scalar.double, True, [1.5], "array", ""),
    (Scalar.double, True, {"a": 1}, "object", ""),
    (Scalar.string, True, 5, "long", ""),
    (Scalar.string, True, True, "boolean", ""),
    (Scalar.string, True, ["a"], "array", ""),
    (Scalar.string, True, {"a": 1}, "object", ""),
    (Scalar.binary, True, "_-_-", "string", ""),
    (Scalar.binary, True, "YW", "string", ""),
    (Scalar.binary, True, "é", "string", ""),
    (Scalar.binary, True, 5, "long", ""),
    (Scalar.binary, True, None, "null", ""),
    (Scalar.datetime, True, 20240102, "long", ""),
    (Scalar.datetime, True, "20240102", "string", ""),
    (Scalar.datetime, True, "01/02/2024", "string", ""),
    (Scalar.datetime, True, "2024-W01-1", "string", ""),
    (Scalar.datetime, True, "2024-13-01", "string", ""),
    (Scalar.datetime, True, "now", "string", ""),
    (Scalar.datetime, True, "NaT", "string", ""),
    (Scalar.datetime, True, "", "string", ""),
    (Scalar.datetime, True, "3000-01-01", "datetime", ""),
    (Scalar.datetime, True, "2024-01-02T03:04:05.1234567891", "string", ""),
    (Array(Scalar.double), True, ["1"], "string", "[0]"),
    (Array(Scalar.double), True, [1.5, True], "boolean", "[1]"),
    (Array(Scalar.double), True, 1.5, "double", ""),
    (Array(Scalar.double), True, None, "null", ""),
    (Array(Scalar.long), True, [1, 3.0], "double", "[1]"),
    (Array(Scalar.long), True, [None], "null", "[0]"),
    (Array(Array(Scalar.long)), True, [None], "null", "[0]"),
    (Array(Array(Scalar.long)), True, [[1], [1, "2"]], "string", "[1][1]"),
    (Object((Property("p", Scalar.long),)), True, {"p": 3.0}, "double", ".p"),
    (Object((Property("p", Scalar.long),)), True, {"p": None}, "null", ".p"),
    (Object((Property("p", Scalar.double),)), True, {"p": None}, "null", ".p"),
    (Object((Property("p", Array(Scalar.long)),)), True, {"p": [1, "a"]}, "string", ".p[1]"),
    (Object((Property("p", Scalar.long),)), True, None, "null", ""),
    (Object((Property("p", Scalar.long),)), True, "a", "string", ""),
    (Map(Scalar.long), True, {"a": "1"}, "string", ".a"),
    (Map(Scalar.long), True, {"a": None}, "null", ".a"),
    (Map(Scalar.long), True, [1], "array", ""),
    (Map(Scalar.long), True, None, "null", ""),
]

SOUND: dict[Any, Any] = {
    Scalar.boolean: True,
    Scalar.integer: 1,
    Scalar.long: 1,
    Scalar.float: 1.5,
    Scalar.double: 1.5,
    Scalar.string: "a",
    Scalar.binary: "YWI=",
    Scalar.datetime: "2024-05-06T07:08:09",
}


def sound(kind: Any) -> Any:
    if isinstance(kind, Scalar):
        return SOUND[kind]
    if isinstance(kind, Array):
        return [sound(kind.items)]
    if isinstance(kind, Object):
        return {p.name: sound(p.type) for p in kind.properties}
    return {"key": sound(kind.values)} if isinstance(kind, Map) else "anything"


def forms_of(kind: Any) -> list[str]:
    """An object of columns is one record where there are nested types."""
    return [f for f in JSON_FORMS if isinstance(kind, Scalar | AnyType) or f != "inputs columns"]


@pytest.mark.parametrize("before", [0, 1, 40])
@pytest.mark.parametrize(("kind", "required", "value", "wanted"), ACCEPTED)
def test_accepted(kind: Any, required: bool, value: Any, wanted: Any, before: int) -> None:
    for form in forms_of(kind):
        batch = enforce(one(kind, required), sent(form, [sound(kind)] * before + [value])).batch
        assert isinstance(batch, Columns)
        assert batch.rows == before + 1
        found = batch.arrays["x"][-1]
        if isinstance(wanted, np.datetime64) and np.isnat(wanted):
            assert np.isnat(found), form
        else:
            assert same(found, wanted), (form, found)
        if isinstance(kind, Scalar):
            assert batch.arrays["x"].dtype == kind.dtype, form


@pytest.mark.parametrize("before", [0, 1, 40])
@pytest.mark.parametrize(("kind", "required", "value", "got", "tail"), REFUSED)
def test_refused(kind: Any, required: bool, value: Any, got: str, tail: str, before: int) -> None:
    for form in forms_of(kind):
        raw = sent(form, [sound(kind)] * before + [value])
        with pytest.raises(InvalidInput) as refused:
            enforce(one(kind, required), raw)
        (violation,) = refused.value.violations
        root = {"dataframe_split": "dataframe_split.data", "inputs records": "inputs"}.get(form, form)
        path = f"{root}[{before}].x" if form != "inputs columns" else f"inputs.x[{before}]"
        assert violation.path == path + tail
        assert violation.got == got


@pytest.mark.parametrize("kind", [Scalar.integer, Scalar.long, Scalar.boolean])
@pytest.mark.parametrize("form", JSON_FORMS)
def test_gaps_in_optional_columns_stay_gaps(kind: Scalar, form: str) -> None:
    value = True if kind is Scalar.boolean else 2**31 - 1
    batch = enforce(one(kind, False), sent(form, [value, None, value])).batch
    assert isinstance(batch, Columns)
    array = batch.arrays["x"]
    assert isinstance(array, np.ma.MaskedArray)
    assert array.dtype == kind.dtype
    assert np.ma.getmaskarray(array).tolist() == [False, True, False]
    assert array.data[[0, 2]].tolist() == [value, value]
    assert frame(batch)["x"].isna().tolist() == [False, True, False]


def test_advice_is_given_for_gaps_in_integers() -> None:
    ((_, problem),) = faults(one(Scalar.long), sent("instances", [None]))
    assert "declare the column as double" in problem
    assert "optional" in problem


def test_mixed_forms_of_dates_in_one_column() -> None:
    cells = ["2024-01-01", "2024-01-01T10:00:00Z", "2024-01-01 10:00:00.5", None, "2024-01-01T10:00+05:30"]
    batch = cast(one(Scalar.datetime), "instances", [{"k": 0, "x": cell} for cell in cells])
    assert batch.arrays["x"].astype(str).tolist() == [
        "2024-01-01T00:00:00.000000000",
        "2024-01-01T10:00:00.000000000",
        "2024-01-01T10:00:00.500000000",
        "NaT",
        "2024-01-01T04:30:00.000000000",
    ]


def test_one_unknown_column_stands_for_the_missing_one_it_resembles_most() -> None:
    signature = Signature((ColSpec(Scalar.double, "width_1"), ColSpec(Scalar.double, "width_2")))
    with pytest.raises(InvalidInput) as refused:
        enforce(signature, RawInput("dataframe_records", [{"Width_2": 1.0}]))
    assert [(v.path, v.got) for v in refused.value.violations] == [
        ("dataframe_records.width_1", None),
        ("dataframe_records.width_2", "the unknown column Width_2"),
    ]
