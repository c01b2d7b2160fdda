"""Input of a model whose signature comes from Python type hints: checks the list of `inputs` item by item.

As in MLflow, the model receives the list itself, and its type hint validates the list again. This module
checks each item against the stored type of the hint, decodes bytes and reads dates.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from loaders.batch import Value
from loaders.enforcement import named, tables
from loaders.enforcement import violations as v
from loaders.enforcement.casts import nested
from loaders.enforcement.scalars import Origin, kind_of
from loaders.enforcement.tables import Table
from loaders.enforcement.violations import Faults
from loaders.schema import AnyType, ColSpec, Object, Scalar, TensorSpec, Type
from loaders.spelling import counted


def hinted(spec: ColSpec | TensorSpec, form: str, data: Any, faults: Faults) -> Value | None:
    """Returns the checked list, one row per item; None after a violation. `inputs` is the only JSON form
    accepted.

    Unknown fields are allowed here: the hint itself decides about them.
    """
    kind: Type = spec.type if isinstance(spec, ColSpec) else AnyType()
    origin: Origin = "json" if form == "inputs" else "python"
    root = "inputs" if form == "inputs" else "data"
    if form in ("csv", "arrow", "tensors") or (form == "python" and hasattr(data, "iloc")):
        table = _table(form, data, kind, faults)
        return None if table is None else _rows(table, kind, faults)
    if form not in ("inputs", "python"):
        faults.add(form, v.WRONG_FORM, "inputs", form)
        return None
    if isinstance(data, np.ndarray):
        data = data.tolist()
    if not isinstance(data, list | tuple):
        faults.add(root, v.WRONG_TYPE, "array", kind_of(data))
        return None
    checked = [
        nested(item, kind, True, origin, faults, partial("{}[{}]".format, root, i), closed=False)
        for i, item in enumerate(data)
    ]
    return Value(checked, len(checked))


def _table(form: str, data: Any, kind: Type, faults: Faults) -> Table | None:
    if form == "csv":
        return tables.from_csv(data, faults)
    if form == "arrow":
        return tables.from_arrow(data, faults)
    if form == "tensors":
        return named.table(data, _columns_of(data, kind), faults)
    if hasattr(data, "columns"):
        return tables.from_frame(data, "data", faults)
    cells = tables.series_array(data)
    return Table([0], [cells], len(cells), "python", "data", "columns", "data")


def _columns_of(data: Any, kind: Type) -> list[ColSpec]:
    """Returns the columns that named tensors fill: one for each field of an object, else a single one."""
    if isinstance(kind, Object):
        return [ColSpec(field.type, field.name, field.required) for field in kind.properties]
    return [ColSpec(kind, name) for name in data][:1]


def _rows(table: Table, kind: Type, faults: Faults) -> Value | None:
    """Reads a table for a hint: an object's fields are the columns; any other type is the only column."""
    if isinstance(kind, Object) and not (len(table.names) == 1 and table.names[0] == 0):
        fields = {field.name: field for field in kind.properties}
        known = [(at, name) for at, name in enumerate(table.names) if name in fields]
        for name, field in fields.items():
            if field.required and name not in table.names:
                faults.add(table.column(name), v.MISSING, field.type)
        columns = {
            name: _cells(table, at, fields[str(name)].type, fields[str(name)].required, faults)
            for at, name in known
        }
        rows = [{name: cells[i] for name, cells in columns.items()} for i in range(table.rows)]
        return Value(rows, len(rows))
    if len(table.names) != 1:
        faults.add(table.root, v.WRONG_LENGTH, "1 column", counted(len(table.names), "column"))
        return None
    items = _cells(table, 0, kind, True, faults)
    return Value(items, len(items))


def _cells(table: Table, at: int, kind: Type, required: bool, faults: Faults) -> list[Any]:
    if table.origin == "text" and not isinstance(kind, Scalar | AnyType):
        faults.add(table.column(table.names[at]), v.WRONG_FORM, "JSON, for nested columns", "csv")
        return []
    cells = table.columns[at]
    path = table.cell(at)
    values = cells.tolist() if isinstance(cells, np.ndarray) else list(cells)
    return [
        nested(value, kind, required, table.origin, faults, partial(path, i), closed=False)
        for i, value in enumerate(values)
    ]
