"""Whether callers of one signature can go on with another: what the second refuses or answers differently.

Compares what is declared and looks at no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from loaders.compat.pythons import zipped
from loaders.inferred import type_of_dtype
from loaders.schema import (
    AnyType,
    Array,
    ColSpec,
    Map,
    Object,
    ParamSpec,
    Scalar,
    Schema,
    SignatureError,
    TensorSpec,
    Type,
)
from loaders.signature import Signature

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
        return (ColSpec(type_of_dtype(spec.dtype, "outputs")),)
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
