"""What a model is given and what it answers: three shapes of data, and nothing else.

`Columns` is a table (a frame without pandas), `Tensors` is one or more arrays, `Value` is anything a
JSON body can hold. Enforcement makes them, the micro-batcher joins and splits them, the wire carries
them, flavors turn them into what their framework wants and their answers back into one of the three.

Nobody changes one that is made. They are not frozen only because making a frozen one costs three times as
much, several times in each request.

This module must not know about signatures, frameworks, HTTP or JSON. It needs numpy alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(slots=True, eq=False)
class Columns:
    """A table.

    `arrays` maps a column's name to a 1-D array; all have `rows` items. A name is a string, or an
    integer where the columns are unnamed (0, 1, …: what pandas calls them). Text, bytes, dates without
    a time and nested values (lists, dicts) stand in object arrays, null there is None. Dates with a
    time are `datetime64[ns]`, null is NaT. Integers and booleans with gaps are `numpy.ma.MaskedArray`
    and become pandas' nullable types, so that neither the gap nor a large integer is lost.
    `index` is the caller's row index (frames only), None for 0..rows-1.
    """

    arrays: dict[str | int, Array]
    rows: int
    index: Array | None = None


@dataclass(slots=True, eq=False)
class Tensors:
    """One or more arrays. The one without a name stands under the empty string.

    `rows` is the length of the shared first axis; None where there is none, or where the arrays must
    not be merged with those of another request.
    """

    arrays: dict[str, Array]
    rows: int | None


@dataclass(slots=True, eq=False)
class Value:
    """Anything else: a list, a dict, a scalar, text, bytes; made of what JSON holds, plus bytes,
    datetimes and numpy arrays. With `rows` set it is a list of that many answers, one a row."""

    value: Any
    rows: int | None = None


class Opaque:
    """Stands in an answer where the model put something that cannot leave its process. `kind` is the name of
    that thing's type. No dataclass: those are written as JSON unasked."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind


Batch: TypeAlias = "Columns | Tensors | Value"


def layout(batch: Batch) -> Hashable | None:
    """What two batches must share to be merged (kind, names, dtypes, trailing shapes); None: never merge."""
    if batch.rows is None:
        return None
    if isinstance(batch, Columns):
        if batch.index is not None:
            return None
        arrays = batch.arrays
        # Flat, and the arrays' own objects: this is made for each request. The type tells a masked array.
        return (Columns, *arrays, *[a.dtype for a in arrays.values()], *map(type, arrays.values()))
    if isinstance(batch, Tensors):
        arrays_ = batch.arrays.values()
        return (Tensors, *batch.arrays, *[a.dtype for a in arrays_], *[a.shape[1:] for a in arrays_])
    return None


def concat(batches: Sequence[Batch]) -> Batch:
    """Joins batches of one `layout`, in order, along their rows."""
    first = batches[0]
    if len(batches) == 1:
        return first
    rows = sum(batch.rows or 0 for batch in batches)
    if isinstance(first, Columns):
        tables = [batch for batch in batches if isinstance(batch, Columns)]
        return Columns({name: _join([t.arrays[name] for t in tables]) for name in first.arrays}, rows)
    if isinstance(first, Tensors):
        tensors = [batch for batch in batches if isinstance(batch, Tensors)]
        return Tensors({name: _join([t.arrays[name] for t in tensors]) for name in first.arrays}, rows)
    raise TypeError("values are never merged")


def split(batch: Batch, counts: Sequence[int]) -> list[Batch] | None:
    """Cuts an answer into parts of `counts` rows; None if it does not have exactly that many rows."""
    if batch.rows is None or batch.rows != sum(counts):
        return None
    parts: list[Batch] = []
    start = 0
    for count in counts:
        part = slice(start, start + count)
        start += count
        if isinstance(batch, Columns):
            arrays = {name: a[part] for name, a in batch.arrays.items()}
            parts.append(Columns(arrays, count, None if batch.index is None else batch.index[part]))
        elif isinstance(batch, Tensors):
            parts.append(Tensors({name: a[part] for name, a in batch.arrays.items()}, count))
        else:
            parts.append(Value(batch.value[part], count))
    return parts


def nbytes(batch: Batch) -> int:
    """The bytes of a batch's arrays; objects count their pointers, a value counts nothing."""
    if isinstance(batch, Value):
        return 0
    return sum(a.nbytes for a in batch.arrays.values())


def frame(table: Columns) -> pd.DataFrame:
    """The table as a pandas frame; gaps in integers and booleans as pandas' nullable types."""
    import pandas as pd

    index = pd.RangeIndex(table.rows) if table.index is None else pd.Index(table.index)
    if not table.arrays:
        return pd.DataFrame(index=index)
    columns: dict[str | int, Any] = {}
    for name, array in table.arrays.items():
        if isinstance(array, np.ma.MaskedArray):
            kind = pd.arrays.BooleanArray if array.dtype.kind == "b" else pd.arrays.IntegerArray
            columns[name] = kind(np.ascontiguousarray(array.data), np.ma.getmaskarray(array).copy())
        elif array.dtype.kind == "O":
            # Left to itself pandas would guess: text becomes its string type, equal numbers an integer
            # column. The model was trained on objects.
            columns[name] = pd.Series(array, index=index, dtype=object)
        else:
            columns[name] = array
    return pd.DataFrame(columns, index=index, copy=False)


