"""Frames: what goes in comes out bit for bit, and a frame that lies is refused in bounded memory."""

from __future__ import annotations

import json
import math
import resource
import socket
import struct
import threading
from collections import OrderedDict
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from loaders.batch import Batch, Columns, Tensors, Value
from loaders.worker import shortcuts, unpacking, wire

# ---- helpers of this file: equality to the bit, and a round trip through a real socket ----


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ma.MaskedArray):
        return (
            isinstance(b, np.ma.MaskedArray)
            and same(np.asarray(a.data), np.asarray(b.data))
            and same(np.ma.getmaskarray(a), np.ma.getmaskarray(b))
        )
    if isinstance(a, np.ndarray):
        if not isinstance(b, np.ndarray) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        if a.dtype.kind == "O":
            return all(same(x, y) for x, y in zip(a.reshape(-1), b.reshape(-1), strict=True))
        return a.tobytes() == b.tobytes()
    if isinstance(a, np.generic):
        return isinstance(b, np.generic) and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, Columns):
        return (
            isinstance(b, Columns)
            and a.rows == b.rows
            and list(a.arrays) == list(b.arrays)
            and all(same(a.arrays[n], b.arrays[n]) for n in a.arrays)
            and same(a.index, b.index)
        )
    if isinstance(a, Tensors):
        return isinstance(b, Tensors) and a.rows == b.rows and same(a.arrays, b.arrays)
    if isinstance(a, Value):
        return isinstance(b, Value) and a.rows == b.rows and same(a.value, b.value)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return bool(a == b)


def passed(message: dict[str, Any]) -> dict[str, Any]:
    """The message after a journey through a socket pair."""
    left, right = socket.socketpair()
    with left, right:
        pieces = wire.encode(message)
        sender = threading.Thread(target=wire.transmit, args=(left, pieces))
        sender.start()
        received = wire.receive(right, wire.Reader())
        sender.join()
    assert received is not None
    return received


def frame(message: dict[str, Any]) -> bytes:
    return b"".join(bytes(piece) for piece in wire.encode(message))


def read(data: bytes, limit: int = wire.MAX_FRAME) -> dict[str, Any] | None:
    """What a reader makes of these bytes followed by the end of the stream."""
    left, right = socket.socketpair()
    with right:
        with left:
            left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            left.sendall(data)
        return wire.receive(right, wire.Reader(limit))


def forged(
    header: Any, body: bytes = b"", *, magic: bytes = b"mgw1", sizes: tuple[int, int] | None = None
) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 16)
    return struct.pack("<4sIQ", magic, *(sizes or (len(text), len(body)))) + text + body


# ---- strategies ----

