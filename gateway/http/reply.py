"""How the answer to one request leaves: a whole answer in one piece.

uvicorn writes head and body separately, and looks at each header by itself. The event loop sends each write
at once, so an answer would take two system calls, and wake the client twice. Must not know paths or models.
"""

from __future__ import annotations

import string
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

#: A larger body is not copied to be sent with its head.
MOST_JOINED: Final = 64 * 1024
#: Headers that decide about the connection or the form of the body.
_DECIDE: Final = frozenset({b"connection", b"transfer-encoding"})
_NAME: Final = (string.ascii_lowercase + string.digits + "-_").encode()
#: What a head is written with: printable characters and tabs; bytes above ASCII are opaque.
_TEXT: Final = bytes([9, *range(32, 127), *range(128, 256)])


class Cycle(RequestResponseCycle):
    """One request and its answer. The head waits for the first part of the body, as ASGI demands. A whole
    answer is written here, any other by uvicorn."""

    _head: Any = None  # a message that waits

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start" and not self.response_started:
            self._head = message
            return
        head, self._head = self._head, None
        if head is not None:
            if self.flow.write_paused and not self.disconnected:
                await self.flow.drain()
            if self.disconnected:
                return
            whole = self._whole(head, message)
            if whole is not None:
                self.response_started = self.response_complete = True
                self.waiting_for_100_continue = False
                self.transport.write(whole)
                self.message_event.set()
                self.on_response()
                return
            await super().send(head)
        await super().send(message)

    def _whole(self, head: Any, message: Any) -> bytes | None:
        """An answer of known length that keeps the connection. None for any other, and for headers that
        uvicorn would refuse or write otherwise."""
        body = message.get("body", b"")
        if message.get("more_body") or len(body) > MOST_JOINED or not self.keep_alive or self.access_log:
            return None
        given = head["headers"]
        if given[-1:] != [(b"content-length", b"%d" % len(body))] or self.scope["method"] == "HEAD":
            return None
        headers = [*self.default_headers, *given]
        names = [name for name, _ in headers]
        if not _DECIDE.isdisjoint(names) or b"".join(names).translate(None, _NAME):
            return None
        text = b"".join([b"%b: %b\r\n" % header for header in headers])
        if text.translate(None, _TEXT) != b"\r\n" * len(headers):
            return None
        return b"".join((STATUS_LINE[head["status"]], text, b"\r\n", body))
