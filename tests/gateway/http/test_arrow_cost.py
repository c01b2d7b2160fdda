"""What an Arrow stream becomes is told from its messages' heads: compressed, shared and empty data too."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from gateway.errors import Problem
from gateway.http import arrow
from loaders.enforcement import InvalidInput, Mode, enforce
from loaders.enforcement.tables import from_arrow
from loaders.enforcement.violations import UNREADABLE as UNREADABLE_VALUE
from loaders.enforcement.violations import Faults
from loaders.schema import ColSpec, Scalar
from loaders.signature import Signature

pa: Any = pytest.importorskip(
    "pyarrow", reason="needs pyarrow, which is not installed here (part of the test-all set)"
)
ROWS = 1_000_000


def stream(table: Any, compression: str | None = None) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(
        sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)
    ) as out:
        out.write_table(table)
    return sink.getvalue()


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_what_is_compressed_counts_unpacked(compression: str) -> None:
    body = stream(pa.table({"x": np.zeros(ROWS)}), compression)
    assert len(body) < 100_000
    assert 8 * ROWS <= arrow.cost(body) <= 40 * ROWS


@pytest.mark.parametrize(
    "column",
    [
        pa.nulls(ROWS),
        pa.array([[]] * ROWS, pa.list_(pa.int8())),
        pa.array([{}] * ROWS, pa.struct([])),
        pa.array([""] * ROWS),
        pa.array(["a"] * ROWS).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_items_that_become_objects_count_as_objects(column: Any) -> None:
    body = stream(pa.table({"x": column}), "zstd")
    assert arrow.cost(body) >= 72 * ROWS


def test_rows_without_columns_count() -> None:
    table = pa.table({"x": pa.nulls(ROWS)}).select([])
    assert table.num_rows == ROWS
    assert arrow.cost(stream(table)) >= 8 * ROWS


def test_numbers_count_little_more_than_they_are() -> None:
    table = pa.table({"x": np.arange(ROWS), "y": np.arange(ROWS) / 7})
    assert arrow.cost(stream(table)) <= 6 * table.nbytes


def shared(rows: int, values: Any) -> Any:
    """A column in which each row refers to the first value of a dictionary."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), values)


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
@pytest.mark.parametrize("kind", [pa.string(), pa.binary(), pa.large_string(), pa.binary(10_000)], ids=str)
def test_each_row_that_refers_to_a_long_value_counts_as_that_value(kind: Any, compression: str) -> None:
    long = shared(5000, pa.array([b"x" * 10_000, b"y" * 10_000], pa.binary()).cast(kind))
    short = shared(5000, pa.array(["a", "b"]))
    inner = pa.ListArray.from_arrays(pa.array([0, 5000], pa.int32()), long)
    for table in (
        pa.table({"short": short, "long": long}),
        pa.table({"short": shared(1, pa.array(["a"])), "inner": inner}),
    ):
        body = stream(table, compression)
        assert len(body) < 80_000
        assert 50_000_000 <= arrow.cost(body) <= 60_000_000
    assert arrow.cost(stream(pa.table({"short": short}), compression)) < 600_000


UNREAD = {
    "string_view": pa.array(["a"], pa.string_view()),
    "binary_view": pa.array(["a"], pa.binary_view()),
    "a dictionary of lists": shared(1, pa.array([["a"]])),
    "a dense union": pa.UnionArray.from_dense(
        pa.array([0], pa.int8()), pa.array([0], pa.int32()), [pa.array(["a"])]
    ),
    "an extension": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)], pa.binary(16))),
}
UNREAD["a sparse union"] = pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1.0])])
UNREAD["a list of dictionaries of lists"] = pa.ListArray.from_arrays(
    pa.array([0, 1], pa.int32()), UNREAD["a dictionary of lists"]
)


@pytest.mark.parametrize("column", UNREAD)
def test_types_whose_items_may_share_bytes_are_refused(column: str) -> None:
    with pytest.raises(Problem) as refused:
        arrow.cost(stream(pa.table({"x": UNREAD[column]})))
    assert refused.value.code == "MALFORMED_BODY"
    assert "not supported" in refused.value.message


def test_the_values_of_a_dictionary_are_made_once() -> None:
    column = pa.array(["a" * 1000, None, "b", "a" * 1000]).dictionary_encode()
    table = from_arrow(pa.table({"x": column}), Faults())
    assert table is not None
    cells = list(table.columns[0])
    assert cells == ["a" * 1000, None, "b", "a" * 1000]
    assert cells[0] is cells[3]


def longer(kind: Any, value: int) -> Any:
    """A column of one number, read as another type of the same width."""
    return pa.array([value], pa.int32() if kind.bit_width == 32 else pa.int64()).view(kind)


UNREADABLE = {
    "a map with a key twice": pa.array([[("k", 1.0), ("k", 2.0)]], pa.map_(pa.string(), pa.float64())),
    "a map with lists as keys": pa.array([[([1], 1.0)]], pa.map_(pa.list_(pa.int64()), pa.float64())),
    "a date in the year 5 million": longer(pa.date32(), 2**31 - 1),
    "a duration of an age of the universe": longer(pa.duration("s"), 2**62),
    "a moment in a list": pa.ListArray.from_arrays(
        pa.array([0, 1], pa.int32()), longer(pa.timestamp("s"), 2**62)
    ),
    "a time zone that is not known": pa.ListArray.from_arrays(
        pa.array([0, 1], pa.int32()), longer(pa.timestamp("s", "Foo/Bar"), 0)
    ),
    "a field twice": pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], ["d", "d"]),
    "a decimal of two million digits": pa.array([bytes([1] * 16)], pa.binary(16)).view(
        pa.decimal128(38, -(2**21))
    ),
}


@pytest.mark.parametrize("mode", ["strict", "mlflow", "warn"])
@pytest.mark.parametrize("column", UNREADABLE)
def test_a_value_that_python_cannot_hold_is_a_violation(column: str, mode: Mode) -> None:
    body = stream(pa.table({"good": [1.0], "x": UNREADABLE[column]}))
    arrow.cost(body)
    signature = Signature(inputs=(ColSpec(Scalar.double, "good"), ColSpec(Scalar.double, "x")))
    with pytest.raises(InvalidInput) as refused:
        enforce(signature, arrow.read(body), mode=mode)
    assert {violation.path for violation in refused.value.violations} <= {"arrow.x", "arrow"}
    if mode == "strict":
        assert refused.value.violations[0].problem == UNREADABLE_VALUE


def test_a_negative_size_does_not_hide_the_others() -> None:
    body = stream(pa.table({"x": np.zeros(1000)}))
    damaged = 0
    for place in range(0, len(body) - 8, 8):
        if body[place : place + 8] == (1000).to_bytes(8, "little"):  # the batch's rows, the column's items
            with pytest.raises(Problem):
                arrow.cost(body[:place] + (-(2**40)).to_bytes(8, "little", signed=True) + body[place + 8 :])
            damaged += 1
    assert damaged >= 2


@pytest.mark.parametrize("body", [b"", b"x" * 100])
def test_a_body_that_is_not_a_stream_is_malformed(body: bytes) -> None:
    with pytest.raises(Problem) as refused:
        arrow.cost(body)
    assert refused.value.code == "MALFORMED_BODY"