texts = st.text(st.characters(exclude_categories=()), max_size=8)  # lone surrogates too
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | texts
    | st.binary(max_size=40)
    | st.datetimes()
    | st.datetimes(timezones=st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30))]))
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.decimals(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
)
dtypes = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?"),
    hnp.complex_number_dtypes(),
    hnp.unicode_string_dtypes(max_len=5),
    hnp.byte_string_dtypes(max_len=5),
    st.just(np.dtype("datetime64[ns]")),
    st.just(np.dtype("timedelta64[us]")),
)
tensors = dtypes.flatmap(
    lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
nested = st.recursive(
    scalars | tensors,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(texts | st.just("~"), inner, max_size=4)
        | st.dictionaries(st.integers() | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


@st.composite
def tables(draw: st.DrawFn) -> Columns:
    rows = draw(st.integers(0, 5))

    def column() -> Any:
        kind = draw(st.sampled_from(["raw", "masked", "objects"]))
        if kind == "objects":
            array = np.empty(rows, dtype=object)
            for i in range(rows):
                array[i] = draw(nested)
            return array
        if kind == "masked":
            data = draw(hnp.arrays(draw(hnp.integer_dtypes() | hnp.boolean_dtypes()), rows))
            return np.ma.MaskedArray(data, mask=draw(hnp.arrays(bool, rows)))
        return draw(hnp.arrays(draw(dtypes), rows))

    names = draw(st.lists(texts | st.integers(0, 5), max_size=4, unique=True))
    index = draw(st.none() | hnp.arrays(np.int64, rows))
    return Columns({name: column() for name in names}, rows, index)


@st.composite
def tensor_batches(draw: st.DrawFn) -> Tensors:
    arrays = draw(st.dictionaries(texts, tensors, max_size=3))
    lengths = {a.shape[0] if a.ndim else -1 for a in arrays.values()}
    rows = lengths.pop() if len(lengths) == 1 and -1 not in lengths else None
    return Tensors(arrays, rows)


values = st.builds(Value, nested) | st.lists(nested, max_size=4).map(lambda items: Value(items, len(items)))
batches: st.SearchStrategy[Batch] = tables() | tensor_batches() | values


# ---- round trips ----


@settings(max_examples=100)
@given(batches, st.dictionaries(texts, nested, max_size=3))
def test_every_batch_returns_bit_for_bit(batch: Batch, params: dict[str, Any]) -> None:
    received = passed({"op": "predict", "batch": batch, "params": params})
    assert received["op"] == "predict"
    assert same(batch, received["batch"])
    assert same(params, received["params"])


def test_large_arrays_are_referred_to_and_arrive_whole() -> None:
    array = np.random.default_rng(0).random((1024, 1024))
    pieces = wire.encode({"a": array, "b": array[::2], "c": b"x" * 5000})
    assert any(isinstance(p, memoryview) and p.nbytes == array.nbytes for p in pieces)
    received = passed({"a": array, "b": array[::2], "c": b"x" * 5000})
    assert same(array, received["a"])
    assert same(np.ascontiguousarray(array[::2]), received["b"])
    assert received["c"] == b"x" * 5000


def test_more_buffers_than_one_call_takes() -> None:
    arrays = [np.full(1024, i) for i in range(1500)]
    received = passed({"arrays": arrays})
    assert all(same(a, b) for a, b in zip(arrays, received["arrays"], strict=True))


def test_what_pandas_and_numpy_leave_in_answers_arrives_as_plain_values() -> None:
    stamp = pd.Timestamp("2026-01-02 03:04:05.123456789")
    received = passed(
        {
            "stamp": stamp,
            "zoned": pd.Timestamp("2026-01-02", tz="UTC"),
            "gap": [pd.NaT, pd.NA],
            "scalar": np.float32(0.1),
            "text": np.str_("a"),
            "ordered": OrderedDict(b=1, a=2),
            "view": memoryview(b"abc"),
            "strings": pd.array(["a", None], dtype="str").to_numpy(),
        }
    )
    assert received["stamp"] == np.datetime64("2026-01-02T03:04:05.123456789")
    assert received["zoned"] == datetime(2026, 1, 2, tzinfo=UTC)
    assert np.isnat(received["gap"][0])
    assert received["gap"][1] is None
    assert same(np.float32(0.1), received["scalar"])
    assert same(np.str_("a"), received["text"])
    assert list(received["ordered"].items()) == [("b", 1), ("a", 2)]
    assert received["view"] == b"abc"
    assert received["strings"].dtype == object


def test_dates_times_and_decimals_keep_their_type() -> None:
    items = [date(2026, 1, 2), time(3, 4), timedelta(days=-1, microseconds=5), Decimal("1.10"), (1, "a"), 2j]
    assert same(items, passed({"items": items})["items"])


def test_several_messages_in_one_stream() -> None:
    left, right = socket.socketpair()
    with right:
        with left:
            for i in range(3):
                left.sendall(frame({"i": i, "array": np.arange(i * 10)}))
        reader = wire.Reader()
        received = [wire.receive(right, reader) for _ in range(4)]
    assert [r and r["i"] for r in received] == [0, 1, 2, None]


def test_a_non_blocking_socket_resumes_where_it_stopped() -> None:
    left, right = socket.socketpair()
    array = np.arange(2_000_000)
    with left, right:
        left.setblocking(False)
        right.setblocking(False)
        pieces, reader = wire.encode({"array": array}), wire.Reader()
        received, full, empty = None, 0, 0
        while received is None:
            try:
                wire.transmit(left, pieces)
            except BlockingIOError:
                full += 1
            try:
                while (received := reader.next()) is None:
                    reader.pull(right)
            except BlockingIOError:
                empty += 1
    assert full
    assert empty
    assert same(array, received["array"])


# ---- what cannot be sent ----


class Opaque:
    pass


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Opaque(), "Opaque cannot leave"),
        ([1, {"a": Opaque}], "cannot leave"),
        (np.zeros(2, dtype=[("a", "i4")]), "structured array"),
        (10**5000, "cannot be written"),
    ],
    ids=["object", "class inside", "fields", "digits"],
)
def test_a_value_that_cannot_be_sent_says_which(value: Any, text: str) -> None:
    with pytest.raises(wire.WireError, match=text):
        wire.encode({"value": value})


