"""A body that is one value (a file, a text or an array), for a model with one input.

It becomes named tensors (the form `tensors`): one row for a file or a text, the rows of an array. Only the
signature decides which kinds are accepted. Must not know media types.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np

from loaders.enforcement import violations as v
from loaders.enforcement.scalars import NDArray, objects
from loaders.enforcement.violations import InvalidInput, Violation
from loaders.schema import ColSpec, Scalar, TensorSpec
from loaders.signature import Signature

#: `file`: bytes in a format that the model parses. `octets`: bytes that may be the values of an array.
Kind = Literal["file", "octets", "text", "array"]

_NUMBERS = "biuf"


class Whole(NamedTuple):
    """The value of a body: `bytes` of a file or octets, `str`, or an array."""

    kind: Kind
    value: Any


def kinds(signature: Signature | None) -> frozenset[Kind]:
    """Returns the kinds that a model accepts; none unless its signature has one binary, text or tensor
    input."""
    inputs = None if signature is None else signature.inputs
    if inputs is None or len(inputs) != 1:
        return frozenset()
    spec = inputs[0]
    if isinstance(spec, TensorSpec):
        if spec.dtype.kind not in _NUMBERS:
            return frozenset({"text"}) if _is_one(spec) and spec.dtype.kind == "U" else frozenset()
        found: frozenset[Kind] = frozenset({"array"})
        return found | {"octets"} if spec.shape.count(-1) <= 1 else found
    if spec.type is Scalar.binary:
        return frozenset({"file", "octets"})
    return frozenset({"text"}) if spec.type is Scalar.string else frozenset()


def tensors(signature: Signature | None, whole: Whole) -> dict[str, NDArray]:
    """Returns the value under its input's name. Raises InvalidInput."""
    suitable = kinds(signature)
    if whole.kind not in suitable or signature is None or signature.inputs is None:
        wanted = " or ".join(sorted(suitable)) or "columns or several inputs"
        raise InvalidInput([Violation("body", v.NOT_WHOLE, wanted, whole.kind)])
    spec = signature.inputs[0]
    name = "0" if isinstance(spec, ColSpec) else "input"
    name = name if spec.name is None else str(spec.name)
    if whole.kind == "array":
        return {name: whole.value}
    if isinstance(spec, ColSpec):
        return {name: objects([whole.value])}
    if whole.kind == "text":
        return {name: objects([whole.value]).reshape([1] * len(spec.shape))}
    return {name: _array(whole.value, spec)}


def _is_one(spec: TensorSpec) -> bool:
    return all(length in (-1, 1) for length in spec.shape)


def _array(octets: bytes, spec: TensorSpec) -> NDArray:
    """Reads little-endian values in row-major order. The number of bytes determines the free length."""
    dtype = spec.dtype.newbyteorder("<")
    known = math.prod(length for length in spec.shape if length != -1)
    row = known * dtype.itemsize
    free = -1 in spec.shape
    fits = len(octets) % row == 0 and len(octets) >= row if free and row else len(octets) == row
    if free and not row:
        raise InvalidInput([Violation("body", v.WRONG_LENGTH, "a tensor without values in another form")])
    if not fits:
        wanted = f"a multiple of {row} bytes" if free else f"{row} bytes"
        raise InvalidInput([Violation("body", v.WRONG_LENGTH, wanted, f"{len(octets)} bytes")])
    array = np.frombuffer(octets, dtype)
    if dtype.kind == "b" and octets.strip(b"\x00\x01"):
        raise InvalidInput([Violation("body", v.OUT_OF_RANGE, "bytes 0 and 1")])
    return array.reshape([len(octets) // row if length == -1 else length for length in spec.shape])
