"""The mode `strict`: matches input of any form with a signature, and never casts if a value would change.

`tables` reads forms, `casts` and `tensors` read values. This module matches columns and tensors with the
signature. Must not know the other modes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from loaders.batch import Batch, Columns, Tensors
from loaders.enforcement import named, tables, tensors
from loaders.enforcement import violations as v
from loaders.enforcement.casts import cast_array, cast_values
from loaders.enforcement.scalars import NDArray, Origin, kind_of, quick_cast
from loaders.enforcement.tables import Table
from loaders.enforcement.untyped import inferred, text_columns
from loaders.enforcement.violations import Faults, shown
from loaders.schema import AnyType, ColSpec, Map, Object, Scalar, TensorSpec
from loaders.schema import Array as ArrayType
from loaders.signature import Signature
from loaders.spelling import counted, near

#: Maximum rows that are checked value by value; above it, checking whole columns is faster.
_FEW_ROWS = 8
_NUMBERS = frozenset({float, int})
#: Limits of the search for misspelt columns: missing columns, candidates, name length, similarity.
_NEAR_FAULTS, _NEAR_NAMES, _NEAR_LENGTH, _NEAR_RATIO = 10, 30, 40, 0.7


def strict(signature: Signature, form: str, data: Any, faults: Faults, extras: list[Any]) -> Batch | None:
    plan = plan_of(signature)
    if plan.tensors:
        if plan.matrix is not None and (rows := _quick_rows(plan.matrix, form, data)) is not None:
            return rows
        return _tensors(plan, form, data, faults, extras)
    if plan.doubles and (quick := quick_doubles(plan, form, data)) is not None:
        return quick
    return _columns(plan, form, data, faults, extras)


@dataclass(frozen=True, slots=True)
class Plan:
    """The requirements of a signature's inputs, computed once per signature."""

    columns: tuple[ColSpec, ...]
    names: list[str | int]
    quick: tuple[Callable[[Sequence[Any]], NDArray | None], ...]
    tensors: tuple[TensorSpec, ...]
    named: bool
    nested: bool
    scalar_only: bool
    doubles: bool
    texts: frozenset[str | int]
    inferred: frozenset[str | int]
    open: bool
    matrix: _Matrix | None


@dataclass(frozen=True, slots=True)
class _Matrix:
    """The only tensor of a signature, without a name: rows of fractions. `width`: the values of a row, -1 for
    any number. `quick` makes an array of the values."""

    width: int
    quick: Callable[[Sequence[Any]], NDArray | None]


_FRACTIONS = {np.dtype(np.float64): Scalar.double, np.dtype(np.float32): Scalar.float}


def plan_of(signature: Signature) -> Plan:
    plan: Plan | None = signature.plans.get("strict")
    if plan is None:
        inputs: Sequence[ColSpec | TensorSpec] = signature.inputs or ()
        columns = tuple(spec for spec in inputs if isinstance(spec, ColSpec))
        names: list[str | int] = [i if spec.name is None else spec.name for i, spec in enumerate(columns)]
        plan = Plan(
            columns,
            names,
            tuple(quick_cast(spec.type) for spec in columns),
            tuple(spec for spec in inputs if isinstance(spec, TensorSpec)),
            bool(inputs) and inputs[0].name is not None,
            any(isinstance(spec.type, ArrayType | Object | Map) for spec in columns),
            all(isinstance(spec.type, Scalar) for spec in columns),
            0 < len(columns) == len(inputs)
            and all(spec.type is Scalar.double for spec in columns)
            and isinstance(inputs[0].name, str),
            frozenset(name for name, spec in zip(names, columns, strict=True) if spec.type is Scalar.string),
            frozenset(
                name for name, spec in zip(names, columns, strict=True) if isinstance(spec.type, AnyType)
            ),
            any(_is_open(spec.type) for spec in columns)
            or any(isinstance(spec, TensorSpec) and spec.dtype.kind == "O" for spec in inputs),
            _matrix(inputs),
        )
        signature.plans["strict"] = plan
    return plan


def _matrix(inputs: Sequence[ColSpec | TensorSpec]) -> _Matrix | None:
    spec = inputs[0] if len(inputs) == 1 else None
    if not isinstance(spec, TensorSpec) or spec.name is not None or spec.dtype not in _FRACTIONS:
        return None
    if len(spec.shape) != 2 or spec.shape[0] != -1:
        return None
    return _Matrix(spec.shape[1], quick_cast(_FRACTIONS[spec.dtype]))


def _is_open(kind: object) -> bool:
    """Returns True if a type contains AnyType at any level."""
    if isinstance(kind, ArrayType):
        return _is_open(kind.items)
    if isinstance(kind, Map):
        return _is_open(kind.values)
    if isinstance(kind, Object):
        return any(_is_open(field.type) for field in kind.properties)
    return isinstance(kind, AnyType)


