"""The modes `mlflow` and `warn`: casts and refuses input as MLflow 3 does.

MLflow has two layers. First the scoring server casts the JSON or CSV body, leniently: `"false"` becomes true,
1.7 becomes 1, a large integer wraps. Then MLflow enforces the signature on the frame or the arrays. This
module follows both layers rule by rule and gives the same results; only the error texts are its own. Imports
pandas when called.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np

from loaders.batch import Batch, Columns, Tensors, is_wide
from loaders.enforcement import violations as v
from loaders.enforcement.scalars import NDArray, is_null, kind_of, objects
from loaders.enforcement.tables import CsvTable, frame_index, is_sparse, series_array
from loaders.enforcement.untyped import text_columns
from loaders.enforcement.violations import Faults, shown
from loaders.schema import AnyType, Array, ColSpec, Map, Object, Scalar, TensorSpec, Type, unsized
from loaders.spelling import counted

Specs = Sequence[ColSpec | TensorSpec]


class _Refused(Exception):
    def __init__(self, path: str, problem: str, expected: object = None, got: str | None = None) -> None:
        super().__init__(problem)
        self.path = path
        self.problem = problem
        self.expected = expected
        self.got = got


def lenient(specs: Specs, form: str, data: Any, faults: Faults, extras: list[Any]) -> Batch | None:
    """Returns the batch that MLflow gives the model. If MLflow refuses, adds the violation and returns
    None."""
    root = "data" if form == "python" else form
    # MLflow's casts lose digits; the operator accepted that with this mode. This is the state of the thread;
    # filters of warnings are those of the process, so they stay as they are.
    with np.errstate(all="ignore"):
        try:
            parsed = _parsed(specs, form, data, root)
            if isinstance(specs[0], TensorSpec):
                return _tensors(
                    [spec for spec in specs if isinstance(spec, TensorSpec)], parsed, root, extras
                )
            return _columns([spec for spec in specs if isinstance(spec, ColSpec)], parsed, root, extras)
        except _Refused as refused:
            faults.add(refused.path, refused.problem, refused.expected, refused.got)
        except Exception:  # noqa: BLE001 - every error of pandas or numpy in a cast is a refusal by MLflow
            faults.add(root, v.WRONG_TYPE)
    return None


# --- the scoring server's casts


def _parsed(specs: Specs, form: str, data: Any, root: str) -> Any:
    import pandas as pd

    if form == "python":
        return data
    if form == "arrow":
        return data.to_pandas()
    if form == "csv":
        return _read_csv(specs, data, root)
    if form == "dataframe_split":
        if not isinstance(data, dict) or "data" not in data or data.keys() - {"columns", "index", "data"}:
            raise _Refused(root, v.WRONG_TYPE, "object with data, columns and index", kind_of(data))
        frame = pd.DataFrame(data["data"], index=data.get("index"), columns=data.get("columns"))
        return _cast_frame(specs, frame, root)
    if form == "dataframe_records":
        if not isinstance(data, list):
            raise _Refused(root, v.WRONG_TYPE, "array", kind_of(data))
        if is_sparse(data):
            raise _Refused(root, v.RAGGED_RECORDS, "records with the same names")
        return _cast_frame(specs, pd.DataFrame(data), root)
    if form == "instances" and isinstance(data, list) and data and isinstance(data[0], dict):
        return _stacked(specs, data, root)
    cast = _cast_inputs(specs, deepcopy(data), root)
    if form == "instances" and isinstance(cast, dict):
        _check_lengths(specs, cast, root)
    return cast


def _read_csv(specs: Specs, data: CsvTable, root: str) -> Any:
    import pandas as pd

    if not all(isinstance(spec, ColSpec) and isinstance(spec.type, Scalar) for spec in specs):
        raise _Refused(root, v.WRONG_FORM, "JSON", "csv")
    if any(isinstance(spec, ColSpec) and spec.type is Scalar.datetime for spec in specs):
        raise _Refused(root, v.WRONG_FORM, "JSON", "csv")
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(data.columns)
    writer.writerows(zip(*data.cells, strict=True))
    text.seek(0)
    dtypes: dict[Any, Any] = {
        (i if spec.name is None else spec.name): _pandas_dtype(spec.type)
        for i, spec in enumerate(specs)
        if isinstance(spec, ColSpec) and isinstance(spec.type, Scalar)
    }
    return pd.read_csv(text, dtype=dtypes)


def _pandas_dtype(kind: Scalar) -> Any:
    return kind.dtype


def _numpy_dtype(kind: Scalar) -> Any:
    return {Scalar.string: np.dtype(str), Scalar.binary: np.dtype(bytes)}.get(kind, kind.dtype)


def _cast_frame(specs: Specs, frame: Any, root: str) -> Any:
    pairs: list[tuple[Any, ColSpec | TensorSpec]] = [(spec.name, spec) for spec in specs]
    if specs[0].name is None:
        # One unnamed tensor holds all columns.
        of_each = [specs[0]] * len(frame.columns) if isinstance(specs[0], TensorSpec) else [*specs]
        pairs = list(zip(frame.columns, of_each, strict=False))
    for name, spec in pairs:
        if name not in frame:
            continue
        path = f"{root}.{shown(name)}"
        try:
            _cast_cells(frame, name, spec, path)
        except _Refused:
            raise
        except Exception:  # noqa: BLE001 - every error of pandas or numpy in a cast is a refusal by MLflow
            raise _Refused(
                path, v.WRONG_TYPE, spec.dtype.name if isinstance(spec, TensorSpec) else spec.type
            ) from None
    return frame


def _cast_cells(frame: Any, name: Any, spec: ColSpec | TensorSpec, path: str) -> None:
    import pandas as pd

    column = frame[name]
    if isinstance(spec, TensorSpec):
        if spec.dtype.kind == "S":
            frame[name] = column.map(lambda text: bytes(text, "utf8"))
        elif not isinstance(column.iloc[0], list):
            wide = spec.dtype.kind == "U" and is_wide(column.tolist())
            frame[name] = column.map(str) if wide else column.astype(spec.dtype)
    elif isinstance(spec.type, AnyType):
        return
    elif not isinstance(spec.type, Scalar):
        kind, required = spec.type, spec.required
        cells = [_nested(cell, kind, required, path) for cell in column]
        frame[name] = pd.Series(objects(cells), index=frame.index, dtype=object)
    elif spec.type is Scalar.binary:
        frame[name] = column.map(lambda text: base64.decodebytes(bytes(text, "utf8")))
    elif spec.type is Scalar.datetime:
        parsed = pd.to_datetime(column)
        frame[name] = parsed.dt.as_unit("ns") if parsed.dtype.kind == "M" else parsed
    elif spec.type is Scalar.string and isinstance(column.dtype, pd.StringDtype):
        return
    else:
        frame[name] = column.astype(_pandas_dtype(spec.type))


def _cast_value(data: Any, spec: ColSpec | TensorSpec | None, path: str) -> Any:
    if spec is None:
        return _unpadded(data)
    if isinstance(spec, TensorSpec):
        return _unpadded(data, spec.dtype)
    if isinstance(spec.type, Scalar):
        dtype = _numpy_dtype(spec.type)
        return _unpadded(data, dtype) if isinstance(data, list) else np.array([data], dtype)[0]
    if isinstance(spec.type, Array):
        return _unpadded(_nested(data, spec.type, spec.required, path))
    return _nested(data, spec.type, spec.required, path)


def _unpadded(data: Any, dtype: np.dtype[Any] | None = None) -> NDArray:
    """Returns numpy's array, as MLflow does; an object array if a text array would be mostly padding."""
    if dtype is None or dtype.kind in "US":
        flat = data if isinstance(data, list) else [data]
        while any(isinstance(part, list) for part in flat):
            flat = [item for part in flat for item in (part if isinstance(part, list) else [part])]
        if is_wide(flat) and (dtype is not None or any(isinstance(item, str) for item in flat)):
            return np.array(data, dtype=object)
    return np.array(data, dtype=dtype)


