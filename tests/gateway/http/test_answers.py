"""Answers as JSON: what is written is what a client reads back, and it is always valid JSON."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import datetime
import decimal
import enum
import json
import socket
import uuid
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from pydantic import BaseModel
from scipy.sparse import csr_matrix

from gateway.errors import Problem
from gateway.http import answers
from loaders.batch import Batch, Columns, Opaque, Tensors, Value, from_result
from loaders.worker import wire


def strict(text: bytes) -> Any:
    """JSON as a reader that takes no bare NaN reads it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def encoded(result: Any, rows: int | None = None) -> Any:
    return strict(answers.encode_now(from_result(result, rows)))


def refused(batch: Batch) -> str:
    with pytest.raises(Problem) as caught:
        answers.encode_now(batch)
    assert caught.value.code == "PREDICTION_FAILED"
    return caught.value.message


numbers = npst.arrays(
    st.one_of(
        npst.integer_dtypes(endianness="?"), npst.floating_dtypes(endianness="?"), npst.boolean_dtypes()
    ),
    npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)


@given(numbers)
def test_any_array_is_read_back_exactly(array: Any) -> None:
    expected = array.tolist()

    def cleaned(value: Any) -> Any:
        if isinstance(value, list):
            return [cleaned(item) for item in value]
        return None if isinstance(value, float) and not np.isfinite(value) else value

    assert strict(answers.encode_now(Tensors({"": array}, None))) == cleaned(expected)


def test_float32_is_given_as_the_number_it_is() -> None:
    array = np.array([0.1, 1e-20, 3.0], dtype=np.float32)
    assert encoded(array) == array.tolist()
    assert encoded(array) != [0.1, 1e-20, 3.0]


def test_integers_stay_exact() -> None:
    array = np.array([2**63 - 1, -(2**63), 2**53 + 1])
    assert encoded(array) == array.tolist()
    assert encoded([2**53 + 1, 2**70, -(2**65)]) == [2**53 + 1, 2**70, -(2**65)]


@pytest.mark.parametrize(
    "array", [np.arange(6).reshape(2, 3).T, np.arange(6)[::2], np.arange(3, dtype=">i4")]
)
def test_any_memory_layout_will_do(array: Any) -> None:
    assert encoded(array) == array.tolist()


def test_several_arrays_are_an_object_of_lists() -> None:
    result = {"label": np.array(["a", "b"]), "p": np.array([[0.5, np.nan], [1.0, np.inf]], dtype=np.float32)}
    assert encoded(result, 2) == {"label": ["a", "b"], "p": [[0.5, None], [1.0, None]]}


def test_a_frame_is_records() -> None:
    frame = pd.DataFrame(
        {
            "n": pd.array([1, None], dtype="Int64"),
            "x": [0.5, np.nan],
            "t": ["a", None],
            "when": pd.to_datetime(["2024-01-01T10:00:00.123456789", None]),
            "many": [[1, np.float32(0.5)], {"b": b"\xff"}],
        },
        index=[7, 9],
    )
    assert encoded(frame, 2) == [
        {"n": 1, "x": 0.5, "t": "a", "when": "2024-01-01T10:00:00.123456789", "many": [1, 0.5]},
        {"n": None, "x": None, "t": None, "when": None, "many": {"b": base64.b64encode(b"\xff").decode()}},
    ]


@pytest.mark.parametrize(
    "name",
    [
        "2024-01-01",
        "2024-01-01T10:20:30.5",
        "2024-01-01T00:00:00.000001001",
        "1969-12-31T23:59",
        "9999-12-31T23:59:59.5",  # beyond what nanoseconds hold
    ],
)
def test_moments_are_written_as_pandas_writes_them(name: str) -> None:
    moment = pd.Timestamp(name)
    assert encoded(pd.Series([moment], name="t")) == [{"t": moment.isoformat()}]
    assert encoded(np.array([moment.to_datetime64()])) == [moment.isoformat()]
    assert encoded([moment.to_datetime64(), moment]) == [moment.isoformat(), moment.isoformat()]


def test_series_are_records_under_their_name_or_0() -> None:
    assert encoded(pd.Series([1, 2], name="y")) == [{"y": 1}, {"y": 2}]
    assert encoded(pd.Series([1.5])) == [{"0": 1.5}]
    assert encoded(pd.DataFrame(np.eye(2))) == [{"0": 1.0, "1": 0.0}, {"0": 0.0, "1": 1.0}]


def test_frames_without_rows_or_columns() -> None:
    assert encoded(pd.DataFrame({"a": [], "b": []})) == []
    assert encoded(pd.DataFrame(index=[0, 1])) == [{}, {}]


def test_two_columns_of_one_name_are_not_merged_silently() -> None:
    assert "two columns" in refused(from_result(pd.DataFrame([[1, 2]], columns=[0, "0"]), 1))


