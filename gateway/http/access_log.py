"""The access log: a line for each request, where the operator wants it (the setting `access_log`).

It stands outside of all that answers and reads what passes: messages of ASGI, the gateway's own headers,
the code of an error. Of a query, a body and a caller's headers no line holds more than the request's id. What
is no HTTP never becomes a request, and has no line.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Final
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.http.problems import UNSENT, Header

#: Probes and scrapes come every few seconds and say nothing: they have no line.
QUIET: Final = frozenset({"/livez", "/readyz", "/metrics", "/ping", "/health"})
_MAX_PATH: Final = 256
_CODE: Final = re.compile(rb'\{"error_code":"([A-Z_]{1,64})"')

log = logging.getLogger("gateway.access")


@dataclass(slots=True)
class Answered:
    """A request and its answer. `path` as it came, without its query, escaped and cut; `status` None: nobody
    was there to answer any more. `seconds` until the answer was given; bytes of bodies as they were sent."""

    method: str
    path: str
    status: int | None = None
    error_code: str | None = None
    seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    model: str | None = None
    version: str | None = None
    request_id: str | None = None

    def __str__(self) -> str:
        outcome = f"{self.status or 'no answer'} {self.error_code or ''}".rstrip()
        model = "" if self.model is None else f", {self.model}/{self.version}"
        return (
            f"{self.method} {self.path} {outcome} in {self.seconds:.4f} s, {self.bytes_in} bytes in, "
            f"{self.bytes_out} out{model}, request {self.request_id!r}"
        )


def logged(app: ASGIApp) -> ASGIApp:
    """The application, with a line for each of its requests."""
    log.setLevel(logging.INFO)  # who asks for these lines wants them at any `log_level`

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in QUIET:
            await app(scope, receive, send)
            return
        raw: bytes = scope.get("raw_path") or scope["path"].encode()
        answered = Answered(_shown(scope["method"].encode()), _shown(raw.partition(b"?")[0]))
        began = perf_counter()

        async def counted() -> Message:
            message = await receive()
            answered.bytes_in += len(message.get("body", b""))
            return message

        async def told(message: Message) -> None:
            body = message.get("body", b"")
            if message["type"] == "http.response.start":
                _take_head(answered, message)
            elif body:
                if not answered.bytes_out and answered.status is not None and answered.status >= 400:
                    code = _CODE.match(body)
                    answered.error_code = None if code is None else code[1].decode()
                answered.bytes_out += len(body)
                answered.seconds = perf_counter() - began
            await send(message)

        try:
            await app(scope, counted, told)
        finally:
            answered.seconds = answered.seconds or perf_counter() - began
            if answered.status is None and UNSENT in scope:
                answered.error_code = "CLIENT_LEFT"
                _take_headers(answered, scope[UNSENT])
            log.info("%s", answered, extra={"event": answered})

    return serve


def _take_head(answered: Answered, message: Message) -> None:
    answered.status = message["status"]
    _take_headers(answered, message["headers"])


def _take_headers(answered: Answered, headers: Iterable[Header]) -> None:
    head = dict(headers)
    answered.request_id = head.get(b"x-request-id", b"").decode("latin-1") or None
    if b"x-model-name" in head:
        answered.model = unquote(head[b"x-model-name"].decode("latin-1"))
        answered.version = head.get(b"x-model-version", b"").decode("latin-1")


def _shown(raw: bytes) -> str:
    """What a client chose, for one line: printable ASCII as it is, the rest escaped, and cut."""
    cut = raw[:_MAX_PATH].decode("latin-1")
    shown = "".join(c if c.isascii() and c.isprintable() else f"\\x{ord(c):02x}" for c in cut)
    return shown if len(raw) <= _MAX_PATH else f"{shown}…"