def _cast_inputs(specs: Specs, data: Any, root: str) -> Any:
    named = specs[0].name is not None
    by_name: dict[Any, ColSpec | TensorSpec] = {spec.name: spec for spec in specs} if named else {}
    if len(by_name) == 1 and isinstance(data, list) and not any(isinstance(item, dict) for item in data):
        data = {specs[0].name: data}
    elif not named and isinstance(data, dict | type(None)):
        raise _Refused(root, v.WRONG_TYPE, "array", kind_of(data))
    if isinstance(data, dict):
        return {
            name: _cast_value(item, by_name.get(name), f"{root}.{shown(name)}") for name, item in data.items()
        }
    if isinstance(data, list) and all(isinstance(row, dict) for row in data):
        return [
            {name: _cast_value(item, by_name.get(name), root) for name, item in row.items()} for row in data
        ]
    return _cast_value(data, specs[0], root)


def _stacked(specs: Specs, rows: list[Any], root: str) -> dict[Any, Any]:
    by_name: dict[Any, ColSpec | TensorSpec] = {spec.name: spec for spec in specs if spec.name is not None}
    parts: dict[Any, list[Any]] = {}
    for row in rows:
        for name, item in row.items():
            parts.setdefault(name, []).append(_cast_value(item, by_name.get(name), root))
    result = {name: _stack(items) for name, items in parts.items()}
    _check_lengths(specs, result, root)
    return result


