"""The ASGI application: predictions, the look-alike protocols and control calls in one.

Only this module decides which part answers a request: by the raw path, before any router. Must not know how a
part answers.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.http import access_log, console, documents, invocations, lookalikes, problems
from gateway.http.console import Console
from gateway.http.control import Control
from gateway.http.documents import Documents
from gateway.http.hosting import Hosted
from gateway.http.invocations import Invocations
from gateway.http.lookalikes import Lookalikes
from gateway.http.peers import PATH, PeerQuestions
from gateway.http.predict import Prediction
from gateway.http.problems import CLOSE, RECORD, request_id
from gateway.http.tracing import UNTRACED, observed, traced
from gateway.http.v2 import OpenInference
from gateway.record import RequestRecord

if TYPE_CHECKING:
    from gateway.http.hosting import Hosting
    from gateway.http.parts import Parts


def build(parts: Parts, hosting: Hosting | None = None, admin_port: int | None = None) -> ASGIApp:
    """The ASGI application. It starts and stops nothing: it only answers `lifespan`. `hosting`: the routes
    that a managed host expects come before all others. `admin_port`: the port of the listener for control
    calls, where it has one.

    Does once, outermost, what every request needs: its record with its id, its trace, `Connection: close`
    while the gateway stops, metrics and the access log.
    """
    prediction = Prediction(parts)
    mlflow = Invocations(prediction)
    inference = OpenInference(parts, prediction)
    others = Lookalikes(parts, prediction)
    hosted = None if hosting is None else Hosted(hosting, parts, prediction)
    described = Documents(parts)
    pages = Console(parts) if parts.settings.console else None
    control = Control(parts)
    peers = None if parts.peers is None else PeerQuestions(parts.peers, parts.access)
    logged = parts.settings.access_log
    callers = parts.access
    guarded = callers.guarded
    spans = parts.spans
    if logged:
        access_log.enable()

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _other(scope, receive, send)
            return
        headers = dict(scope["headers"])
        record = scope[RECORD] = RequestRecord(request_id(headers), headers)
        if len(headers) < len(scope["headers"]):
            record.twice = problems.contradiction(scope["headers"])
        if spans is not None and scope["path"] not in UNTRACED:
            send = observed(spans, scope, record, send)
        elif b"traceparent" in headers:
            send = traced(scope["headers"], send)
        if admin_port is not None:
            record.administers = scope["server"][1] == admin_port
        if guarded:
            await callers.identify(record)
        if parts.draining():
            send = _closing(send)
        line = None
        if logged and (line := access_log.line(scope, record)) is not None:
            receive, send = line.counting(receive, send)
        try:
            await route(scope, receive, send)
        finally:
            if record.predicts and record.code:
                parts.metrics.record(record)
            if line is not None:
                line.write()
            if record.span is not None and spans is not None:
                record.span.set_attribute("http.response.status_code", record.status)
                spans.answered(record, failed=record.status >= 500)

    def route(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        path = _raw_path(scope)
        if hosted is not None and hosted.is_here(path):
            return hosted.serve(scope, receive, send, path)
        if path[:9] == b"/predict/":
            return prediction.serve(scope, receive, send, path[9:])
        if path == b"/predict":
            return prediction.serve(scope, receive, send, None)
        if path.startswith(b"/v2") and path[3:4] in (b"", b"/"):
            return inference.serve(scope, receive, send, path)
        if lookalikes.is_here(path):
            return others.serve(scope, receive, send, path)
        if documents.is_here(path):
            return described.serve(scope, receive, send, path)
        if pages is not None and console.is_here(path):
            return pages.serve(scope, receive, send, path)
        if peers is not None and path == PATH:
            return peers.serve(scope, receive, send)
        if path in invocations.PATHS:
            return mlflow.serve(scope, receive, send, path)
        return control.serve(scope, receive, send, path)

    return serve


async def _other(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await _lifespan(receive, send)
    elif scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1000})


def _closing(send: Send) -> Send:
    """Adds `Connection: close` to every answer, so that clients go to another gateway."""

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            others = [header for header in message["headers"] if header[0] != b"connection"]
            message = {**message, "headers": [*others, CLOSE]}
        await send(message)

    return closing


def _raw_path(scope: Scope) -> bytes:
    """The path as the client wrote it, without the query and the mount point. It is optional in ASGI: a
    server that does not give it has decoded the path already, and then `%40` cannot be told from `@`."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    if b"?" in raw:
        raw = raw.partition(b"?")[0]
    root = scope.get("root_path", "")
    return raw.removeprefix(root.encode()) if root else raw


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
