"""The form `tensors`: converts arrays by name, each with a dtype, to columns or tensor inputs.

Protocols that send typed arrays use this form. Text, bytes and dates arrive as object arrays of `str` or
`bytes`, and the signature decides which of them they are. A missing value is masked, or None in an object
array. Must not know protocols.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from loaders.batch import Batch, Columns, Tensors, is_wide
from loaders.enforcement import violations as v
from loaders.enforcement.casts import cast_values
from loaders.enforcement.scalars import NDArray, objects
from loaders.enforcement.tables import Name, Table
from loaders.enforcement.untyped import inferred, text_columns
from loaders.enforcement.violations import Faults, shown
from loaders.schema import AnyType, Array, ColSpec, Scalar, TensorSpec, Type
from loaders.spelling import counted

ROOT = "inputs"

_NUMBERS = frozenset({Scalar.boolean, Scalar.integer, Scalar.long, Scalar.float, Scalar.double})


def table(data: Mapping[str, NDArray], specs: Sequence[ColSpec], faults: Faults) -> Table | None:
    """Reads the tensors as the columns of a signature: a tensor of shape [n] or [n, 1] for each column, or
    one of shape [n, k] for k columns of the same numeric type."""
    names: list[Name] = [i if spec.name is None else spec.name for i, spec in enumerate(specs)]
    kinds: dict[str, ColSpec] = {str(name): spec for name, spec in zip(names, specs, strict=True)}
    if (matrix := _matrix(data, specs)) is not None:
        columns = [matrix[:, i] for i in range(len(names))]
        return Table(names, columns, len(matrix), "python", ROOT, "columns", ROOT)
    if len(data) == 1 and specs[0].name is not None and _are_alike(specs):
        ((sole, array),) = data.items()
        required = any(spec.required for spec in specs)
        if array.ndim == 2 and array.shape[1] > 1 and sole not in kinds and required:
            # Meant as all columns, not as an unknown one.
            expected, got = f"shape [n, {len(specs)}]", f"shape {list(array.shape)}"
            faults.add(f"{ROOT}.{shown(sole)}", v.WRONG_SHAPE, expected, got)
            return None
    found: dict[Name, Any] = {}
    if specs[0].name is None and data.keys() == kinds.keys():
        data = {name: data[name] for name in kinds}  # unnamed columns are taken in their order
    for position, (name, array) in enumerate(data.items()):
        spec = kinds.get(name)
        if spec is None and specs[0].name is None and position < len(specs):
            spec = specs[position]
        cells = _column(array, name, spec, faults)
        if cells is not None:
            found[name] = cells
    if faults.total:
        return None
    rows = {len(cells) for cells in found.values()}
    if len(rows) > 1:
        wanted = len(next(iter(found.values())))
        for column, cells in found.items():
            if len(cells) != wanted:
                got = counted(len(cells), "value")
                faults.add(f"{ROOT}.{shown(column)}", v.WRONG_LENGTH, f"{wanted} values", got)
        return None
    return Table(
        list(found), list(found.values()), rows.pop() if rows else 0, "python", ROOT, "columns", ROOT
    )


def _matrix(data: Mapping[str, NDArray], specs: Sequence[ColSpec]) -> NDArray | None:
    """Returns the tensor that holds all columns; None if there is no such tensor."""
    if len(data) != 1:
        return None
    ((name, array),) = data.items()
    if array.ndim != 2 or array.shape[1] != len(specs) or name in {spec.name for spec in specs}:
        return None
    return array if _are_alike(specs) else None


def _are_alike(specs: Sequence[ColSpec]) -> bool:
    """Whether all columns have one numeric type."""
    return specs[0].type in _NUMBERS and all(spec.type == specs[0].type for spec in specs)


def _column(array: NDArray, name: str, spec: ColSpec | None, faults: Faults) -> Any:
    """Returns the cells of one column. If `spec` is None, the column is unknown and only its length
    matters."""
    whole = f"{ROOT}.{shown(name)}"
    kind: Type = AnyType() if spec is None else spec.type
    if array.ndim == 2 and isinstance(kind, Array) and isinstance(kind.items, Scalar | AnyType):
        return _rows_of(array, kind.items, whole, faults)
    if isinstance(kind, Scalar | AnyType):
        if array.ndim == 2 and array.shape[1] == 1:
            array = array.reshape(-1)
        if array.ndim == 1:
            required = spec is None or spec.required
            return _cells(array, kind, required, whole, faults)
        if spec is None:
            return list(array) if array.ndim else [array[()]]
        faults.add(whole, v.WRONG_SHAPE, "shape [n] or [n, 1]", f"shape {list(array.shape)}")
        return None
    wanted = "shape [n, k]" if isinstance(kind, Array) else "JSON on /predict, for nested columns"
    faults.add(whole, v.WRONG_FORM, wanted, f"shape {list(array.shape)}")
    return None


def _rows_of(array: NDArray, kind: Type, whole: str, faults: Faults) -> list[Any]:
    if array.dtype.kind == "O":
        flat = _cells(array.reshape(-1), kind, True, whole, faults)
        array = np.asarray(flat).reshape(array.shape)
    return [row.tolist() if row.dtype.kind == "O" else row for row in array]


def _cells(array: NDArray, kind: Type, required: bool, whole: str, faults: Faults) -> NDArray:
    """Returns the values of an array as cells of a type. Converts only text and bytes."""
    if array.dtype.kind != "O":
        return array
    path = partial("{}[{}]".format, whole)
    if kind is Scalar.binary:
        return objects([value.encode() if isinstance(value, str) else value for value in array])
    try:
        values = [value.decode() if isinstance(value, bytes) else value for value in array]
    except UnicodeDecodeError:
        if isinstance(kind, AnyType):
            return array
        for i, value in enumerate(array):
            if isinstance(value, bytes) and value.decode(errors="replace").encode() != value:
                faults.add(path(i), v.BAD_TEXT, kind, "binary")
        return array
    if kind is Scalar.datetime:
        return cast_values(values, kind, required, "json", faults, path)
    return objects(values)


def inputs(data: Mapping[str, NDArray], specs: Sequence[TensorSpec], faults: Faults) -> dict[str, NDArray]:
    """Reads the tensors as the inputs of a tensor signature. A single tensor fills an unnamed input."""
    result: dict[str, NDArray] = {}
    unnamed = specs[0].name is None
    if unnamed and len(data) != 1:
        faults.add(ROOT, v.WRONG_LENGTH, "1 tensor", f"{len(data)} tensors")
        return {}
    by_name = {spec.name: spec for spec in specs}
    for name, array in data.items():
        spec = specs[0] if unnamed else by_name.get(name)
        key = "" if unnamed else name
        if spec is None:
            result[key] = array
            continue
        whole = f"{ROOT}.{shown(name)}"
        if isinstance(array, np.ma.MaskedArray):
            array = _without_gaps(array, spec, whole, faults)
        if array.dtype.kind == "O":
            kinds = {"S": Scalar.binary, "M": Scalar.datetime, "U": Scalar.string}
            kind: Type = kinds.get(spec.dtype.kind, AnyType())
            array = _cells(array.reshape(-1), kind, True, whole, faults).reshape(array.shape)
        result[key] = array
    return result


def _without_gaps(array: Any, spec: TensorSpec, whole: str, faults: Faults) -> NDArray:
    gaps = np.ma.getmaskarray(array)
    data: NDArray = array.data
    if data.dtype.kind == "f":
        return np.where(gaps, np.array(np.nan, data.dtype), data)
    for at in np.flatnonzero(gaps):
        faults.add(f"{whole}[{at}]", v.NULL, spec.dtype.name, "null")
    return data


def untyped(data: Mapping[str, NDArray]) -> Batch:
    """Reads the tensors for a model without a signature: one tensor as an array, several as arrays by name,
    tensors with missing values as a table."""
    arrays = {name: _plain(array) for name, array in data.items()}
    if any(isinstance(array, np.ma.MaskedArray) for array in arrays.values()) and all(
        array.ndim == 1 for array in arrays.values()
    ):
        columns: dict[str | int, NDArray] = {name: inferred(array) for name, array in arrays.items()}
        return Columns(columns, len(next(iter(arrays.values()))), None, text_columns(columns, columns))
    if len(arrays) == 1:
        arrays = {"": next(iter(arrays.values()))}
    lengths = {len(array) if array.ndim else -1 for array in arrays.values()}
    rows = lengths.pop() if len(lengths) == 1 else -1
    return Tensors(arrays, None if rows < 0 else rows)


def _plain(array: NDArray) -> NDArray:
    if array.dtype.kind != "O":
        return array
    flat = _cells(array.reshape(-1), AnyType(), False, ROOT, Faults())
    if flat.size and all(isinstance(value, str) for value in flat) and not is_wide(flat):
        return np.array(flat.tolist()).reshape(array.shape)
    return flat.reshape(array.shape)


def frame(read: Table) -> Any:
    """Returns the columns as a pandas frame, for the modes that follow MLflow, which has no form
    `tensors`."""
    import pandas as pd

    columns: dict[Any, Any] = {}
    for name, cells in zip(read.names, read.columns, strict=True):
        gaps = np.ma.getmaskarray(cells) if isinstance(cells, np.ma.MaskedArray) else None
        series = pd.Series(np.ma.getdata(cells) if gaps is not None else cells)
        columns[name] = series if gaps is None else series.astype(object).mask(gaps, None)
    return pd.DataFrame(columns, index=range(read.rows))