def _stack(items: list[Any]) -> NDArray:
    texts = [
        text for item in items if np.asarray(item).dtype.kind in "US" for text in np.ravel(item).tolist()
    ]
    if not is_wide(texts):
        return np.array(items)
    return np.array([item.tolist() if isinstance(item, np.ndarray) else item for item in items], dtype=object)


def _check_lengths(specs: Specs, data: Mapping[Any, Any], root: str) -> None:
    names = {
        spec.name
        for spec in specs
        if isinstance(spec, TensorSpec) or (spec.required and not isinstance(spec.type, Array))
    }
    if specs[0].name is None:
        names = set(data)
    parts = [item for name, item in data.items() if name in names and isinstance(item, list | np.ndarray)]
    if len({len(part) for part in parts}) > 1:
        raise _Refused(root, v.RAGGED, "columns of one length")


# --- enforcement of columns


def _columns(specs: Sequence[ColSpec], data: Any, root: str, extras: list[Any]) -> Columns:
    import pandas as pd

    frame = _to_frame(specs, data, root)
    arrays: dict[str | int, NDArray] = {}
    if specs[0].name is None:
        names = list(frame.columns)
        if len(names) < len(specs):
            raise _Refused(root, v.WRONG_LENGTH, counted(len(specs), "column"), counted(len(names), "column"))
        pairs = list(zip(names, specs, strict=False))
        extras += names[len(specs) :]
    else:
        pairs = []
        for spec in specs:
            if spec.name in frame:
                pairs.append((spec.name, spec))
            elif spec.required:
                raise _Refused(f"{root}.{shown(spec.name)}", v.MISSING, spec.type)
        wanted = {spec.name for spec in specs}
        extras += [name for name in frame.columns if name not in wanted]
    for name, spec in pairs:
        path = f"{root}.{shown(name)}"
        column = frame[name]
        if isinstance(spec.type, Scalar):
            cast = _column(column, spec.type, path)
        elif isinstance(spec.type, AnyType):
            cast = column
        else:
            cells = [_nested(cell, spec.type, spec.required, path) for cell in column]
            cast = pd.Series(objects(cells), index=frame.index, dtype=object)
        label = int(name) if isinstance(name, np.integer) else name
        arrays[label] = _array(cast)
    return Columns(arrays, len(frame), frame_index(frame), text_columns(arrays, arrays))


def _array(column: Any) -> NDArray:
    array = series_array(column)
    if array.dtype.kind in "US":
        return objects(array.tolist())
    if array.dtype.kind == "M":
        return array.astype("datetime64[ns]")
    if array.dtype.kind != "O":
        return array
    cells = [cell.tolist() if isinstance(cell, np.ndarray) else cell for cell in array]
    return objects([None if is_null(cell) else cell for cell in cells])


def _to_frame(specs: Sequence[ColSpec], data: Any, root: str) -> Any:
    import pandas as pd

    if isinstance(data, pd.DataFrame):
        return data
    if isinstance(data, pd.Series):
        return pd.DataFrame(data)
    if np.isscalar(data):
        return pd.DataFrame([data])
    if isinstance(data, dict):
        one_record = any(isinstance(spec.type, Array | Object) for spec in specs) or all(
            np.isscalar(item)
            or item is None
            or (isinstance(item, list) and all(isinstance(text, str) for text in item))
            for item in data.values()
        )
        texts = all(
            isinstance(item, np.ndarray) and item.dtype.kind == "U" and item.shape == ()
            for item in data.values()
        )
        if one_record or texts:
            return pd.DataFrame([data])
        return pd.DataFrame(
            {
                name: item.tolist() if isinstance(item, np.ndarray) and item.ndim > 1 else item
                for name, item in data.items()
            }
        )
    if isinstance(data, list | np.ndarray):
        return pd.DataFrame(data)
    raise _Refused(root, v.WRONG_TYPE, "columns", kind_of(data))


