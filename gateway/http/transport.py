"""A transport that sends the head of an answer together with its body.

uvicorn writes the two separately. The event loop sends each write at once, so an answer takes two system
calls, and wakes the client twice. Must not know HTTP.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

#: A larger write is not copied to be joined with another one.
MOST_JOINED: Final = 64 * 1024


class JoiningTransport:
    """Passes everything on to `transport`. A first write of a turn of the loop waits for a second one, which
    is sent with it; at the latest it is sent in the next turn, or before the connection is closed."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._call_soon = loop.call_soon
        self._send = transport.write
        self._held = b""
        self._is_due = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        held = self._held
        if held:
            self._held = b""
            if len(data) > MOST_JOINED:
                self._send(held)
                self._send(data)
            else:
                self._send(held + data)
        elif len(data) > MOST_JOINED:
            self._send(data)
        else:
            self._held = data
            if not self._is_due:
                self._is_due = True
                self._call_soon(self._flush_late)

    def writelines(self, parts: Any) -> None:
        self.write(b"".join(parts))

    def write_eof(self) -> None:
        self._flush()
        self._transport.write_eof()

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        self._held = b""
        self._transport.abort()

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size() + len(self._held)

    def _flush_late(self) -> None:
        self._is_due = False
        self._flush()

    def _flush(self) -> None:
        held, self._held = self._held, b""
        if held and not self._transport.is_closing():
            self._send(held)
