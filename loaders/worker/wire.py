"""Messages between the gateway and a model process: a JSON header and raw buffers, never pickle.

A frame is

    4 bytes   b"mgw1"
    4 bytes   length of the header, unsigned, little-endian, a multiple of 16
    8 bytes   length of the body, unsigned, little-endian
    header    JSON (ASCII, padded with spaces): the message, an object
    body      the buffers the header refers to, in the order in which it refers to them

Values that JSON can hold are in the header unchanged. Everything else is `{"~": [kind, …]}`: an array is
`{"~": ["array", dtype, shape]}` and takes the next bytes of the body (aligned to 16), and so on; an
object that has the key "~" itself is written as a list of pairs. The reader takes the buffers in
order and must end exactly at the body's end, so a header cannot claim the same bytes twice.

Nothing executes on reading. A frame that lies about itself is a `WireError`, and costs no more memory
than the bytes that really came. This module must not know about sockets' owners, models or processes.
Sockets are an argument; blocking and non-blocking ones both work.
"""

from __future__ import annotations

import enum
import json
import math
import re
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from datetime import date, datetime, time, timedelta
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loaders.batch import Columns, Opaque, Tensors, Value
from loaders.compat.pythons import dataclass, zipped
from loaders.plain import opened
from loaders.weight import counted

if TYPE_CHECKING:
    import socket
    from typing import TypeAlias

Array: TypeAlias = "np.ndarray[Any, Any]"
Segment: TypeAlias = "memoryview | bytes"

MAX_HEADER: Final = 1 << 28
MAX_FRAME: Final = 1 << 31

_MAGIC: Final = b"mgw1"
_PREFIX: Final = struct.Struct("<4sIQ")
_ALIGN: Final = 16
_TAG: Final = "~"
_JSON: Final = json.JSONEncoder(ensure_ascii=True, check_circular=False, separators=(",", ":"))
_PLAIN: Final = frozenset({str, int, float, bool, type(None)})
_KEYS: Final = (str, int, float, bytes, type(None), np.generic, date, time, timedelta, Decimal, complex)
_RAW_KINDS: Final = frozenset("biufcSUMm")
_RAW_DTYPE: Final = re.compile(r"[<>|=][biufcSUMm][1-9]\d{0,9}(\[\d*[A-Za-z]{1,2}\])?\Z")
_JOIN_BELOW: Final = 4096
_SMALL: Final = 1 << 16
_READ_AT_ONCE: Final = 1 << 20
_SEGMENTS_AT_ONCE: Final = 512
#: What lists and objects, and what they hold, take in the reader's memory, in bytes.
_LIST_BYTES, _ITEM_BYTES, _DICT_BYTES, _MEMBER_BYTES = 72, 32, 232, 100
#: A list of more items is sent in pieces of at most so many items, or about so many bytes of memory.
_PIECE_FROM: Final = 1_000
_PIECE_ITEMS: Final = 8_192
_PIECE_WEIGHT: Final = 1 << 20
#: A header up to this length is read without being weighed before.
_UNWEIGHED: Final = 1 << 16


class WireError(Exception):
    """A value that cannot be sent, or a frame that is not what it says."""


class TooLarge(WireError):
    """A value that takes more memory than it may."""


# ---- writing ------------------------------------------------------------------------------------------


class _Body:
    """The buffers of one frame, in order: small ones joined, large ones left where they are."""

    def __init__(self, limit: int, *, lenient: bool) -> None:
        self.limit = limit
        self.lenient = lenient
        self.segments: list[Segment] = []
        self.size = 0
        self.weight = 0
        self._joined = bytearray()

    def weigh(self, size: int) -> None:
        """Counts memory that the reader's values will take, and buffers before they are made contiguous."""
        self.weight += size
        if self.weight > self.limit:
            raise TooLarge(f"the value takes more than the {self.limit} bytes allowed")

    def add(self, data: Segment, *, aligned: bool = True) -> None:
        padding = -self.size % _ALIGN if aligned else 0
        if len(data) < _JOIN_BELOW:
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