def _column(column: Any, kind: Scalar, path: str) -> Any:
    """Casts one column of a frame by MLflow's rules for dtypes."""
    import pandas as pd

    if column.dtype == object and kind not in (Scalar.binary, Scalar.string):
        column = column.infer_objects()
    source, target = column.dtype, kind.dtype
    plain = isinstance(source, np.dtype) and source.kind == "O"
    text = isinstance(source, pd.StringDtype)
    if kind in (Scalar.string, Scalar.binary):
        if plain or text or source.kind == ("U" if kind is Scalar.string else "S"):
            return column
        raise _Refused(path, v.WRONG_TYPE, kind, str(source))
    if source == target:
        return column
    if kind is Scalar.datetime:
        if getattr(source, "tz", None) is None and (source.kind == "M" or plain):
            return column.astype(target)
        raise _Refused(path, v.WRONG_TYPE, kind, str(source))
    if plain:
        if kind is Scalar.boolean:
            return column
        if kind is Scalar.double:
            # MLflow means this for decimals, and does it for any mixture.
            return pd.to_numeric(column)
    if source.kind == target.kind and source.kind in "iuf":
        widens = source.itemsize <= target.itemsize
    elif source.kind == "u" and target.kind == "i":
        widens = source.itemsize < target.itemsize
    else:
        widens = source.kind in "iu" and kind is Scalar.double and source.itemsize <= 4
    flags = source == np.int64 and kind in (Scalar.float, Scalar.double) and column.isin([0, 1]).all()
    if widens or flags:
        return column.astype(target)
    gaps = source == np.float64 and target.kind == "i" and column.hasnans
    raise _Refused(path, v.NULL_INTEGER if gaps else v.WRONG_TYPE, kind, str(source))


# --- nested values


def _nested(value: Any, kind: Type, required: bool, path: str) -> Any:
    import pandas as pd

    if isinstance(kind, AnyType):
        return value
    if isinstance(kind, Scalar):
        if not required and is_null(value):
            return None
        if not np.isscalar(value):
            raise _Refused(path, v.NULL if value is None else v.WRONG_TYPE, kind, kind_of(value))
        return _column(pd.Series([value]), kind, path)[0]
    if isinstance(kind, Array):
        if (not required or isinstance(kind.items, AnyType)) and (value is None or _is_empty(value)):
            return value
        if not isinstance(value, list | np.ndarray):
            raise _Refused(path, v.WRONG_TYPE, "array", kind_of(value))
        if not isinstance(kind.items, Scalar):
            return [_nested(item, kind.items, required, path) for item in value]
        if not len(value):
            return value
        column, dtype = _column(pd.Series(value), kind.items, path), _numpy_dtype(kind.items)
        if dtype.kind in "US" and is_wide(cells := column.tolist()):
            return cells
        return column.to_numpy(dtype=dtype).tolist()
    anything = isinstance(kind, Map) and isinstance(kind.values, AnyType)
    if (not required or anything) and (value is None or value == {}):
        return value
    if not isinstance(value, dict):
        raise _Refused(path, v.WRONG_TYPE, "object", kind_of(value))
    if isinstance(kind, Map):
        if not all(isinstance(name, str) for name in value):
            raise _Refused(path, v.WRONG_TYPE, "text keys")
        return {name: _nested(item, kind.values, required, path) for name, item in value.items()}
    fields = {field.name: field for field in kind.properties}
    for name, field in fields.items():
        if field.required and name not in value:
            raise _Refused(f"{path}.{shown(name)}", v.MISSING, field.type)
    for name in value:
        if name not in fields:
            raise _Refused(f"{path}.{shown(name)}", v.UNKNOWN)
    return {
        name: _nested(item, fields[name].type, fields[name].required, f"{path}.{shown(name)}")
        for name, item in value.items()
    }


def _is_empty(value: Any) -> bool:
    return isinstance(value, list | np.ndarray) and len(value) == 0


# --- enforcement of tensors


