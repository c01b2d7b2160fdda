"""Batches of every kind for tests of the frames between the gateway and a model process, the frame of a
message, and equality to the bit."""

from __future__ import annotations

import math
from datetime import UTC, timedelta, timezone
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from loaders.batch import Batch, Columns, Tensors, Value
from loaders.worker import wire


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


def frame(message: dict[str, Any]) -> bytes:
    return b"".join(bytes(piece) for piece in wire.encode(message))


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
