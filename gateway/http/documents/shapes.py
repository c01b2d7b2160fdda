"""A signature as JSON schemas: what each form of a body holds, what an answer holds, and made-up values.

Pure: knows the types of signatures and JSON Schema 2020-12, which OpenAPI 3.1 uses. The schemas describe what
strict enforcement takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from loaders.schema import Array, ColSpec, Map, Object, ParamSpec, Scalar, TensorSpec, Type
from loaders.signature import Signature

Schema = dict[str, Any]

_SCALARS: Final[Mapping[Scalar, Schema]] = {
    Scalar.boolean: {"type": "boolean"},
    Scalar.integer: {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1},
    Scalar.long: {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    Scalar.float: {"type": "number"},
    Scalar.double: {"type": "number"},
    Scalar.string: {"type": "string"},
    Scalar.binary: {"type": "string", "contentEncoding": "base64"},
    Scalar.datetime: {"type": "string", "description": "ISO 8601, such as 2024-01-31T12:00:00"},
}
_KINDS: Final = {"b": "boolean", "i": "integer", "u": "integer", "f": "number"}


def of_type(kind: Type, *, null: bool = False) -> Schema:
    """A value of a type. `null`: it may be null as well."""
    if isinstance(kind, Scalar):
        schema = dict(_SCALARS[kind])
    elif isinstance(kind, Array):
        schema = {"type": "array", "items": of_type(kind.items)}
    elif isinstance(kind, Map):
        schema = {"type": "object", "additionalProperties": of_type(kind.values)}
    elif isinstance(kind, Object):
        schema = {
            "type": "object",
            "properties": {one.name: of_type(one.type, null=not one.required) for one in kind.properties},
            "required": [one.name for one in kind.properties if one.required],
        }
    else:
        return {}
    if null:
        schema["type"] = [schema["type"], "null"]
    return schema


def of_tensor(spec: TensorSpec) -> Schema:
    """Nested arrays of the tensor's shape."""
    kind = _KINDS.get(spec.dtype.kind, "string")
    schema: Schema = {"type": kind}
    if spec.dtype.kind in "iu":
        limits = np.iinfo(spec.dtype)
        schema |= {"minimum": int(limits.min), "maximum": int(limits.max)}
    for length in reversed(spec.shape):
        schema = {"type": "array", "items": schema}
        if length != -1:
            schema |= {"minItems": length, "maxItems": length}
    return schema


def record(columns: Sequence[ColSpec]) -> Schema:
    """One row as an object."""
    return {
        "type": "object",
        "properties": {
            name(spec, i): of_type(spec.type, null=not spec.required) for i, spec in enumerate(columns)
        },
        "required": [name(spec, i) for i, spec in enumerate(columns) if spec.required],
    }


def name(spec: ColSpec, place: int) -> str:
    """Returns the name of a column; one without a name has its number."""
    return str(place if spec.name is None else spec.name)


def forms(signature: Signature | None) -> dict[str, Schema]:
    """What stands under each name that carries the input of a JSON body; without a signature, anything."""
    inputs = None if signature is None else signature.inputs
    rows: Schema = {"type": "array", "items": {"type": "array"}}
    if not inputs:
        split: Schema = {"type": "object", "properties": {"columns": {"type": "array"}, "data": rows}}
        split["required"] = ["data"]
        anything: Schema = {}
        records: Schema = {"type": "array", "items": {"type": "object"}}
        return {
            "dataframe_split": split,
            "dataframe_records": records,
            "instances": {"type": "array"},
            "inputs": anything,
        }
    if isinstance(inputs[0], TensorSpec):
        return _tensor_forms([spec for spec in inputs if isinstance(spec, TensorSpec)])
    columns = [spec for spec in inputs if isinstance(spec, ColSpec)]
    width = {"minItems": sum(spec.required for spec in columns)}
    split = {
        "type": "object",
        "properties": {
            "columns": {"type": "array", "items": {"type": ["string", "integer"]}},
            "index": {"type": "array"},
            "data": {"type": "array", "items": {"type": "array", **width}},
        },
        "required": ["columns", "data"],
    }
    if any(spec.name is None for spec in columns):
        only = of_type(columns[0].type) if len(columns) == 1 else {"type": "array"}
        return {
            "dataframe_split": {**split, "required": ["data"]},
            "instances": {"type": "array", "items": only},
            "inputs": {"type": "array", "items": only},
        }
    by_column = {
        name(spec, i): {"type": "array", "items": of_type(spec.type, null=not spec.required)}
        for i, spec in enumerate(columns)
    }
    required = [name(spec, i) for i, spec in enumerate(columns) if spec.required]
    inputs_by_column: Schema = {"type": "object", "properties": by_column, "required": required}
    if not all(isinstance(spec.type, Scalar) for spec in columns):
        inputs_by_column = {}  # nested values may stand for one row or for many
    return {
        "dataframe_split": split,
        "dataframe_records": {"type": "array", "items": record(columns)},
        "instances": {"type": "array", "items": record(columns)},
        "inputs": inputs_by_column,
    }


def _tensor_forms(tensors: Sequence[TensorSpec]) -> dict[str, Schema]:
    named = [spec for spec in tensors if spec.name is not None]
    if len(named) < len(tensors) or not named:
        whole = of_tensor(tensors[0])
        return {"instances": whole, "inputs": whole}
    columns = {str(spec.name): of_tensor(spec) for spec in named}
    whole = {"type": "object", "properties": columns, "required": list(columns)}
    if len(named) == 1:
        whole = {"anyOf": [of_tensor(named[0]), whole]}
    return {"inputs": whole}


def params(given: Sequence[ParamSpec]) -> Schema:
    """The model's params with their defaults."""
    properties: dict[str, Schema] = {}
    for spec in given:
        kind = of_type(spec.type)
        one = kind if spec.shape is None else {"type": "array", "items": kind}
        if isinstance(spec.default, str | int | float | bool | list):
            one = {**one, "default": spec.default}
        properties[spec.name] = one
    return {"type": "object", "properties": properties}


def predictions(signature: Signature | None) -> Schema:
    """What a model says that it answers: declared by its package, not enforced."""
    outputs = None if signature is None else signature.outputs
    if not outputs:
        return {}
    tensors = [spec for spec in outputs if isinstance(spec, TensorSpec)]
    if tensors:
        if len(tensors) == 1:
            return of_tensor(tensors[0])
        return {"type": "object", "properties": {str(spec.name): of_tensor(spec) for spec in tensors}}
    columns = [spec for spec in outputs if isinstance(spec, ColSpec)]
    if len(columns) == 1 and columns[0].name is None:
        return {"type": "array", "items": of_type(columns[0].type, null=True)}
    nullable = [ColSpec(spec.type, spec.name, False) for spec in columns]
    return {"type": "array", "items": record(nullable)}