# --- columns


def quick_doubles(plan: Plan, form: str, data: Any) -> Columns | None:
    """Fast path for the most common request: a few rows of numbers under exactly the signature's names.
    Returns None for any other input."""
    if form == "dataframe_split":
        if type(data) is not dict or data.get("columns") != plan.names:
            return None
        rows = data.get("data")
        if len(data) != 2 and (len(data) != 3 or not tables.counts_rows(data.get("index"), rows)):
            return None
        if type(rows) is not list or not 0 < len(rows) <= _FEW_ROWS:
            return None
    elif form == "dataframe_records":
        if type(data) is not list or not 0 < len(data) <= _FEW_ROWS:
            return None
        rows = []
        for record in data:
            if type(record) is not dict or list(record) != plan.names:
                return None
            rows.append(list(record.values()))
    else:
        return None
    width = len(plan.names)
    for row in rows:
        if type(row) is not list or len(row) != width or not _NUMBERS.issuperset(map(type, row)):
            return None
    try:
        matrix = np.array(rows, np.float64, order="F")
    except OverflowError:
        return None
    return Columns(dict(zip(plan.names, matrix.T, strict=True)), len(rows))


def _columns(plan: Plan, form: str, data: Any, faults: Faults, extras: list[Any]) -> Columns | None:
    table = _table(plan, form, data, faults)
    if table is None:
        return None
    names, columns = table.names, table.columns
    if not plan.named:
        if not table.rows and not names:
            names, columns = plan.names, [()] * len(plan.names)
        if len(names) < len(plan.names):
            faults.add(
                table.root, v.WRONG_LENGTH, counted(len(plan.names), "column"), counted(len(names), "column")
            )
            return None
        positions = {name: i for i, name in enumerate(plan.names)}
    else:
        positions = {name: i for i, name in enumerate(names)}
    arrays: dict[str | int, NDArray] = {}
    json = table.origin == "json"
    for name, quick, spec in zip(plan.names, plan.quick, plan.columns, strict=True):
        at = positions.get(name)
        if at is None and type(name) is int:
            # Names in JSON objects and CSV headers are always text.
            at = positions.get(str(name))
        if at is None:
            if spec.required:
                if not table.named and type(name) is str:
                    faults.add(table.root, v.NO_COLUMNS, "named columns")
                    return None
                meant = _near(name, names, plan, faults)
                faults.add(table.column(name), v.MISSING, spec.type, meant)
            continue
        cells = columns[at]
        array = quick(cells) if json and not isinstance(cells, np.ndarray) else None
        if array is None:
            array = _cast(spec, cells, at, table, faults)
        arrays[name if plan.named else names[at]] = array
    texts = plan.texts
    if plan.texts and not plan.named:
        texts = frozenset(names[int(place)] for place in plan.texts)
    if plan.inferred:
        texts |= text_columns(arrays, plan.inferred if plan.named else arrays)
    if len(arrays) < len(names):
        known = {str(name) for name in arrays if type(name) is int}
        extras += [name for name in names if name not in arrays and name not in known]
    return Columns(arrays, table.rows, table.index, texts)


def _near(name: str | int, sent: Sequence[str | int], plan: Plan, faults: Faults) -> str | None:
    """Returns the unknown column that the caller most likely meant. Limits the number of searches, of names
    and their length, because the caller chooses the names that are compared."""
    if faults.total >= _NEAR_FAULTS or type(name) is not str:
        return None
    wanted = set(plan.names)
    unknown = [str(one) for one in islice(sent, len(wanted) + _NEAR_NAMES) if one not in wanted]
    spelt = {one.casefold(): one for one in unknown[:_NEAR_NAMES] if len(one) <= _NEAR_LENGTH}
    found = near(name[:_NEAR_LENGTH].casefold(), spelt, _NEAR_RATIO)
    if found is None:
        return None
    # Suggest an unknown column only for the missing column that it resembles most.
    there = set(sent)
    absent = (str(one)[:_NEAR_LENGTH].casefold() for one in plan.names if one not in there)
    meant = near(found, islice(absent, _NEAR_NAMES), _NEAR_RATIO)
    if meant is not None and meant != name[:_NEAR_LENGTH].casefold():
        return None
    return f"the unknown column {shown(spelt[found])}"


def _cast(spec: ColSpec, cells: Any, at: int, table: Table, faults: Faults) -> NDArray:
    if isinstance(spec.type, AnyType):
        return inferred(cells)
    if isinstance(cells, np.ndarray):
        whole = partial(table.column, table.names[at])
        return cast_array(cells, spec.type, spec.required, faults, table.cell(at), whole)
    return cast_values(cells, spec.type, spec.required, table.origin, faults, table.cell(at))


