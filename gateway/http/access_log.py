"""The access log: a line for each request, where the operator wants it (the setting `access_log`).

What it says of a request is in the request's record; sizes and the status it counts as they pass. Of a query,
a body and a caller's headers no line holds more than the request's id. What is no HTTP never becomes a
request, and has no line.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from time import perf_counter
from typing import Final

from starlette.types import Message, Receive, Scope, Send

from gateway.record import RequestRecord

#: Probes and scrapes come every few seconds and say nothing: they have no line.
QUIET: Final = frozenset({"/livez", "/readyz", "/metrics", "/ping", "/health"})
_MAX_PATH: Final = 256

log = logging.getLogger("gateway.access")


@dataclass(slots=True)
class Answered:
    """A request and its answer. `path` as it came, without its query, escaped and cut; `status` None: the
    client had left. `seconds` until the answer was given; bytes of bodies as they were sent."""

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


def enable() -> None:
    """Writes the lines at any `log_level`: the operator asked for them."""
    log.setLevel(logging.INFO)


def line(scope: Scope, record: RequestRecord) -> Line | None:
    """The line of a request that begins; None for a probe or scrape."""
    return None if scope["path"] in QUIET else Line(scope, record)


class Line:
    """Counts what passes, and is written when the request has ended."""

    def __init__(self, scope: Scope, record: RequestRecord) -> None:
        raw: bytes = scope.get("raw_path") or scope["path"].encode()
        self._record = record
        self._answered = Answered(_shown(scope["method"].encode()), _shown(raw.partition(b"?")[0]))

    def counting(self, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """The same two, counted."""
        answered = self._answered

        async def received() -> Message:
            message = await receive()
            answered.bytes_in += len(message.get("body", b""))
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered.status = message["status"]
            elif body := message.get("body", b""):
                answered.bytes_out += len(body)
                answered.seconds = perf_counter() - self._record.began
            await send(message)

        return received, sent

    def write(self) -> None:
        write(self._answered, self._record)


def write(answered: Answered, record: RequestRecord) -> None:
    """Writes the line of a request that has ended."""
    answered.seconds = answered.seconds or perf_counter() - record.began
    answered.error_code = None if record.code in ("", "2xx") else record.code
    answered.request_id = record.shown_id
    if record.version is not None:
        answered.model, answered.version = record.version.name, record.version.version
    log.info("%s", answered, extra={"event": answered})


def _shown(raw: bytes) -> str:
    """What a client chose, for one line: printable ASCII as it is, the rest escaped, and cut."""
    cut = raw[:_MAX_PATH].decode("latin-1")
    shown = "".join(c if c.isascii() and c.isprintable() else f"\\x{ord(c):02x}" for c in cut)
    return shown if len(raw) <= _MAX_PATH else f"{shown}…"
