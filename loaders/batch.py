"""The input and the answer of a model: a batch, which has one of three forms.

`Columns` is a table (a frame without pandas), `Tensors` is one or more arrays, `Value` is anything that a
JSON body can hold. Enforcement creates batches, the micro-batcher joins and splits them, the wire carries
them. Flavors convert them for their framework, and convert the framework's answers back.

No code may change a batch after its creation. The classes are not frozen, because creating a frozen object
takes three times as long, several times per request.

This module must not know signatures, frameworks, HTTP or JSON. It needs only numpy.
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

_EXACT: Final = 2**53  # a double represents every integer up to here exactly
#: A nested value takes about so many bytes of memory; at most so many are looked at to weigh a batch.
_VALUE_BYTES: Final = 40
_LOOKED_AT: Final = 10_000
#: An array of text may hold this many characters, or this many times the characters of its texts.
_PADDED: Final = 1 << 18
_PADDING: Final = 4


@dataclass(slots=True, eq=False)
class Columns:
    """A table.

    `arrays` maps a column's name to a 1-D array; all have `rows` items. A name is a string, or an integer
    if the columns are unnamed (0, 1, …, as in pandas). Text, bytes, dates without a time and nested values
    (lists, dicts) are in object arrays, where null is None. Dates with a time are `datetime64[ns]`, null is
    NaT. Integers and booleans with missing values are `numpy.ma.MaskedArray`, so that neither a missing value
    nor a large integer is lost.
    `index` is the caller's row index (frames only), None for 0..rows-1.
    `texts` names the text columns (it may name absent columns). The pandas that makes the frame decides the
    type of text and the value of missing text.
    """

    arrays: dict[str | int, Array]
    rows: int
    index: Array | None = None
    texts: frozenset[str | int] = frozenset()


@dataclass(slots=True, eq=False)
class Tensors:
    """One or more arrays. The name of an unnamed array is the empty string.

    `rows` is the length of the shared first axis; None if there is none, or if the arrays must not be merged
    with those of another request.
    """

    arrays: dict[str, Array]
    rows: int | None


@dataclass(slots=True, eq=False)
class Value:
    """Any other value: a list, a dict, a scalar, text, bytes. It consists of JSON's types, bytes, datetimes
    and numpy arrays. If `rows` is set, it is a list with one answer per row."""

    value: Any
    rows: int | None = None


class Opaque:
    """Replaces an object in an answer that cannot leave the model's process. `kind` is the name of its type.
    Not a dataclass, because JSON encoders write dataclasses by themselves."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind


Batch: TypeAlias = "Columns | Tensors | Value"


def incomplete(batch: object, most_cells: int) -> list[str | int]:
    """The names of a table's columns with missing values. Empty for other batches, and for a table of more
    than `most_cells` cells."""
    if not isinstance(batch, Columns) or batch.rows * len(batch.arrays) > most_cells:
        return []
    return [name for name, array in batch.arrays.items() if _has_missing(array)]


def _has_missing(array: Array) -> bool:
    if isinstance(array, np.ma.MaskedArray):
        return bool(np.ma.getmaskarray(array).any())
    if array.dtype.kind == "f":
        return bool(np.isnan(array).any())
    if array.dtype.kind in "mM":
        return bool(np.isnat(array).any())
    return array.dtype.kind == "O" and any(cell is None for cell in array)


def layout(batch: Batch) -> Hashable | None:
    """The properties that two batches must share to be merged (kind, names, dtypes, trailing shapes). None:
    never merge this batch."""
    if batch.rows is None:
        return None
    if isinstance(batch, Columns):
        if batch.index is not None:
            return None
        arrays = batch.arrays
        kinds: list[Hashable] = [*map(type, arrays.values())]
        if np.ma.MaskedArray in kinds:
            # Integers that need pandas' nullable type must not be merged with those that do not.
            masked = [a for a in arrays.values() if isinstance(a, np.ma.MaskedArray)]
            kinds += [a.dtype.kind == "b" or _is_exact(a) for a in masked]
        # Flat, and with the arrays' own objects, because each request makes one. The type marks masked
        # arrays.
        return (Columns, batch.texts, *arrays, *[a.dtype for a in arrays.values()], *kinds)
    if isinstance(batch, Tensors):
        arrays_ = batch.arrays.values()
        return (Tensors, *batch.arrays, *[a.dtype for a in arrays_], *[a.shape[1:] for a in arrays_])
    return None


def concat(batches: Sequence[Batch]) -> Batch:
    """Joins batches of the same `layout`, in order, along their rows."""
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


