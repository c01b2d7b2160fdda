"""Captured requests outside the store: JSON that is a body again, and frames that lose nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.capture.exchange import from_frames, to_frame, to_json
from gateway.capture.records import Record, Taken, Unreadable, recorded
from gateway.http.bodies import parse_json
from loaders.batch import Batch, Columns, Tensors, Value
from loaders.enforcement import enforce

TABLE = Columns(
    {
        "n": np.ma.MaskedArray([1, 2], mask=[False, True]),
        "when": np.array(["2026-01-01T10:00", "NaT"], "M8[ns]"),
        "raw": np.array([b"\xff", None], object),
        "text": np.array(["a", None], object),
        "nested": np.array([{"a": [1.5]}, None], object),
    },
    2,
    texts=frozenset({"text"}),
)


def record(batch: Batch, answer: Batch | None = None) -> Record:
    taken = Taken("iris", "2", "d", 0.0, 0.5, batch, {"k": 1}, answer or batch)
    return recorded(taken, (), 1 << 20)


@pytest.mark.parametrize(
    "batch",
    [
        TABLE,
        Tensors({"": np.zeros((2, 3), np.float32)}, 2),
        Tensors({"a": np.array(["x"]), "b": np.ones(1)}, 1),
        Value([{"a": 1}], 1),
        Columns({0: np.array([1.5])}, 1),
    ],
)
def test_json_is_a_body_again(batch: Batch) -> None:
    shown = json.loads(json.dumps(to_json(record(batch)), allow_nan=False))
    assert (shown["model"], shown["version"], shown["at"]) == ("iris", "2", "1970-01-01T00:00:00Z")
    parsed = parse_json(json.dumps(shown["input"]).encode())
    assert parsed.params == {"k": 1}
    assert enforce(None, parsed.raw).batch.rows == batch.rows


def test_a_table_in_json() -> None:
    shown = to_json(record(TABLE))
    assert shown["input"]["dataframe_split"] == {
        "columns": ["n", "when", "raw", "text", "nested"],
        "data": [
            [1, "2026-01-01T10:00:00.000000000", "/w==", "a", {"a": [1.5]}],
            [None, None, None, None, None],
        ],
    }
    assert shown["predictions"][0]["text"] == "a"


def test_what_json_cannot_hold_is_named() -> None:
    shown = to_json(record(Tensors({"": np.array([np.inf])}, 1)))
    assert "infinite" in shown["problem"]
    broken = record(TABLE)
    cut = Record(**{**{n: getattr(broken, n) for n in Record.__slots__}, "frame": broken.frame[:-1]})
    assert "cannot be read" in to_json(cut)["problem"]


def _cut(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


@pytest.mark.parametrize("size", [1, 7, 100, 1 << 20])
def test_frames_lose_nothing(size: int) -> None:
    records = [record(TABLE), record(Value(None))]
    assert list(from_frames(_cut(b"".join(map(to_frame, records)), size))) == records
    assert list(from_frames([])) == []


@given(st.binary(min_size=1, max_size=100))
def test_any_bytes_are_unreadable(data: bytes) -> None:
    with pytest.raises(Unreadable):
        list(from_frames([data]))


def test_half_a_frame_is_unreadable() -> None:
    with pytest.raises(Unreadable, match="inside a frame"):
        list(from_frames([to_frame(record(TABLE))[:-1]]))