def _table(plan: Plan, form: str, data: Any, faults: Faults) -> Table | None:
    if form == "dataframe_split":
        return tables.from_split(data, faults)
    if form == "dataframe_records":
        if not isinstance(data, list):
            faults.add(form, v.WRONG_TYPE, "array", kind_of(data))
            return None
        if not data and plan.named:
            faults.add(form, v.EMPTY, "records")
            return None
        return tables.from_rows(data, form, "json", faults)
    if form == "csv":
        if not plan.scalar_only:
            faults.add(form, v.WRONG_FORM, "JSON, for nested columns", "csv")
            return None
        return tables.from_csv(data, faults)
    if form == "arrow":
        return tables.from_arrow(data, faults)
    if form == "tensors":
        return named.table(data, plan.columns, faults)
    if form == "python":
        return _python_table(plan, data, faults)
    return _inputs_table(plan, data, form, "json", faults)


def _inputs_table(plan: Plan, data: Any, root: str, origin: Origin, faults: Faults) -> Table | None:
    """Reads `inputs` and `instances`: columns, one record, records, or the cells of the only column."""
    if isinstance(data, Mapping):
        if not plan.named:
            faults.add(root, v.WRONG_TYPE, "array", "object")
            return None
        # As in MLflow, an object is one record if a column has a nested type.
        if not plan.nested:
            if set(map(type, data.values())) == {list}:
                return tables.from_columns(data, root, origin, faults)
            if _is_columnar(plan, data):
                return tables.from_columns(_without_nulls(plan, data), root, origin, faults)
        return tables.from_record(data, root, origin)
    if not isinstance(data, list | tuple):
        if not plan.named and len(plan.columns) == 1:
            return Table([0], [[data]], 1, origin, root, "value", root, named=False)
        faults.add(root, v.WRONG_TYPE, "array" if not plan.named else "object", kind_of(data))
        return None
    name = plan.columns[0].name
    cells_of_one = len(plan.columns) == 1 and not any(isinstance(row, dict) for row in data)
    if not plan.named:
        if len(plan.columns) == 1 and not isinstance(plan.columns[0].type, Scalar):
            return tables.from_list(data, 0, root, origin)
        return tables.from_rows(data, root, origin, faults)
    if not data and (root == "instances" or not cells_of_one):
        faults.add(root, v.EMPTY, "records")
        return None
    if cells_of_one and name is not None and not isinstance(name, int):
        if plan.nested:
            return tables.from_record({name: data}, root, origin)
        return tables.from_list(data, name, root, origin)
    return tables.from_rows(data, root, origin, faults)


def _is_columnar(plan: Plan, data: Mapping[Any, Any]) -> bool:
    found = False
    for spec in plan.columns:
        value = data.get(spec.name, data.get(str(spec.name)))
        if value is None:
            continue
        found = True
        if not isinstance(value, list | tuple | np.ndarray) and not hasattr(value, "iloc"):
            return False
        if isinstance(value, np.ndarray) and not value.ndim:
            return False
    return found


