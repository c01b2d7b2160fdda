"""One made-up row for a model that was saved without an example, with the types of its signature.

It shows whether the framework can answer here at all, which a load does not show. Its values have no meaning,
so a model may refuse it. Pure. Knows signatures; must not know models.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loaders.enforcement import RawInput
from loaders.schema import AnyType, Array, ColSpec, Map, Object, Scalar, TensorSpec

if TYPE_CHECKING:
    from loaders.schema import Type
    from loaders.signature import Signature

_SCALARS: Final[dict[Scalar, Any]] = {
    Scalar.boolean: True,
    Scalar.integer: 1,
    Scalar.long: 1,
    Scalar.float: 1.0,
    Scalar.double: 1.0,
    Scalar.string: "a",
    Scalar.binary: base64.b64encode(b"a").decode(),
    Scalar.datetime: "2024-01-01T00:00:00",
}
MOST_VALUES: Final = 1 << 20
"""The values of the largest row."""
_OF_SCALAR: Final[dict[Scalar, tuple[type, ...]]] = {
    Scalar.boolean: (bool,),
    Scalar.integer: (int,),
    Scalar.long: (int,),
    Scalar.float: (int, float),
    Scalar.double: (int, float),
    Scalar.string: (str,),
}


def row(
    signature: Signature | None,
    known: Mapping[str, Any] = MappingProxyType({}),
    most: int = MOST_VALUES,
) -> RawInput | None:
    """None where the signature says too little, or wants more than `most` values in all. `known`: values that
    the model knows, by column, as a process that may be hostile tells them."""
    inputs: list[ColSpec | TensorSpec] = [] if signature is None else list(signature.inputs or ())
    count = 0
    for spec in inputs:
        count += _values(spec)
        if count > most:
            return None
    columns = [spec for spec in inputs if isinstance(spec, ColSpec)]
    tensors = [spec for spec in inputs if isinstance(spec, TensorSpec)]
    if columns and all(spec.name is not None for spec in columns):
        names = [spec.name for spec in columns]
        return RawInput("dataframe_split", {"columns": names, "data": [[_cell(s, known) for s in columns]]})
    if tensors:
        made = {spec.name or "": _tensor(spec) for spec in tensors}
        if any(value is None for value in made.values()):
            return None
        return RawInput("inputs", made[""] if set(made) == {""} else made)
    return None


def _cell(spec: ColSpec, known: Mapping[str, Any]) -> Any:
    if isinstance(spec.type, Scalar) and isinstance(known, Mapping):
        value = known.get(str(spec.name))
        if type(value) in _OF_SCALAR.get(spec.type, ()):
            return value
    return _value(spec.type)


def _value(kind: Type) -> Any:
    if isinstance(kind, Scalar):
        return _SCALARS[kind]
    if isinstance(kind, Array):
        return [_value(kind.items)]
    if isinstance(kind, Map):
        return {"a": _value(kind.values)}
    if isinstance(kind, Object):
        return {item.name: _value(item.type) for item in kind.properties}
    assert isinstance(kind, AnyType)
    return 1


def _values(spec: ColSpec | TensorSpec) -> int:
    """How many values and lists one row of it has. Python's integers do not wrap, those of numpy do."""
    if isinstance(spec, TensorSpec):
        return math.prod(max(abs(length), 1) for length in spec.shape)
    pending, count = [spec.type], 0
    while pending:
        kind = pending.pop()
        count += 1
        if isinstance(kind, Object):
            pending += [item.type for item in kind.properties]
        elif isinstance(kind, (Array, Map)):
            pending.append(kind.items if isinstance(kind, Array) else kind.values)
    return count


def _tensor(spec: TensorSpec) -> Any:
    shape = [1 if length == -1 else length for length in spec.shape]
    if spec.dtype.kind in "biuf":
        return np.ones(shape, spec.dtype).tolist()
    return np.full(shape, "a").tolist() if spec.dtype.kind in "USO" else None