def weight(batch: Batch, enough: int) -> int:
    """About how many bytes of memory a batch takes, with its texts and objects. Stops at `enough`, which is
    also the result where there are too many values to be looked at, so it never takes long."""
    total, looked = 0, 0
    left: list[Any] = [batch.value] if isinstance(batch, Value) else list(batch.arrays.values())
    while left and total < enough:
        one = left.pop()
        parts: Any = ()
        if isinstance(one, (str, bytes)):
            total += len(one)
        elif isinstance(one, np.ndarray):
            total += one.nbytes
            parts = one.reshape(-1) if one.dtype.kind == "O" else ()
        elif isinstance(one, (list, tuple)):
            parts = one
        elif isinstance(one, dict):
            if len(one) > _LOOKED_AT:
                return enough
            parts = [*one, *one.values()]
        looked += len(parts)
        if looked > _LOOKED_AT:
            return enough
        total += _VALUE_BYTES * len(parts)
        left.extend(parts)
    return min(total, enough)


def is_wide(values: Sequence[Any] | Array) -> bool:
    """Returns True if a numpy array of these texts or bytes would be mostly padding. numpy reserves the
    length of the longest for each. One long text among many short ones would fill the memory, and so would a
    number of many digits that becomes text."""
    lengths = [_characters(value) for value in values]
    padded = len(values) * max(lengths, default=0)
    return padded > _PADDED and padded > _PADDING * sum(lengths)


def _characters(value: Any) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    return value.bit_length() // 3 if isinstance(value, int) else 1


def is_text(values: Sequence[Any] | Array) -> bool:
    """Returns True if a column holds only text; missing values (None) are allowed."""
    kinds = set(map(type, values))
    return str in kinds and kinds <= {str, type(None)}


def frame(table: Columns, *, gap: float | None = math.nan) -> pd.DataFrame:
    """The table as a frame, with the types that this pandas gives the same data in `pd.read_csv` and
    `pd.DataFrame`.

    Text has the type of this pandas: objects in pandas 2, `str` from pandas 3; a missing value is NaN.
    Booleans with missing values are objects with NaN. Integers with missing values are float64; only those
    that a double cannot hold exactly have pandas' nullable type. (A model fitted on nullable types accepts
    all of these; a model fitted on these does not accept nullable types.) A date is `datetime64[ns]`, a
    missing date NaT. A missing value in bytes or nested values is None. With `gap=None` text stays objects,
    and missing text and booleans are None, for models fitted that way.
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
            # Otherwise pandas would infer the type again, and turn whole numbers into an integer column.
            columns[name] = pd.Series(array, index=index, dtype=object)
        else:
            columns[name] = array
    return pd.DataFrame(columns, index=index, copy=False)


def _with_gaps(array: Any, index: Any, gap: float | None) -> Any:
    """Integers or booleans with missing values, in the types that pandas uses."""
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
    """The type of a text column in this pandas with its current options."""
    import pandas as pd

    return pd.Series(["text"]).dtype


def native(batch: Batch, *, gap: float | None = math.nan) -> Any:
    """The batch in the form that models receive: a pandas frame, an array, a dict of arrays by name, or the
    value. `gap` as in `frame`."""
    if isinstance(batch, Columns):
        return frame(batch, gap=gap)
    if isinstance(batch, Tensors):
        return batch.arrays[""] if set(batch.arrays) == {""} else batch.arrays
    return batch.value


def from_result(result: Any, rows: int | None) -> Batch:
    """Converts a model's answer to a batch. `rows`: the number of input rows (None: unknown).

    Frames and series become columns (an unnamed series is column 0, as MLflow shows it), arrays and
    dicts of arrays tensors. A list with one item per row becomes a value that can be split, everything else a
    value. Frames, series and sparse matrices are recognised by their methods, so that only numpy is needed.
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
    """One pandas series as a 1-D array in the form of `Columns` (nullable types keep their missing
    values)."""
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
        # A date after the year 2262 is handled below, like Python's own dates.
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
    """Dates in nanoseconds; NaT for a date outside the range of that unit.

    For such a date numpy before 2.5 wraps silently, and later versions raise OverflowError. So this checks
    the range first.
    """
    unit, step = np.datetime_data(values.dtype)
    gap = np.datetime64("NaT", "ns")
    if unit == "generic":  # only NaT has no unit
        return np.full(values.shape, gap)
    if unit in _MOST:
        most, counts = _MOST[unit] // step, values.astype(np.int64)
        # NaT is the smallest integer, so it is out of range and becomes NaT here too.
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
"""By unit: the largest distance from 1970, in both directions, that nanoseconds can represent."""


def _join(arrays: list[Array]) -> Array:
    for array in arrays:
        if isinstance(array, np.ma.MaskedArray):
            return np.ma.concatenate(arrays)  # type: ignore[no-any-return,no-untyped-call]
    return np.concatenate(arrays)