def test_a_value_nested_without_end_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(wire.WireError, match="nested"):
        wire.encode({"value": value})


def test_a_message_over_the_limit_is_refused_before_it_is_sent() -> None:
    with pytest.raises(wire.WireError, match="more than the 1000"):
        wire.encode({"array": np.zeros(1000)}, limit=1000)


# ---- frames that lie ----


LIES = {
    "no magic": forged({}, magic=b"GET "),
    "odd header": forged({}, sizes=(15, 0)),
    "endless header": forged({}, sizes=(0xFFFFFFF0, 0)),
    "endless body": forged({}, sizes=(16, 2**63)),
    "truncated": forged({"a": 1}, sizes=(1600, 0)),
    "half a prefix": b"mgw1\0",
    "no json": forged(b"{]"),
    "no text": forged(b"\xff\xfe"),
    "no object": forged([1]),
    "deep": forged(b"[" * 200_000),
    "unknown tag": forged({"a": {"~": ["pickle", "x"]}}),
    "tag without kind": forged({"a": {"~": []}}),
    "tag of a number": forged({"a": {"~": 5}}),
    "array past the end": forged({"a": {"~": ["array", "<f8", [1000]]}}, b"12345678"),
    "negative shape": forged({"a": {"~": ["array", "<f8", [-1]]}}, b"12345678"),
    "endless shape": forged({"a": {"~": ["array", "<f8", [1] * 65]}}, b"12345678"),
    "shape of text": forged({"a": {"~": ["array", "<f8", ["8"]]}}, b"12345678"),
    "shape of truth": forged({"a": {"~": ["array", "<f8", [True]]}}, b"12345678"),
    "huge and empty": forged({"a": {"~": ["array", "<f8", [0, 2**62]]}}),
    "dtype of objects": forged({"a": {"~": ["array", "|O", [1]]}}, b"12345678"),
    "dtype of fields": forged({"a": {"~": ["array", "f8,O", [1]]}}, b"12345678"),
    "dtype impossible": forged({"a": {"~": ["array", "<f7", [1]]}}, b"1234567"),
    "unit impossible": forged({"a": {"~": ["array", "<M8[xx]", [1]]}}, b"12345678"),
    "bytes past the end": forged({"a": {"~": ["bytes", 2**40]}}, b"1"),
    "negative bytes": forged({"a": {"~": ["bytes", -1]}}, b"1"),
    "bytes without a reference": forged({"a": 1}, b"12345678"),
    "same bytes twice": forged({"a": [{"~": ["bytes", 8]}] * 2}, b"12345678"),
    "objects do not fill": forged({"a": {"~": ["objects", [3], [1]]}}),
    "mask does not fit": forged(
        {"a": {"~": ["masked", {"~": ["array", "<i1", [1]]}, {"~": ["array", "|b1", [2]]}]}},
        b"1" + bytes(15) + b"\1\1",
    ),
    "mask of a list": forged({"a": {"~": ["masked", [1], [True]]}}),
    "columns of two lengths": forged(
        {"a": {"~": ["columns", 1, [[None, "x", {"~": ["array", "|i1", [2]]}]], None]}}, b"12"
    ),
    "columns of lists": forged({"a": {"~": ["columns", 1, [[None, "x", [1]]], None]}}),
    "columns past the end": forged({"a": {"~": ["columns", 3, [["|i1", ["x", "y"]]], None]}}, b"12345"),
    "columns of objects": forged({"a": {"~": ["columns", 1, [["|O", ["x"]]], None]}}, b"12345678"),
    "endless rows of nothing": forged({"a": {"~": ["columns", 2**62, [["|i1", []]], None]}}),
    "columns without rows": forged({"a": {"~": ["columns", None, [], None]}}),
    "columns with odd names": forged(
        {"a": {"~": ["columns", 0, [[None, {"~": ["array", "|i1", [0]]}]], None]}}
    ),
    "tensors claim rows": forged({"a": {"~": ["tensors", 5, [["", {"~": ["array", "|i1", [2]]}]]]}}, b"12"),
    "tensors of lists": forged({"a": {"~": ["tensors", None, [["", [1]]]]}}),
    "value claims rows": forged({"a": {"~": ["value", 2, [1]]}}),
    "unhashable key": forged({"a": {"~": ["dict", [[[], 1]]]}}),
    "no date": forged({"a": {"~": ["date", "yesterday"]}}),
    "no number": forged({"a": {"~": ["decimal", "one"]}}),
    "span overflows": forged({"a": {"~": ["timedelta", 10**12, 0, 0]}}),
}


