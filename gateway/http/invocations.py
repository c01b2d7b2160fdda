"""The endpoints of MLflow's scoring server, for unchanged clients of MLflow and SageMaker: POST /invocations,
GET /ping, /health and /version.

Knows those four paths; `gateway.http.predict` answers predictions.
"""

from __future__ import annotations

from typing import Final

from starlette.types import Receive, Scope, Send

from gateway import __version__
from gateway.errors import Problem
from gateway.http import problems
from gateway.http.dialects import MLFLOW
from gateway.http.predict import TARGET_MODEL, Prediction
from gateway.record import RequestRecord

PATHS: Final = frozenset({b"/invocations", b"/ping", b"/health", b"/version"})

_ARCHIVE: Final = b".tar.gz"
_TEXT: Final = (b"content-type", b"text/plain; charset=utf-8")


class Invocations:
    """Answers the paths of `PATHS`. The header X-Model or SageMaker's X-Amzn-SageMaker-Target-Model names the
    model, else the setting `default_model`."""

    def __init__(self, prediction: Prediction) -> None:
        self._prediction = prediction

    async def serve(self, scope: Scope, receive: Receive, send: Send, path: bytes) -> None:
        record: RequestRecord = scope[problems.RECORD]
        if path == b"/invocations":
            try:
                _target(record, scope)
            except Problem as problem:
                await problems.respond_problem(send, problem, record)
                return
            await self._prediction.serve(scope, receive, send, None, MLFLOW)
            return
        if scope["method"] not in ("GET", "HEAD"):
            await problems.respond_not_allowed(send, record, scope["method"], "GET, HEAD")
            return
        body = __version__.encode() if path == b"/version" else b"\n"
        await problems.respond(send, 200, [_TEXT, (b"x-request-id", record.id)], body)


def _target(record: RequestRecord, scope: Scope) -> None:
    """Uses SageMaker's target model as X-Model: NAME, NAME@ALIAS or NAME/VERSION, with or without `.tar.gz`.
    The default model must never answer if the request names another one. Raises INVALID_REFERENCE if the two
    headers name different models."""
    named = {value.removesuffix(_ARCHIVE) for name, value in scope["headers"] if name == TARGET_MODEL}
    if not named:
        return
    named |= {value for name, value in scope["headers"] if name == b"x-model"}
    if len(named) > 1:
        raise Problem(
            "INVALID_REFERENCE",
            "X-Amzn-SageMaker-Target-Model and X-Model name different models",
            hint="send one of the two headers",
        )
    others = {name: value for name, value in record.headers.items() if name != TARGET_MODEL}
    record.headers = {**others, b"x-model": named.pop()}
