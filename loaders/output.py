"""Checks a model's answer: does it match the output schema, and is it too large?

Names the differences from the schema, but refuses nothing for them. Compares only kinds (a float32 answer
fits a double output), because the width of a framework's result often differs from the example's without a
change in meaning. Knows batches and schemas; must not know frameworks.
"""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from loaders.batch import Array, Batch, Columns, Tensors, Value
from loaders.compat.pythons import zipped
from loaders.schema import AnyType, ColSpec, Map, Object, Scalar, TensorSpec, Type
from loaders.schema import Array as SchemaArray
from loaders.signature import Signature
from loaders.spelling import counted

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


#: The Python types that are accepted for a type in an answer of plain Python values. An int is also a number.
_PYTHON: dict[Scalar, tuple[type, ...]] = {
    Scalar.boolean: (bool,),
    Scalar.integer: (int,),
    Scalar.long: (int,),
    Scalar.float: (int, float, decimal.Decimal),
    Scalar.double: (int, float, decimal.Decimal),
    Scalar.string: (str,),
    Scalar.binary: (bytes, bytearray, str),
    Scalar.datetime: (datetime.date, str),
}

#: The minimum bytes of JSON for a value with its comma, a list or an object.
_VALUE, _LIST = 2, 3


class AnswerTooLarge(ValueError):
    """The model's answer is larger than the limit."""


def least_json(shape: tuple[int, ...]) -> int:
    """Returns the minimum bytes of JSON for an array of this shape; empty lists count too."""
    if 0 in shape:
        return _LIST * math.prod(shape[: shape.index(0)])
    return _VALUE * math.prod(shape)


def check_size(result: Any, limit: int) -> None:
    """Checks a model's result before it is converted. Raises AnswerTooLarge if its JSON must have more than
    `limit` bytes. Counts rows times columns, because few bytes can represent many rows (a frame with only an
    index, an array with an empty axis, a sparse matrix, a range). Counts texts, because one text can occur
    many times (categories, a list that repeats a text)."""
    parts = list(result.values()) if isinstance(result, dict) else [result]
    least = 0
    for part in parts:
        shape = getattr(part, "shape", None)
        if isinstance(shape, tuple) and all(isinstance(length, int) for length in shape):
            least += max(least_json(shape), _LIST * shape[0] if len(shape) > 1 else 0)
        elif isinstance(part, (list, tuple, range)):
            least += _VALUE * len(part)
        if least <= limit:
            least += _text_length(part)
    if least > limit:
        raise AnswerTooLarge(f"the answer takes at least {least} bytes, more than the limit of {limit} bytes")


def _text_length(part: Any) -> int:
    """Returns the number of characters in a list of texts; a category counts as often as it occurs."""
    if isinstance(part, (list, tuple)):
        return sum(map(len, filter(_is_text, part))) if part and _is_text(part[0]) else 0
    if getattr(part, "ndim", 0) == 2 and hasattr(part, "iloc"):
        # Only categorical columns: reading every column of a wide frame costs more than the answer.
        places = [at for at, dtype in enumerate(part.dtypes) if hasattr(dtype, "categories")]
        return sum(_text_length(part.iloc[:, at]) for at in places)
    column = getattr(part, "cat", part)
    categories, codes = getattr(column, "categories", None), getattr(column, "codes", None)
    if categories is None or codes is None:
        return 0
    lengths = np.array([len(item) if _is_text(item) else 0 for item in categories], dtype=np.int64)
    held = np.asarray(codes)
    times = np.bincount(held[held >= 0], minlength=len(lengths))
    return int(times @ lengths)


def _is_text(item: Any) -> bool:
    return isinstance(item, (str, bytes))


def mismatches(signature: Signature, answer: Batch) -> list[str]:
    """Returns the differences between `answer` and the declared outputs; empty if there are none, or no
    declared outputs."""
    outputs = signature.outputs
    if not outputs:
        return []
    if isinstance(outputs[0], TensorSpec):
        tensors = [spec for spec in outputs if isinstance(spec, TensorSpec)]
        return _tensor_mismatches(tensors, answer)
    return _column_mismatches([spec for spec in outputs if isinstance(spec, ColSpec)], answer)