PRIME = 2**61 - 1  # the hash of a number is its remainder
EMPTY = {"~": ["array", "|i1", [0]]}
COLLIDING = {
    "numbers": {"~": ["dict", [[PRIME * n, 0] for n in range(1, 100)]]},
    "decimals": {"~": ["dict", [[{"~": ["decimal", str(PRIME * n)]}, 0] for n in range(1, 100)]]},
    "tuples": {"~": ["dict", [[{"~": ["tuple", [PRIME * n]]}, 0] for n in range(1, 100)]]},
    "names": {"~": ["columns", 0, [["|i1", [PRIME * n for n in range(1, 100)]]], None, []]},
    "names, one by one": {"~": ["columns", 0, [[None, PRIME * n, EMPTY] for n in range(1, 100)], None, []]},
    "texts": {"~": ["columns", 0, [], None, [PRIME * n for n in range(1, 100)]]},
}


@pytest.mark.parametrize("name", COLLIDING)
def test_keys_that_were_made_to_collide_are_refused(name: str) -> None:
    with pytest.raises(wire.WireError, match="same hash"):
        read(forged({"a": COLLIDING[name]}))


def test_a_large_dict_with_honest_keys_is_read() -> None:
    for honest in (
        {n - 5_000: n for n in range(10_000)},
        {n / 7: n for n in range(-5_000, 5_000)},
        {Decimal(n) / 100: n for n in range(10_000)},
        {timedelta(minutes=n): n for n in range(10_000)},
    ):
        assert wire.loads(b"".join(map(bytes, wire.encode({"a": honest})))) == {"a": honest}


@pytest.mark.parametrize("name", LIES)
def test_a_lying_frame_is_a_clean_error(name: str) -> None:
    with pytest.raises(wire.WireError):
        read(LIES[name])


def test_a_frame_that_claims_much_and_brings_little_costs_little() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(20):
        with pytest.raises(wire.WireError):
            read(forged({}, sizes=(16, wire.MAX_FRAME - 16)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


WHOLE = frame(
    {
        "op": "predict",
        "batch": Columns(
            {"a": np.arange(3), "c": np.ones(3), "b": np.array(["x", None, b"y"], dtype=object)}, 3
        ),
    }
)


@given(st.integers(0, len(WHOLE) - 1))
def test_every_truncation_is_a_clean_error(length: int) -> None:
    if length == 0:
        assert read(b"") is None
        return
    with pytest.raises(wire.WireError):
        read(WHOLE[:length])


@settings(max_examples=250)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes_give_a_message_or_a_clean_error(changes: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE)
    for place, byte in changes:
        data[place] = byte
    try:
        message = read(bytes(data))
    except wire.WireError:
        return
    assert isinstance(message, dict)


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_noise_is_a_clean_error(noise: bytes) -> None:
    if not noise:
        return
    with pytest.raises(wire.WireError):
        read(noise)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.lists(inner, max_size=3).flatmap(
            lambda rest: st.sampled_from(sorted(unpacking.KINDS)).map(lambda kind: {"~": [kind, *rest]})
        )
    ),
    max_leaves=10,
)


@settings(max_examples=250)
@given(json_values, st.binary(max_size=64))
def test_any_header_gives_a_message_or_a_clean_error(value: Any, body: bytes) -> None:
    try:
        message = read(forged({"a": value}, body))
    except wire.WireError:
        return
    assert isinstance(message, dict)


# ---- answers: long lists come in pieces, and nothing takes more memory than it may


PIECED = {
    "numbers": [0.5, 1, None, True] * 5_000,
    "lists": [[i, [str(i)]] for i in range(20_000)],
    "arrays among them": [np.arange(3), 1, "x", np.zeros(2000)] * 2_000,
    "a long list in each": [list(range(3_000)), {"a": list(range(2_000))}] * 3,
    "a table's column": Columns({"a": np.array([[1], "x", None] * 2_000, dtype=object)}, 6_000),
    "one a row": Value([{"~": 1}] * 3_000, 3_000),
}


