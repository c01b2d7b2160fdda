"""The endpoints of MLflow's scoring server, for its clients and SageMaker's, unchanged (MLFLOW's protocol:
POST /invocations, GET /ping, /health, /version).

Knows those four paths; a prediction itself is `gateway.http.predict`'s affair.
"""

from __future__ import annotations

from typing import Final

from starlette.types import Receive, Scope, Send

from gateway import __version__
from gateway.http import problems
from gateway.http.predict import Prediction
from gateway.http.tracing import traced

PATHS: Final = frozenset({b"/invocations", b"/ping", b"/health", b"/version"})

_TEXT: Final = (b"content-type", b"text/plain; charset=utf-8")


class Invocations:
    """Answers the paths of `PATHS`. The model is the header X-Model's, else the setting `default_model`."""

    def __init__(self, prediction: Prediction) -> None:
        self._prediction = prediction

    async def serve(self, scope: Scope, receive: Receive, send: Send, path: bytes) -> None:
        if path == b"/invocations":
            await self._prediction.serve(scope, receive, send, None, bare=True)
            return
        headers = dict(scope["headers"])
        identity = problems.request_id(headers)
        if b"traceparent" in headers:
            send = traced(scope["headers"], send)
        if scope["method"] not in ("GET", "HEAD"):
            await problems.respond_not_allowed(send, identity, scope["method"], "GET, HEAD")
            return
        body = __version__.encode() if path == b"/version" else b"\n"
        await problems.respond(send, 200, [_TEXT, (b"x-request-id", identity)], body)
