"""A model's answer as JSON bytes, in the forms MLflow's scoring server gives them.

Knows batches and JSON; must not know requests. An answer that JSON cannot hold is the model's failure: it
raises `Problem` PREDICTION_FAILED with the reason, and never gives invalid JSON. NaN and the infinities
become null. A thread encodes a large answer in pieces, because each piece holds the interpreter's lock. An
answer that must exceed the limit is refused before anything is built.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import enum
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, Final

import numpy as np
import orjson

from gateway.errors import Problem
from gateway.pools import in_large_thread
from loaders.batch import Array, Batch, Columns, Opaque, Tensors, nbytes
from loaders.output import least_json
from loaders.plain import opened

#: An answer above this size, in bytes of its arrays or as values, is encoded in a thread, in pieces.
OFF_LOOP_BYTES: Final = 256 * 1024
#: The most bytes of arrays and the most values in one piece.
PIECE_BYTES: Final = 256 * 1024
_PIECE_VALUES: Final = 16 * 1024
_VALUE_BYTES: Final = 16
_MAX_DEPTH: Final = 200
_NATIVE: Final = frozenset(np.dtype(code) for code in "?bhilqBHILQd")


async def encode_apart(batch: Batch, limit: int) -> list[bytes]:
    """`predictions` as JSON, in pieces to send one after the other: a table as records, an array as nested
    lists, several arrays as an object, any other value as itself. Raises PREDICTION_FAILED, also for more
    than `limit` bytes."""
    return await in_large_thread(encode_large, batch, limit)


def encode_now(batch: Batch) -> bytes:
    """The JSON at once, in the calling thread."""
    try:
        if isinstance(batch, Tensors):
            if batch.arrays.keys() == {""}:
                return _array(batch.arrays[""])
            return orjson.dumps({name: orjson.Fragment(_array(a)) for name, a in batch.arrays.items()})
        if isinstance(batch, Columns):
            return _dumps(_records(batch))
        return _dumps(batch.value)
    except orjson.JSONEncodeError as error:
        raise _not_json(str(error)) from None


def encode_large(batch: Batch, limit: int) -> list[bytes]:
    """The JSON in pieces of at most about a megabyte, in the calling thread."""
    check(batch, limit)
    parts: list[bytes] = []
    size = 0
    try:
        for part in _pieces(batch):
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            parts.append(part)
    except orjson.JSONEncodeError as error:
        raise _not_json(str(error)) from None
    return parts


def check(batch: Batch, limit: int) -> None:
    """Raises PREDICTION_FAILED for an answer whose JSON must have more than `limit` bytes."""
    if least(batch) > limit:
        raise _too_large(limit)


def least(batch: Batch) -> int:
    """The fewest bytes of JSON that a table or arrays can have; rows without a value count too."""
    if isinstance(batch, Columns):
        return batch.rows * (3 + sum(len(str(name)) + 4 for name in batch.arrays))
    if isinstance(batch, Tensors):
        return sum(least_json(array.shape) for array in batch.arrays.values())
    return 0


def weight(batch: Batch) -> int:
    """About how many bytes an answer takes. Stops counting values when the answer is known to be large."""
    if isinstance(batch, Columns):
        return nbytes(batch) + 3 * batch.rows
    if isinstance(batch, Tensors):
        total = 0
        for array in batch.arrays.values():
            total += array.nbytes or least_json(array.shape)
        return total
    return _VALUE_BYTES * _count(batch.value, OFF_LOOP_BYTES // _VALUE_BYTES + 1)


def _count(value: object, enough: int) -> int:
    """How many values an answer has; long text and arrays count by their length. Stops at `enough`."""
    total, left = 0, [value]
    while left and total < enough:
        one = left.pop()
        if isinstance(one, list | tuple | Set):
            total += len(one)
            if total < enough:
                left += one
        elif isinstance(one, dict):
            total += 2 * len(one)
            if total < enough:
                left += one.values()
        elif isinstance(one, str | bytes):
            total += 1 + len(one) // _VALUE_BYTES
        elif isinstance(one, np.ndarray):
            total += 1 + max(one.nbytes, least_json(one.shape)) // _VALUE_BYTES
    return total


def _pieces(batch: Batch) -> Iterator[bytes]:
    if isinstance(batch, Columns):
        yield from _table_pieces(batch)
    elif isinstance(batch, Tensors):
        if batch.arrays.keys() == {""}:
            yield from _array_pieces(batch.arrays[""])
            return
        for place, (name, array) in enumerate(batch.arrays.items()):
            yield (b"," if place else b"{") + orjson.dumps(name) + b":"
            yield from _array_pieces(array)
        yield b"}" if batch.arrays else b"{}"
    else:
        yield from _value_pieces(batch.value, _MAX_DEPTH)


def _table_pieces(table: Columns) -> Iterator[bytes]:
    each = max(1, sum(array.itemsize for array in table.arrays.values()))
    step = max(1, min(_PIECE_VALUES // max(1, len(table.arrays)), PIECE_BYTES // each))
    for start in range(0, table.rows, step):
        rows = min(step, table.rows - start)
        part = Columns({name: a[start : start + rows] for name, a in table.arrays.items()}, rows)
        yield (b"," if start else b"[") + _dumps(_records(part))[1:-1]
    yield b"]" if table.rows else b"[]"


def _array_pieces(array: Array) -> Iterator[bytes]:
    if not array.ndim or max(array.nbytes, least_json(array.shape)) <= PIECE_BYTES:
        yield _array(array)
        return
    each = max(array[:1].nbytes, least_json(array[:1].shape))
    step = PIECE_BYTES // each
    for start in range(0, len(array), max(1, step)):
        yield b"," if start else b"["
        if step:
            yield _array(array[start : start + step])[1:-1]
        else:
            yield from _array_pieces(array[start])
    yield b"]"


def _value_pieces(value: Any, depth: int) -> Iterator[bytes]:
    """Long lists and objects in parts; everything else at once."""
    if depth == 0 or type(value) not in (list, dict) or _count(value, _PIECE_VALUES) < _PIECE_VALUES:
        if isinstance(value, np.ndarray) and value.dtype.kind != "O":
            yield from _array_pieces(value)
        else:
            yield _dumps(value)
        return
    if type(value) is dict:
        if not all(type(key) is str for key in value):
            yield _dumps(value)
            return
        for place, (key, item) in enumerate(value.items()):
            yield (b"," if place else b"{") + orjson.dumps(key) + b":"
            yield from _value_pieces(item, depth - 1)
        yield b"}"
        return
    yield b"["
    group: list[Any] = []
    held, first = 0, True
    for item in value:
        size = 1 + _count(item, _PIECE_VALUES)
        if group and held + size > _PIECE_VALUES:
            yield (b"" if first else b",") + _dumps(group)[1:-1]
            group, held, first = [], 0, False
        if size > _PIECE_VALUES:
            if not first:
                yield b","
            yield from _value_pieces(item, depth - 1)
            first = False
        else:
            group.append(item)
            held += size
    if group:
        yield (b"" if first else b",") + _dumps(group)[1:-1]
    yield b"]"


def _too_large(limit: int) -> Problem:
    return Problem(
        "PREDICTION_FAILED",
        f"the model's answer takes more than {limit} bytes as JSON",
        hint="send fewer rows in one request; the operator's limit is the setting max_answer_bytes",
    )


def _array(array: Array) -> bytes:
    """An array as a nested list. Narrow floats are widened first, so that a reader gets exactly the model's
    number (as `tolist` gives it), not a shorter text for it."""
    kind = array.dtype.kind
    if kind == "f" and array.dtype.itemsize < 8 and not np.ma.isMaskedArray(array):
        array = array.astype(np.float64)
    if array.ndim and array.dtype in _NATIVE and not isinstance(array, np.ma.MaskedArray):
        if not array.flags.c_contiguous:
            array = np.ascontiguousarray(array)
        return orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)
    return _dumps(_items(array))


def _items(array: Array) -> Any:
    """The array as nested lists of Python values (a scalar if it has no axis); a missing value is None."""
    kind = array.dtype.kind
    if kind == "M":
        unit = _SHOWN.get(np.datetime_data(array.dtype)[0])
        return _map(_moment, np.datetime_as_string(array if unit is None else array.astype(unit)).tolist())
    if kind in "mc":
        raise _not_json(f"it has an array of type {array.dtype.name}")
    return array.tolist()


def _map(function: Any, nested: Any) -> Any:
    return [_map(function, item) for item in nested] if isinstance(nested, list) else function(nested)


#: Units that are written as another one: without a time of day, or finer than a timestamp's nine digits.
_SHOWN = {
    **dict.fromkeys(("Y", "M", "W", "D", "h", "m"), "datetime64[s]"),
    **dict.fromkeys(("ps", "fs", "as"), "datetime64[ns]"),
}


def _moment(text: str) -> str | None:
    """A timestamp as pandas' isoformat gives it: no fraction, or six digits, or nine."""
    if text == "NaT":
        return None
    moment, point, fraction = text.partition(".")
    if not fraction.strip("0"):
        return moment
    fraction = fraction.ljust(9, "0")
    return moment + point + (fraction[:6] if fraction.endswith("000") else fraction)