@dataclasses.dataclass
class Point:
    x: int
    raw: bytes


class Color(enum.Enum):
    RED = "red"


class Person(BaseModel):
    name: str
    photo: bytes


THE_ID = uuid.UUID(int=1)

VALUES = [
    ("text", "text"),
    (3, 3),
    (None, None),
    (float("nan"), None),
    ({"a": float("inf"), "b": [float("-inf")]}, {"a": None, "b": [None]}),
    ((1, (2, 3)), [1, [2, 3]]),
    ({5}, [5]),
    (frozenset(), []),
    ({True: "a", None: "b", 2.5: "c", 7: "d"}, {"true": "a", "null": "b", "2.5": "c", "7": "d"}),
    ({np.int64(3): 1, np.str_("k"): 2}, {"3": 1, "k": 2}),
    (b"\x00\xff" * 60, base64.b64encode(b"\x00\xff" * 60).decode()),
    (decimal.Decimal("1.10"), 1.1),
    (decimal.Decimal("NaN"), None),
    (datetime.datetime(2024, 1, 2, 3, 4, 5), "2024-01-02T03:04:05"),
    (datetime.date(2024, 1, 2), "2024-01-02"),
    ({datetime.date(2024, 1, 2): 1}, {"2024-01-02": 1}),
    ([np.float32(0.1), np.float64(0.2), np.int8(3), np.bool_(True)], [float(np.float32(0.1)), 0.2, 3, True]),
    ([np.float64("nan"), pd.NA, pd.NaT], [None, None, None]),
    ({"a": np.arange(3), "b": [np.array([b"x"], dtype=object)]}, {"a": [0, 1, 2], "b": [["eA=="]]}),
    (Point(1, b"x"), {"x": 1, "raw": "eA=="}),
    ([Color.RED, THE_ID], ["red", str(THE_ID)]),
    ([Person(name="a", photo=b"x")], [{"name": "a", "photo": "eA=="}]),
    ({"frame": pd.DataFrame({"a": [1]}), "series": pd.Series([2])}, {"frame": [{"a": 1}], "series": [2]}),
    ({"sparse": csr_matrix(np.eye(2))}, {"sparse": [[1.0, 0.0], [0.0, 1.0]]}),
]


@pytest.mark.parametrize(("value", "expected"), VALUES, ids=lambda v: repr(v)[:30])
def test_values_that_models_really_give(value: Any, expected: Any) -> None:
    assert strict(answers.encode_now(Value(value))) == expected


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(st.characters(exclude_categories=["Cs"])),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.integers() | st.text("ab"), inner, max_size=4)
        ),
        max_leaves=20,
    )
)
def test_whatever_python_holds_becomes_valid_json_or_is_refused(value: Any) -> None:
    try:
        text = answers.encode_now(Value(value))
    except Problem as problem:
        assert problem.code == "PREDICTION_FAILED"  # noqa: PT017 - either outcome is right
    else:
        strict(text)


def recursive() -> list[Any]:
    inside: list[Any] = []
    inside.append(inside)
    return inside


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (object(), "object"),
        ({"f": lambda: 0}, "function"),
        ([datetime.timedelta(1)], "timedelta"),
        (np.timedelta64(1, "s"), "timedelta64"),
        ([np.complex128(1j)], "complex"),
        ([1j], "complex"),
        ({(1, 2): 3}, "tuple"),
        ({1: "a", "1": "b"}, "'1'"),
        ("\ud800", "surrogates"),
        (recursive(), "nested"),
        (Point, "type"),
    ],
)
def test_what_json_cannot_hold_is_the_models_failure(value: Any, word: str) -> None:
    assert word in refused(Value(value))


def test_arrays_that_json_cannot_hold() -> None:
    assert "complex" in refused(Tensors({"": np.array([1j])}, 1))
    assert "timedelta" in refused(Tensors({"": np.array([1], dtype="m8[s]")}, 1))


