"""Reads values from a JSON header and raw buffers, the content of a frame (the format is in `wire`).

The header refers to the buffers in order, and to all of them, so a header cannot claim the same bytes twice.
Executes nothing. Must not know frames or sockets.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any, Final

import numpy as np

from loaders.batch import Columns, Opaque, Tensors, Value
from loaders.compat.pythons import zipped
from loaders.weight import counted
from loaders.worker.packing import ALIGN, MAX_FRAME, PLAIN, TAG, Array, TooLarge, WireError

#: At most this many keys of a dict, or names of a table, may have hashes that others have.
_COLLISIONS: Final = 64
_MOST_AXES: Final = 64
_JSON: Final = json.JSONDecoder()
_RAW_DTYPE: Final = re.compile(r"[<>|=][biufcSUMm][1-9]\d{0,9}(\[\d*[A-Za-z]{1,2}\])?\Z")


class Cursor:
    """Reads the body of a frame in order."""

    def __init__(self, body: Array, budget: int | None = None) -> None:
        self._body = body
        self._at = 0
        self._budget = budget

    def json(self, text: Array, unweighed: int = 0) -> Any:
        """Parses JSON text. Raises TooLarge before building the values of text with more than `unweighed`
        bytes."""
        if self._budget is not None and len(text) > unweighed:
            self._budget -= counted(text.data)
            if self._budget < 0:
                raise TooLarge("the values of the frame take more memory than allowed")
        written = text.tobytes().decode("ascii")
        value, end = _JSON.raw_decode(written)
        if end < len(written) and written[end:].strip(" "):
            raise WireError("the header holds more than one value")
        return value

    def take(self, size: int) -> Array:
        start = self._at + -self._at % ALIGN
        if size < 0 or start + size > len(self._body):
            raise WireError("a buffer extends past the end of the frame")
        self._at = start + size
        return self._body[start : self._at]

    def close(self) -> None:
        if self._at != len(self._body):
            raise WireError("the frame contains bytes without a reference")


def unpack(value: Any, cursor: Cursor) -> Any:
    kind = type(value)  # of JSON, so no subclass
    if kind is list:
        return value if PLAIN.issuperset(map(type, value)) else [unpack(item, cursor) for item in value]
    if kind is not dict:
        return value
    if TAG not in value:
        return {key: item if type(item) in PLAIN else unpack(item, cursor) for key, item in value.items()}
    kind, *rest = value[TAG]
    return KINDS[kind](cursor, *rest)


def _array(cursor: Cursor, dtype: str, shape: list[int]) -> Array:
    kind = _dtype(dtype)
    _check_shape(shape)
    raw = cursor.take(kind.itemsize * math.prod(shape))
    if not raw.size:
        return np.empty(shape, kind)
    return np.ndarray(tuple(shape), kind, buffer=raw.data)


@lru_cache(maxsize=256)
def _dtype(text: str) -> np.dtype[Any]:
    if not _RAW_DTYPE.match(text):
        raise WireError("an array of an unknown type")
    return np.dtype(text)


def _check_shape(shape: list[int]) -> None:
    """Checks a shape. An empty array has no bytes, so its other axes must be checked separately."""
    total, fits = 1, len(shape) <= _MOST_AXES
    for n in shape:
        fits = fits and type(n) is int and 0 <= n <= MAX_FRAME
        total *= n if fits and n else 1
    if not fits or total > MAX_FRAME:
        raise WireError("an array of an impossible shape")


def _pieces(cursor: Cursor, parts: list[Any]) -> list[Any]:
    items: list[Any] = []
    for part in parts:
        piece = cursor.json(cursor.take(part)) if type(part) is int else part
        items += unpack(piece, cursor)
    return items


def _masked(cursor: Cursor, data: Any, mask: Any) -> Array:
    values, gaps = unpack(data, cursor), unpack(mask, cursor)
    if gaps.dtype.kind != "b" or gaps.shape != values.shape:
        raise WireError("a mask that does not fit its array")
    return np.ma.MaskedArray(values, mask=gaps)


def _objects(cursor: Cursor, shape: list[int], items: list[Any]) -> Array:
    _check_shape(shape)
    values = unpack(items, cursor)
    if len(values) != math.prod(shape):
        raise WireError("an array whose items do not fill it")
    array = np.empty(len(values), dtype=object)
    for i, item in enumerate(values):
        array[i] = item
    return array.reshape(shape)


def _dict(cursor: Cursor, pairs: list[Any]) -> dict[Any, Any]:
    unpacked = [(unpack(key, cursor), unpack(item, cursor)) for key, item in pairs]
    _check_hashes([key for key, _ in unpacked])
    return dict(unpacked)


def _check_hashes(keys: list[Any]) -> None:
    """Refuses keys with equal hashes: a dict of n of them takes n squared steps. Only the hashes of texts,
    bytes and dates are secret. Numbers with a chosen hash are easy to find. Raises WireError."""
    if len(keys) <= _COLLISIONS or all(type(key) is str for key in keys):
        return
    hashes = np.sort(np.fromiter(map(hash, keys), np.int64, len(keys)))
    if np.count_nonzero(hashes[1:] == hashes[:-1]) > _COLLISIONS:
        raise WireError("a dict or a table with too many keys of the same hash")


def _columns(cursor: Cursor, rows: int, runs: list[Any], index: Any, texts: list[Any]) -> Columns:
    if type(rows) is not int or not 0 <= rows <= MAX_FRAME:
        raise WireError("a table without rows")
    _check_hashes([name for dtype, names, *_ in runs for name in ([names] if dtype is None else names)])
    _check_hashes(texts)
    table: dict[str | int, Array] = {}
    for dtype, names, *array in runs:
        if dtype is None:
            table[_name(names, (str, int))] = _column(unpack(array[0], cursor), rows)
            continue
        kind = _dtype(dtype)
        raw = cursor.take(kind.itemsize * rows * len(names))
        shape = (len(names), rows)
        block: Array = np.ndarray(shape, kind, buffer=raw.data) if raw.size else np.empty(shape, kind)
        for name, column in zipped(names, block):
            table[_name(name, (str, int))] = column
    labels = None if index is None else _column(unpack(index, cursor), rows)
    return Columns(table, rows, labels, frozenset(_name(name, (str, int)) for name in texts))


def _column(array: Any, rows: int) -> Array:
    if not isinstance(array, np.ndarray) or array.shape != (rows,):
        raise WireError("a table whose columns differ in length")
    return array


def _tensors(cursor: Cursor, rows: int | None, arrays: list[Any]) -> Tensors:
    tensors: dict[str, Array] = {}
    for name, described in arrays:
        array = tensors[_name(name, str)] = unpack(described, cursor)
        if not isinstance(array, np.ndarray):
            raise WireError("tensors that are not arrays")
        if rows is not None and (type(rows) is not int or array.shape[:1] != (rows,)):
            raise WireError("tensors without a shared first axis")
    return Tensors(tensors, rows)


def _value(cursor: Cursor, rows: int | None, value: Any) -> Value:
    inner = unpack(value, cursor)
    if rows is not None and (not isinstance(inner, list) or type(rows) is not int or len(inner) != rows):
        raise WireError("a value that does not have its rows")
    return Value(inner, rows)


def _name(name: Any, kinds: Any) -> Any:
    if not isinstance(name, kinds) or isinstance(name, bool):
        raise WireError("a column with an impossible name")
    return name


KINDS: Final[dict[str, Callable[..., Any]]] = {
    "array": _array,
    "objects": _objects,
    "pieces": _pieces,
    "masked": _masked,
    "columns": _columns,
    "tensors": _tensors,
    "value": _value,
    "scalar": lambda cursor, dtype: _array(cursor, dtype, [])[()],
    "bytes": lambda cursor, size: cursor.take(size).tobytes(),
    "tuple": lambda cursor, items: tuple(unpack(items, cursor)),
    "dict": _dict,
    "datetime": lambda cursor, text: datetime.fromisoformat(text),
    "date": lambda cursor, text: date.fromisoformat(text),
    "time": lambda cursor, text: time.fromisoformat(text),
    "timedelta": lambda cursor, days, seconds, micros: timedelta(days, seconds, micros),
    "decimal": lambda cursor, text: Decimal(text),
    "opaque": lambda cursor, kind: Opaque(_name(kind, str)),
    "complex": lambda cursor, real, imag: complex(real, imag),
}
