"""The shortcuts of the two most common frames: what they write and read is what the general way does."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from loaders.batch import Batch, Columns, Tensors, Value
from loaders.worker import shortcuts, wire
from tests.support.frames import batches, dtypes, frame, same, texts

QUICK: dict[str, Batch] = {
    "doubles": Columns({"a": np.array([1.5, math.nan]), "é": np.array([2.5, -0.0])}, 2),
    "integers": Columns({0: np.array([1], np.int64), "b": np.array([2], np.int64)}, 1),
    "truths": Columns({"a": np.array([True, False, True])}, 3),
    "columns of one matrix": Columns(dict(zip("abc", np.ones((3, 2)), strict=True)), 2),
    "no rows": Columns({"a": np.empty(0)}, 0),
    "one array": Tensors({"": np.ones((2, 3), np.float32)}, 2),
    "one array that is not side by side": Tensors({"": np.arange(6).reshape(2, 3).T}, None),
}
SLOW: dict[str, Batch] = {
    "two types": Columns({"a": np.ones(1), "b": np.ones(1, np.int64)}, 1),
    "text": Columns({"a": np.array(["x"], object)}, 1, None, frozenset("a")),
    "labels": Columns({"a": np.ones(1)}, 1, np.array([7])),
    "gaps": Columns({"a": np.ma.MaskedArray([1], mask=[True])}, 1),
    "dates": Columns({"a": np.array(["2020-01-01"], "M8[ns]")}, 1),
    "not side by side": Columns({"a": np.ones((2, 2))[:, 0]}, 2),
    "large": Columns({"a": np.ones(5000)}, 5000),
    "no columns": Columns({}, 3),
    "many columns": Columns({str(i): np.ones(1) for i in range(100)}, 1),
    "an array with a name": Tensors({"a": np.ones(1)}, 1),
    "two arrays": Tensors({"": np.ones(1), "a": np.ones(1)}, 1),
    "a large array": Tensors({"": np.ones(5000)}, 5000),
    "texts": Tensors({"": np.array(["x"])}, 1),
    "a value": Value([1.0], 1),
}


@pytest.mark.parametrize("batch", QUICK.values(), ids=QUICK.keys())
def test_a_small_batch_of_numbers_takes_the_quick_way_to_the_same_frame(batch: Batch) -> None:
    frame = b"".join(wire.encode({"op": "predict", "batch": batch, "params": {}}))
    assert wire.encode_call("predict", batch) == frame


@pytest.mark.parametrize("batch", SLOW.values(), ids=SLOW.keys())
def test_any_other_batch_does_not(batch: Batch) -> None:
    assert wire.encode_call("predict", batch) is None


def without_shortcuts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("call", "answer", "read"):
        monkeypatch.setattr(shortcuts, name, lambda *given: None)


small = hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
number_tables = st.tuples(dtypes, st.integers(0, 4), st.lists(texts, max_size=4, unique=True)).map(
    lambda given: Columns({name: np.ones(given[1], given[0]) for name in given[2]}, given[1])
)


@settings(max_examples=200)
@given(small, st.booleans())
def test_an_answer_is_written_and_read_as_without_a_shortcut(array: Any, with_rows: bool) -> None:
    rows = len(array) if with_rows and array.ndim else None
    message = {"op": "answer", "batch": Tensors({"": array}, rows)}
    written = b"".join(map(bytes, wire.encode(message, lenient=True)))
    both_ways(message, written, lenient=True)


@settings(max_examples=200)
@given(batches | number_tables, st.sampled_from(["predict", "prewarm", "answer", 'a"b', "é"]))
def test_a_call_is_read_as_without_a_shortcut(batch: Batch, op: str) -> None:
    message: dict[str, Any] = {"op": op, "batch": batch, "params": {}}
    both_ways(message, frame(message), lenient=False)


def both_ways(message: dict[str, Any], written: bytes, *, lenient: bool) -> None:
    """Compares the frame with that of `packing`, and what is read, before and after its header is known, with
    what `unpacking` reads."""
    with pytest.MonkeyPatch.context() as patch:
        without_shortcuts(patch)
        assert b"".join(map(bytes, wire.encode(message, lenient=lenient))) == written
        plain = wire.loads(written)
    for _ in range(2):
        found = wire.loads(written)
        assert same(plain, found)
        assert list(plain) == list(found)
        batch = found["batch"]
        if isinstance(batch, Columns | Tensors):
            assert all(array.flags.writeable for array in batch.arrays.values() if array.size)


@pytest.mark.parametrize("kind", ["call", "call with an array", "answer"])
def test_the_second_frame_with_a_header_is_not_unpacked(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, batch = f"only here: {kind}", np.ones(1, ">f8")
    message: dict[str, Any] = {"op": "answer", "batch": Tensors({"": batch.reshape((1,) * 7)}, 1)}
    if kind == "call":
        message = {"op": "predict", "batch": Columns({name: batch}, 1), "params": {}}
    if kind == "call with an array":
        message = {"op": "predict", "batch": message["batch"], "params": {}}
    written = b"".join(map(bytes, wire.encode(message, lenient=kind == "answer")))
    wire.loads(written)
    monkeypatch.setattr(wire, "unpack", lambda *given: pytest.fail("it was unpacked"))
    assert same(wire.loads(written), message)


def test_a_known_header_with_another_body_is_refused() -> None:
    message: dict[str, Any] = {"op": "answer", "batch": Tensors({"": np.arange(3)}, 3)}
    whole = b"".join(map(bytes, wire.encode(message, lenient=True)))
    assert same(wire.loads(whole), message)
    header = int.from_bytes(whole[4:8], "little")
    for body in (b"", bytes(8), bytes(32)):
        with pytest.raises(wire.WireError):
            wire.loads(struct.pack("<4sIQ", b"mgw1", header, len(body)) + whole[16 : 16 + header] + body)


def test_only_few_and_short_headers_of_clients_and_models_are_kept() -> None:
    for number in range(2 * shortcuts._MOST_REMEMBERED):
        for name in (f"c{number}", f"c{number}" * 2000):
            written = wire.encode_call("predict", Columns({name: np.ones(1)}, 1))
            assert written is not None
            wire.loads(written)
    for kept in (shortcuts._WRITTEN, shortcuts._READ):
        assert 0 < len(kept) <= shortcuts._MOST_REMEMBERED
    assert max(map(len, shortcuts._WRITTEN.values())) <= shortcuts._LONGEST_REMEMBERED
    assert max(map(len, shortcuts._READ)) <= shortcuts._LONGEST_REMEMBERED
