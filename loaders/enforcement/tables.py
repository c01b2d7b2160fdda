"""Reads each form of rows as a table of columns: names, cells, and the path of every cell.

The forms are those of MLflow's scoring protocol (`dataframe_split`, `dataframe_records`, `inputs`,
`instances`, CSV), frames and Arrow tables. Decides only which cell belongs to which column; `casts` handles
types. Imports neither pandas nor pyarrow: it calls methods of the objects that it receives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import Any, Literal

import numpy as np

from loaders.batch import column_array
from loaders.enforcement import violations as v
from loaders.enforcement.scalars import NDArray, Origin, Path, kind_of, objects
from loaders.enforcement.violations import Faults, shown
from loaders.spelling import counted

#: Maximum cells of a table of records, per value sent; and the number that is always allowed.
_SPARSEST, _SPARSE = 16, 100_000

#: What pyarrow raises for a value without an equal in Python, such as a date in the year 5 million, a decimal
#: with a million zeros, or a map with one key twice. Its own exceptions derive from these.
_UNREADABLE = (ValueError, ArithmeticError, LookupError, TypeError, NotImplementedError)
_SHOWN_TYPE = 40

_LARGEST_NAME = 2**53

Style = Literal["rows", "columns", "record", "list", "value"]
Name = str | int


@dataclass(frozen=True, slots=True)
class CsvTable:
    """A CSV body: the names from the header row, and each column's cells as text (an empty cell is None)."""

    columns: list[str]
    cells: list[list[str | None]]


@dataclass(slots=True)
class Table:
    """Columns of equal length. A column is a sequence of Python values or a 1-D array with a dtype.

    `prefix` and `style` define the paths of cells in the original form. `named` is False if the form has only
    positions; the names are then 0, 1, …. `index` is the caller's row index, None for 0, 1, ….
    """

    names: list[Name]
    columns: Sequence[Sequence[Any] | NDArray]
    rows: int
    origin: Origin
    prefix: str
    style: Style
    root: str
    named: bool = True
    index: NDArray | None = None

    def cell(self, position: int) -> Path:
        """Returns a function that gives the path of the cell in a row."""
        return partial(self._cell, position)

    def _cell(self, position: int, row: int) -> str:
        if self.style == "list":
            return f"{self.prefix}[{row}]"
        if self.style == "value":
            return self.prefix
        name = self.names[position]
        tail = f".{shown(name)}" if self.named else f"[{position}]"
        if self.style == "rows":
            return f"{self.prefix}[{row}]{tail}"
        return f"{self.prefix}{tail}" if self.style == "record" else f"{self.prefix}{tail}[{row}]"

    def column(self, name: Name) -> str:
        """Returns the path of the whole column."""
        return f"{self.root}.{shown(name)}" if self.named else f"{self.root}[{name}]"


def from_split(data: Any, faults: Faults) -> Table | None:
    """Reads `dataframe_split`: `{columns?, index?, data: [[…], …]}`."""
    root = "dataframe_split"
    if not isinstance(data, dict):
        faults.add(root, v.WRONG_TYPE, "object", kind_of(data))
        return None
    columns, index, rows = data.get("columns"), data.get("index"), data.get("data")
    if len(data) != ("columns" in data) + ("index" in data) + ("data" in data):
        for key in data:
            if key not in ("columns", "index", "data"):
                faults.add(f"{root}.{shown(key)}", v.UNKNOWN)
        return None
    if not isinstance(rows, list):
        faults.add(f"{root}.data", v.WRONG_TYPE if "data" in data else v.MISSING, "array", kind_of(rows))
        return None
    if columns is not None and not _are_names(columns, f"{root}.columns", faults):
        return None
    width = None if columns is None else len(columns)
    cells = _cells(rows, width, f"{root}.data", faults)
    if cells is None:
        return None
    table = Table(
        list(range(len(cells))) if columns is None else columns,
        cells,
        len(rows),
        "json",
        f"{root}.data",
        "rows",
        root,
        named=columns is not None,
    )
    if index is not None:
        table.index = _index(index, len(rows), f"{root}.index", faults)
    return table


def _are_names(names: Any, path: str, faults: Faults) -> bool:
    if not isinstance(names, list):
        faults.add(path, v.WRONG_TYPE, "array", kind_of(names))
        return False
    if not set(map(type, names)) <= {str, int}:
        for i, name in enumerate(names):
            if type(name) not in (str, int):
                faults.add(f"{path}[{i}]", v.WRONG_TYPE, "string", kind_of(name))
        return False
    if (large := too_large(names)) is not None:
        faults.add(f"{path}[{large}]", v.OUT_OF_RANGE, "string")
        return False
    return _are_unique(names, path, faults)


def too_large(names: object) -> int | None:
    """Returns the place of the first integer in a list that JSON numbers do not hold exactly. Python's
    integers have equal hashes where they differ by 2**61 - 1: a table of such names takes quadratic time."""
    for i, name in enumerate(names if isinstance(names, list) else ()):
        if type(name) is int and not -_LARGEST_NAME <= name <= _LARGEST_NAME:
            return i
    return None


