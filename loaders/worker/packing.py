"""Writes values as a JSON header and raw buffers, the content of a frame (the format is in `wire`).

JSON values go into the header unchanged. Arrays and bytes go into a `Body`, in order, and the header refers
to them. Must not know frames or sockets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loaders.batch import Columns, Tensors, Value
from loaders.plain import opened

if TYPE_CHECKING:
    from typing import TypeAlias

Array: TypeAlias = "np.ndarray[Any, Any]"
Segment: TypeAlias = "memoryview | bytes"

MAX_FRAME: Final = 1 << 31
ALIGN: Final = 16
TAG: Final = "~"
JSON: Final = json.JSONEncoder(ensure_ascii=True, check_circular=False, separators=(",", ":"))
PLAIN: Final = frozenset({str, int, float, bool, type(None)})
_KEYS: Final = (str, int, float, bytes, type(None), np.generic, date, time, timedelta, Decimal, complex)
RAW_KINDS: Final = frozenset("biufcSUMm")
JOIN_BELOW: Final = 4096
#: Bytes that lists and objects, and their items, take in the reader's memory.
_LIST_BYTES, _ITEM_BYTES, _DICT_BYTES, _MEMBER_BYTES = 72, 32, 232, 100
#: A longer list is sent in pieces of at most this many items, or about this many bytes of memory.
_PIECE_FROM: Final = 1_000
_PIECE_ITEMS: Final = 8_192
_PIECE_WEIGHT: Final = 1 << 20


class WireError(Exception):
    """A value that cannot be sent, or a malformed frame."""


class TooLarge(WireError):
    """A value that exceeds the memory limit."""


class Body:
    """The buffers of one frame, in order. Joins small ones; does not copy large ones."""

    def __init__(self, limit: int, *, lenient: bool) -> None:
        self.limit = limit
        self.lenient = lenient
        self.segments: list[Segment] = []
        self.size = 0
        self.weight = 0
        self._joined = bytearray()

    def weigh(self, size: int) -> None:
        """Counts the memory of the reader's values, and of buffers before they are made contiguous."""
        self.weight += size
        if self.weight > self.limit:
            raise TooLarge(f"the value takes more than the {self.limit} bytes allowed")

    def add(self, data: Segment, *, aligned: bool = True) -> None:
        padding = -self.size % ALIGN if aligned else 0
        if len(data) < JOIN_BELOW:
            self._joined += bytes(padding)
            self._joined += data
        else:
            self._joined += bytes(padding)
            self._flush()
            self.segments.append(data)
        self.size += padding + len(data)

    def close(self) -> list[Segment]:
        self._flush()
        return self.segments

    def _flush(self) -> None:
        if self._joined:
            self.segments.append(memoryview(self._joined))
            self._joined = bytearray()


def pack(value: Any, body: Body) -> Any:
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind is list:
        if body.lenient:
            body.weigh(_LIST_BYTES + _ITEM_BYTES * len(value))
            if len(value) > _PIECE_FROM:
                return _pack_pieces(value, body)
        return value if PLAIN.issuperset(map(type, value)) else [pack(item, body) for item in value]
    if kind is dict:
        if body.lenient:
            body.weigh(_DICT_BYTES + _MEMBER_BYTES * len(value))
        if TAG not in value and all(type(key) is str for key in value):
            return {key: pack(item, body) for key, item in value.items()}
        return {TAG: ["dict", [[_pack_key(key, body), pack(item, body)] for key, item in value.items()]]}
    if kind is Columns:
        runs = _pack_columns(value.arrays, body)
        index = None if value.index is None else pack(value.index, body)
        return {TAG: ["columns", value.rows, runs, index, list(value.texts)]}
    if kind is Tensors:
        return {TAG: ["tensors", value.rows, [[name, pack(a, body)] for name, a in value.arrays.items()]]}
    if kind is Value:
        return {TAG: ["value", value.rows, pack(value.value, body)]}
    if isinstance(value, np.ndarray):
        return _pack_array(value, body)
    if isinstance(value, np.generic):
        if value.dtype.kind not in RAW_KINDS:
            if body.lenient:
                return pack(value.item(), body)
            raise WireError(f"a numpy {kind.__name__} cannot leave the process")
        return {TAG: ["scalar", *_raw(np.asarray(value), body)[:1]]}
    return _pack_object(value, body)


