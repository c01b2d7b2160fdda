"""A model's signature: what it takes, what it answers, its parameters. Read, written, inferred, compared.

The form is MLflow's (the `signature` of an `MLmodel`: three JSON strings or nulls). `infer_signature`
gives what `mlflow.models.infer_signature` gives, and also takes what that refuses without need: integers
and booleans with gaps in object columns, decimals, scalars as outputs. This module never checks data
against a signature: that is `enforce`.
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loaders.compat.pythons import zipped
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
    param_from_json,
    param_to_json,
    schema_from_json,
    schema_to_json,
    unsized,
)

__all__ = [
    "AnyType",
    "Array",
    "ColSpec",
    "Map",
    "Object",
    "ParamSpec",
    "Property",
    "Scalar",
    "Schema",
    "Signature",
    "SignatureError",
    "TensorSpec",
    "Type",
    "compatible",
    "infer_signature",
]


@dataclass(frozen=True)
class Signature:
    """Inputs, outputs and parameters; None where nothing is said about them. Raises SignatureError.

    `plans` belongs to enforcement: what it worked out about this signature once, for every request after.
    """

    inputs: Schema | None = None
    outputs: Schema | None = None
    params: tuple[ParamSpec, ...] | None = None
    plans: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for place, schema in (("inputs", self.inputs), ("outputs", self.outputs)):
            if schema is not None:
                kinds = {isinstance(spec, TensorSpec) for spec in schema}
                check_schema(schema, place, mixed=len(kinds) > 1)
        if self.params is not None and len({p.name for p in self.params}) < len(self.params):
            raise SignatureError("params", "uses a name twice")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Signature:
        """The `signature` of an `MLmodel`: inputs, outputs and params, each a JSON string, its parsed
        value, or null. Raises SignatureError."""
        if not isinstance(data, Mapping):
            raise SignatureError("signature", "is not an object")
        inputs, outputs, params = (_parsed(data.get(key), key) for key in ("inputs", "outputs", "params"))
        if params is not None and not isinstance(params, list):
            raise SignatureError("params", "is not a list")
        return cls(
            None if inputs is None else schema_from_json(inputs, "inputs"),
            None if outputs is None else schema_from_json(outputs, "outputs"),
            None
            if params is None
            else tuple(param_from_json(item, f"params[{i}]") for i, item in enumerate(params)),
        )

    def to_json(self) -> dict[str, str | None]:
        """The same in MLflow's form; `mlflow.models.ModelSignature.from_dict` reads it."""
        params = None if self.params is None else [param_to_json(spec) for spec in self.params]
        return {
            "inputs": None if self.inputs is None else json.dumps(schema_to_json(self.inputs)),
            "outputs": None if self.outputs is None else json.dumps(schema_to_json(self.outputs)),
            "params": None if params is None else json.dumps(params),
        }

    def __str__(self) -> str:
        parts = (("inputs", self.inputs), ("outputs", self.outputs), ("params", self.params))
        lines = [f"{name}: {', '.join(map(str, specs))}" for name, specs in parts if specs]
        return "\n".join(lines) or "nothing declared"


def _parsed(value: object, place: str) -> Any:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise SignatureError(place, "is not JSON") from None


# --- inference


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
        return ColSpec(_dtype_type(column.dtype, where), name, required)
    values = column.tolist()
    if not values:
        return ColSpec(Scalar.string, name, required)
    return ColSpec(_merged((_infer_type(value, where) for value in values), where), name, required)


def _tensor_spec(data: Any, name: str | None, place: str) -> TensorSpec:
    dtype = unsized(data.dtype)
    if dtype.kind not in "biufcUSMO":
        raise SignatureError(place, f"has the dtype {dtype}, which no tensor can have")
    return TensorSpec(dtype, (-1, *data.shape[1:]) if data.ndim else (), name)


def _dtype_type(dtype: Any, place: str) -> Scalar:
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
            kind = _dtype_type(value.dtype, place)
            for _ in range(value.ndim):
                kind = Array(kind)
            return kind
        value = list(value)
    if isinstance(value, (list, tuple)):
        return Array(_merged((_infer_type(item, place) for item in value), place))
    return _scalar_type(value, place)


def _scalar_type(value: Any, place: str) -> Scalar:
    if isinstance(value, (np.generic, np.ndarray)):
        return _dtype_type(value.dtype, place)
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
            item_type: Type = _dtype_type(value.dtype, place)
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


# --- comparison

# What every value of the first type can become without loss or surprise.
_WIDENINGS = {
    (Scalar.integer, Scalar.long),
    (Scalar.integer, Scalar.float),
    (Scalar.integer, Scalar.double),
    (Scalar.long, Scalar.float),
    (Scalar.long, Scalar.double),
    (Scalar.float, Scalar.double),
}


def compatible(old: Signature | None, new: Signature | None) -> list[str]:
    """Why callers of `old` could not go on with `new`: input that `old` accepts and `new` would not, or
    outputs that are gone or changed. Empty: they can."""
    if old is None:
        return []
    if new is None:
        return ["the new version has no signature"]
    reasons: list[str] = []
    if old.inputs is not None:
        if new.inputs is None:
            reasons.append("the new version has no signature for its inputs")
        else:
            reasons += _compare_schemas(old.inputs, new.inputs, "input")
    if old.outputs is not None:
        if new.outputs is None:
            reasons.append("the new version has no signature for its outputs")
        else:
            reasons += _compare_schemas(old.outputs, new.outputs, "output")
    return reasons + _compare_params(old.params or (), new.params or ())


