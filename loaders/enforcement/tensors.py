"""Tensors: converts nested lists, arrays and columns of cells to the arrays that tensor specs declare.

The shape must match the declared one (-1: any length), and lists must be regular. Single values follow the
same strict rules as columns. Must not know forms or whole signatures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from loaders.batch import is_wide
from loaders.enforcement import violations as v
from loaders.enforcement.casts import cast_values, narrowed
from loaders.enforcement.scalars import (
    NDArray,
    Origin,
    Path,
    Refused,
    kind_of,
    objects,
    parse_date,
    read_number,
    read_whole,
    walked,
)
from loaders.enforcement.tables import Table
from loaders.enforcement.violations import Faults
from loaders.schema import Scalar, TensorSpec, unsized
from loaders.spelling import counted


def from_lists(data: Any, spec: TensorSpec, origin: Origin, faults: Faults, root: str) -> NDArray | None:
    """Reads a tensor from a nested list, or from a single value if the shape is []."""
    if spec.shape == (-1,) and spec.dtype.kind == "O" and isinstance(data, list | tuple):
        return objects(data)
    shape: list[int] = []
    level: list[Any] = [data]
    for _ in spec.shape:
        kinds = set(map(type, level))
        if not kinds <= {list, tuple}:
            _report_shape(spec, shape, faults, root)
            return None
        lengths = set(map(len, level))
        if len(lengths) > 1:
            first = len(level[0])
            odd = next(i for i, part in enumerate(level) if len(part) != first)
            faults.add(
                f"{root}{_subscript(odd, shape)}",
                v.RAGGED,
                counted(first, "value"),
                counted(len(level[odd]), "value"),
            )
            return None
        shape.append(lengths.pop() if lengths else 0)
        level = list(chain.from_iterable(level))
    if not fits(shape, spec.shape) or any(isinstance(leaf, list | tuple | dict) for leaf in level[:1]):
        _report_shape(spec, shape, faults, root)
        return None
    flat = cast_leaves(level, spec.dtype, origin, faults, lambda i: f"{root}{_subscript(i, shape)}")
    return flat.reshape(shape)


def _subscript(position: int, shape: Sequence[int]) -> str:
    if not shape:
        return ""
    return "".join(f"[{i}]" for i in np.unravel_index(position, shape))


def fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Returns True if a shape matches the declared one (-1 matches any length)."""
    return len(shape) == len(wanted) and all(w in (-1, n) for n, w in zip(shape, wanted, strict=True))


def _report_shape(spec: TensorSpec, shape: Sequence[int], faults: Faults, root: str) -> None:
    faults.add(root, v.WRONG_SHAPE, f"shape {list(spec.shape)}", f"shape {list(shape)}")


def cast_leaves(
    values: Sequence[Any], dtype: np.dtype[Any], origin: Origin, faults: Faults, path: Path
) -> NDArray:
    """Casts a flat list of values to a 1-D array of a dtype."""
    if dtype.kind == "f" and dtype.itemsize >= 4:
        kind = Scalar.float if dtype.itemsize == 4 else Scalar.double
        return cast_values(values, kind, True, origin, faults, path).astype(dtype, copy=False)
    if dtype.kind == "b":
        return cast_values(values, Scalar.boolean, True, origin, faults, path)
    if dtype.kind in "iu" and dtype.itemsize <= 8 and origin == "json":
        quick = _quick_whole(values, dtype)
        if quick is not None:
            return quick
    if dtype.kind == "O":
        return objects(values)
    null = None if dtype.kind == "f" else v.NULL
    leaves = walked(
        values, partial(_LEAVES[dtype.kind], dtype, origin), null, dtype.name, origin, faults, path
    )
    if faults.total:
        return np.zeros(len(values), dtype=dtype)
    if dtype.kind == "M":
        return np.array(leaves, dtype=np.int64).view("datetime64[ns]").astype(dtype)
    if dtype.kind in "US" and is_wide(leaves):
        return objects(leaves)
    return np.array(leaves, dtype=dtype)


def _quick_whole(values: Sequence[Any], dtype: np.dtype[Any]) -> NDArray | None:
    if set(map(type, values)) != {int}:
        return None
    limits = np.iinfo(dtype)
    if min(values) < limits.min or max(values) > limits.max:
        return None
    return np.array(values, dtype=dtype)


def _whole(dtype: np.dtype[Any], origin: Origin, value: Any) -> int:
    limits = np.iinfo(dtype)
    return read_whole(value, origin, int(limits.min), int(limits.max))


def _half(dtype: np.dtype[Any], origin: Origin, value: Any) -> float:
    return read_number(value, origin, float(np.finfo(dtype).max))


def _complex(dtype: np.dtype[Any], origin: Origin, value: Any) -> complex:
    if origin == "python" and isinstance(value, complex):
        return complex(value)
    return complex(read_number(value, origin, math.inf))