def encode(message: Mapping[str, Any], limit: int = MAX_FRAME, *, lenient: bool = False) -> deque[Segment]:
    """A message as the pieces of its frame, for `transmit`. Large arrays are referred to, not copied: they
    must not change before the frame is gone.

    A value may be what JSON holds, a batch, a numpy array or scalar, bytes, a tuple, a date, a time, a
    Decimal, a complex number, or a list or dict of these. Raises WireError for any other, for one nested
    deeper than Python's stack, and for a frame over `limit` bytes.

    `lenient` is for what a model answers: sets and other sequences go as lists, enumerations as their values,
    UUIDs as text, dataclasses and pydantic models as dicts, structured arrays as tuples, and any
    other value as the name of its type (`Opaque`), so that the error about the answer can name it.
    """
    body = _Body(limit, lenient=lenient)
    try:
        packed = _pack(dict(message), body)
        header = _JSON.encode(packed).encode("ascii")
    except RecursionError:
        raise WireError("the value is nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python turns into text
        raise WireError(f"the value cannot be written: {error}") from None
    header += b" " * (-len(header) % _ALIGN)
    if len(header) > MAX_HEADER or len(header) + body.size > limit:
        raise TooLarge(f"the message takes {len(header) + body.size} bytes, more than the {limit} allowed")
    prefix = _PREFIX.pack(_MAGIC, len(header), body.size)
    pieces = body.close()
    if body.size < _JOIN_BELOW:
        return deque([b"".join([prefix, header, *pieces])])
    return deque([prefix + header, *pieces])


@dataclass(slots=True, eq=False)
class Framed:
    """A batch that is already encoded as part of a message to a model process. `rows` as in the batch.
    The frame is passed on unread."""

    rows: int | None
    frame: Array
    header: int

    def pieces(self) -> deque[Segment]:
        """The frame, for `transmit`."""
        prefix = _PREFIX.pack(_MAGIC, self.header, len(self.frame) - self.header)
        return deque([prefix, self.frame.data])

    def message(self) -> dict[str, Any]:
        """The message, read. Raises WireError."""
        return decode(self.frame, self.header)


def transmit(sock: socket.socket, pieces: deque[Segment]) -> None:
    """Sends the pieces, and takes from `pieces` what has gone. On a non-blocking socket raises
    BlockingIOError when it is full: call again with what is left. Raises OSError if the other end is gone."""
    while pieces:
        sent = sock.sendmsg([pieces[i] for i in range(min(len(pieces), _SEGMENTS_AT_ONCE))])
        while pieces and sent >= len(pieces[0]):
            sent -= len(pieces.popleft())
        if sent:
            pieces[0] = memoryview(pieces[0])[sent:]


def _pack(value: Any, body: _Body) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list:
        if body.lenient:
            body.weigh(_LIST_BYTES + _ITEM_BYTES * len(value))
            if len(value) > _PIECE_FROM:
                return _pack_pieces(value, body)
        return value if _PLAIN.issuperset(map(type, value)) else [_pack(item, body) for item in value]
    if kind is dict:
        if body.lenient:
            body.weigh(_DICT_BYTES + _MEMBER_BYTES * len(value))
        if _TAG not in value and all(type(key) is str for key in value):
            return {key: _pack(item, body) for key, item in value.items()}
        return {_TAG: ["dict", [[_pack_key(key, body), _pack(item, body)] for key, item in value.items()]]}
    if kind is Columns:
        runs = _pack_columns(value.arrays, body)
        index = None if value.index is None else _pack(value.index, body)
        return {_TAG: ["columns", value.rows, runs, index, list(value.texts)]}
    if kind is Tensors:
        return {_TAG: ["tensors", value.rows, [[name, _pack(a, body)] for name, a in value.arrays.items()]]}
    if kind is Value:
        return {_TAG: ["value", value.rows, _pack(value.value, body)]}
    if isinstance(value, np.ndarray):
        return _pack_array(value, body)
    if isinstance(value, np.generic):
        if value.dtype.kind not in _RAW_KINDS:
            if body.lenient:
                return _pack(value.item(), body)
            raise WireError(f"a numpy {kind.__name__} cannot leave the process")
        return {_TAG: ["scalar", *_raw(np.asarray(value), body)[:1]]}
    return _pack_object(value, body)


def _pack_object(value: Any, body: _Body) -> Any:
    if isinstance(value, (bytes, bytearray, memoryview)):
        raw = value if isinstance(value, bytes) else bytes(value)
        body.add(raw)
        return {_TAG: ["bytes", len(raw)]}
    if isinstance(value, (bool, str)):
        return str.__str__(value) if isinstance(value, str) else bool(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, list):
        return [_pack(item, body) for item in value]
    if isinstance(value, tuple):
        return {_TAG: ["tuple", [_pack(item, body) for item in value]]}
    if isinstance(value, Mapping):
        return _pack(dict(value), body)
    if isinstance(value, (datetime, timedelta)) and hasattr(value, "to_numpy"):
        return _pack_timestamp(value, body)
    if isinstance(value, datetime):
        return {_TAG: ["datetime", value.isoformat()]}
    if isinstance(value, date):
        return {_TAG: ["date", value.isoformat()]}
    if isinstance(value, time):
        return {_TAG: ["time", value.isoformat()]}
    if isinstance(value, timedelta):
        return {_TAG: ["timedelta", value.days, value.seconds, value.microseconds]}
    if isinstance(value, Decimal):
        return {_TAG: ["decimal", str(value)]}
    if isinstance(value, complex):
        return {_TAG: ["complex", value.real, value.imag]}
    if type(value).__name__ == "NAType":  # pandas.NA, known without pandas
        return None
    if body.lenient:
        return _pack_foreign(value, body)
    raise WireError(f"a {type(value).__module__}.{type(value).__qualname__} cannot leave the process")


def _pack_pieces(items: Sequence[Any], body: _Body) -> Any:
    """A long list as pieces of JSON text among the buffers, so that the reader can pause between them."""
    parts: list[Any] = []
    piece: list[Any] = []
    size, weight = body.size, body.weight
    for item in items:
        piece.append(_pack(item, body))
        if type(item) is str:
            body.weigh(len(item))
        if len(piece) == _PIECE_ITEMS or body.weight - weight > _PIECE_WEIGHT:
            parts.append(_pack_piece(piece, body, plain=body.size == size))
            piece, size, weight = [], body.size, body.weight
    if piece:
        parts.append(_pack_piece(piece, body, plain=body.size == size))
    return {_TAG: ["pieces", parts]}


def _pack_piece(piece: list[Any], body: _Body, *, plain: bool) -> Any:
    if not plain:
        return piece  # its buffers are in the body already: it must be read before them
    text = _JSON.encode(piece).encode("ascii")
    body.add(text)
    return len(text)


def _pack_foreign(value: Any, body: _Body) -> Any:
    """Packs a value that only answers may contain in the form that JSON gives it."""
    if isinstance(value, enum.Enum):
        return _pack(value.value, body)
    if isinstance(value, (Set, Sequence)):
        return [_pack(item, body) for item in value]
    inside = opened(value)
    if inside is not value:
        return _pack(inside, body)
    return {_TAG: ["opaque", type(value).__name__]}


def _pack_key(key: Any, body: _Body) -> Any:
    """A key must come out as something that can be one: JSON knows no others than these."""
    if body.lenient and not isinstance(key, _KEYS):
        return {_TAG: ["opaque", type(key).__name__]}
    return _pack(key, body)


def _pack_timestamp(value: Any, body: _Body) -> Any:
    """A pandas Timestamp or Timedelta: to the nanosecond, or with its offset; NaT as numpy's."""
    if value != value or getattr(value, "tzinfo", None) is None:
        return _pack(value.to_numpy(), body)
    return {_TAG: ["datetime", value.to_pydatetime(warn=False).isoformat()]}


def _pack_columns(arrays: Mapping[str | int, Array], body: _Body) -> list[Any]:
    """Neighbours of one dtype go as one block: [dtype, names]. A small table costs little that way.
    All other columns as [None, name, array]."""
    runs: list[Any] = []
    for name, array in arrays.items():
        if type(array) is not np.ndarray or array.dtype.kind not in _RAW_KINDS or not array.dtype.itemsize:
            runs.append([None, name, _pack(array, body)])
            continue
        dtype = array.dtype.str
        begins = not runs or runs[-1][0] != dtype
        if begins:
            runs.append([dtype, []])
        runs[-1][1].append(name)
        if body.lenient:
            body.weigh(array.nbytes)
        data = (
            array.tobytes() if array.nbytes < _JOIN_BELOW else np.ascontiguousarray(array).view(np.uint8).data
        )
        body.add(data, aligned=begins)
    return runs


def _pack_array(array: Array, body: _Body) -> Any:
    if isinstance(array, np.ma.MaskedArray):
        data = _pack_array(np.asarray(array.data), body)
        return {_TAG: ["masked", data, _pack_array(np.ma.getmaskarray(array), body)]}
    if array.dtype.kind == "V" and not body.lenient:
        raise WireError("a structured array cannot leave the process; answer with one array a field")
    if array.dtype.kind not in _RAW_KINDS:
        if body.lenient:
            body.weigh(array.nbytes)
        return {_TAG: ["objects", list(array.shape), _pack(array.reshape(-1).tolist(), body)]}
    return {_TAG: ["array", *_raw(array, body)]}


def _raw(array: Array, body: _Body) -> tuple[str, list[int]]:
    if array.dtype.itemsize == 0:
        array = array.astype(array.dtype.kind + "1")
    if body.lenient:
        body.weigh(array.nbytes)
    if array.nbytes < _JOIN_BELOW:
        body.add(array.tobytes())
    else:
        body.add(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return array.dtype.str, list(array.shape)


# ---- reading ------------------------------------------------------------------------------------------


class Reader:
    """Frames out of one stream socket. `pull` takes bytes from it, `next` gives the messages they make."""

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self._limit = limit
        self._small = bytearray(_SMALL)
        self._end = 0
        self._frame: Array | None = None  # a frame larger than `_small`, being filled
        self._filled = 0
        self._header = 0

    @property
    def partial(self) -> bool:
        """True while the stream is inside a frame."""
        return self._end > 0 or self._frame is not None

    def pull(self, sock: socket.socket) -> bool:
        """Takes what is there, at most a megabyte; False at the end of the stream. On a non-blocking socket
        with nothing there raises BlockingIOError."""
        if self._frame is not None:
            rest = self._frame[self._filled : self._filled + _READ_AT_ONCE].data
            got = sock.recv_into(rest)
            self._filled += got
        else:
            got = sock.recv_into(memoryview(self._small)[self._end :])
            self._end += got
        return got > 0

    def next(self) -> dict[str, Any] | None:
        """The next message that has come whole, or None. Raises WireError."""
        whole = self.frame()
        return None if whole is None else decode(*whole)

    def frame(self) -> tuple[Array, int] | None:
        """The same, not yet read: what `decode` takes. The number is the length of the header, which is
        what decoding costs. Raises WireError."""
        if self._frame is not None:
            if self._filled < len(self._frame):
                return None
            frame, self._frame = self._frame, None
            return frame, self._header
        if self._end < _PREFIX.size:
            return None
        magic, header, body = _PREFIX.unpack_from(self._small)
        if magic != _MAGIC or header % _ALIGN:
            raise WireError("the stream does not hold frames")
        size = header + body
        if header > MAX_HEADER or size > self._limit:
            raise WireError(f"a frame of {size} bytes is over the limit")
        present = min(size, self._end - _PREFIX.size)
        if present < size and _PREFIX.size + size <= _SMALL:
            return None
        try:
            frame = np.empty(size, np.uint8)  # pages that are not written to take no memory
        except MemoryError:
            raise WireError(f"no memory for a frame of {size} bytes") from None
        taken = _PREFIX.size + present
        frame[:present] = np.frombuffer(self._small, np.uint8, present, _PREFIX.size)
        self._small[: self._end - taken] = self._small[taken : self._end]
        self._end -= taken
        if present == size:
            return frame, header
        self._frame, self._filled, self._header = frame, present, header
        return None


def receive(sock: socket.socket, reader: Reader) -> dict[str, Any] | None:
    """The next message of a blocking socket; None at the end of the stream. Raises WireError, OSError."""
    while (message := reader.next()) is None:
        if not reader.pull(sock):
            if reader.partial:
                raise WireError("the stream ended inside a frame")
            return None
    return message


class _Cursor:
    """The body of a frame, taken in order."""

    def __init__(self, body: Array, budget: int | None = None) -> None:
        self._body = body
        self._at = 0
        self._budget = budget

    def json(self, text: Array, unweighed: int = 0) -> Any:
        """The values of JSON text of more than `unweighed` bytes. Raises TooLarge before they are built."""
        if self._budget is not None and len(text) > unweighed:
            self._budget -= counted(text.data)
            if self._budget < 0:
                raise TooLarge("the values of the frame take more memory than they may")
        return json.loads(text.tobytes())

    def take(self, size: int) -> Array:
        start = self._at + -self._at % _ALIGN
        if size < 0 or start + size > len(self._body):
            raise WireError("a buffer reaches past the frame")
        self._at = start + size
        return self._body[start : self._at]

    def close(self) -> None:
        if self._at != len(self._body):
            raise WireError("the frame holds bytes that nothing refers to")


def decode(frame: Array, header: int, budget: int | None = None) -> dict[str, Any]:
    """A message from the bytes of its header and body. Arrays are views of `frame`. `budget`: the most bytes
    that lists, objects and text may take in memory. Raises WireError."""
    cursor = _Cursor(frame[header:], budget)
    try:
        message = _unpack(cursor.json(frame[:header], _UNWEIGHED), cursor)
        cursor.close()
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, InvalidOperation) as error:
        raise WireError(f"the frame is not well formed: {error}") from None
    except (RecursionError, MemoryError):
        raise WireError("the frame is nested too deeply or too large") from None
    if not isinstance(message, dict):
        raise WireError("the frame holds no message")
    return message


def _unpack(value: Any, cursor: _Cursor) -> Any:
    if isinstance(value, list):
        return value if _PLAIN.issuperset(map(type, value)) else [_unpack(item, cursor) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: _unpack(item, cursor) for key, item in value.items()}
    kind, *rest = value[_TAG]
    return _KINDS[kind](cursor, *rest)


def _array(cursor: _Cursor, dtype: str, shape: list[int]) -> Array:
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
    """An empty array takes no bytes whatever its other axes say: they must stay sane too."""
    if any(type(n) is not int or n < 0 for n in shape) or math.prod(n for n in shape if n) > MAX_FRAME:
        raise WireError("an array of an impossible shape")


def _pieces(cursor: _Cursor, parts: list[Any]) -> list[Any]:
    items: list[Any] = []
    for part in parts:
        piece = cursor.json(cursor.take(part)) if type(part) is int else part
        items += _unpack(piece, cursor)
    return items


def _masked(cursor: _Cursor, data: Any, mask: Any) -> Array:
    values, gaps = _unpack(data, cursor), _unpack(mask, cursor)
    if gaps.dtype.kind != "b" or gaps.shape != values.shape:
        raise WireError("a mask that does not fit its array")
    return np.ma.MaskedArray(values, mask=gaps)


def _objects(cursor: _Cursor, shape: list[int], items: list[Any]) -> Array:
    _check_shape(shape)
    values = _unpack(items, cursor)
    if len(values) != math.prod(shape):
        raise WireError("an array whose items do not fill it")
    array = np.empty(len(values), dtype=object)
    for i, item in enumerate(values):
        array[i] = item
    return array.reshape(shape)


def _columns(cursor: _Cursor, rows: int, runs: list[Any], index: Any, texts: list[Any]) -> Columns:
    if type(rows) is not int or not 0 <= rows <= MAX_FRAME:
        raise WireError("a table without rows")
    table: dict[str | int, Array] = {}
    for dtype, names, *array in runs:
        if dtype is None:
            table[_name(names, (str, int))] = _column(_unpack(array[0], cursor), rows)
            continue
        kind = _dtype(dtype)
        raw = cursor.take(kind.itemsize * rows * len(names))
        shape = (len(names), rows)
        block: Array = np.ndarray(shape, kind, buffer=raw.data) if raw.size else np.empty(shape, kind)
        for name, column in zipped(names, block):
            table[_name(name, (str, int))] = column
    labels = None if index is None else _column(_unpack(index, cursor), rows)
    return Columns(table, rows, labels, frozenset(_name(name, (str, int)) for name in texts))


def _column(array: Any, rows: int) -> Array:
    if not isinstance(array, np.ndarray) or array.shape != (rows,):
        raise WireError("a table whose columns differ in length")
    return array


def _tensors(cursor: _Cursor, rows: int | None, arrays: list[Any]) -> Tensors:
    tensors = {_name(name, str): _unpack(array, cursor) for name, array in arrays}
    if rows is not None and any(array.shape[:1] != (rows,) for array in tensors.values()):
        raise WireError("tensors without a shared first axis")
    if not all(isinstance(array, np.ndarray) for array in tensors.values()):
        raise WireError("tensors that are not arrays")
    return Tensors(tensors, rows)


def _value(cursor: _Cursor, rows: int | None, value: Any) -> Value:
    inner = _unpack(value, cursor)
    if rows is not None and (not isinstance(inner, list) or type(rows) is not int or len(inner) != rows):
        raise WireError("a value that does not have its rows")
    return Value(inner, rows)


def _name(name: Any, kinds: Any) -> Any:
    if not isinstance(name, kinds) or isinstance(name, bool):
        raise WireError("a column with an impossible name")
    return name


_KINDS: Final[dict[str, Callable[..., Any]]] = {
    "array": _array,
    "objects": _objects,
    "pieces": _pieces,
    "masked": _masked,
    "columns": _columns,
    "tensors": _tensors,
    "value": _value,
    "scalar": lambda cursor, dtype: _array(cursor, dtype, [])[()],
    "bytes": lambda cursor, size: cursor.take(size).tobytes(),
    "tuple": lambda cursor, items: tuple(_unpack(items, cursor)),
    "dict": lambda cursor, pairs: {_unpack(key, cursor): _unpack(item, cursor) for key, item in pairs},
    "datetime": lambda cursor, text: datetime.fromisoformat(text),
    "date": lambda cursor, text: date.fromisoformat(text),
    "time": lambda cursor, text: time.fromisoformat(text),
    "timedelta": lambda cursor, days, seconds, micros: timedelta(days, seconds, micros),
    "decimal": lambda cursor, text: Decimal(text),
    "opaque": lambda cursor, kind: Opaque(_name(kind, str)),
    "complex": lambda cursor, real, imag: complex(real, imag),
}