def _one_value_a_row(schema: Schema) -> Schema:
    """An output of one value a row is the same in an answer whether it is declared as a column or as a
    tensor of one axis: MLflow declares it one way, earlier versions of this product the other."""
    spec = schema[0]
    if len(schema) > 1 or not isinstance(spec, TensorSpec) or spec.name is not None or spec.shape != (-1,):
        return schema
    if spec.dtype.kind == "O":
        return (ColSpec(Scalar.string),)
    try:
        return (ColSpec(_dtype_type(spec.dtype, "outputs")),)
    except SignatureError:
        return schema


def _compare_schemas(old: Schema, new: Schema, what: str) -> list[str]:
    if what == "output" and isinstance(old[0], TensorSpec) != isinstance(new[0], TensorSpec):
        old, new = _one_value_a_row(old), _one_value_a_row(new)
    if isinstance(old[0], TensorSpec) != isinstance(new[0], TensorSpec):
        kinds = [("tensors" if isinstance(schema[0], TensorSpec) else "columns") for schema in (old, new)]
        return [f"{what}s were {kinds[0]} and are {kinds[1]} now"]
    if (old[0].name is None) != (new[0].name is None):
        states = [("unnamed" if schema[0].name is None else "named") for schema in (old, new)]
        return [f"{what}s were {states[0]} and are {states[1]} now"]
    reasons: list[str] = []
    before, after = _by_name(old), _by_name(new)
    for name, spec in after.items():
        label = f"{what} {name}" if spec.name is not None or len(new) > 1 else f"the {what}"
        if name not in before:
            if what == "input" and (isinstance(spec, TensorSpec) or spec.required):
                reasons.append(f"{label} is required now")
        elif isinstance(spec, TensorSpec):
            reasons += _compare_tensors(before[name], spec, label, what)
        else:
            reasons += _compare_columns(before[name], spec, label, what)
    if what == "output":
        reasons += [f"output {name} is gone" for name in before if name not in after]
    return reasons


def _by_name(schema: Schema) -> dict[str | int, Any]:
    specs: Sequence[ColSpec | TensorSpec] = schema
    return {i if spec.name is None else spec.name: spec for i, spec in enumerate(specs)}


def _compare_columns(old: ColSpec, new: ColSpec, label: str, what: str) -> list[str]:
    reasons = [f"{where} {problem}" for where, problem in _compare_types(old.type, new.type, label, what)]
    if what == "input" and new.required and not old.required:
        reasons.append(f"{label} was optional and is required now")
    if what == "output" and old.required and not new.required:
        reasons.append(f"{label} was always there and is optional now")
    return reasons


def _compare_types(old: Type, new: Type, place: str, what: str) -> list[tuple[str, str]]:
    """What an input of type `old` may not become; an output's type must stay."""
    if old == new:
        return []
    if what == "input" and (isinstance(new, AnyType) or (old, new) in _WIDENINGS):
        return []
    if isinstance(old, Array) and isinstance(new, Array):
        return _compare_types(old.items, new.items, f"the items of {place}", what)
    if isinstance(old, Map) and isinstance(new, Map):
        return _compare_types(old.values, new.values, f"the values of {place}", what)
    if isinstance(old, Object) and isinstance(new, Object):
        return _compare_objects(old, new, place, what)
    if what == "input" and isinstance(old, Object) and isinstance(new, Map):
        return [
            r for p in old.properties for r in _compare_types(p.type, new.values, f"{place}.{p.name}", what)
        ]
    return [(place, f"was {old} and is {new} now")]


def _compare_objects(old: Object, new: Object, place: str, what: str) -> list[tuple[str, str]]:
    reasons: list[tuple[str, str]] = []
    before = {p.name: p for p in old.properties}
    after = {p.name: p for p in new.properties}
    for name in sorted(before.keys() | after.keys()):
        where = f"{place}.{name}"
        if name not in after:
            # Objects are closed: a field that is not declared any more is refused.
            reasons.append((where, "is gone"))
        elif name not in before:
            if what == "input" and after[name].required:
                reasons.append((where, "is required now"))
        else:
            reasons += _compare_types(before[name].type, after[name].type, where, what)
            if what == "input" and after[name].required and not before[name].required:
                reasons.append((where, "was optional and is required now"))
            if what == "output" and before[name].required and not after[name].required:
                reasons.append((where, "was always there and is optional now"))
    return reasons


def _compare_tensors(old: TensorSpec, new: TensorSpec, label: str, what: str) -> list[str]:
    reasons = []
    same = old.dtype == new.dtype
    wider = (
        what == "input"
        and old.dtype.kind in "iuf"
        and new.dtype.kind in "iuf"
        and np.can_cast(old.dtype, new.dtype, "safe")
    )
    if not (same or wider):
        reasons.append(f"{label} was {old.dtype.name} and is {new.dtype.name} now")
    fits = len(old.shape) == len(new.shape) and all(
        n in (-1, o) if what == "input" else n == o for o, n in zipped(old.shape, new.shape)
    )
    if not fits:
        reasons.append(f"{label} had the shape {list(old.shape)} and has {list(new.shape)} now")
    return reasons


def _compare_params(old: Sequence[ParamSpec], new: Sequence[ParamSpec]) -> list[str]:
    reasons = []
    after = {spec.name: spec for spec in new}
    for spec in old:
        now = after.get(spec.name)
        if now is None:
            reasons.append(f"param {spec.name} is gone")
            continue
        reasons += [
            f"{where} {problem}"
            for where, problem in _compare_types(spec.type, now.type, f"param {spec.name}", "input")
        ]
        if spec.shape != now.shape:
            shapes = ["a list" if s.shape else "a single value" for s in (spec, now)]
            reasons.append(f"param {spec.name} was {shapes[0]} and is {shapes[1]} now")
    return reasons
