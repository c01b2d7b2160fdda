"""Input of a model without a signature: checks nothing, and reads everything as MLflow does.

Frames become columns, whose dtypes are inferred from their cells as pandas does. Arrays in `inputs` and
`instances` become tensors if numpy has a dtype for them. Everything else stays a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from loaders.batch import Batch, Columns, Tensors, Value, is_text, is_wide, to_nanoseconds
from loaders.enforcement import violations as v
from loaders.enforcement.scalars import NDArray, objects
from loaders.enforcement.tables import (
    CsvTable,
    Table,
    frame_index,
    from_arrow,
    from_csv,
    from_frame,
    from_rows,
    from_split,
    series_array,
)
from loaders.enforcement.violations import Faults
from loaders.spelling import counted


def untyped(form: str, data: Any, faults: Faults) -> Batch | None:
    """Returns the input unchecked; None if its structure is wrong."""
    if form == "dataframe_split":
        return _columns(from_split(data, faults))
    if form == "dataframe_records":
        if not isinstance(data, list):
            faults.add(form, v.WRONG_TYPE, "array", None)
            return None
        return _columns(from_rows(data, form, "json", faults))
    if form == "csv":
        assert isinstance(data, CsvTable)
        return _columns(from_csv(data, faults))
    if form == "arrow":
        return _columns(from_arrow(data, faults))
    if form == "python":
        return _python(data, faults)
    rows = form == "instances" and isinstance(data, list) and len(data) > 0 and isinstance(data[0], dict)
    return _stacked(data, faults) if rows else _tensors(data, form, faults)


def _columns(table: Table | None) -> Columns | None:
    if table is None:
        return None
    read = _from_text if table.origin == "text" else inferred
    arrays = {name: read(cells) for name, cells in zip(table.names, table.columns, strict=True)}
    return Columns(arrays, table.rows, table.index, text_columns(arrays, arrays))


def text_columns(arrays: Mapping[str | int, NDArray], among: Iterable[str | int]) -> frozenset[str | int]:
    """Returns the columns of `among` that hold only text and missing values."""
    return frozenset(
        name for name in among if name in arrays and arrays[name].dtype.kind == "O" and is_text(arrays[name])
    )


def inferred(cells: Sequence[Any] | NDArray) -> NDArray:
    """Returns the array of a column without a declared type, with the dtype that pandas infers."""
    if isinstance(cells, np.ndarray):
        if cells.dtype.kind in "US":
            return objects(cells.tolist())
        return to_nanoseconds(cells) if cells.dtype.kind == "M" else cells
    kinds = set(map(type, cells))
    try:
        if kinds == {bool}:
            return np.array(cells, dtype=np.bool_)
        if kinds == {int}:
            return np.array(cells, dtype=np.int64)
        if kinds == {int, type(None)}:
            gaps = [cell is None for cell in cells]
            return np.ma.MaskedArray(np.array([cell or 0 for cell in cells], dtype=np.int64), mask=gaps)
        # In pandas, numbers with missing values are doubles.
        if kinds and kinds <= {int, float, type(None)} and kinds != {type(None)}:
            return np.array(cells, dtype=np.float64)
    except OverflowError:
        pass  # too large for any dtype: keep Python's integers
    if str in kinds and float in kinds:
        return objects([None if isinstance(cell, float) and cell != cell else cell for cell in cells])
    return objects(cells)


def _from_text(cells: Any) -> NDArray:
    present = [cell for cell in cells if cell is not None]
    if not present or any(not cell.isascii() or "_" in cell for cell in present):
        return objects(cells) if present else np.full(len(cells), np.nan)
    readers: tuple[Callable[[str], Any], ...] = (_boolean, int, float)
    for read in readers:
        try:
            values = [None if cell is None else read(cell) for cell in cells]
        except ValueError:
            continue
        if read is _boolean and len(present) < len(cells):
            return objects([np.nan if value is None else value for value in values])  # as pandas reads it
        return inferred(values)
    return objects(cells)


def _boolean(text: str) -> bool:
    if text in ("True", "TRUE", "true"):
        return True
    if text in ("False", "FALSE", "false"):
        return False
    raise ValueError


def regular(data: Any) -> NDArray | None:
    """Converts a regular list of numbers, booleans or text to an array; returns None for anything else."""
    flat, level = [data], isinstance(data, list | tuple)
    while level:
        if not all(isinstance(part, list | tuple) for part in flat):
            return None
        flat = [item for part in flat for item in part]
        level = any(isinstance(item, list | tuple) for item in flat)
    kinds = set(map(type, flat))
    if kinds and not (kinds <= {int, float} or kinds == {str} or kinds == {bool}):
        return None
    if kinds == {str} and is_wide(flat):
        return None
    try:
        array = np.array(data)
    except (ValueError, OverflowError):
        return None
    # Keep integers that fit only into a float as Python's integers.
    return None if array.dtype.kind == "O" or (kinds == {int} and array.dtype.kind == "f") else array


def _tensors(data: Any, root: str, faults: Faults) -> Batch | None:
    if isinstance(data, dict):
        arrays = {name: regular(value) for name, value in data.items()}
        if arrays and all(arrays) and all(array is not None for array in arrays.values()):
            found = {name: array for name, array in arrays.items() if array is not None}
            return Tensors(found, _shared(found))
        return Value(data)
    if isinstance(data, list) and _is_ragged(data):
        faults.add(root, v.RAGGED)
        return None
    array = regular(data)
    if array is not None:
        return Tensors({"": array}, len(array) if array.ndim else None)
    return Value(data, len(data) if isinstance(data, list) else None)


def _is_ragged(data: list[Any]) -> bool:
    """Returns True if a list of numbers, text or booleans has parts of different lengths."""
    level = data
    while any(type(part) is list for part in level):
        if not all(type(part) is list for part in level) or len(set(map(len, level))) > 1:
            return True
        level = [item for part in level for item in part]
    return False


def _shared(arrays: Mapping[str, NDArray]) -> int | None:
    lengths = {len(array) if array.ndim else -1 for array in arrays.values()}
    return lengths.pop() if len(lengths) == 1 and -1 not in lengths else None


def _stacked(rows: list[Any], faults: Faults) -> Batch | None:
    """Reads `instances` that are objects: one array for each name, all of one length."""
    table = from_rows(rows, "instances", "json", faults)
    if table is None:
        return None
    names = set(rows[0])
    for i, row in enumerate(rows):
        if set(row) != names:
            faults.add(
                f"instances[{i}]", v.WRONG_LENGTH, counted(len(names), "name"), counted(len(row), "name")
            )
    if faults.total:
        return None
    return _tensors(
        {name: list(cells) for name, cells in zip(table.names, table.columns, strict=True)},
        "instances",
        faults,
    )


def _python(data: Any, faults: Faults) -> Batch | None:
    if hasattr(data, "iloc") and hasattr(data, "columns"):
        return _columns(from_frame(data, "data", faults))
    if hasattr(data, "iloc"):
        name = data.name if isinstance(data.name, str | int) else 0
        arrays = {name: inferred(series_array(data))}
        return Columns(arrays, len(data), frame_index(data), text_columns(arrays, arrays))
    if hasattr(data, "toarray"):
        data = np.asarray(data.toarray())
    if isinstance(data, np.ndarray) and data.dtype.kind not in "OV":
        return Tensors({"": data}, len(data) if data.ndim else None)
    if isinstance(data, dict) and data and all(_is_plain(value) for value in data.values()):
        return Tensors(dict(data), _shared(data))
    return Value(data, len(data) if isinstance(data, list) else None)


def _is_plain(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind not in "OV"