def _tensors(specs: Sequence[TensorSpec], data: Any, root: str, extras: list[Any]) -> Tensors:
    import pandas as pd

    if isinstance(data, pd.Series):
        data = pd.DataFrame(data)
    if hasattr(data, "toarray"):
        data = data.toarray()
    arrays: dict[str, NDArray] = {}
    if specs[0].name is None:
        if isinstance(data, pd.DataFrame):
            data = _unnamed(specs[0], data, root)
        elif not isinstance(data, np.ndarray):
            raise _Refused(root, v.WRONG_TYPE, "array", kind_of(data))
        arrays[""] = _tensor(data, specs[0], root)
    else:
        if isinstance(data, np.ndarray) and len(specs) == 1:
            data = {specs[0].name: data}
        if not isinstance(data, dict | pd.DataFrame):
            raise _Refused(root, v.WRONG_TYPE, "object", kind_of(data))
        for spec in specs:
            name, path = str(spec.name), f"{root}.{shown(spec.name)}"
            if name not in data:
                raise _Refused(path, v.MISSING, spec)
            item = data[name]
            if isinstance(data, pd.DataFrame):
                item = _from_column(spec, item, path)
            elif not isinstance(item, np.ndarray):
                raise _Refused(path, v.WRONG_TYPE, "array", kind_of(item))
            arrays[name] = _tensor(item, spec, path)
        extras += [name for name in data if name not in arrays]
    free = all(spec.shape[:1] == (-1,) for spec in specs)
    lengths = {len(array) for array in arrays.values()} if free else set()
    return Tensors(arrays, lengths.pop() if len(lengths) == 1 else None)


def _unnamed(spec: TensorSpec, frame: Any, root: str) -> NDArray:
    if frame.empty:
        raise _Refused(root, v.WRONG_SHAPE, f"shape {list(spec.shape)}", "no rows")
    if len(frame.columns) == 1:
        return _from_column(spec, frame[frame.columns[0]], root)
    if spec.shape != (-1, len(frame.columns)):
        raise _Refused(
            root, v.WRONG_SHAPE, f"shape {list(spec.shape)}", counted(len(frame.columns), "column")
        )
    return np.asarray(frame.to_numpy())


def _from_column(spec: TensorSpec, column: Any, path: str) -> NDArray:
    if spec.shape[:1] != (-1,) or -1 in spec.shape[1:]:
        raise _Refused(path, v.WRONG_FORM, f"shape {list(spec.shape)}", "a column")
    first = column[0]  # by label: MLflow refuses a frame whose index has no 0
    if np.isscalar(first):
        if spec.shape not in ((-1,), (-1, 1)):
            raise _Refused(path, v.WRONG_SHAPE, f"shape {list(spec.shape)}", f"shape {[len(column)]}")
        padded = spec.dtype.kind in "US" and is_wide(column.tolist())
        return np.array(column, dtype=object if padded else spec.dtype).reshape(spec.shape)
    if isinstance(first, list) and not np.isscalar(first[0]):
        raise _Refused(path, v.WRONG_TYPE, "scalars or flat lists", "array")
    if isinstance(first, list) and is_wide([item for row in column for item in row]):
        return np.vstack([np.array(row, dtype=object) for row in column]).reshape(spec.shape)
    rows = np.vstack(column.tolist()).reshape(spec.shape)
    if len(rows) != len(column):
        raise _Refused(path, v.WRONG_SHAPE, f"shape {list(spec.shape)}")
    return rows.astype(spec.dtype) if isinstance(first, list) else rows


def _tensor(data: NDArray, spec: TensorSpec, path: str) -> NDArray:
    if spec.shape == (-1,) and spec.dtype.kind == "O":
        return data
    if len(spec.shape) > 1 and -1 in spec.shape[1:] and data.ndim == 1 and data.dtype.kind == "O":
        return data
    if len(data.shape) != len(spec.shape) or any(
        wanted not in (-1, found) for wanted, found in zip(spec.shape, data.shape, strict=True)
    ):
        raise _Refused(path, v.WRONG_SHAPE, f"shape {list(spec.shape)}", f"shape {list(data.shape)}")
    padded = spec.dtype.kind in "US" and data.dtype.kind == "O" and is_wide(data.ravel().tolist())
    if unsized(data.dtype) != spec.dtype and not padded:
        raise _Refused(path, v.WRONG_TYPE, spec.dtype.name, data.dtype.name)
    return data