def _without_nulls(plan: Plan, data: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Drops optional columns whose whole value is null."""
    optional = {spec.name for spec in plan.columns if not spec.required}
    return {name: value for name, value in data.items() if value is not None or name not in optional}


def _python_table(plan: Plan, data: Any, faults: Faults) -> Table | None:
    root = "data"
    if hasattr(data, "iloc") and hasattr(data, "columns"):
        return tables.from_frame(data, root, faults)
    if hasattr(data, "iloc"):
        single = plan.columns[0].name if len(plan.columns) == 1 else None
        name = data.name if isinstance(data.name, str | int) else 0 if single is None else single
        cells = tables.series_array(data)
        return Table(
            [name], [cells], len(cells), "python", root, "columns", root, index=tables.frame_index(data)
        )
    if isinstance(data, np.ndarray):
        if data.ndim == 1 and len(plan.columns) == 1 and isinstance(plan.columns[0].type, Scalar):
            single = plan.columns[0].name
            return tables.from_list(data, 0 if single is None else single, root, "python")
        if data.ndim == 2:
            columns = [data[:, i] for i in range(data.shape[1])]
            return Table(
                list(range(len(columns))), columns, len(data), "python", root, "rows", root, named=False
            )
        data = data.tolist()
    elif hasattr(data, "toarray"):
        faults.add(root, v.WRONG_FORM, "columns", "a sparse matrix")
        return None
    return _inputs_table(plan, data, root, "python", faults)


# --- tensors


def _quick_rows(matrix: _Matrix, form: str, data: Any) -> Tensors | None:
    """Fast path for a few rows of numbers. Returns None for any other input."""
    if form not in ("inputs", "instances") or type(data) is not list or not 0 < len(data) <= _FEW_ROWS:
        return None
    width = matrix.width
    values: list[Any] = []
    for row in data:
        if type(row) is not list or not row or (len(row) != width and width != -1):
            return None
        values += row
        width = len(row)
    numbers = matrix.quick(values)
    return None if numbers is None else Tensors({"": numbers.reshape(len(data), width)}, len(data))


def _tensors(plan: Plan, form: str, data: Any, faults: Faults, extras: list[Any]) -> Tensors | None:
    table: Table | None = None
    if form in ("dataframe_split", "dataframe_records", "csv", "arrow"):
        if form == "dataframe_records" and isinstance(data, list) and not data and plan.named:
            faults.add(form, v.EMPTY, "records")
            return None
        table = _table(plan, form, data, faults)
    elif form == "python" and hasattr(data, "iloc") and (hasattr(data, "columns") or plan.named):
        table = _python_table(plan, data, faults)
    else:
        return _tensors_of_inputs(plan, data, form, faults, extras)
    if table is None:
        return None
    arrays = tensors.from_table(table, plan.tensors, faults)
    if plan.named and not arrays.keys().isdisjoint(table.names):
        extras += [name for name in table.names if name not in arrays]
    return None if faults.total else Tensors(arrays, _rows(plan, arrays))


def _tensors_of_inputs(plan: Plan, data: Any, form: str, faults: Faults, extras: list[Any]) -> Tensors | None:
    origin: Origin = "json" if form in ("inputs", "instances") else "python"
    root = {"python": "data", "tensors": named.ROOT}.get(form, form)
    values: dict[str, Any]
    if form == "tensors":
        values = named.inputs(data, plan.tensors, faults)
        if faults.total:
            return None
    elif not plan.named:
        if isinstance(data, Mapping):
            faults.add(root, v.WRONG_TYPE, "array", "object")
            return None
        values = {"": data}
    elif isinstance(data, Mapping):
        values = dict(data)
    elif form == "instances" and isinstance(data, list) and data and isinstance(data[0], dict):
        return _tensors_of_instances(plan, data, faults, extras)
    elif len(plan.tensors) == 1 and not (isinstance(data, list) and any(isinstance(d, dict) for d in data)):
        if form == "instances" and isinstance(data, list) and not data:
            faults.add(root, v.EMPTY, "records")
            return None
        values = {plan.tensors[0].name or "": data}
    else:
        faults.add(root, v.WRONG_TYPE, "object", kind_of(data))
        return None
    arrays: dict[str, NDArray] = {}
    for spec in plan.tensors:
        name = spec.name or ""
        if name not in values:
            faults.add(f"{root}.{shown(name)}", v.MISSING, spec)
            continue
        path = f"{root}.{shown(name)}" if name and isinstance(data, Mapping) else root
        array = tensors.from_value(values[name], spec, origin, faults, path)
        if array is not None:
            arrays[name] = array
    extras += [name for name in values if name not in arrays]
    if (
        not faults.total
        and form == "instances"
        and len({len(a) if a.ndim else -1 for a in arrays.values()}) > 1
    ):
        faults.add(root, v.RAGGED, "tensors of one length")
    return None if faults.total else Tensors(arrays, _rows(plan, arrays))


def _tensors_of_instances(plan: Plan, rows: list[Any], faults: Faults, extras: list[Any]) -> Tensors | None:
    """Reads a list of objects, one per row, and stacks the parts of each tensor."""
    arrays: dict[str, NDArray] = {}
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            faults.add(f"instances[{i}]", v.WRONG_TYPE, "object", kind_of(row))
    if faults.total:
        return None
    for spec in plan.tensors:
        name = spec.name or ""
        for i, row in enumerate(rows):
            if name not in row:
                faults.add(f"instances[{i}].{shown(name)}", v.MISSING, spec)
        if not faults.total:
            array = tensors.from_lists(
                [row[name] for row in rows], spec, "json", faults, f"instances.{shown(name)}"
            )
            if array is not None:
                arrays[name] = array
    extras += [name for name in dict.fromkeys(n for row in rows for n in row) if name not in arrays]
    return None if faults.total else Tensors(arrays, _rows(plan, arrays))


def _rows(plan: Plan, arrays: Mapping[str, NDArray]) -> int | None:
    """Returns the length of the first axis if all tensors share it and leave it free, else None."""
    if any(spec.shape[:1] != (-1,) for spec in plan.tensors):
        return None
    lengths = {len(array) for array in arrays.values()}
    return lengths.pop() if len(lengths) == 1 else None
