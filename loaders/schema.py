"""The parts of a signature: scalars, nested types, columns, tensors, parameters; and their JSON.

The JSON form is MLflow's (`mlflow.types.schema`, MLflow 1 to 3), so that each side reads what the other
writes. Knows names, types and shapes; must not know data, packages or files.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loaders.compat.pythons import dataclass

if TYPE_CHECKING:
    from typing import TypeAlias

_MAX_DEPTH: Final = 32
_MAX_RANK: Final = 64  # numpy's own limit
_MAX_LENGTH: Final = 2**63 - 1


class SignatureError(ValueError):
    """A signature is not valid. `place` says where (`inputs[2].type`), `problem` what is wrong."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(f"{place}: {problem}")
        self.place = place
        self.problem = problem


class Scalar(str, Enum):
    """MLflow's scalar types. `dtype` is the numpy dtype of a column of it."""

    boolean = "boolean"
    integer = "integer"
    long = "long"
    float = "float"
    double = "double"
    string = "string"
    binary = "binary"
    datetime = "datetime"

    def __str__(self) -> str:
        return self.value

    @property
    def dtype(self) -> np.dtype[Any]:
        return DTYPES[self]


DTYPES: Final[Mapping[Scalar, np.dtype[Any]]] = {
    Scalar.boolean: np.dtype(np.bool_),
    Scalar.integer: np.dtype(np.int32),
    Scalar.long: np.dtype(np.int64),
    Scalar.float: np.dtype(np.float32),
    Scalar.double: np.dtype(np.float64),
    Scalar.string: np.dtype(object),
    Scalar.binary: np.dtype(object),
    Scalar.datetime: np.dtype("datetime64[ns]"),
}


@dataclass(frozen=True, slots=True)
class Array:
    """A list of items of one type. Spark's ML vector is read as an array of doubles."""

    items: Type

    def __str__(self) -> str:
        return f"array<{self.items}>"


@dataclass(frozen=True, slots=True)
class Property:
    """One field of an object."""

    name: str
    type: Type
    required: bool = True


@dataclass(frozen=True, slots=True)
class Object:
    """A closed set of named fields, sorted by name."""

    properties: tuple[Property, ...]

    def __post_init__(self) -> None:
        if not self.properties:
            raise SignatureError("properties", "an object needs at least one")
        ordered = tuple(sorted(self.properties, key=lambda p: p.name))
        if len({p.name for p in ordered}) < len(ordered):
            raise SignatureError("properties", "a name is used twice")
        object.__setattr__(self, "properties", ordered)

    def __str__(self) -> str:
        fields = ", ".join(f"{p.name}: {p.type}{'' if p.required else '?'}" for p in self.properties)
        return f"object<{fields}>"


@dataclass(frozen=True, slots=True)
class Map:
    """Text keys, values of one type."""

    values: Type

    def __str__(self) -> str:
        return f"map<{self.values}>"


@dataclass(frozen=True, slots=True)
class AnyType:
    """Any value, also null: nothing is checked."""

    def __str__(self) -> str:
        return "any"


Type: TypeAlias = "Scalar | Array | Object | Map | AnyType"


@dataclass(frozen=True, slots=True)
class ColSpec:
    """A column. Its name is text, an integer (a frame without column names has 0, 1, …) or None.

    `type` may be given as a scalar's name. A column that is not `required` may be absent or hold null.
    """

    type: Type
    name: str | int | None = None
    required: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "type", _named(self.type))

    def __str__(self) -> str:
        name = "" if self.name is None else f"{self.name}: "
        return f"{name}{self.type}{'' if self.required else ' (optional)'}"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor. -1 in `shape` means any length; dtypes of text and bytes have no size."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    name: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", unsized(np.dtype(self.dtype)))
        object.__setattr__(self, "shape", tuple(self.shape))

    def __str__(self) -> str:
        name = "" if self.name is None else f"{self.name}: "
        return f"{name}tensor<{self.dtype.name}>{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """A parameter with its default. `shape` is None for a single value, (-1,) for a list.

    The default of a datetime is a `date` or a naive `datetime`; None is a valid default.
    """

    name: str
    type: Scalar | Object
    default: Any = None
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "type", _named(self.type))
        if self.shape is not None:
            object.__setattr__(self, "shape", tuple(self.shape))
        if self.type is Scalar.binary:
            raise SignatureError(f"params.{self.name}", "a parameter cannot be binary")
        if self.shape not in (None, (-1,)) or (self.shape is not None and isinstance(self.type, Object)):
            raise SignatureError(f"params.{self.name}", "the shape of a parameter is null or [-1]")

    def __str__(self) -> str:
        return f"{self.name}: {self.type}{'' if self.shape is None else '[]'} = {self.default!r}"


Schema: TypeAlias = "tuple[ColSpec, ...] | tuple[TensorSpec, ...]"


def unsized(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype without the length that text and bytes have in numpy."""
    return np.dtype(dtype.kind) if dtype.kind in "US" else dtype


