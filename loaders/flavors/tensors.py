"""Converts arrays to the dtype and rank that a model of tensors declares, or refuses them.

Numbers become the declared dtype if each keeps its value or is only rounded to a narrower float. Nothing else
becomes a number. One record is one row. Input that does not fit raises `Unsuitable`, whose text contains
names, dtypes and shapes, but no data. Must not know frameworks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loaders.batch import Array, Columns
from loaders.compat.pythons import zipped
from loaders.flavors.failures import Unsuitable

if TYPE_CHECKING:
    from typing import TypeAlias

Shape: TypeAlias = "Sequence[int | None]"
"""Lengths by axis; None means any length."""


def cast(array: Array, dtype: np.dtype[Any], name: str) -> Array:
    """Casts the array to a dtype; `object` means text. Raises Unsuitable."""
    if isinstance(array, np.ma.MaskedArray):
        gaps = np.ma.getmaskarray(array)
        if gaps.any() and dtype.kind != "f":
            raise _null(name, dtype)
        array = np.where(gaps, np.nan, array.data) if gaps.any() else np.asarray(array.data)
    if dtype.kind == "O":
        return _text(array, dtype, name)
    if array.dtype.kind == "O":
        array = _unpacked(array, dtype, name)
    source = array.dtype
    if source == dtype:
        return array
    if dtype.kind in "iu" and source.kind in "iu":
        limits = np.iinfo(dtype)
        if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
            raise Unsuitable(f"{name} takes {dtype.name}: a value is out of range")
        return array.astype(dtype)
    if dtype.kind == "f" and source.kind in "iuf":
        with np.errstate(over="ignore"):
            result = array.astype(dtype)
        if (np.isinf(result) & np.isfinite(array)).any():
            raise Unsuitable(f"{name} takes {dtype.name}: a value is out of range")
        return result
    raise Unsuitable(f"{name} takes {dtype.name}, not {'text' if source.kind == 'U' else source.name}")


def _text(array: Array, dtype: np.dtype[Any], name: str) -> Array:
    if array.dtype.kind == "U":
        return array.astype(object)
    kinds = set(map(type, array.reshape(-1))) if array.dtype.kind == "O" else {array.dtype.type}
    if type(None) in kinds:
        raise _null(name, dtype)
    if not kinds <= {str}:
        raise Unsuitable(f"{name} takes text")
    return array


def _unpacked(array: Array, dtype: np.dtype[Any], name: str) -> Array:
    """Converts cells that are Python's numbers, or lists of one length, to an array of their own dtype."""
    if any(cell is None for cell in array.reshape(-1)) and dtype.kind != "f":
        raise _null(name, dtype)
    try:
        found = np.array([np.nan if cell is None else cell for cell in array.tolist()])
    except (ValueError, OverflowError):
        raise Unsuitable(f"{name} takes {dtype.name}, all of one shape") from None
    if found.dtype.kind not in "biuf":
        raise Unsuitable(f"{name} takes {dtype.name}, not text or objects")
    return found


def _null(name: str, dtype: np.dtype[Any]) -> Unsuitable:
    return Unsuitable(f"{name} takes {'text' if dtype.kind == 'O' else dtype.name}, which cannot be null")


def shaped(array: Array, shape: Shape, name: str) -> Array:
    """Returns the array if its shape matches the declared one. Raises Unsuitable."""
    if len(array.shape) == len(shape) and all(
        n is None or n == have for n, have in zipped(shape, array.shape)
    ):
        return array
    wanted = ", ".join("n" if n is None else str(n) for n in shape)
    raise Unsuitable(f"{name} takes the shape [{wanted}], not {list(array.shape)}")


def column(table: Columns, key: str | int, dtype: np.dtype[Any], shape: Shape, name: str) -> Array:
    """Returns one column as one input, of rank 1 or 2: each cell is a row. Raises Unsuitable."""
    array = cast(table.arrays[key], dtype, name)
    if array.ndim == 1 and len(shape) == 2:
        array = array.reshape(-1, 1)
    return shaped(array, shape, name)


def matrix(table: Columns, dtype: np.dtype[Any], shape: Shape, name: str) -> Array:
    """Returns all columns as the matrix of one input; a single column may contain whole rows. Raises
    Unsuitable."""
    if len(table.arrays) == 1 or len(shape) == 1:
        if len(table.arrays) > 1:
            raise Unsuitable(f"{name} takes one column, not {len(table.arrays)}")
        return column(table, next(iter(table.arrays)), dtype, shape, name)
    columns = [cast(array, dtype, f"{name} (column {key})"[:100]) for key, array in table.arrays.items()]
    if any(array.ndim != 1 for array in columns):
        raise Unsuitable(f"{name} takes one number per column")
    if not columns:
        raise Unsuitable(f"{name} takes columns, but there are none")
    return shaped(np.stack(columns, axis=1), shape, name)


def records(result: Any, rows: int) -> Any:
    """Converts an output to a column with one cell per row: a number, a list, or (for a classifier) an
    object. Returns None if the number of rows differs."""
    if isinstance(result, list):
        return [*result] if len(result) == rows else None
    array = np.asarray(result)
    if not array.ndim or len(array) != rows:
        return None
    if array.ndim == 1 or array.size == rows:
        return array.reshape(-1)
    return array.tolist()
