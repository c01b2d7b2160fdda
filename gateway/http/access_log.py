"""The access log: one line per request, if the setting `access_log` is on.

Reads the request's record, and counts sizes and the status as they pass. From the query, the body and the
client's headers a line holds only the request's id. Bytes that are not valid HTTP never become a request, so
they have no line.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from time import perf_counter
from typing import Final

from starlette.types import Message, Receive, Scope, Send

from gateway.record import RequestRecord

#: Probes and scrapes come every few seconds and carry no information: they have no line.
QUIET: Final = frozenset({"/livez", "/readyz", "/metrics", "/ping", "/health"})
_MAX_PATH: Final = 256

log = logging.getLogger("gateway.access")


@dataclass(slots=True)
class Answered:
    """A request and its answer. `path`: as received, without its query, escaped and cut. `status`: None if
    the client left before the answer. `seconds`: until the answer was sent. Sizes are bytes of bodies as
    sent."""

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
    """Writes the lines at any `log_level`, because the operator switched them on."""
    log.setLevel(logging.INFO)


def line(scope: Scope, record: RequestRecord) -> Line | None:
    """The line of a new request; None for a probe or scrape."""
    return None if scope["path"] in QUIET else Line(scope, record)


class Line:
    """Counts what passes, and writes the line when the request has ended."""

    def __init__(self, scope: Scope, record: RequestRecord) -> None:
        raw: bytes = scope.get("raw_path") or scope["path"].encode()
        self._record = record
        self._answered = Answered(_shown(scope["method"].encode()), _shown(raw.partition(b"?")[0]))

    def counting(self, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """Wraps both, so that they count."""
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
    """Text chosen by a client, safe for one line: other than printable ASCII is escaped; long text is cut."""
    cut = raw[:_MAX_PATH].decode("latin-1")
    shown = "".join(c if c.isascii() and c.isprintable() else f"\\x{ord(c):02x}" for c in cut)
    return shown if len(raw) <= _MAX_PATH else f"{shown}…"