def type_to_json(kind: Type) -> dict[str, Any]:
    """MLflow's JSON of a type."""
    if isinstance(kind, Scalar):
        return {"type": kind.value}
    if isinstance(kind, Array):
        return {"type": "array", "items": type_to_json(kind.items)}
    if isinstance(kind, Map):
        return {"type": "map", "values": type_to_json(kind.values)}
    if isinstance(kind, Object):
        properties = {p.name: {**type_to_json(p.type), "required": p.required} for p in kind.properties}
        return {"type": "object", "properties": properties}
    return {"type": "any"}


def type_from_json(data: object, place: str, depth: int = 0) -> Type:
    """The type in MLflow's JSON. Raises SignatureError."""
    if not isinstance(data, dict):
        raise SignatureError(place, "is not an object with a type")
    if depth > _MAX_DEPTH:
        raise SignatureError(place, f"is nested deeper than {_MAX_DEPTH} levels")
    name = data.get("type")
    if name == "array":
        return Array(type_from_json(data.get("items"), f"{place}.items", depth + 1))
    if name == "map":
        return Map(type_from_json(data.get("values"), f"{place}.values", depth + 1))
    if name == "any":
        return AnyType()
    if name == "sparkml_vector":
        return Array(Scalar.double)
    if name == "object":
        fields = data.get("properties")
        if not isinstance(fields, dict) or not fields:
            raise SignatureError(f"{place}.properties", "an object needs at least one")
        return Object(
            tuple(
                Property(
                    field,
                    type_from_json(spec, f"{place}.{field}", depth + 1),
                    _required(spec, f"{place}.{field}"),
                )
                for field, spec in fields.items()
            )
        )
    return _scalar(name, f"{place}.type")


def schema_to_json(schema: Schema) -> list[dict[str, Any]]:
    """MLflow's JSON of inputs or outputs."""
    items: list[dict[str, Any]] = []
    for spec in schema:
        named = {} if spec.name is None else {"name": spec.name}
        if isinstance(spec, TensorSpec):
            tensor = {"dtype": spec.dtype.name, "shape": list(spec.shape)}
            items.append({**named, "type": "tensor", "tensor-spec": tensor})
        else:
            items.append({**type_to_json(spec.type), **named, "required": spec.required})
    return items


def schema_from_json(data: object, place: str) -> Schema:
    """Inputs or outputs from MLflow's JSON. Raises SignatureError."""
    if not isinstance(data, list) or not data:
        raise SignatureError(place, "is not a list of columns or tensors")
    columns: list[ColSpec] = []
    tensors: list[TensorSpec] = []
    for i, item in enumerate(data):
        where = f"{place}[{i}]"
        if isinstance(item, dict) and item.get("type") == "tensor":
            tensors.append(_tensor(item, where))
        else:
            columns.append(_column(item, where))
    return check_schema(tuple(columns) or tuple(tensors), place, mixed=bool(columns and tensors))


def check_schema(schema: Schema, place: str, mixed: bool = False) -> Schema:
    """Returns the schema if it follows MLflow's rules: columns or tensors; all named, or one unnamed tensor,
    or only unnamed columns; unique names; optional only if named. Raises SignatureError."""
    if mixed:
        raise SignatureError(place, "mixes columns and tensors")
    if not schema:
        raise SignatureError(place, "is empty")
    names = [spec.name for spec in schema if spec.name is not None]
    if names and len(names) < len(schema):
        raise SignatureError(place, "mixes named and unnamed items")
    if len(set(names)) < len(names):
        raise SignatureError(place, "uses a name twice")
    if not names and len(schema) > 1 and isinstance(schema[0], TensorSpec):
        raise SignatureError(place, "has several unnamed tensors")
    if not names and any(isinstance(spec, ColSpec) and not spec.required for spec in schema):
        raise SignatureError(place, "has an optional column without a name")
    return schema