def _text(dtype: np.dtype[Any], origin: Origin, value: Any) -> str:
    if isinstance(value, str):
        return str(value)
    raise Refused(v.WRONG_TYPE, kind_of(value))


def _bytes(dtype: np.dtype[Any], origin: Origin, value: Any) -> bytes:
    # As in MLflow, a byte tensor is sent as text, not as base64.
    if isinstance(value, str) and origin != "python":
        return value.encode()
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    raise Refused(v.WRONG_TYPE, kind_of(value))


def _date(dtype: np.dtype[Any], origin: Origin, value: Any) -> int:
    if origin == "python":
        stamps = cast_values([value], Scalar.datetime, True, origin, faults := Faults(), str)
        if faults.total:
            raise Refused(faults.kept[0].problem, kind_of(value))
        stamp = int(stamps.astype(np.int64)[0])
    elif isinstance(value, str):
        stamp = parse_date(value.strip() if origin == "text" else value)
    else:
        raise Refused(v.WRONG_TYPE, kind_of(value))
    if not -(2**63) < stamp < 2**63:
        raise Refused(v.OUT_OF_RANGE, "datetime")
    moment = np.datetime64(stamp, "ns")
    if moment.astype(dtype).astype("datetime64[ns]") != moment:
        raise Refused(v.LOSSY, "datetime")
    return stamp


def _span(dtype: np.dtype[Any], origin: Origin, value: Any) -> Any:
    raise Refused(v.WRONG_FORM, kind_of(value))


_LEAVES: dict[str, Callable[[np.dtype[Any], Origin, Any], Any]] = {
    "i": _whole,
    "u": _whole,
    "f": _half,
    "c": _complex,
    "U": _text,
    "S": _bytes,
    "M": _date,
    "m": _span,
}


def from_array(data: NDArray, spec: TensorSpec, faults: Faults, root: str) -> NDArray | None:
    """Reads a tensor from an array. The dtype must be the declared one or widen to it; a float is narrowed if
    no value changes. An object array holds Python values, or parts of different lengths if the spec leaves a
    later dimension free."""
    if spec.shape == (-1,) and spec.dtype.kind == "O":
        return data
    if data.dtype.kind == "O" and spec.dtype.kind != "O":
        if data.ndim == 1 and -1 in spec.shape[1:] and len({np.shape(part) for part in data}) > 1:
            part_spec = TensorSpec(spec.dtype, spec.shape[1:])
            parts = [_part(part, part_spec, faults, f"{root}[{i}]") for i, part in enumerate(data)]
            return objects(parts)
        return from_lists(_unpacked(data), spec, "python", faults, root)
    if not fits(data.shape, spec.shape):
        _report_shape(spec, data.shape, faults, root)
        return None
    source = unsized(data.dtype)
    if source == spec.dtype:
        return data
    if source.kind in "iuf" and spec.dtype.kind == "f":
        flat = narrowed(data.reshape(-1), spec.dtype, faults, lambda i: f"{root}{_subscript(i, data.shape)}")
        return flat.reshape(data.shape)
    if source.kind in "iu" and spec.dtype.kind in "iu" and np.can_cast(source, spec.dtype, "safe"):
        return data.astype(spec.dtype)
    if source.kind == spec.dtype.kind == "M":
        result = data.astype(spec.dtype)
        if ((result.astype(source) == data) | np.isnat(data)).all():
            return result
    if source.kind in "iufc" and spec.dtype.kind == "c" and np.can_cast(source, spec.dtype, "safe"):
        return data.astype(spec.dtype)
    faults.add(root, v.WRONG_TYPE, spec.dtype.name, source.name)
    return None


def _part(data: Any, spec: TensorSpec, faults: Faults, root: str) -> NDArray | None:
    if isinstance(data, np.ndarray):
        return from_array(data, spec, faults, root)
    return from_lists(data, spec, "python", faults, root)


def _unpacked(data: Any) -> Any:
    """Converts arrays at every level to lists."""
    if isinstance(data, np.ndarray):
        data = data.tolist() if data.dtype.kind not in "M" else list(data)
    if isinstance(data, list | tuple):
        return [_unpacked(item) for item in data]
    return data


def from_value(data: Any, spec: TensorSpec, origin: Origin, faults: Faults, root: str) -> NDArray | None:
    """Reads a tensor from the value in any form."""
    if isinstance(data, np.ndarray | np.generic):
        return from_array(np.asarray(data), spec, faults, root)
    if hasattr(data, "toarray"):
        return from_array(np.asarray(data.toarray()), spec, faults, root)
    if hasattr(data, "iloc"):
        return from_array(np.asarray(data.to_numpy()), spec, faults, root)
    if origin == "python" and _holds_arrays(data):
        return from_array(np.asarray(data), spec, faults, root)
    return from_lists(data, spec, origin, faults, root)


