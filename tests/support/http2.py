"""A client of HTTP/2 that sends what a well-behaved one does not: gRPC messages without their end.

It keeps to the server's windows. Source of the frames: RFC 9113, 4.1 and 6; of a message: gRPC over HTTP/2.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import dataclass, field

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _WINDOW = 0, 1, 3, 4, 6, 8
_ACK = _END_STREAM = 1
_END_HEADERS = 4
_INITIAL_WINDOW = 4
_WINDOW_BYTES = 65_535
_FRAME_BYTES = 16_384


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _headers(path: str) -> bytes:
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x"}
    fields |= {"content-type": "application/grpc", "te": "trailers"}
    pairs = [text.encode() for pair in fields.items() for text in pair]
    sized = [bytes([len(text)]) + text for text in pairs]
    return b"".join(b"\0" + name + value for name, value in zip(sized[::2], sized[1::2], strict=True))


@dataclass
class _Call:
    window: int
    left: int
    prefix: bytes


@dataclass
class Unfinished:
    """Calls on one connection, each with a message whose last byte never comes. `open`: by number; `ended`:
    those that the server has ended."""

    connection: socket.socket
    open: dict[int, _Call] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    _received: bytes = b""
    _window: int = _WINDOW_BYTES
    _initial: int = _WINDOW_BYTES
    _last: int = -1

    def __post_init__(self) -> None:
        self.connection.settimeout(0.01)
        self.connection.sendall(_PREFACE + _frame(_SETTINGS, 0, 0))

    def begin(self, path: str, size: int) -> None:
        """Begins a call with a message of `size` bytes."""
        self._last += 2
        self.connection.sendall(_frame(_HEADERS, _END_HEADERS, self._last, _headers(path)))
        self.open[self._last] = _Call(self._initial, size, b"\0" + size.to_bytes(4, "big"))

    def go_on(self) -> int:
        """Reads what the server says, then sends what the windows allow. Returns the bytes sent."""
        with suppress(TimeoutError):
            self._received += self.connection.recv(1 << 16)
        while len(self._received) >= 9:
            end = 9 + int.from_bytes(self._received[:3], "big")
            if len(self._received) < end:
                break
            frame, self._received = self._received[:end], self._received[end:]
            self._said(frame[3], frame[4], int.from_bytes(frame[5:9], "big"), frame[9:])
        return sum(self._send(number, call) for number, call in self.open.items())

    def _said(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == _SETTINGS and not flags & _ACK:
            for at in range(0, len(payload), 6):
                if int.from_bytes(payload[at : at + 2], "big") == _INITIAL_WINDOW:
                    initial = int.from_bytes(payload[at + 2 : at + 6], "big")
                    for call in self.open.values():
                        call.window += initial - self._initial
                    self._initial = initial
            self.connection.sendall(_frame(_SETTINGS, _ACK, 0))
        elif kind == _PING and not flags & _ACK:
            self.connection.sendall(_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW and number == 0:
            self._window += int.from_bytes(payload, "big")
        elif kind == _WINDOW and number in self.open:
            self.open[number].window += int.from_bytes(payload, "big")
        elif kind == _RESET or (kind == _HEADERS and flags & _END_STREAM):
            self.ended.add(number)
            self.open.pop(number, None)

    def _send(self, number: int, call: _Call) -> int:
        size = min(call.window, self._window, _FRAME_BYTES, len(call.prefix) + call.left - 1)
        if size <= 0:
            return 0
        payload = (call.prefix + bytes(size))[:size]
        call.left -= size - min(size, len(call.prefix))
        call.prefix = call.prefix[size:]
        call.window -= size
        self._window -= size
        self.connection.sendall(_frame(_DATA, 0, number, payload))
        return size