def _pack_object(value: Any, body: Body) -> Any:
    if isinstance(value, (bytes, bytearray, memoryview)):
        raw = value if isinstance(value, bytes) else bytes(value)
        body.add(raw)
        return {TAG: ["bytes", len(raw)]}
    if isinstance(value, (bool, str)):
        return str.__str__(value) if isinstance(value, str) else bool(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, list):
        return [pack(item, body) for item in value]
    if isinstance(value, tuple):
        return {TAG: ["tuple", [pack(item, body) for item in value]]}
    if isinstance(value, Mapping):
        return pack(dict(value), body)
    if isinstance(value, (datetime, timedelta)) and hasattr(value, "to_numpy"):
        return _pack_timestamp(value, body)
    if isinstance(value, datetime):
        return {TAG: ["datetime", value.isoformat()]}
    if isinstance(value, date):
        return {TAG: ["date", value.isoformat()]}
    if isinstance(value, time):
        return {TAG: ["time", value.isoformat()]}
    if isinstance(value, timedelta):
        return {TAG: ["timedelta", value.days, value.seconds, value.microseconds]}
    if isinstance(value, Decimal):
        return {TAG: ["decimal", str(value)]}
    if isinstance(value, complex):
        return {TAG: ["complex", value.real, value.imag]}
    if type(value).__name__ == "NAType":  # pandas.NA, recognised without pandas
        return None
    if body.lenient:
        return _pack_foreign(value, body)
    raise WireError(f"a {type(value).__module__}.{type(value).__qualname__} cannot leave the process")


def _pack_pieces(items: Sequence[Any], body: Body) -> Any:
    """Packs a long list as pieces of JSON text among the buffers, so that the reader can pause between
    them."""
    parts: list[Any] = []
    piece: list[Any] = []
    size, weight = body.size, body.weight
    for item in items:
        piece.append(pack(item, body))
        if type(item) is str:
            body.weigh(len(item))
        if len(piece) == _PIECE_ITEMS or body.weight - weight > _PIECE_WEIGHT:
            parts.append(_pack_piece(piece, body, plain=body.size == size))
            piece, size, weight = [], body.size, body.weight
    if piece:
        parts.append(_pack_piece(piece, body, plain=body.size == size))
    return {TAG: ["pieces", parts]}


def _pack_piece(piece: list[Any], body: Body, *, plain: bool) -> Any:
    if not plain:
        return piece  # its buffers are in the body already, so it must be read before them
    text = JSON.encode(piece).encode("ascii")
    body.add(text)
    return len(text)


def _pack_foreign(value: Any, body: Body) -> Any:
    """Packs a value that only answers may contain in the form that JSON gives it."""
    if isinstance(value, (Set, Sequence)):
        return [pack(item, body) for item in value]
    inside = opened(value)
    if inside is not value:
        return pack(inside, body)
    return {TAG: ["opaque", type(value).__name__]}


def _pack_key(key: Any, body: Body) -> Any:
    """Packs a key. Only these types are possible keys in JSON."""
    if body.lenient and not isinstance(key, _KEYS):
        return {TAG: ["opaque", type(key).__name__]}
    return pack(key, body)


def _pack_timestamp(value: Any, body: Body) -> Any:
    """Packs a pandas Timestamp or Timedelta with its nanoseconds or its offset; NaT becomes numpy's."""
    if value != value or getattr(value, "tzinfo", None) is None:
        return pack(value.to_numpy(), body)
    return {TAG: ["datetime", value.to_pydatetime(warn=False).isoformat()]}


def _pack_columns(arrays: Mapping[str | int, Array], body: Body) -> list[Any]:
    """Packs adjacent columns of the same dtype as one block, [dtype, names], which makes small tables cheap.
    Packs other columns as [None, name, array]."""
    runs: list[Any] = []
    for name, array in arrays.items():
        if type(array) is not np.ndarray or array.dtype.kind not in RAW_KINDS or not array.dtype.itemsize:
            runs.append([None, name, pack(array, body)])
            continue
        dtype = array.dtype.str
        begins = not runs or runs[-1][0] != dtype
        if begins:
            runs.append([dtype, []])
        runs[-1][1].append(name)
        if body.lenient:
            body.weigh(array.nbytes)
        data = (
            array.tobytes() if array.nbytes < JOIN_BELOW else np.ascontiguousarray(array).view(np.uint8).data
        )
        body.add(data, aligned=begins)
    return runs


def _pack_array(array: Array, body: Body) -> Any:
    if isinstance(array, np.ma.MaskedArray):
        data = _pack_array(np.asarray(array.data), body)
        return {TAG: ["masked", data, _pack_array(np.ma.getmaskarray(array), body)]}
    if array.dtype.kind == "V" and not body.lenient:
        raise WireError("a structured array cannot leave the process; return one array per field")
    if array.dtype.kind not in RAW_KINDS:
        if body.lenient:
            body.weigh(array.nbytes)
        return {TAG: ["objects", list(array.shape), pack(array.reshape(-1).tolist(), body)]}
    return {TAG: ["array", *_raw(array, body)]}


def _raw(array: Array, body: Body) -> tuple[str, list[int]]:
    if array.dtype.itemsize == 0:
        array = array.astype(array.dtype.kind + "1")
    if body.lenient:
        body.weigh(array.nbytes)
    if array.nbytes < JOIN_BELOW:
        body.add(array.tobytes())
    else:
        body.add(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return array.dtype.str, list(array.shape)
