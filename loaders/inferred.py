"""The signature that data shows: of frames, arrays, dicts and JSON values, as input, output or parameters.

Gives what `mlflow.models.infer_signature` gives, and also takes what that refuses without need: integers and
booleans with gaps in object columns, decimals, scalars as outputs. Never checks data against a signature:
that is `enforcement`.
"""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from loaders.schema import (
    AnyType,
    Array,
    ColSpec,
    Map,
    Object,
    ParamSpec,
    Property,
    Scalar,
    Schema,
    SignatureError,
    TensorSpec,
    Type,
    check_schema,
    unsized,
)
from loaders.signature import Signature


def infer_signature(
    input_example: Any, prediction: Any = None, params: Mapping[str, Any] | None = None
) -> Signature:
    """The signature that data shows: frames and series give columns, arrays, dicts of arrays and sparse
    matrices give tensors with a free first dimension, JSON values give columns (nested where they nest).

    A gap makes a column optional. Raises SignatureError for data that no signature can describe.
    """
    return Signature(
        None if input_example is None else _infer_schema(input_example, "inputs"),
        None if prediction is None else _infer_schema(prediction, "outputs"),
        None if not params else tuple(_infer_param(str(name), value) for name, value in params.items()),
    )


def _infer_schema(data: Any, place: str) -> Schema:
    if hasattr(data, "iloc") and hasattr(data, "columns"):
        columns = [(_label(name, place), data.iloc[:, i]) for i, name in enumerate(data.columns)]
        return check_schema(tuple(_series_spec(column, name, place) for name, column in columns), place)
    if hasattr(data, "iloc"):
        return (_series_spec(data, None if data.name is None else _label(data.name, place), place),)
    if isinstance(data, np.ndarray) or hasattr(data, "toarray"):
        return (_tensor_spec(data, None, place),)
    if isinstance(data, Mapping):
        if not all(isinstance(name, str) for name in data):
            raise SignatureError(place, "has names that are not text")
        if data and all(
            isinstance(value, np.ndarray) or hasattr(value, "toarray") for value in data.values()
        ):
            return tuple(_tensor_spec(value, name, place) for name, value in data.items())
        specs = ((name, _infer_type(value, f"{place}.{name}")) for name, value in data.items())
        return check_schema(
            tuple(ColSpec(kind, name, _whole(data[name])) for name, kind in specs),
            place,
        )
    if isinstance(data, (list, tuple)):
        if not data:
            return (ColSpec(Scalar.string),)  # as MLflow reads an empty list
        if all(isinstance(row, Mapping) for row in data):
            return _records_schema(data, place)
        return (ColSpec(_merged((_infer_type(item, place) for item in data), place)),)
    return (ColSpec(_infer_type(data, place)),)


def _label(name: Any, place: str) -> str | int:
    if isinstance(name, np.integer):
        return int(name)
    if isinstance(name, str) or (isinstance(name, int) and not isinstance(name, bool)):
        return name
    raise SignatureError(place, "has a column whose name is neither text nor an integer")