@pytest.mark.parametrize("name", PIECED)
def test_long_lists_in_pieces_are_the_same_lists(name: str) -> None:
    pieces = wire.encode({"op": "answer", "value": PIECED[name]}, lenient=True)
    raw = b"".join(bytes(piece) for piece in pieces)
    header = int.from_bytes(raw[4:8], "little")
    assert header < 1 << 16 or name == "arrays among them"
    message = wire.decode(np.frombuffer(raw[16:], np.uint8), header)
    assert same(message["value"], PIECED[name])


@pytest.mark.parametrize(
    "value",
    [
        [[]] * 100_000,
        {str(i): i for i in range(100_000)},
        np.broadcast_to(0.0, (1 << 40,)),
        Columns({"a": np.broadcast_to(0.0, (1 << 40,))}, 1 << 40),
        np.broadcast_to(np.array([None]), (1 << 40,)),
        ["x" * 100_000] * 50,
    ],
    ids=range(6),
)
def test_an_answer_that_takes_too_much_is_not_written(value: Any) -> None:
    with pytest.raises(wire.TooLarge):
        wire.encode({"value": value}, 4_000_000, lenient=True)


@pytest.mark.parametrize("pieces", [False, True])
def test_a_frame_whose_values_take_too_much_is_not_read(pieces: bool) -> None:
    """However it was made: a hostile process does not weigh what it writes."""
    raw = b"".join(map(bytes, wire.encode({"value": [[]] * 100_000}, lenient=pieces)))
    frame, header = np.frombuffer(raw[16:], np.uint8), int.from_bytes(raw[4:8], "little")
    with pytest.raises(wire.TooLarge):
        wire.decode(frame, header, 4_000_000)
    assert wire.decode(frame, header, 40_000_000) == {"value": [[]] * 100_000}


QUICK = {
    "doubles": Columns({"a": np.array([1.5, math.nan]), "é": np.array([2.5, -0.0])}, 2),
    "integers": Columns({0: np.array([1], np.int64), "b": np.array([2], np.int64)}, 1),
    "truths": Columns({"a": np.array([True, False, True])}, 3),
    "columns of one matrix": Columns(dict(zip("abc", np.ones((3, 2)), strict=True)), 2),
    "no rows": Columns({"a": np.empty(0)}, 0),
}
SLOW = {
    "two types": Columns({"a": np.ones(1), "b": np.ones(1, np.int64)}, 1),
    "text": Columns({"a": np.array(["x"], object)}, 1, None, frozenset("a")),
    "labels": Columns({"a": np.ones(1)}, 1, np.array([7])),
    "gaps": Columns({"a": np.ma.MaskedArray([1], mask=[True])}, 1),
    "dates": Columns({"a": np.array(["2020-01-01"], "M8[ns]")}, 1),
    "not side by side": Columns({"a": np.ones((2, 2))[:, 0]}, 2),
    "large": Columns({"a": np.ones(5000)}, 5000),
    "no columns": Columns({}, 3),
    "many columns": Columns({str(i): np.ones(1) for i in range(100)}, 1),
}


@pytest.mark.parametrize("table", QUICK.values(), ids=QUICK.keys())
def test_a_small_table_of_numbers_takes_the_quick_way_to_the_same_frame(table: Columns) -> None:
    frame = b"".join(wire.encode({"op": "predict", "batch": table, "params": {}}))
    assert wire.encode_table("predict", table) == frame


@pytest.mark.parametrize("table", SLOW.values(), ids=SLOW.keys())
def test_any_other_table_does_not(table: Columns) -> None:
    assert wire.encode_table("predict", table) is None


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


@pytest.mark.parametrize("kind", ["call", "answer"])
def test_the_second_frame_with_a_header_is_not_unpacked(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, batch = f"only here: {kind}", np.ones(1, ">f8")
    message: dict[str, Any] = {"op": "answer", "batch": Tensors({"": batch.reshape((1,) * 7)}, 1)}
    if kind == "call":
        message = {"op": "predict", "batch": Columns({name: batch}, 1), "params": {}}
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
            written = wire.encode_table("predict", Columns({name: np.ones(1)}, 1))
            assert written is not None
            wire.loads(written)
    for kept in (shortcuts._WRITTEN, shortcuts._READ):
        assert 0 < len(kept) <= shortcuts._MOST_REMEMBERED
    assert max(map(len, shortcuts._WRITTEN.values())) <= shortcuts._LONGEST_REMEMBERED
    assert max(map(len, shortcuts._READ)) <= shortcuts._LONGEST_REMEMBERED
