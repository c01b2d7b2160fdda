"""Frames: what goes in comes out bit for bit, and a frame that lies is refused in bounded memory."""

from __future__ import annotations

import json
import resource
import socket
import struct
import threading
from collections import OrderedDict
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.batch import Batch, Columns, Value
from loaders.worker import unpacking, wire
from tests.support.frames import batches, frame, nested, same, texts

# ---- helpers of this file: a round trip through a real socket, and forged frames ----


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