def _are_unique(names: Sequence[Name], path: str, faults: Faults) -> bool:
    if len(set(names)) == len(names):
        return True
    seen: set[Name] = set()
    for i, name in enumerate(names):
        if name in seen:
            faults.add(f"{path}[{i}]", v.DUPLICATE)
        seen.add(name)
    return False


def counts_rows(index: Any, rows: Any) -> bool:
    """Returns True if the row labels of a JSON body are 0, 1, …"""
    if type(index) is not list or type(rows) is not list:
        return False
    return index == list(range(len(rows))) and set(map(type, index)) == {int}


def _index(index: Any, rows: int, path: str, faults: Faults) -> NDArray | None:
    if not isinstance(index, list):
        faults.add(path, v.WRONG_TYPE, "array", kind_of(index))
        return None
    if len(index) != rows:
        faults.add(path, v.WRONG_LENGTH, counted(rows, "value"), counted(len(index), "value"))
        return None
    kinds = set(map(type, index))
    if kinds <= {int}:
        if index == list(range(rows)):
            return None
        if all(-(2**63) <= label < 2**63 for label in index):
            return np.array(index, dtype=np.int64)
    if not kinds <= {int, float, str, bool, type(None)}:
        faults.add(path, v.WRONG_TYPE, "row labels", "array" if list in kinds else "object")
        return None
    return np.array(index, dtype=np.float64) if kinds == {float} else objects(index)


def _cells(rows: list[Any], width: int | None, path: str, faults: Faults) -> list[Sequence[Any]] | None:
    """Converts rows to columns. All rows are lists of one length, or (a single column) no row is a list."""
    kinds = set(map(type, rows))
    if kinds == {list}:
        try:
            cells: list[Sequence[Any]] = list(zip(*rows, strict=True))
        except ValueError:
            cells = []
        found = len(cells)
        wanted = (
            (len(rows[0]) if width is None else width) if found == 0 else (found if width is None else width)
        )
        if found == wanted:
            return cells
        for i, row in enumerate(rows):
            if len(row) != wanted:
                faults.add(
                    f"{path}[{i}]", v.WRONG_LENGTH, counted(wanted, "value"), counted(len(row), "value")
                )
        return None
    if not rows:
        return [()] * (width or 0)
    if list in kinds or dict in kinds:
        for i, row in enumerate(rows):
            if not isinstance(row, list):
                faults.add(f"{path}[{i}]", v.WRONG_TYPE, "array", kind_of(row))
        return None
    if width not in (None, 1):
        for i in range(len(rows)):
            faults.add(partial("{}[{}]".format, path, i), v.WRONG_TYPE, "array", kind_of(rows[i]))
        return None
    return [rows]


def from_rows(rows: Sequence[Any], root: str, origin: Origin, faults: Faults) -> Table | None:
    """Reads a list of rows: objects (an absent name means null), lists, or single values."""
    kinds = set(map(type, rows))
    if kinds == {dict}:
        names: list[Any] = list(rows[0])
        cells = _record_cells(rows, names)
        if cells is None:
            names = list(dict.fromkeys(chain.from_iterable(rows)))
            if is_sparse(rows):
                faults.add(root, v.RAGGED_RECORDS, "records with the same names")
                return None
            cells = [[row.get(name) for row in rows] for name in names]
        return Table(names, cells, len(rows), origin, root, "rows", root)
    if dict in kinds:
        for i, row in enumerate(rows):
            if not isinstance(row, dict):
                faults.add(f"{root}[{i}]", v.WRONG_TYPE, "object", kind_of(row))
        return None
    columns = _cells(list(rows), None, root, faults)
    if columns is None:
        return None
    style: Style = "rows" if kinds == {list} else "list"
    return Table(list(range(len(columns))), columns, len(rows), origin, root, style, root, named=False)


def is_sparse(rows: Sequence[Any]) -> bool:
    """Returns True if records have so many different names that the table (rows times names) would be far
    larger than the input."""
    records = [row for row in rows if isinstance(row, dict)]
    names = len(set(chain.from_iterable(records)))
    return names * len(rows) > _SPARSEST * sum(map(len, records)) + _SPARSE


def _record_cells(rows: Sequence[Any], names: list[Any]) -> list[Sequence[Any]] | None:
    """Returns the cells of records that all have the same names; None if the names differ."""
    if len(rows) == 1:
        return [(value,) for value in rows[0].values()]
    if len(names) < 2 or set(map(len, rows)) != {len(names)}:
        return None
    try:
        return list(zip(*map(itemgetter(*names), rows), strict=True))
    except KeyError:
        return None


def from_columns(data: Mapping[Any, Any], root: str, origin: Origin, faults: Faults) -> Table | None:
    """Reads an object of columns of one length."""
    names = list(data)
    columns = [column if type(column) is list else _sequence(column) for column in data.values()]
    rows = len(columns[0]) if columns else 0
    if set(map(len, columns)) <= {rows}:
        return Table(names, columns, rows, origin, root, "columns", root)
    for name, column in zip(names, columns, strict=True):
        if len(column) != rows:
            faults.add(
                f"{root}.{shown(name)}", v.WRONG_LENGTH, counted(rows, "value"), counted(len(column), "value")
            )
    return None


