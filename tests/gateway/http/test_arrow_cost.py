"""What an Arrow stream becomes is told from its messages' heads: compressed, shared and empty data too."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from gateway.errors import Problem
from gateway.http import arrow
from loaders.enforcement.tables import from_arrow
from loaders.enforcement.violations import Faults

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


@pytest.mark.parametrize("body", [b"", b"x" * 100])
def test_a_body_that_is_not_a_stream_is_malformed(body: bytes) -> None:
    with pytest.raises(Problem) as refused:
        arrow.cost(body)
    assert refused.value.code == "MALFORMED_BODY"