def _holds_arrays(data: Any) -> bool:
    """Returns True for a list of arrays of one shape and dtype, which can be joined without a look at each
    value."""
    return (
        isinstance(data, list | tuple)
        and len(data) > 0
        and all(isinstance(part, np.ndarray) for part in data)
        and len({(part.shape, part.dtype) for part in data}) == 1
    )


def from_table(table: Table, specs: Sequence[TensorSpec], faults: Faults) -> dict[str, NDArray]:
    """Reads tensors from columns, as MLflow reads a frame.

    Scalar cells give the shape (-1,) or (-1, 1). Lists of scalars are reshaped to the spec's shape, whose
    first dimension is free and whose others are fixed. An unnamed tensor is one column, or one scalar column
    for each place of its second dimension. A single named tensor of two dimensions is read in the same way if
    there are several columns and none has its name.
    """
    result: dict[str, NDArray] = {}
    positions = {name: i for i, name in enumerate(table.names)}
    for spec in specs:
        if len(specs) == 1 and _is_matrix(table, spec):
            found = _from_columns(table, spec, faults)
        elif spec.name is not None:
            at = positions.get(spec.name)
            if at is None:
                faults.add(table.column(spec.name), v.MISSING, spec)
                continue
            found = _from_column(table, at, spec, faults)
        elif len(table.columns) == 1:
            found = _from_column(table, 0, spec, faults)
        elif spec.shape == (-1, len(table.columns)) and table.rows:
            found = _from_columns(table, spec, faults)
        else:
            shape = [table.rows, len(table.columns)]
            _report_shape(spec, shape, faults, table.root)
            continue
        if found is not None:
            result[spec.name or ""] = found
    return result


def _is_matrix(table: Table, spec: TensorSpec) -> bool:
    width = len(table.columns)
    return (
        spec.name not in (None, *table.names)
        and width > 1
        and table.rows > 0
        and spec.shape in ((-1, width), (-1, -1))
    )


def _from_columns(table: Table, spec: TensorSpec, faults: Faults) -> NDArray | None:
    flat_spec = TensorSpec(spec.dtype, (-1,))
    columns = [_scalars(table, i, flat_spec, faults) for i in range(len(table.columns))]
    if any(column is None for column in columns):
        return None
    return _stacked([column for column in columns if column is not None], 1)


def _scalars(table: Table, at: int, spec: TensorSpec, faults: Faults) -> NDArray | None:
    cells = table.columns[at]
    if isinstance(cells, np.ndarray) and cells.dtype.kind != "O":
        path = table.cell(at)
        if isinstance(cells, np.ma.MaskedArray):
            cells = _filled(cells)
        if cells.dtype.kind in "iuf" and spec.dtype.kind == "f":
            return narrowed(cells, spec.dtype, faults, path)
        return from_array(cells, spec, faults, table.column(table.names[at]))
    for i, cell in enumerate(cells):
        if isinstance(cell, list | tuple | dict | np.ndarray):
            faults.add(partial(table.cell(at), i), v.WRONG_TYPE, spec.dtype.name, kind_of(cell))
    return cast_leaves(list(cells), spec.dtype, table.origin, faults, table.cell(at))


def _filled(cells: Any) -> NDArray:
    """Returns a column with NaN for missing values."""
    gaps = np.ma.getmaskarray(cells)
    return np.where(gaps, np.nan, cells.data) if gaps.any() else np.asarray(cells.data)


def _from_column(table: Table, at: int, spec: TensorSpec, faults: Faults) -> NDArray | None:
    cells = table.columns[at]
    whole = table.column(table.names[at])
    if spec.shape[:1] != (-1,) or -1 in spec.shape[1:]:
        faults.add(whole, v.WRONG_FORM, f"shape {list(spec.shape)}", "a column")
        return None
    size = math.prod(spec.shape[1:])
    if not any(isinstance(cell, list | tuple | np.ndarray) for cell in cells[:1]):
        if spec.shape not in ((-1,), (-1, 1)):
            _report_shape(spec, [len(cells)], faults, whole)
            return None
        flat = _scalars(table, at, TensorSpec(spec.dtype, (-1,)), faults)
        return None if flat is None else flat.reshape(-1, *spec.shape[1:])
    rows = []
    for i, cell in enumerate(cells):
        path = table.cell(at)(i)
        if isinstance(cell, np.ndarray):
            row = from_array(cell.reshape(-1), TensorSpec(spec.dtype, (size,)), faults, path)
        else:
            row = from_lists(cell, TensorSpec(spec.dtype, (size,)), table.origin, faults, path)
        if row is not None:
            rows.append(row)
    return _stacked(rows, 0).reshape(-1, *spec.shape[1:]) if len(rows) == len(cells) else None


def _stacked(arrays: Sequence[NDArray], axis: int) -> NDArray:
    texts = [text for array in arrays if array.dtype.kind in "US" for text in array.ravel().tolist()]
    return np.stack([a.astype(object) for a in arrays] if is_wide(texts) else arrays, axis=axis)