def _sequence(column: Any) -> Sequence[Any] | NDArray:
    if hasattr(column, "iloc"):
        return series_array(column)
    if isinstance(column, np.ndarray):
        return column if column.ndim == 1 else list(column)
    return column if isinstance(column, list | tuple) else [column]


def from_record(data: Mapping[Any, Any], root: str, origin: Origin) -> Table:
    """Reads an object that is one row."""
    return Table(list(data), [[value] for value in data.values()], 1, origin, root, "record", root)


def from_list(values: Sequence[Any] | NDArray, name: Name, root: str, origin: Origin) -> Table:
    """Reads the cells of the only column."""
    return Table([name], [values], len(values), origin, root, "list", root)


def from_csv(data: CsvTable, faults: Faults) -> Table | None:
    """Reads a CSV body."""
    if not _are_unique(data.columns, "csv.columns", faults):
        return None
    rows = len(data.cells[0]) if data.cells else 0
    if len(data.cells) != len(data.columns) or any(len(cells) != rows for cells in data.cells):
        faults.add("csv", v.RAGGED)
        return None
    return Table([*data.columns], data.cells, rows, "text", "csv.data", "rows", "csv")


def from_frame(frame: Any, root: str, faults: Faults) -> Table | None:
    """Reads a pandas frame."""
    names = [int(name) if isinstance(name, np.integer) else name for name in frame.columns]
    try:
        unique = _are_unique(names, f"{root}.columns", faults)
    except TypeError:
        unique = False
        faults.add(f"{root}.columns", v.WRONG_TYPE, "string")
    if not unique:
        return None
    columns = [series_array(frame.iloc[:, i]) for i in range(len(names))]
    return Table(names, columns, len(frame), "python", root, "columns", root, index=frame_index(frame))


def frame_index(frame: Any) -> NDArray | None:
    """Returns the row index of a frame or series; None if it is 0, 1, …"""
    index = frame.index
    if getattr(index, "start", None) == 0 and getattr(index, "step", None) == 1:
        return None
    labels = index.to_numpy()
    return labels if labels.dtype.kind in "biufMO" else objects(index.tolist())


def series_array(series: Any) -> NDArray:
    """Converts a pandas series to a 1-D array; converts dates with a zone to UTC."""
    if hasattr(series, "sparse"):
        series = series.sparse.to_dense()
    dtype = series.dtype
    if isinstance(dtype, np.dtype):
        return np.asarray(series.to_numpy())
    if dtype.kind == "M":
        if getattr(dtype, "tz", None) is not None:
            series = series.dt.tz_convert("UTC").dt.tz_localize(None)
        return np.asarray(series.to_numpy(dtype="datetime64[ns]"))
    if dtype.name in ("str", "string"):
        return np.asarray(series.to_numpy(dtype=object, na_value=None))
    return column_array(series)


_ARROW_NUMBERS = frozenset(
    (
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "halffloat",
        "float",
        "double",
        "bool",
    )
)


def from_arrow(table: Any, faults: Faults) -> Table | None:
    """Reads a pyarrow table or record batch."""
    names = list(table.column_names)
    if not _are_unique(names, "arrow.columns", faults):
        return None
    columns = []
    for i, name in enumerate(names):
        try:
            columns.append(_arrow_array(table.column(i)))
        except _UNREADABLE:
            faults.add(f"arrow.{shown(name)}", v.UNREADABLE, got=str(table.column(i).type)[:_SHOWN_TYPE])
    if len(columns) < len(names):
        return None
    return Table([*names], columns, table.num_rows, "python", "arrow", "columns", "arrow")


def _arrow_array(column: Any) -> NDArray:
    if hasattr(column, "combine_chunks"):
        column = column.combine_chunks()
    kind = str(column.type)
    if kind in _ARROW_NUMBERS:
        if column.null_count == 0 or kind in ("halffloat", "float", "double"):
            return np.asarray(column.to_numpy(zero_copy_only=False))
        filled = column.fill_null(False if kind == "bool" else 0).to_numpy(zero_copy_only=False)
        return np.ma.MaskedArray(filled, mask=column.is_null().to_numpy(zero_copy_only=False))
    if kind.startswith("timestamp") or kind in ("string", "large_string", "binary", "large_binary"):
        return np.asarray(column.to_numpy(zero_copy_only=False))
    if kind.startswith("dictionary<") and hasattr(column, "indices"):
        # Convert each value once, because many rows may refer to it.
        values = objects([*column.dictionary.to_pylist(), None])
        cells: NDArray = values[column.indices.fill_null(0).to_numpy(zero_copy_only=False)]
        cells[column.indices.is_null().to_numpy(zero_copy_only=False)] = None
        return cells
    if "map<" in kind:
        return objects(column.to_pylist(maps_as_pydicts="strict"))
    return objects(column.to_pylist())
