"""HTTP on one connection, before there is a request: limits for the head, and errors in the contract's form.

uvicorn's own protocol sets no limit on the size and duration of a head, and answers invalid HTTP in plain
text. Here each complete head is checked once, for what a proxy may read differently. Must not know paths or
models.
"""

from __future__ import annotations

import asyncio
import random
import select
import string
from collections import deque
from typing import Any, Final, Literal

from gateway.errors import Problem
from gateway.http import problems
from gateway.http.connections import SLOWEST, Connections
from gateway.http.transport import JoiningTransport

MAX_HEAD_BYTES: Final = 64 * 1024
HEAD_SECONDS: Final = 30.0
LINGER_SECONDS: Final = 1.0
SEND_SECONDS: Final = 60.0
#: The key in the scope of a request that came on a connection kept for probes and control calls.
SPARE: Final = "gateway.spare"
_BODY: Final = -1
_OFFER: Final = frozenset({b"upgrade", b"http2-settings"})
_PER_HEADER: Final = len(": \r\n")
_VERSIONS: Final = frozenset({"1.0", "1.1"})
#: What the name of a host, with a port, is written with (RFC 3986, 3.2.2).
_HOST: Final = (string.ascii_letters + string.digits + "-._~!$&'()*+,;=%:[]").encode()

#: The age at which connections end varies by this share, so that clients do not all reconnect at once.
AGE_JITTER: Final = 0.1

try:
    import httptools
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError:

    def protocol(
        max_age: float | None = None,
        connections: Connections | None = None,
        send_seconds: float = SEND_SECONDS,
    ) -> type[asyncio.Protocol] | Literal["auto"]:
        """The value for uvicorn's option `http`; without httptools, uvicorn's own choice."""
        return "auto"

