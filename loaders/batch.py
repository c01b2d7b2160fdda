"""What a model is given and what it answers: three shapes of data, and nothing else.

`Columns` is a table (a frame without pandas), `Tensors` is one or more arrays, `Value` is anything a
JSON body can hold. Enforcement makes them, the micro-batcher joins and splits them, the wire carries
them, flavors turn them into what their framework wants and their answers back into one of the three.

Nobody changes one that is made. They are not frozen only because making a frozen one costs three times as
much, several times in each request.

This module must not know about signatures, frameworks, HTTP or JSON. It needs numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loaders.compat.pythons import dataclass

if TYPE_CHECKING:
    from typing import TypeAlias

    import pandas as pd

Array: TypeAlias = "np.ndarray[Any, Any]"

_EXACT: Final = 2**53  # the integers up to here are told apart by doubles


@dataclass(slots=True, eq=False)
class Columns:
    """A table.

    `arrays` maps a column's name to a 1-D array; all have `rows` items. A name is a string, or an
    integer where the columns are unnamed (0, 1, …: what pandas calls them). Text, bytes, dates without
    a time and nested values (lists, dicts) are in object arrays, where null is None. Dates with a
    time are `datetime64[ns]`, null is NaT. Integers and booleans with gaps are `numpy.ma.MaskedArray`,
    so that neither the gap nor a large integer is lost.
    `index` is the caller's row index (frames only), None for 0..rows-1.
    `texts` names the columns of text (it may name columns that are absent): which type text has in a
    frame, and which value a gap in it has, is the business of the pandas that makes the frame.
    """

    arrays: dict[str | int, Array]
    rows: int
    index: Array | None = None
    texts: frozenset[str | int] = frozenset()


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
        kinds: list[Hashable] = [*map(type, arrays.values())]
        if np.ma.MaskedArray in kinds:
            # Integers that need pandas' nullable type must not give it to those that do not.
            masked = [a for a in arrays.values() if isinstance(a, np.ma.MaskedArray)]
            kinds += [a.dtype.kind == "b" or _is_exact(a) for a in masked]
        # Flat, and the arrays' own objects: this is made for each request. The type tells a masked array.
        return (Columns, batch.texts, *arrays, *[a.dtype for a in arrays.values()], *kinds)
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
        joined = {name: _join([t.arrays[name] for t in tables]) for name in first.arrays}
        return Columns(joined, rows, None, first.texts)
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
            index = None if batch.index is None else batch.index[part]
            parts.append(Columns(arrays, count, index, batch.texts))
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


def is_text(values: Sequence[Any] | Array) -> bool:
    """Returns True if a column holds text only; gaps (None) are allowed."""
    kinds = set(map(type, values))
    return str in kinds and kinds <= {str, type(None)}


def frame(table: Columns, *, gap: float | None = math.nan) -> pd.DataFrame:
    """The table as this pandas makes it of the same data with `pd.read_csv` and `pd.DataFrame`.

    Text has the type that this pandas gives it: objects in pandas 2, `str` from pandas 3; a gap is NaN.
    Booleans with gaps are objects, a gap is NaN. Integers with gaps are float64; only those that a double
    cannot hold exactly are pandas' nullable type. (What was fitted on nullable types takes all of these;
    what was fitted on these does not take nullable types.) A date is `datetime64[ns]`, its gap NaT; a gap in
    bytes or nested values is None.
    With `gap=None` text stays objects, and a gap in text and booleans is None: for what was fitted so.
    """
    import pandas as pd

    index = pd.RangeIndex(table.rows) if table.index is None else pd.Index(table.index)
    if not table.arrays:
        return pd.DataFrame(index=index)
    columns: dict[str | int, Any] = {}
    for name, array in table.arrays.items():
        if isinstance(array, np.ma.MaskedArray):
            columns[name] = _with_gaps(array, index, gap)
        elif name in table.texts and gap is not None:
            columns[name] = _text_series(array, index)
        elif array.dtype.kind == "O":
            # Left to itself pandas would guess again: equal numbers become an integer column.
            columns[name] = pd.Series(array, index=index, dtype=object)
        else:
            columns[name] = array
    return pd.DataFrame(columns, index=index, copy=False)


def _with_gaps(array: Any, index: Any, gap: float | None) -> Any:
    """Integers or booleans with gaps as pandas makes them."""
    import pandas as pd

    gaps = np.ma.getmaskarray(array)
    if array.dtype.kind != "b":
        if _is_exact(array):
            return np.where(gaps, np.nan, array.data)
        return pd.arrays.IntegerArray(np.ascontiguousarray(array.data), gaps.copy())
    values = array.data.astype(object)
    values[gaps] = gap
    return pd.Series(values, index=index, dtype=object)


def _is_exact(array: Any) -> bool:
    """Returns True if a double can hold every integer that is present."""
    present = array.compressed()
    return not len(present) or (int(present.min()) >= -_EXACT and int(present.max()) <= _EXACT)


def _text_series(array: Array, index: Any) -> Any:
    import pandas as pd

    dtype = _text_dtype()
    if not isinstance(dtype, np.dtype):
        return pd.Series(array, index=index, dtype=dtype)
    gaps = np.array([value is None for value in array], dtype=np.bool_)
    if gaps.any():
        array = array.copy()
        array[gaps] = math.nan
    return pd.Series(array, index=index, dtype=object)


@lru_cache(maxsize=None)
def _text_dtype() -> Any:
    """The type that this pandas, with its options, gives a column of text."""
    import pandas as pd

    return pd.Series(["text"]).dtype


def native(batch: Batch, *, gap: float | None = math.nan) -> Any:
    """The batch as models are given it: a pandas frame, an array, a dict of arrays by name, or the value.
    `gap` as in `frame`."""
    if isinstance(batch, Columns):
        return frame(batch, gap=gap)
    if isinstance(batch, Tensors):
        return batch.arrays[""] if set(batch.arrays) == {""} else batch.arrays
    return batch.value


def from_result(result: Any, rows: int | None) -> Batch:
    """Converts a model's answer to a batch. `rows`: the number of input rows (None: unknown).

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
        if not result.columns.is_unique:
            twice = str(result.columns[result.columns.duplicated()][0])
            raise ValueError(f"the answer has two columns named {twice[:80]!r}")
        series = {
            name if isinstance(name, (str, int)) else str(name): result.iloc[:, i]
            for i, name in enumerate(result.columns)
        }
    else:
        name = getattr(result, "name", None)
        series = {name if isinstance(name, (str, int)) else 0 if name is None else str(name): result}
    return Columns({name: column_array(column) for name, column in series.items()}, len(result))


def column_array(column: Any) -> Array:
    """One pandas series as the 1-D array that `Columns` holds (nullable types keep their gaps)."""
    if hasattr(column, "sparse"):
        column = column.sparse.to_dense()
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
        values[i] = None if missing[i] and not isinstance(item, (list, dict, tuple, np.ndarray)) else item
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