def native(batch: Batch) -> Any:
    """The batch as models are given it: a pandas frame, an array, a dict of arrays by name, or the value."""
    if isinstance(batch, Columns):
        return frame(batch)
    if isinstance(batch, Tensors):
        return batch.arrays[""] if set(batch.arrays) == {""} else batch.arrays
    return batch.value


def from_result(result: Any, rows: int | None) -> Batch:
    """What a model answered, as a batch. `rows`: how many rows it was asked about (None: unknown).

    Frames and series become columns (an unnamed series is column 0, as MLflow shows it), arrays and
    dicts of arrays tensors, a list with one item a row a value that can be split, all else a value.
    Frames, series and sparse matrices are recognised by their methods, so that numpy alone is needed.
    """
    if isinstance(result, np.ndarray):
        if result.ndim and result.dtype.kind not in "OV":
            return Tensors({"": result}, len(result))
        return _listed(result.tolist(), rows) if result.dtype.kind == "O" else Tensors({"": result}, None)
    if isinstance(result, dict):
        named = bool(result) and all(isinstance(name, str) and name for name in result)
        if named and all(isinstance(v, np.ndarray) and v.dtype.kind not in "OV" for v in result.values()):
            lengths = {len(v) if v.ndim else -1 for v in result.values()}
            shared = rows if rows is not None and lengths == {rows} else None
            return Tensors(dict(result), shared)
        return Value(result)
    if hasattr(result, "iloc") and hasattr(result, "to_numpy"):
        return _from_pandas(result)
    if hasattr(result, "toarray") and hasattr(result, "nnz"):
        dense = np.asarray(result.toarray())
        return Tensors({"": dense}, len(dense))
    return _listed(result, rows)


def _listed(result: Any, rows: int | None) -> Value:
    if isinstance(result, list) and rows is not None and len(result) == rows:
        return Value(result, rows)
    return Value(result)


def _from_pandas(result: Any) -> Columns:
    if hasattr(result, "columns"):
        series = {
            name if isinstance(name, str | int) else str(name): result.iloc[:, i]
            for i, name in enumerate(result.columns)
        }
    else:
        name = getattr(result, "name", None)
        series = {name if isinstance(name, str | int) else 0 if name is None else str(name): result}
    return Columns({name: column_array(column) for name, column in series.items()}, len(result))


def column_array(column: Any) -> Array:
    """One pandas series as the 1-D array that `Columns` holds (nullable types keep their gaps)."""
    dtype = column.dtype
    if isinstance(dtype, np.dtype) and dtype.kind in "biuf":
        return np.asarray(column.to_numpy())
    if isinstance(dtype, np.dtype) and dtype.kind == "M":
        moments = np.asarray(column.to_numpy())
        stamps = to_nanoseconds(moments)
        if np.array_equal(np.isnat(stamps), np.isnat(moments)):
            return stamps
        # A date beyond the year 2262: as Python's own dates, below.
    kind = getattr(dtype, "kind", "O")
    if kind in "biuf" and not isinstance(dtype, np.dtype):
        mask = np.asarray(column.isna().to_numpy(), dtype=bool)
        plain = getattr(dtype, "numpy_dtype", np.dtype("O"))
        if plain.kind in "biuf":
            if not mask.any():
                return np.asarray(column.to_numpy(dtype=plain))
            if kind == "f":
                return np.asarray(column.to_numpy(dtype=plain, na_value=np.nan))
            return np.ma.MaskedArray(column.to_numpy(dtype=plain, na_value=0), mask=mask)
    values = np.empty(len(column), dtype=object)
    missing = np.asarray(column.isna().to_numpy(), dtype=bool)
    for i, item in enumerate(column.tolist()):
        values[i] = None if missing[i] and not isinstance(item, list | dict | tuple | np.ndarray) else item
    return values


def to_nanoseconds(values: Array) -> Array:
    """Dates in nanoseconds; NaT where that unit cannot hold them.

    numpy before 2.5 wraps such a date silently and raises OverflowError since, so the range is checked first.
    """
    unit, step = np.datetime_data(values.dtype)
    gap = np.datetime64("NaT", "ns")
    if unit == "generic":  # only NaT has no unit
        return np.full(values.shape, gap)
    if unit in _MOST:
        most, counts = _MOST[unit] // step, values.astype(np.int64)
        # NaT is the smallest integer, so it becomes NaT here as well.
        values = np.where((-most <= counts) & (counts <= most), values, np.array("NaT", values.dtype))
    result = values.astype("datetime64[ns]")
    return np.where(result.astype(values.dtype) == values, result, gap)


_MOST: Final[Mapping[str, int]] = {
    "Y": 292,
    "M": 292 * 12 + 3,
    **{
        unit: (2**63 - 1) // length
        for unit, length in {
            "W": 7 * 86_400 * 10**9,
            "D": 86_400 * 10**9,
            "h": 3_600 * 10**9,
            "m": 60 * 10**9,
            "s": 10**9,
            "ms": 10**6,
            "us": 10**3,
        }.items()
    },
}
"""By unit: how far from 1970, in both directions, a moment may lie for nanoseconds to hold it."""


def _join(arrays: list[Array]) -> Array:
    if any(isinstance(a, np.ma.MaskedArray) for a in arrays):
        return np.ma.concatenate(arrays)  # type: ignore[no-any-return,no-untyped-call]
    return np.concatenate(arrays)
