"""Messages between the gateway and a model process: a JSON header and raw buffers, never a pickle.

A frame is

    4 bytes   b"mgw1"
    4 bytes   length of the header, unsigned, little-endian, a multiple of 16
    8 bytes   length of the body, unsigned, little-endian
    header    JSON (ASCII, padded with spaces): the message, an object
    body      the buffers, in the order in which the header refers to them

`packing` writes values into header and body, `unpacking` reads them. JSON values are in the header unchanged.
Every other value is `{"~": [kind, …]}`. For example, an array is `{"~": ["array", dtype, shape]}` and takes
the next bytes of the body (aligned to 16). An object with the key "~" is written as a list of pairs. The
reader takes the buffers in order and must end exactly at the body's end, so a header cannot claim the same
bytes twice.

The frame of a call to a pack comes after 16 bytes that name the model:

    4 bytes   b"mgwt"
    4 bytes   the number of the model, unsigned, little-endian
    8 bytes   zero

Reading executes nothing. A frame with false lengths is a `WireError`, and costs no more memory than the bytes
received. Must not know models or processes. Sockets are an argument; blocking and non-blocking ones work.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Mapping
from decimal import InvalidOperation
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loaders.compat.pythons import dataclass
from loaders.worker import shortcuts
from loaders.worker.packing import ALIGN, JOIN_BELOW, JSON, Body, pack
from loaders.worker.packing import MAX_FRAME as MAX_FRAME
from loaders.worker.packing import Array as Array
from loaders.worker.packing import Segment as Segment
from loaders.worker.packing import TooLarge as TooLarge
from loaders.worker.packing import WireError as WireError
from loaders.worker.unpacking import Cursor, unpack

if TYPE_CHECKING:
    import socket

    from loaders.batch import Batch

MAX_HEADER: Final = 1 << 28

_MAGIC: Final = b"mgw1"
_ADDRESS: Final = b"mgwt"
_PREFIX: Final = struct.Struct("<4sIQ")
_SMALL: Final = 1 << 16
_READ_AT_ONCE: Final = 1 << 20
_SEGMENTS_AT_ONCE: Final = 512
#: A header up to this length is parsed without estimating its memory first.
_UNWEIGHED: Final = 1 << 16


def encode(message: Mapping[str, Any], limit: int = MAX_FRAME, *, lenient: bool = False) -> deque[Segment]:
    """Encodes a message as the pieces of its frame, for `transmit`. Refers to large arrays without a copy, so
    they must not change before the frame is sent.

    A value may be a JSON value, a batch, a numpy array or scalar, bytes, a tuple, a date, a time, a Decimal,
    a complex number, or a list or dict of these. Raises WireError for any other value, for one nested deeper
    than Python's stack, and for a frame over `limit` bytes.

    `lenient` is for a model's answers. Sets and other sequences become lists, enumerations their values,
    UUIDs text, dataclasses and pydantic models dicts, structured arrays tuples. Any other value becomes the
    name of its type (`Opaque`), so that the error about the answer can name it.
    """
    if lenient and (quick := _encode_answer(message, limit)) is not None:
        return deque((quick,))
    body = Body(limit, lenient=lenient)
    try:
        packed = pack(dict(message), body)
        header = JSON.encode(packed).encode("ascii")
    except RecursionError:
        raise WireError("the value is nested too deeply, or holds itself") from None
    except ValueError as error:  # a number with more digits than Python converts to text
        raise WireError(f"the value cannot be written: {error}") from None
    header += b" " * (-len(header) % ALIGN)
    if len(header) > MAX_HEADER or len(header) + body.size > limit:
        raise TooLarge(f"the message takes {len(header) + body.size} bytes, more than the {limit} allowed")
    prefix = _PREFIX.pack(_MAGIC, len(header), body.size)
    pieces = body.close()
    if body.size < JOIN_BELOW:
        return deque([b"".join([prefix, header, *pieces])])
    return deque([prefix + header, *pieces])


def encode_call(op: str, batch: Batch) -> bytes | None:
    """The frame of `{"op": op, "batch": batch, "params": {}}` for a small table of numbers of one dtype, or
    for one small array of numbers: the bytes that `encode` makes. None for any other batch."""
    known = shortcuts.call(op, batch)
    if known is None:
        return None
    header, size, buffers = known
    return b"".join((_PREFIX.pack(_MAGIC, len(header), size), header, *buffers))


def _encode_answer(message: Mapping[str, Any], limit: int) -> bytes | None:
    """The frame of a small answer; None for any other message."""
    known = shortcuts.answer(message) if limit > 2 * JOIN_BELOW else None
    if known is None:
        return None
    header, data = known
    return b"".join((_PREFIX.pack(_MAGIC, len(header), len(data)), header, data))


def address(model: int) -> bytes:
    """What precedes the frame of a call to the model with this number."""
    return _PREFIX.pack(_ADDRESS, model, 0)


def size(data: bytes | bytearray) -> int | None:
    """The bytes of the frame with which `data` begins; None if that is not known yet. Raises WireError."""
    if len(data) < _PREFIX.size:
        return None
    magic, header, body = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise WireError("this is not a frame")
    return int(_PREFIX.size + header + body)


def loads(data: bytes, budget: int | None = None) -> dict[str, Any]:
    """Decodes one whole frame, the joined pieces of `encode`. Its arrays may be changed. `budget` as in
    `decode`. Raises WireError."""
    if len(data) < _PREFIX.size:
        raise WireError("the frame is too short")
    magic, header, body = _PREFIX.unpack_from(data)
    if magic != _MAGIC or header % ALIGN or len(data) != _PREFIX.size + header + body:
        raise WireError("this is not one frame")
    return decode(np.frombuffer(bytearray(data), np.uint8, offset=_PREFIX.size), header, budget)


@dataclass(slots=True, eq=False)
class Framed:
    """A batch already encoded as part of a message to a model process. `rows` as in the batch. The frame is
    forwarded without decoding."""

    rows: int | None
    frame: Array
    header: int

    def pieces(self) -> deque[Segment]:
        """Returns the frame, for `transmit`."""
        prefix = _PREFIX.pack(_MAGIC, self.header, len(self.frame) - self.header)
        return deque([prefix, self.frame.data])

    def message(self) -> dict[str, Any]:
        """Decodes the message. Raises WireError."""
        return decode(self.frame, self.header)


def transmit(sock: socket.socket, pieces: deque[Segment]) -> None:
    """Sends the pieces, and removes sent bytes from `pieces`. On a non-blocking socket, raises
    BlockingIOError when it is full: call again with the remaining pieces. Raises OSError if the other end is
    closed."""
    while pieces:
        if len(pieces) <= _SEGMENTS_AT_ONCE:
            sent = sock.sendmsg(pieces)
        else:
            sent = sock.sendmsg([pieces[i] for i in range(_SEGMENTS_AT_ONCE)])
        while pieces and sent >= len(pieces[0]):
            sent -= len(pieces.popleft())
        if sent:
            pieces[0] = memoryview(pieces[0])[sent:]


class Reader:
    """Reads frames from one stream socket. `pull` receives bytes, `next` returns complete messages. `model`:
    the number in front of the last frame."""

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self._limit = limit
        self._small = memoryview(bytearray(_SMALL))
        self._start = self._end = 0
        self._frame: Array | None = None  # a frame larger than `_small`, being filled
        self._filled = 0
        self._header = 0
        self.model = 0

    @property
    def partial(self) -> bool:
        """True while the stream is inside a frame."""
        return self._end > self._start or self._frame is not None

    def pull(self, sock: socket.socket) -> bool:
        """Receives available bytes, at most a megabyte. Returns False at the end of the stream. On a
        non-blocking socket without bytes, raises BlockingIOError."""
        if self._frame is not None:
            rest = self._frame[self._filled : self._filled + _READ_AT_ONCE].data
            got = sock.recv_into(rest)
            self._filled += got
            return got > 0
        small, start, end = self._small, self._start, self._end
        if start:
            end -= start
            small[:end] = bytes(small[start : start + end])
            self._start = 0
        got = sock.recv_into(small[end:] if end else small)
        self._end = end + got
        return got > 0

    def next(self) -> dict[str, Any] | None:
        """Returns the next complete message, or None. Raises WireError."""
        whole = self.frame()
        return None if whole is None else decode(*whole)

    def frame(self) -> tuple[Array, int] | None:
        """Returns the next complete frame for `decode`, or None. The number is the header's length, which
        determines the cost of decoding. Raises WireError."""
        if self._frame is not None:
            if self._filled < len(self._frame):
                return None
            frame, self._frame = self._frame, None
            return frame, self._header
        small, start, end = self._small, self._start, self._end
        if end - start < _PREFIX.size:
            return None
        magic, header, body = _PREFIX.unpack_from(small, start)
        start += _PREFIX.size
        model = 0
        if magic == _ADDRESS:
            if end - start < _PREFIX.size:
                return None
            model = header
            magic, header, body = _PREFIX.unpack_from(small, start)
            start += _PREFIX.size
        if magic != _MAGIC or header % ALIGN or not header:
            raise WireError("the stream does not contain frames")
        size = header + body
        if header > MAX_HEADER or size > self._limit:
            raise WireError(f"a frame of {size} bytes is over the limit")
        present = end - start
        if present >= size:
            self._start, self.model = start + size, model
            return np.frombuffer(bytearray(small[start : start + size]), np.uint8), header
        if size <= _SMALL - 2 * _PREFIX.size:
            return None
        try:
            frame = np.empty(size, np.uint8)  # pages take no memory until they are written
        except MemoryError:
            raise WireError(f"no memory for a frame of {size} bytes") from None
        frame[:present] = np.frombuffer(small, np.uint8, present, start)
        self._start, self._end, self.model = 0, 0, model
        self._frame, self._filled, self._header = frame, present, header
        return None


def receive(sock: socket.socket, reader: Reader) -> dict[str, Any] | None:
    """Returns the next message of a blocking socket; None at the end of the stream. Raises WireError and
    OSError."""
    while (whole := reader.frame()) is None:
        if not reader.pull(sock):
            if reader.partial:
                raise WireError("the stream ended inside a frame")
            return None
    return decode(*whole)


def decode(frame: Array, header: int, budget: int | None = None) -> dict[str, Any]:
    """Decodes a message from the bytes of its header and body. Arrays are views of `frame`. `budget`: the
    maximum bytes of lists, objects and text in memory. Raises WireError."""
    known = shortcuts.read(frame, header)
    if known is not None:
        return known
    cursor = Cursor(frame[header:], budget)
    try:
        message = unpack(cursor.json(frame[:header], _UNWEIGHED), cursor)
        cursor.close()
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, InvalidOperation) as error:
        raise WireError(f"the frame is not well formed: {error}") from None
    except (RecursionError, MemoryError):
        raise WireError("the frame is nested too deeply or too large") from None
    if not isinstance(message, dict):
        raise WireError("the frame contains no message")
    shortcuts.learn(frame, header, message)
    return message