def _tensor_mismatches(specs: list[TensorSpec], answer: Batch) -> list[str]:
    if isinstance(answer, Value):
        answer = _as_tensors(specs, answer.value)
    if not isinstance(answer, Tensors):
        return ["the output is a table, but declared as tensors"] if isinstance(answer, Columns) else []
    found = []
    for spec in specs:
        array = answer.arrays.get(spec.name or "")
        label = f"output {spec.name}" if spec.name else "the output"
        if array is None:
            found.append(f"{label} is declared but missing from the answer")
            continue
        if array.dtype.kind != np.dtype(spec.dtype).kind:
            found.append(f"{label} is {array.dtype}, declared {spec.dtype}")
        fits = array.ndim == len(spec.shape) and all(
            want in (-1, have) for want, have in zipped(spec.shape, array.shape)
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
    if isinstance(answer, Value):
        return _listed_mismatches(specs, answer.value)
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
                found.append(f"output {name} is declared but missing from the answer")
            continue
        found += _kind_mismatch(spec, column, f"output {name}")
    return found


def _as_tensors(specs: list[TensorSpec], value: Any) -> Tensors:
    """Converts a list (or an object of lists) to arrays; a ragged list becomes an array of lists."""
    listed = value if isinstance(value, dict) else {specs[0].name or "": value}
    arrays = {}
    for name, item in listed.items():
        try:
            arrays[str(name)] = np.asarray(item)
        except ValueError:
            arrays[str(name)] = np.empty((len(item),), dtype=object)
    for spec in specs:
        array = arrays.get(spec.name or "")
        # JSON numbers have no width, only whole numbers differ from others; JSON text has no length.
        if array is not None and (array.dtype.kind, spec.dtype.kind) in (("i", "u"), ("i", "f"), ("U", "O")):
            arrays[spec.name or ""] = array.astype(spec.dtype)
    return Tensors(arrays, None)


def _listed_mismatches(specs: list[ColSpec], value: Any) -> list[str]:
    """Compares a list with one item per row, or a single answer. An item is an object with the columns'
    names, a list of their values, or the value of the only column."""
    rows = value if isinstance(value, list) else [value]
    found: dict[str, str] = {}
    for row in rows:
        for label, problem in _row_mismatches(specs, row):
            found.setdefault(label, problem)
    return list(found.values())


def _row_mismatches(specs: list[ColSpec], row: Any) -> Iterator[tuple[str, str]]:
    named = specs[0].name is not None
    single = len(specs) == 1 and not (isinstance(row, dict) and specs[0].name in row)
    if single:
        yield from _value_mismatch(specs[0].type, row, f"output {specs[0].name}" if named else "the output")
        return
    if isinstance(row, (list, tuple)) and len(row) == len(specs):
        row = {
            place if spec.name is None else spec.name: item
            for place, (spec, item) in enumerate(zipped(specs, row))
        }
    if not isinstance(row, dict):
        yield "", f"the output is {_json_kind(row)} for a row, declared {counted(len(specs), 'column')}"
        return
    for place, spec in enumerate(specs):
        name = place if spec.name is None else spec.name
        if name in row:
            yield from _value_mismatch(spec.type, row[name], f"output {name}", spec.required)
        elif spec.required:
            yield str(name), f"output {name} is declared but missing from the answer"


def _value_mismatch(kind: Type, value: Any, label: str, required: bool = True) -> Iterator[tuple[str, str]]:
    """Yields the places where a plain Python value does not have the kind of its type; null fits every
    kind."""
    if value is None or isinstance(kind, AnyType):
        return
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(kind, SchemaArray) and isinstance(value, (list, tuple)):
        for item in value:
            yield from _value_mismatch(kind.items, item, f"an item of {label}")
    elif isinstance(kind, Map) and isinstance(value, dict):
        for item in value.values():
            yield from _value_mismatch(kind.values, item, f"a value of {label}")
    elif isinstance(kind, Object) and isinstance(value, dict):
        for part in kind.properties:
            if part.name in value:
                yield from _value_mismatch(part.type, value[part.name], f"{label}.{part.name}")
            elif part.required:
                yield f"{label}.{part.name}", f"{label}.{part.name} is declared but missing from the answer"
    elif (
        not isinstance(kind, Scalar)
        or not isinstance(value, _PYTHON[kind])
        or (isinstance(value, bool) and kind is not Scalar.boolean)
    ):
        yield label, f"{label} is {_json_kind(value)}, declared {kind}"


def _json_kind(value: Any) -> str:
    names = {bool: "a boolean", int: "a whole number", float: "a number", str: "text", dict: "an object"}
    return names.get(
        type(value), "a list" if isinstance(value, (list, tuple)) else f"a {type(value).__name__}"
    )


def _kind_mismatch(spec: ColSpec, array: Array, label: str) -> list[str]:
    if isinstance(spec.type, Scalar) and array.dtype.kind not in _KINDS[spec.type]:
        return [f"{label} is {array.dtype}, declared {spec.type}"]
    return []