else:

    class Protocol(HttpToolsProtocol):
        """A request's head has at most `MAX_HEAD_BYTES` and is complete after `head_seconds`.

        A head with a fault is answered with 400 MALFORMED_BODY, then the connection is closed. A connection
        on which nothing came is closed without an answer.

        An offer to upgrade (`Upgrade: h2c` from curl --http2 and the JDK) is ignored, as RFC 9110, 7.8
        allows: the request is answered over HTTP/1.1. The parser stops at such a head and treats the body as
        the new protocol, so a new parser gets the head without the offer.

        A client takes its answer at `SLOWEST` bytes a second at least; it may take nothing for `send_seconds`
        in all, and again after it has caught up. Otherwise the connection is ended.

        A connection older than `max_age` seconds (with jitter) ends after its next answer, which carries
        `Connection: close`.
        """

        head_seconds = HEAD_SECONDS
        max_age: float | None = None
        send_seconds = SEND_SECONDS
        limiter: Connections | None = None

        _spare = False
        _receives = False  # the rest of a body is still to come
        _slow: asyncio.TimerHandle | None = None  # runs while unsent bytes wait for the client
        _ends = float("inf")
        _offered = False
        _head = 0  # the bytes received for an incomplete head; `_BODY` after the head
        _late: asyncio.TimerHandle | None = None
        _fault = "the request is not valid HTTP"
        _refused = False

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)  # type: ignore[arg-type]
            self.transport = JoiningTransport(self.transport, self.loop)  # type: ignore[assignment]
            self._earlier: deque[Any] = deque()  # cycles that another cycle follows
            if self.limiter is not None:
                self.limiter.opened(self)
                self._spare = self.limiter.crowded
            self._late = self.loop.call_later(self.head_seconds, self._expire)
            self._patience = self.send_seconds
            if self.max_age is not None:
                self._ends = self.loop.time() + self.max_age * random.uniform(1 - AGE_JITTER, 1 + AGE_JITTER)

        def connection_lost(self, exc: Exception | None) -> None:
            self._in_time()
            if self._slow is not None:
                self._slow.cancel()
            if self.limiter is not None:
                self.limiter.closed(self)
                self.limiter.stalled += isinstance(
                    exc, TimeoutError
                )  # what the kernel says of `send_timeout`
            super().connection_lost(exc)
            # uvicorn tells only the last request that the client is gone. The request that is being answered
            # may be an earlier one: it would write to a closed transport.
            for cycle in self._earlier:
                cycle.disconnected = True
                cycle.message_event.set()

        def data_received(self, data: bytes) -> None:
            if self._refused:
                return
            if self._head != _BODY:
                self._head += len(data)
            self._unset_keepalive_if_required()
            try:
                try:
                    self.parser.feed_data(data)
                except httptools.HttpParserUpgrade as offer:
                    self._decline(data, offer)
            except httptools.HttpParserError:
                self.send_400_response("")
                return
            if self._head == _BODY:
                if self.limiter is not None:
                    self._receives = True
                    self.limiter.receiving(self, len(data))
            elif self._head > 0 and not self._refused:
                if self._head > MAX_HEAD_BYTES:
                    self._refuse(_too_large())
                elif self._late is None:
                    self._late = self.loop.call_later(self.head_seconds, self._expire)

        def on_headers_complete(self) -> None:
            # The data may include a part of the body: only then count the head exactly.
            if self._head > MAX_HEAD_BYTES and self._head_bytes() > MAX_HEAD_BYTES:
                self._fault = _too_large()
                raise ValueError(self._fault)  # stops the parser; uvicorn then calls `send_400_response`
            if (fault := _ambiguity(self.headers, self.parser.get_http_version())) is not None:
                self._fault = fault
                raise ValueError(fault)
            if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
                self._offered = True
                return
            self._head = _BODY
            self._in_time()
            before = self.cycle
            if self.limiter is not None:
                self.limiter.busy(self)
                if self._spare and self.limiter.crowded:
                    self.scope[SPARE] = True  # type: ignore[typeddict-unknown-key]
            super().on_headers_complete()
            if self.max_age is not None and self.loop.time() >= self._ends:
                self.cycle.default_headers = [*self.cycle.default_headers, problems.CLOSE]
            if self.pipeline:
                while self._earlier and self._earlier[0].response_complete:
                    self._earlier.popleft()
                self._earlier.append(before)

        def on_message_complete(self) -> None:
            if self._offered:
                return
            self._head = 0
            if self._receives and self.limiter is not None:
                self._receives = False
                self.limiter.received(self)
            super().on_message_complete()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.limiter is not None and self.cycle.response_complete:
                self.limiter.idle(self)

        def close(self) -> None:
            """Closes the connection, for `Connections`."""
            self.transport.close()
            if self.transport.get_write_buffer_size():  # otherwise it is open until the client has read it
                self.loop.call_later(LINGER_SECONDS, self.transport.abort)

        def timeout_keep_alive_handler(self) -> None:
            # A request that came while the loop was busy is still in the kernel: closing would reset it.
            if not _has_arrived(self.transport):
                self.close()

        def pause_writing(self) -> None:
            super().pause_writing()
            unsent = self.transport.get_write_buffer_size()
            self._paused = (self.loop.time(), unsent)
            self._slow = self.loop.call_later(self._patience + unsent / SLOWEST, self._give_up)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._slow is not None:
                self._slow.cancel()
                self._slow = None
                since, unsent = self._paused
                taken = unsent - self.transport.get_write_buffer_size()
                spent = self.loop.time() - since - taken / SLOWEST
                self._patience = min(self.send_seconds, max(0.0, self._patience - spent))

        def _give_up(self) -> None:
            self._slow = None
            if self.limiter is not None:
                self.limiter.stalled += 1
            self.transport.abort()

        def send_400_response(self, msg: str) -> None:
            """Called by uvicorn to answer a request that the parser refused."""
            self._refuse(self._fault)

        def _decline(self, data: bytes, offer: Any) -> None:
            """Feeds a head that offered to upgrade again, without the offer, and what follows it."""
            while True:
                data = self._declined() + data[offer.args[0] :]
                try:
                    return self.parser.feed_data(data)
                except httptools.HttpParserUpgrade as another:
                    offer = another

        def _declined(self) -> bytes:
            """The last head without its offer to upgrade, for a new parser."""
            method, version = self.parser.get_method(), self.parser.get_http_version()
            lines = [b"%s %s HTTP/%s" % (method, self.url, version.encode())]
            for name, value in self.headers:
                if name == b"connection":
                    options = [option.strip() for option in value.split(b",")]
                    value = b", ".join(o for o in options if o.lower() not in _OFFER)
                if name not in _OFFER and (value or name != b"connection"):
                    lines.append(name + b": " + value)
            self._offered = False
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            return b"\r\n".join([*lines, b"", b""])

        def _head_bytes(self) -> int:
            return len(self.url) + sum(len(name) + len(value) + _PER_HEADER for name, value in self.headers)

        def _in_time(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _expire(self) -> None:
            if self._head == 0:
                self.transport.close()
            else:
                self._refuse(f"the request's head was not complete after {self.head_seconds:g} s")

        def _refuse(self, fault: str) -> None:
            """Answers, discards for a moment what the client still sends, then closes: closing at once would
            reset the connection before the client has read the answer."""
            self._refused = True
            self._in_time()
            if self.transport.is_closing():
                return
            if self.cycle is not None and not self.cycle.response_complete:
                if not self.cycle.more_body:
                    # An earlier request still waits for its answer, which must be sent first.
                    self.cycle.keep_alive = False
                    return
                if self.cycle.response_started:
                    self.transport.close()
                    return
            self.transport.write(_answer(fault))
            if self.cycle is not None:
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def protocol(
        max_age: float | None = None,
        connections: Connections | None = None,
        send_seconds: float = SEND_SECONDS,
    ) -> type[asyncio.Protocol] | Literal["auto"]:
        """The value for uvicorn's option `http`. Connections end at the age of `max_age` seconds; None:
        never. `connections` counts them, and closes idle ones if there are too many. `send_seconds`: how long
        a client may take nothing of its answer."""
        options = {"max_age": max_age, "limiter": connections, "send_seconds": send_seconds}
        return type("Protocol", (Protocol,), options)


def _has_arrived(transport: asyncio.Transport) -> bool:
    """Whether the kernel holds bytes of the client that the loop has not read yet."""
    poll = select.poll()
    try:
        poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))
    except (OSError, ValueError, AttributeError):  # closed meanwhile
        return False


