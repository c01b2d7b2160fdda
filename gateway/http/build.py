"""The gateway over HTTP: one ASGI application, made of predictions, MLflow's endpoints and control.

This file alone decides which of them a request goes to, by its raw path, before any router.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.http import access_log, invocations
from gateway.http.control import Control
from gateway.http.invocations import Invocations
from gateway.http.predict import Prediction
from gateway.http.problems import CLOSE

if TYPE_CHECKING:
    from gateway.app import Gateway


def build(app: Gateway) -> ASGIApp:
    """The ASGI application of a gateway. It starts and stops nothing: `lifespan` is answered and no more."""
    prediction = Prediction(app)
    mlflow = Invocations(prediction)
    control = Control(app)

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if app.draining:
                send = _closing(send)
            path = _raw_path(scope)
            if path.startswith(b"/predict/"):
                await prediction.serve(scope, receive, send, path[9:])
            elif path == b"/predict":
                await prediction.serve(scope, receive, send, None)
            elif path in invocations.PATHS:
                await mlflow.serve(scope, receive, send, path)
            else:
                await control.serve(scope, receive, send, path)
        elif scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})

    return access_log.logged(serve) if app.settings.access_log else serve


def _closing(send: Send) -> Send:
    """Tells clients with every answer to go elsewhere."""

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            others = [header for header in message["headers"] if header[0] != b"connection"]
            message = {**message, "headers": [*others, CLOSE]}
        await send(message)

    return closing


def _raw_path(scope: Scope) -> bytes:
    """The path as the client wrote it, without the query and the mount point. Servers that do not give it
    (ASGI has it optional) have decoded it already: then `%40` cannot be told from `@`."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    raw = raw.partition(b"?")[0]
    root = scope.get("root_path", "")
    return raw.removeprefix(root.encode()) if root else raw


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
