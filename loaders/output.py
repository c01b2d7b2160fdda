"""Checks a model's answer: does it match the output schema, and is it too large?

Names the differences from the schema, but refuses nothing for them. Compares only kinds (a float32 answer
fits a double output), because the width of a framework's result often differs from the example's without a
change in meaning. Of many values it looks at a few, spread over the answer, so that it never takes long: a
gateway does this between requests. Knows batches and schemas; must not know frameworks.
"""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Iterator
from itertools import islice
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


#: The most rows of a list that are compared with the schema, and about the most values in all of them.
_ROWS, _LOOKED_AT = 256, 4096
#: An array of texts takes the length of the longest for each, so only so many characters are looked at.
_SHOWN = 32


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
    if type(result) is np.ndarray and 0 < (_LIST + _VALUE) * result.size <= limit:
        return  # the common case, which takes no more than this
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
    if isinstance(answer, Columns):
        return ["the output is a table, but declared as tensors"]
    if isinstance(answer, Value):
        forms = _forms_of_lists(specs, answer.value)
    else:
        forms = {name: (array.dtype, array.shape) for name, array in answer.arrays.items()}
    found = []
    for spec in specs:
        label = f"output {spec.name}" if spec.name else "the output"
        if (spec.name or "") not in forms:
            found.append(f"{label} is declared but missing from the answer")
            continue
        dtype, shape = forms[spec.name or ""]
        if dtype.kind != np.dtype(spec.dtype).kind:
            found.append(f"{label} is {dtype}, declared {spec.dtype}")
        fits = len(shape) == len(spec.shape) and all(
            want in (-1, have) for want, have in zipped(spec.shape, shape)
        )
        if not fits:
            found.append(f"{label} has the shape {shape}, declared {spec.shape}")
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


def _forms_of_lists(specs: list[TensorSpec], value: Any) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """The dtypes and shapes that a list (or an object of lists) has as arrays; a ragged list is an array of
    lists."""
    listed = value if isinstance(value, dict) else {specs[0].name or "": value}
    forms = {}
    for spec in specs:
        name = spec.name or ""
        if name not in listed:
            continue
        dtype, shape = _form_of_list(listed[name])
        # JSON numbers have no width, only whole numbers differ from others; JSON text has no length.
        alike = (dtype.kind, spec.dtype.kind) in (("i", "u"), ("i", "f"), ("U", "O"))
        forms[name] = (spec.dtype if alike else dtype, shape)
    return forms


def _form_of_list(item: Any) -> tuple[Any, tuple[int, ...]]:
    """The dtype and the shape of the array that a list becomes, from a few of its items."""
    if not isinstance(item, (list, tuple)):
        array = np.asarray(item)
        return array.dtype, array.shape
    shape: list[int] = []
    level: list[Any] = [item]
    while level and all(isinstance(part, (list, tuple)) for part in level):
        if len({len(part) for part in level}) > 1:
            break
        shape.append(len(level[0]))
        each = max(1, _LOOKED_AT // len(level))
        level = [inner for part in level for inner in _spread(part, each)]
    level = [part[:_SHOWN] if isinstance(part, (str, bytes)) else part for part in level]
    try:
        array = np.asarray(level)
    except ValueError:
        return np.dtype(object), (len(item),)
    if any(isinstance(part, (list, tuple)) for part in level):
        return np.dtype(object), (len(item),)
    return array.dtype, (*shape, *array.shape[1:])


def _spread(items: Any, most: int) -> Any:
    """At most so many items of a list or an array, at equal distances."""
    return items if len(items) <= most else [items[at * len(items) // most] for at in range(most)]


def _listed_mismatches(specs: list[ColSpec], value: Any) -> list[str]:
    """Compares a list with one item per row, or a single answer. An item is an object with the columns'
    names, a list of their values, or the value of the only column."""
    rows = value if isinstance(value, list) else [value]
    found: dict[str, str] = {}
    rows = _spread(rows, min(_ROWS, max(1, _LOOKED_AT // len(specs))))
    few = max(1, _LOOKED_AT // len(specs) // max(1, len(rows)))
    for row in rows:
        for label, problem in _row_mismatches(specs, row, few):
            found.setdefault(label, problem)
    return list(found.values())


def _row_mismatches(specs: list[ColSpec], row: Any, few: int) -> Iterator[tuple[str, str]]:
    """`few`: how many values of a column are looked at."""
    named = specs[0].name is not None
    single = len(specs) == 1 and not (isinstance(row, dict) and specs[0].name in row)
    if single:
        label = f"output {specs[0].name}" if named else "the output"
        yield from _value_mismatch(specs[0].type, row, label, few)
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
            yield from _value_mismatch(spec.type, row[name], f"output {name}", few)
        elif spec.required:
            yield str(name), f"output {name} is declared but missing from the answer"


def _value_mismatch(kind: Type, value: Any, label: str, few: int) -> Iterator[tuple[str, str]]:
    """Yields the places where a plain Python value does not have the kind of its type; null fits every
    kind."""
    if value is None or isinstance(kind, AnyType):
        return
    if isinstance(value, np.ndarray) and value.ndim:
        value = list(_spread(value, few))
    elif isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(kind, SchemaArray) and isinstance(value, (list, tuple)):
        items = _spread(value, few)
        for item in items:
            yield from _value_mismatch(kind.items, item, f"an item of {label}", max(1, few // len(items)))
    elif isinstance(kind, Map) and isinstance(value, dict):
        values = list(islice(value.values(), few))
        for item in values:
            yield from _value_mismatch(kind.values, item, f"a value of {label}", max(1, few // len(values)))
    elif isinstance(kind, Object) and isinstance(value, dict):
        each = max(1, few // max(1, len(kind.properties)))
        for part in kind.properties:
            if part.name in value:
                yield from _value_mismatch(part.type, value[part.name], f"{label}.{part.name}", each)
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