def _ambiguity(headers: list[tuple[bytes, bytes]], version: str) -> str | None:
    """Why a proxy in front may have understood the head differently, None where it cannot (RFC 9112, 3.2 and
    6.1): two readings of one connection let one client's bytes pass for the request of another. What the
    parser refuses by itself (two lengths, a length next to a coding) never comes here."""
    if version not in _VERSIONS:
        return f"HTTP/{version} is not spoken here"
    host, coding, hosts, codings = b"", b"", 0, 0
    for name, value in headers:
        if name == b"host":
            host, hosts = value, hosts + 1
        elif name == b"transfer-encoding":
            coding, codings = value, codings + 1
    if hosts != 1 and (hosts or version == "1.1"):
        return "the request has more than one Host header" if hosts else "the request has no Host header"
    if host.translate(None, _HOST):
        return "the Host header is not the name of a host"
    if codings and (version == "1.0" or codings > 1 or coding.strip().lower() != b"chunked"):
        return "the only Transfer-Encoding is chunked, in HTTP/1.1"
    return None


def _too_large() -> str:
    return f"the request's head is larger than {MAX_HEAD_BYTES // 1024} KiB"


def _answer(fault: str) -> bytes:
    hint = f"send HTTP/1.1, with a head of at most {MAX_HEAD_BYTES // 1024} KiB and without a pause in it"
    problem = Problem("MALFORMED_BODY", fault, hint=hint)
    identity = problems.request_id({})
    body = problems.document(problem, identity)
    headers: list[Any] = [*problems.header_list(problem, identity), problems.CLOSE]
    headers.append((b"content-length", b"%d" % len(body)))
    lines = [b"HTTP/1.1 400 Bad Request", *(name + b": " + value for name, value in headers), b"", body]
    return b"\r\n".join(lines)