def _records(table: Columns) -> list[dict[str, Any]]:
    names = [str(name) for name in table.arrays]
    if len(set(names)) < len(names):
        raise _not_json("it has two columns with the same name")
    if not names:
        return [{} for _ in range(table.rows)]
    columns = [_items(array) for array in table.arrays.values()]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _dumps(value: Any) -> bytes:
    """JSON of Python values: by orjson alone if it can; otherwise the values are made plain first."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        return orjson.dumps(_plain(value, _MAX_DEPTH))


def _plain(value: Any, depth: int) -> Any:
    """The value, made of types that orjson writes. Raises PREDICTION_FAILED, naming the type that it
    cannot."""
    if value is None or type(value) in (bool, float, str):
        return value
    if depth == 0:
        raise _not_json("it is nested too deeply, or contains itself")
    if isinstance(value, enum.Enum):
        return _plain(value.value, depth - 1)
    if isinstance(value, str | float):
        return str(value) if isinstance(value, str) else float(value)
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**64 else orjson.Fragment(str(int(value)).encode())
    if isinstance(value, Mapping):
        return _plain_object(value, depth)
    if isinstance(value, Sequence | Set) and not isinstance(value, bytes | bytearray | memoryview):
        return [_plain(item, depth - 1) for item in value]
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "O":
            return _plain(value.tolist(), depth - 1)
        return orjson.Fragment(_array(value))
    if isinstance(value, np.generic):
        return _plain_scalar(value, depth)
    return _plain_leaf(value, depth)


def _plain_object(value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in value.items():
        name = _plain_key(key)
        if name in result:
            raise _not_json(f"an object has the key {name[:80]!r} twice")
        result[name] = _plain(item, depth - 1)
    return result


def _plain_key(key: Any) -> str:
    if isinstance(key, str):
        return str(key)
    if isinstance(key, bool | np.bool_):
        return "true" if key else "false"
    if key is None:
        return "null"
    if isinstance(key, datetime.date):
        return key.isoformat()
    if isinstance(key, int | float | np.integer | np.floating):
        return str(key)
    raise _not_json(f"an object has a key of type {_kind(key)}")


def _kind(value: object) -> str:
    return value.kind if isinstance(value, Opaque) else type(value).__name__


def _plain_scalar(value: np.generic, depth: int) -> Any:
    if isinstance(value, np.datetime64):
        return _items(np.asarray(value))
    if isinstance(value, np.timedelta64 | np.complexfloating):
        raise _not_json(f"it has a value of type {type(value).__name__}")
    if isinstance(value, np.longdouble):
        return float(value)
    return _plain(value.item(), depth - 1)


def _plain_leaf(value: Any, depth: int) -> Any:
    kind = _kind(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    if kind in ("NaTType", "NAType"):  # pandas' own nulls
        return None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return orjson.Fragment(str(value).encode()) if value.is_finite() else None
    if isinstance(value, Opaque):
        raise _not_json(f"it has a value of type {kind}")
    inside = opened(value)
    if inside is not value:
        return _plain(inside, depth - 1)
    raise _not_json(f"it has a value of type {kind}")


def _not_json(what: str) -> Problem:
    return Problem("PREDICTION_FAILED", f"the model's answer cannot be written as JSON: {what}")
