"""Records: what a captured request becomes on disk, without its redacted columns, and back."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.capture.records import Taken, Unnamed, Unreadable, decoded, recorded
from gateway.rollouts.agreement import compare
from loaders.batch import Batch, Columns, Tensors, Value
from loaders.worker import wire
from loaders.worker.wire import Framed, TooLarge

SECRET = "123-45-6789"
LIMIT = 1 << 20


def taken(batch: Batch | Framed, params: dict[str, Any] | None = None, answer: Batch | None = None) -> Taken:
    answer = answer or Tensors({"": np.array([1.0])}, 1)
    return Taken("iris", "2", "sha256:0", 100.0, 0.5, batch, params or {}, answer)


TABLE = Columns(
    {
        "age": np.array([41, 7]),
        "ssn": np.array([SECRET, None], object),
        "seen": np.array(["2026-01-01", "NaT"], "M8[ns]"),
        "count": np.ma.MaskedArray([1, 2], mask=[False, True]),
        "person": np.array([{"name": "a", "SSN": SECRET, "more": [{"ssn": SECRET}]}, None], object),
    },
    2,
    texts=frozenset({"ssn"}),
)


@pytest.mark.parametrize(
    "batch",
    [
        TABLE,
        Columns({0: np.array([1.5])}, 1, np.array([9])),
        Tensors({"": np.zeros((2, 3), np.float32)}, 2),
        Tensors({"image": np.zeros((2, 2, 2), np.uint8), "text": np.array(["x"])}, None),
        Tensors({"raw": np.array([b"\x00\xff"], object)}, 1),
        Value([{"a": [1, None, 2.5]}, "text", b"bytes", datetime.datetime(2026, 1, 1)], 4),
        Value(None),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_every_form_comes_back_as_it_was(batch: Batch) -> None:
    record = recorded(taken(batch, {"threshold": 0.5}, answer=batch), (), LIMIT)
    content = record.content()
    assert compare(content.batch, batch, 0.0).exact
    assert compare(content.answer, batch, 0.0).exact
    assert type(content.batch) is type(batch)
    assert content.params == {"threshold": 0.5}
    assert (record.model, record.version, record.at, record.seconds) == ("iris", "2", 100.0, 0.5)
    assert record.removed == ()


def test_a_framed_body_is_read() -> None:
    pieces = wire.encode({"op": "predict", "batch": TABLE, "params": {"k": 1}})
    joined = b"".join(pieces)
    header = len(joined) and int.from_bytes(joined[4:8], "little")
    framed = Framed(2, np.frombuffer(joined[16:], np.uint8), header)
    content = recorded(taken(framed), (), LIMIT).content()
    assert compare(content.batch, TABLE).exact
    assert content.params == {"k": 1}


def test_redacted_columns_members_and_params_never_become_bytes() -> None:
    record = recorded(taken(TABLE, {"Ssn": SECRET, "k": 1}, answer=TABLE), ["ssn"], LIMIT)
    assert SECRET.encode() not in record.frame
    assert record.removed == ("SSN", "Ssn", "ssn")
    content = record.content()
    assert isinstance(content.batch, Columns)
    assert set(content.batch.arrays) == {"age", "seen", "count", "person"}
    assert content.batch.arrays["person"].tolist() == [{"name": "a", "more": [{}]}, None]
    assert content.params == {"k": 1}


def test_redacted_tensors_and_values() -> None:
    tensors = Tensors({"SSN": np.array([SECRET]), "x": np.zeros(1)}, 1)
    record = recorded(taken(tensors), ["ssn"], LIMIT)
    assert SECRET.encode() not in record.frame
    assert record.removed == ("SSN",)
    nested = Value([{"a": {"ssn": [SECRET]}, "b": 1}], 1)
    record = recorded(taken(nested), ["ssn"], LIMIT)
    assert SECRET.encode() not in record.frame
    assert record.content().batch.value == [{"a": {}, "b": 1}]  # type: ignore[union-attr]


@given(st.recursive(
    st.just(SECRET) | st.integers(),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
    max_leaves=8,
))  # fmt: skip
def test_nothing_below_a_redacted_member_is_kept(inner: Any) -> None:
    record = recorded(taken(Value([{"ssn": inner, "kept": {"ssn": inner}}], 1)), ["SSN"], LIMIT)
    assert SECRET.encode() not in record.frame


@pytest.mark.parametrize(
    "batch",
    [
        Columns({0: np.array([SECRET], object)}, 1),
        Tensors({"": np.array([[1.0]])}, 1),
        Value([[SECRET]], 1),
        Value(SECRET),
        Value([SECRET], 1),
    ],
)
def test_values_without_names_are_not_kept_where_something_is_redacted(batch: Batch) -> None:
    with pytest.raises(Unnamed):
        recorded(taken(batch), ["ssn"], LIMIT)
    assert recorded(taken(batch), (), LIMIT).removed == ()


def test_a_large_request_is_not_encoded() -> None:
    with pytest.raises(TooLarge):
        recorded(taken(Tensors({"": np.zeros(1000)}, 1000)), (), 1000)
    with pytest.raises(TooLarge):
        recorded(taken(Framed(1, np.zeros(2000, np.uint8), 8)), (), 1000)


def test_equal_requests_have_different_ids() -> None:
    assert recorded(taken(TABLE), (), LIMIT).id != recorded(taken(TABLE), (), LIMIT).id


@given(st.binary(max_size=200))
def test_any_bytes_are_a_record_or_unreadable(data: bytes) -> None:
    with pytest.raises(Unreadable):
        decoded(data)


@given(st.data())
def test_a_damaged_record_is_unreadable_or_a_batch(data: st.DataObject) -> None:
    frame = bytearray(recorded(taken(TABLE), (), LIMIT).frame)
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        content = decoded(bytes(frame))
    except Unreadable:
        return
    assert isinstance(content.batch, Columns | Tensors | Value)
