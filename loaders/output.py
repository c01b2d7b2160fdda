"""What a model answered: whether it looks as the signature's output schema says, and whether it is too large.

Differences from the schema are named and nothing is refused for them.
Only kinds are compared (a float32 answer fits a double output), because what a framework returns and what
was once inferred from an example differ in width more often than in meaning. Knows batches and schemas.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from loaders.batch import Array, Batch, Columns, Tensors
from loaders.schema import ColSpec, Scalar, TensorSpec
from loaders.signature import Signature

_KINDS: dict[Scalar, str] = {
    Scalar.boolean: "b",
    Scalar.integer: "iu",
    Scalar.long: "iu",
    Scalar.float: "f",
    Scalar.double: "f",
    Scalar.string: "OUST",
    Scalar.binary: "OS",
    Scalar.datetime: "MO",
}


#: The fewest bytes of JSON that a value takes with its comma, and a list or an object.
_VALUE, _LIST = 2, 3


class AnswerTooLarge(ValueError):
    """The model answered more than an answer may hold."""


def least_json(shape: tuple[int, ...]) -> int:
    """The fewest bytes of JSON that an array of this shape takes: lists without items count too."""
    if 0 in shape:
        return _LIST * math.prod(shape[: shape.index(0)])
    return _VALUE * math.prod(shape)


def check_size(result: Any, limit: int) -> None:
    """Looks at what a model returned, before anything is made of it: its rows times its columns, however few
    bytes it takes (a frame with an index alone, an array with an empty axis, a sparse matrix). Raises
    AnswerTooLarge where its JSON must have more than `limit` bytes."""
    parts = list(result.values()) if isinstance(result, dict) else [result]
    least = 0
    for part in parts:
        shape = getattr(part, "shape", None)
        if isinstance(shape, tuple) and all(isinstance(length, int) for length in shape):
            least += max(least_json(shape), _LIST * shape[0] if len(shape) > 1 else 0)
    if least > limit:
        raise AnswerTooLarge(f"the answer takes at least {least} bytes, more than the {limit} allowed")


def mismatches(signature: Signature, answer: Batch) -> list[str]:
    """How `answer` differs from the declared outputs; empty where it fits or nothing is declared."""
    outputs = signature.outputs
    if not outputs:
        return []
    if isinstance(outputs[0], TensorSpec):
        tensors = [spec for spec in outputs if isinstance(spec, TensorSpec)]
        return _tensor_mismatches(tensors, answer)
    return _column_mismatches([spec for spec in outputs if isinstance(spec, ColSpec)], answer)


def _tensor_mismatches(specs: list[TensorSpec], answer: Batch) -> list[str]:
    if not isinstance(answer, Tensors):
        return []
    found = []
    for spec in specs:
        array = answer.arrays.get(spec.name or "")
        label = f"output {spec.name}" if spec.name else "the output"
        if array is None:
            found.append(f"{label} is declared and was not answered")
            continue
        if array.dtype.kind != np.dtype(spec.dtype).kind:
            found.append(f"{label} is {array.dtype}, declared {spec.dtype}")
        fits = array.ndim == len(spec.shape) and all(
            want in (-1, have) for want, have in zip(spec.shape, array.shape, strict=True)
        )
        if not fits:
            found.append(f"{label} has the shape {array.shape}, declared {spec.shape}")
    return found


def _column_mismatches(specs: list[ColSpec], answer: Batch) -> list[str]:
    if isinstance(answer, Tensors) and answer.arrays.keys() == {""}:
        array = answer.arrays[""]
        width = 1 if array.ndim == 1 else array.shape[1] if array.ndim == 2 else 0
        if width != len(specs):
            return [f"the output has {width} columns, declared {len(specs)}"]
        return _kind_mismatch(specs[0], array, "the output")
    if not isinstance(answer, Columns):
        return []
    found = []
    for place, spec in enumerate(specs):
        name = place if spec.name is None else spec.name
        column: Array | None = answer.arrays.get(name)
        if column is None and spec.name is None and place < len(answer.arrays):
            column = list(answer.arrays.values())[place]
        if column is None:
            if spec.required:
                found.append(f"output {name} is declared and was not answered")
            continue
        found += _kind_mismatch(spec, column, f"output {name}")
    return found


def _kind_mismatch(spec: ColSpec, array: Array, label: str) -> list[str]:
    if isinstance(spec.type, Scalar) and array.dtype.kind not in _KINDS[spec.type]:
        return [f"{label} is {array.dtype}, declared {spec.type}"]
    return []