@pytest.mark.parametrize(
    "value",
    [np.zeros(200_000), [0.5] * 200_000, [[0.5] * 2000] * 100, "x" * 2_000_000, {"a": "x" * 2_000_000}],
)
def test_large_answers_are_encoded_off_the_loop(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = from_result(value, None)
    assert answers.weight(batch) > answers.OFF_LOOP_BYTES
    moved = []
    plain = answers.in_large_thread

    async def seen(function: Any, *arguments: Any) -> Any:
        moved.append(function)
        return await plain(function, *arguments)

    monkeypatch.setattr(answers, "in_large_thread", seen)
    assert b"".join(asyncio.run(answers.encode_apart(batch, 1 << 30))) == answers.encode_now(batch)
    assert moved


MANY = 60_000
LARGE: dict[str, Any] = {
    "doubles": np.arange(MANY) / 7,
    "singles": (np.arange(MANY * 2) / 7).astype(np.float32),
    "rows": np.arange(MANY * 3).reshape(-1, 3),
    "one row": np.arange(MANY * 3).reshape(1, -1),
    "wide rows": np.zeros((3, 2, MANY)),
    "no columns": np.empty((MANY * 3, 0)),
    "text": np.array(["ab", "ç"] * MANY),
    "dates": np.full(MANY, "2020-01-01", "M8[ns]"),
    "two": {"a": np.arange(MANY), "b": np.zeros((MANY, 2))},
    "frame": pd.DataFrame({"a": np.arange(MANY), "b": ["x"] * MANY}),
    "index alone": pd.DataFrame(index=pd.RangeIndex(MANY * 3)),
    "numbers": [0.5] * MANY,
    "lists": [[1, 2]] * MANY,
    "empty lists": [[]] * MANY,
    "one list": [[[1] * MANY], 2],
    "a small, a large, a small": [1, [2] * MANY, 3],
    "records": [{"a": 1, "b": [None, True]}] * MANY,
    "an object": {"a": [1] * MANY, "b": {"c": ["x"] * MANY, "d": 1}, "e": 0},
    "arrays in a list": [np.zeros(MANY), 1, np.zeros(3)],
    "what JSON has no form for": [decimal.Decimal(1), b"x", {1, 2}] * MANY,
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_answer_comes_in_pieces_and_is_the_same(name: str) -> None:
    batch = from_result(LARGE[name], None)
    parts = asyncio.run(answers.encode_apart(batch, 1 << 30))
    assert len(parts) > 1
    assert max(map(len, parts)) <= 1 << 20
    assert b"".join(parts) == answers.encode_now(batch)


@pytest.mark.parametrize(
    "batch",
    [
        Columns({}, 2_000_000_000),
        Columns({"a": np.broadcast_to(np.float64(0), (2_000_000_000,))}, 2_000_000_000),
        Tensors({"": np.empty((2_000_000_000, 0))}, 2_000_000_000),
        Tensors({"": np.broadcast_to(np.int8(0), (50_000, 50_000))}, 50_000),
        Tensors({"a": np.empty((1_000_000, 1000, 0)), "b": np.zeros(2)}, None),
        Value([0.123456789] * 500_000),
        Value({"a": ["x" * 1_000_000] * 10}),
    ],
    ids=range(7),
)
def test_an_answer_over_the_limit_is_refused_before_it_is_built(batch: Batch) -> None:
    with pytest.raises(Problem) as refused:
        asyncio.run(answers.encode_apart(batch, 1_000_000))
    assert refused.value.code == "PREDICTION_FAILED"
    assert "1000000 bytes" in refused.value.message
    assert "max_answer_bytes" in str(refused.value.hint)


class Odd(BaseModel):
    a: int


@dataclasses.dataclass
class Spot:
    x: int
    y: tuple[int, ...]


class Colour(enum.Enum):
    red = "RED"


FIELDS = np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")])


def outcome(batch: Batch) -> Any:
    try:
        return strict(answers.encode_now(batch))
    except Problem as problem:
        return problem.code, problem.message


@pytest.mark.parametrize(
    "result",
    [
        {"tags": {5}},
        [frozenset({"a"}), {"b": range(3)}],
        Spot(1, (2,)),
        [Odd(a=1), Colour.red, uuid.UUID(int=7)],
        {"frame": pd.DataFrame({"a": [1]}), "series": pd.Series([1, 2]), "sparse": csr_matrix([[0, 1]])},
        FIELDS,
        [FIELDS[0]],
        (n for n in range(3)),
        [1, {"a": object()}],
        {"a": Spot},
        lambda: 1,
        {frozenset({1}): 1},
        {(1, frozenset()): 1},
        {uuid.UUID(int=7): 1},
        {Colour.red: 1},
        {2: 2, None: 3, True: 4},
    ],
    ids=repr,
)
def test_an_answer_from_another_process_is_written_as_one_from_this(result: Any) -> None:
    batch = from_result(result, None)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        wire.transmit(ours, wire.encode({"batch": batch}, lenient=True))
        received = wire.receive(theirs, wire.Reader())
    assert received is not None
    assert outcome(received["batch"]) == outcome(batch)


def test_what_cannot_leave_a_process_is_named() -> None:
    assert refused(Value([Opaque("generator")])).endswith("written as JSON: it has a value of type generator")
    assert refused(Value({Opaque("frozenset"): 1})).endswith("an object has a key of type frozenset")


def test_a_class_in_an_answer_is_named() -> None:
    assert refused(Value([np.ndarray])).endswith("written as JSON: it has a value of type type")