def _whole(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return not any(_missing(item) for item in items)


def _records_schema(rows: Sequence[Mapping[Any, Any]], place: str) -> Schema:
    columns: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items():
            if not isinstance(name, str):
                raise SignatureError(place, "has names that are not text")
            columns.setdefault(name, []).append(value)
    return check_schema(
        tuple(
            ColSpec(
                _merged((_infer_type(v, f"{place}.{name}") for v in values), f"{place}.{name}"),
                name,
                len(values) == len(rows) and not any(v is None for v in values),
            )
            for name, values in columns.items()
        ),
        place,
    )


def _series_spec(column: Any, name: str | int | None, place: str) -> ColSpec:
    where = place if name is None else f"{place}.{name}"
    if hasattr(column, "sparse"):
        column = column.sparse.to_dense()
    kind = getattr(column.dtype, "kind", "O")
    required = name is None or not bool(column.isna().any())
    if kind != "O":
        return ColSpec(type_of_dtype(column.dtype, where), name, required)
    values = column.tolist()
    if not values:
        return ColSpec(Scalar.string, name, required)
    return ColSpec(_merged((_infer_type(value, where) for value in values), where), name, required)


def _tensor_spec(data: Any, name: str | None, place: str) -> TensorSpec:
    dtype = unsized(data.dtype)
    if dtype.kind not in "biufcUSMO":
        raise SignatureError(place, f"has the dtype {dtype}, which no tensor can have")
    return TensorSpec(dtype, (-1, *data.shape[1:]) if data.ndim else (), name)


def type_of_dtype(dtype: Any, place: str) -> Scalar:
    """The type of a numpy or pandas dtype: the narrowest that holds all its values, as in MLflow."""
    kind, size = dtype.kind, dtype.itemsize
    if kind == "b":
        return Scalar.boolean
    if kind == "i" or (kind == "u" and size < 8):
        return Scalar.integer if size < 4 or (kind == "i" and size == 4) else Scalar.long
    if kind == "f" and size <= 8:
        return Scalar.float if size <= 4 else Scalar.double
    found = {"U": Scalar.string, "S": Scalar.binary, "M": Scalar.datetime}.get(kind)
    if found is None:
        raise SignatureError(place, f"has the dtype {dtype}, which no signature type covers")
    return found


def _missing(value: Any) -> bool:
    # pandas' NA and NaT are told by their class, so that pandas need not be imported.
    return value is None or (isinstance(value, float) and math.isnan(value)) or _is_pandas_null(value)


def _is_pandas_null(value: Any) -> bool:
    return type(value).__name__ in ("NAType", "NaTType")


def _infer_type(value: Any, place: str) -> Type:
    if _missing(value) or (isinstance(value, (list, tuple, Mapping)) and not value):
        return AnyType()
    if isinstance(value, Mapping):
        fields = []
        for name, item in value.items():
            if not isinstance(name, str):
                raise SignatureError(place, "has names that are not text")
            kind = _infer_type(item, f"{place}.{name}")
            fields.append(Property(name, kind, not isinstance(kind, AnyType)))
        return Object(tuple(fields))
    if isinstance(value, np.ndarray) and value.ndim:
        if value.dtype.kind != "O":
            kind = type_of_dtype(value.dtype, place)
            for _ in range(value.ndim):
                kind = Array(kind)
            return kind
        value = list(value)
    if isinstance(value, (list, tuple)):
        return Array(_merged((_infer_type(item, place) for item in value), place))
    return _scalar_type(value, place)


def _scalar_type(value: Any, place: str) -> Scalar:
    if isinstance(value, (np.generic, np.ndarray)):
        return type_of_dtype(value.dtype, place)
    if isinstance(value, bool):
        return Scalar.boolean
    if isinstance(value, int):
        return Scalar.long
    if isinstance(value, (float, decimal.Decimal)):
        return Scalar.double
    if isinstance(value, str):
        return Scalar.string
    if isinstance(value, (bytes, bytearray)):
        return Scalar.binary
    if isinstance(value, datetime.date):
        return Scalar.datetime
    raise SignatureError(place, f"holds a {type(value).__name__}, which no signature type covers")


def _merged(kinds: Iterable[Type], place: str) -> Type:
    """The one type of several values; a value of unknown type fits any."""
    result: Type | None = None
    for kind in kinds:
        result = kind if result is None else _merge(result, kind, place)
    return AnyType() if result is None else result


def _merge(a: Type, b: Type, place: str) -> Type:
    if a == b:
        return a
    if isinstance(a, AnyType) or isinstance(b, AnyType):
        known = b if isinstance(a, AnyType) else a
        if isinstance(known, Object):
            return Object(tuple(Property(p.name, p.type, required=False) for p in known.properties))
        return known
    if isinstance(a, Array) and isinstance(b, Array):
        return Array(_merge(a.items, b.items, place))
    if isinstance(a, Map) and isinstance(b, Map):
        return Map(_merge(a.values, b.values, place))
    if isinstance(a, Object) and isinstance(b, Object):
        left, right = ({p.name: p for p in kind.properties} for kind in (a, b))
        fields = []
        for name in left.keys() | right.keys():
            if name in left and name in right:
                kind = _merge(left[name].type, right[name].type, f"{place}.{name}")
                fields.append(Property(name, kind, left[name].required and right[name].required))
            else:
                fields.append(Property(name, (left.get(name) or right[name]).type, required=False))
        return Object(tuple(fields))
    raise SignatureError(place, "holds values of different types")


def _infer_param(name: str, value: Any) -> ParamSpec:
    place = f"params.{name}"
    if isinstance(value, Mapping):
        kind = _infer_type(value, place)
        if not isinstance(kind, Object):
            raise SignatureError(place, "is an empty object")
        return ParamSpec(name, kind, dict(value))
    if isinstance(value, (list, tuple, np.ndarray)):
        items = value.tolist() if isinstance(value, np.ndarray) else list(value)
        if isinstance(value, np.ndarray) and value.dtype.kind != "O":
            item_type: Type = type_of_dtype(value.dtype, place)
        elif all(type(item) in (int, float) for item in items) and items:
            item_type = Scalar.long if all(type(item) is int for item in items) else Scalar.double
        else:
            item_type = _merged((_infer_type(item, place) for item in items), place)
        if not isinstance(item_type, Scalar):
            raise SignatureError(place, "is not a list of scalars of one type")
        return ParamSpec(name, item_type, items, (-1,))
    if _missing(value) and not isinstance(value, float):
        raise SignatureError(place, "is null: its type cannot be told")
    kind = _scalar_type(value, place)
    return ParamSpec(name, kind, value.item() if isinstance(value, np.generic) else value)
