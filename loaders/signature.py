"""A model's signature: the schemas of its inputs, outputs and parameters. Reads and writes it.

The format is MLflow's `signature` of an `MLmodel`: three JSON strings or nulls. `inferred` makes a signature
from data, `compatibility` compares two, and `enforcement` checks data against one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

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
]

#: The values in the JSON of a signature's part, as its brackets and commas show them before it is read.
_MAX_VALUES: Final = 1_000_000


@dataclass(frozen=True)
class Signature:
    """Inputs, outputs and parameters; None means not declared. Raises SignatureError.

    `plans` belongs to enforcement: its cache of facts about this signature.
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

    def widened(self, declared: Mapping[str, Sequence[int]]) -> Signature:
        """Returns the signature with every length free that the model leaves free, or this signature if
        nothing changes. `declared`: the shapes of the model's inputs, by name. For example, a signature
        inferred from rows of three values has the length 3 although the model accepts any length."""
        tensors = [spec for spec in self.inputs or () if isinstance(spec, TensorSpec)]
        inputs = tuple(_widened(spec, declared) for spec in tensors)
        return self if inputs == tuple(tensors) else Signature(inputs, self.outputs, self.params)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Signature:
        """Reads the `signature` of an `MLmodel`: inputs, outputs and params, each a JSON string, its parsed
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
        """Returns the signature in MLflow's format; `mlflow.models.ModelSignature.from_dict` reads it."""
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
    if sum(map(value.count, "[{,")) > _MAX_VALUES:
        raise SignatureError(place, "is too large")
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise SignatureError(place, "is not JSON") from None


# --- inference


# --- comparison


def _widened(spec: TensorSpec, declared: Mapping[str, Sequence[int]]) -> TensorSpec:
    own = declared.get(spec.name or "")
    if own is None and spec.name is None and len(declared) == 1:
        (own,) = declared.values()
    if own is None or len(own) != len(spec.shape):
        return spec
    shape = tuple(-1 if free == -1 else length for length, free in zipped(spec.shape, own))
    return TensorSpec(spec.dtype, shape, spec.name)