def param_to_json(spec: ParamSpec) -> dict[str, Any]:
    """MLflow's JSON of a parameter."""
    default = spec.default
    if spec.type is Scalar.datetime and default is not None:
        default = default.isoformat() if spec.shape is None else [v and v.isoformat() for v in default]
    shape = None if spec.shape is None else list(spec.shape)
    return {"name": spec.name, "default": default, "shape": shape, **type_to_json(spec.type)}


def param_from_json(data: object, place: str) -> ParamSpec:
    """A parameter from MLflow's JSON (old files have `dtype` in place of `type`). Raises SignatureError."""
    if not isinstance(data, dict) or "name" not in data or "default" not in data:
        raise SignatureError(place, "is not an object with name, type and default")
    name = data.get("type") or data.get("dtype")
    kind = type_from_json({**data, "type": name}, place)
    if not isinstance(kind, (Scalar, Object)):
        raise SignatureError(f"{place}.type", "a parameter is a scalar or an object")
    shape = data.get("shape")
    if not (shape is None or shape == [-1]):
        raise SignatureError(f"{place}.shape", "is neither null nor [-1]")
    default = data["default"]
    if kind is Scalar.datetime:
        default = _dates(default, f"{place}.default")
    elif kind in (Scalar.float, Scalar.double):
        default = [_as_float(v) for v in default] if isinstance(default, list) else _as_float(default)
    return ParamSpec(str(data["name"]), kind, default, None if shape is None else (-1,))


def _as_float(value: Any) -> Any:
    return float(value) if type(value) is int else value


def _dates(value: Any, place: str) -> Any:
    if isinstance(value, list):
        return [_dates(item, place) for item in value]
    if value is None or isinstance(value, datetime.date):
        return value
    try:
        if len(value) == 10:
            return datetime.date.fromisoformat(value)
        return datetime.datetime.fromisoformat(value.replace("Z", "+00:00"))
    except (TypeError, ValueError, AttributeError):
        raise SignatureError(place, "is not a date in ISO 8601") from None


def _named(kind: object) -> object:
    """A scalar from its name; any other type unchanged."""
    return _scalar(kind, "type") if type(kind) is str else kind


def _scalar(name: object, place: str) -> Scalar:
    try:
        return Scalar(name)
    except ValueError:
        known = ", ".join(kind.value for kind in Scalar)
        raise SignatureError(place, f"is not one of {known}, array, object, map, any, tensor") from None


def _required(data: Mapping[str, Any], place: str) -> bool:
    # Files from before optional columns have no `required`; some later files have null.
    required = data.get("required")
    if not isinstance(required, (bool, type(None))):
        raise SignatureError(f"{place}.required", "is neither true nor false")
    return True if required is None else required


def _column(item: object, place: str) -> ColSpec:
    kind = type_from_json(item, place)
    assert isinstance(item, dict)
    name = item.get("name")
    if isinstance(name, bool) or not isinstance(name, (str, int, type(None))):
        raise SignatureError(f"{place}.name", "is not text")
    return ColSpec(kind, name, _required(item, place))


def _tensor(item: dict[str, Any], place: str) -> TensorSpec:
    spec = item.get("tensor-spec")
    if not isinstance(spec, dict) or not isinstance(spec.get("dtype"), str):
        raise SignatureError(f"{place}.tensor-spec", "is not an object with dtype and shape")
    try:
        dtype = np.dtype(spec["dtype"])
    except (TypeError, ValueError, SyntaxError):
        raise SignatureError(f"{place}.tensor-spec.dtype", "is not a numpy dtype") from None
    if dtype.kind not in "biufcUSMO" or dtype.shape:
        raise SignatureError(f"{place}.tensor-spec.dtype", "is not a dtype that a tensor can have")
    shape = spec.get("shape")
    if not isinstance(shape, list) or any(type(n) is not int or not -1 <= n <= _MAX_LENGTH for n in shape):
        raise SignatureError(f"{place}.tensor-spec.shape", "is not a list of lengths")
    if len(shape) > _MAX_RANK:
        raise SignatureError(f"{place}.tensor-spec.shape", f"has more than {_MAX_RANK} dimensions")
    name = item.get("name")
    if not isinstance(name, (str, type(None))):
        raise SignatureError(f"{place}.name", "is not text")
    return TensorSpec(dtype, tuple(shape), name)
