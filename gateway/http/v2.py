"""The Open Inference Protocol (V2) over HTTP, below `/v2`: server, models, inference, model repository.

Knows the protocol's paths and documents. `v2_inputs` reads tensors, `v2_outputs` writes them,
`predict.Prediction` answers predictions, and `Views` decides what a model's state means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs

from starlette.types import Receive, Scope, Send

from gateway import names
from gateway.errors import Problem
from gateway.http import answers, bodies, problems, v2_inputs, v2_models, v2_outputs
from gateway.http.dialects import Dialect
from gateway.http.media import Media
from gateway.http.problems import JSON, Header
from gateway.pools import in_large_thread
from loaders.batch import Columns, Tensors

if TYPE_CHECKING:
    from gateway.http.parts import Parts
    from gateway.http.predict import Prediction
    from gateway.names import Reference
    from gateway.record import RequestRecord
    from gateway.service import Answer

_BINARY: Final[Header] = (b"content-type", b"application/octet-stream")
_MAX_BODY: Final = 64 * 1024


def _media(headers: Mapping[bytes, bytes]) -> Media:
    """JSON with any content type or none, as V2 clients send it. A header says where binary data begins."""
    return Media("v2", v2_inputs.header_length(headers))


async def _encode(
    record: RequestRecord, answer: Answer, asks: Any, limit: int
) -> tuple[list[Header], list[bytes]]:
    assert record.version is not None
    about: dict[str, Any] = {"model_name": record.version.name, "model_version": record.version.version}
    if asks["id"] is not None:
        about["id"] = asks["id"]
    if answer.warnings:
        about["parameters"] = {"warnings": "; ".join(answer.warnings)}
    said = v2_models.output_names(answer.signature)

    def whole() -> tuple[list[bytes], int | None]:
        return v2_outputs.encode(about, v2_outputs.outputs(answer.result, said), asks, limit)

    if answers.weight(answer.result) > answers.OFF_LOOP_BYTES:
        if isinstance(answer.result, Columns | Tensors) and not asks["binary"] and asks["outputs"] is None:
            answers.check(answer.result, limit)
        parts, length = await in_large_thread(whole)
    else:
        parts, length = whole()
    if length is None:
        parts.append(b"\n")
        return [JSON], parts if sum(map(len, parts)) > answers.PIECE_BYTES else [b"".join(parts)]
    return [_BINARY, (b"inference-header-content-length", b"%d" % length)], parts


V2: Final = Dialect(_media, problems.error_document, _encode)


class OpenInference:
    """Answers every path that begins with `/v2`."""

    def __init__(self, parts: Parts, prediction: Prediction) -> None:
        self._views = parts.views
        self._residency = parts.residency
        self._access = parts.access
        self._draining = parts.draining
        self._prediction = prediction
        self._bodies = bodies.BodyReader(_MAX_BODY, 16 * _MAX_BODY)

    async def serve(self, scope: Scope, receive: Receive, send: Send, path: bytes) -> None:
        """Answers one request. `path` is the raw path, without the mount point."""
        record: RequestRecord = scope[problems.RECORD]
        try:
            if path.startswith(b"/v2/models/") and path.endswith(b"/infer"):
                reference = _reference(path[11:-6])
                await self._prediction.serve(scope, receive, send, reference, V2)
                return
            status, content = await self._answer(scope, receive, path)
            body = b"" if content is None else problems.json_line(content)
            head = [JSON, (b"x-request-id", record.id)]
            await problems.respond(send, status, head, body)
        except bodies.ClientLeft:
            record.code = "CLIENT_LEFT"
        except _NotAllowed as error:
            await problems.respond_not_allowed(
                send, record, scope["method"], error.allowed, problems.error_document
            )
        except Exception as error:  # noqa: BLE001 - nothing may reach the server without an answer
            problem = error if isinstance(error, Problem) else problems.unexpected(error, record.id)
            await problems.respond_problem(send, problem, record, document=problems.error_document)

    async def _answer(self, scope: Scope, receive: Receive, path: bytes) -> tuple[int, Any]:
        problems.check_headers(scope[problems.RECORD])
        if path.startswith(b"/v2/repository/"):
            return await self._repository(scope, receive, path[15:])
        if path in (b"/v2", b"/v2/"):
            return _get(scope, lambda: v2_models.SERVER)
        if path == b"/v2/health/live":
            return _get(scope, lambda: {"live": True})
        if path == b"/v2/health/ready":
            _get(scope, dict)
            ready = self._views.ready().ready and not self._draining()
            return (200 if ready else 503), {"ready": ready}
        if not path.startswith(b"/v2/models/"):
            raise problems.not_found()
        _get(scope, dict)
        if path.endswith(b"/ready"):
            return await self._ready(_reference(path[11:-6]), scope)
        reference = _reference(path[11:])
        self._access.read(scope[problems.RECORD], reference.name)
        return 200, await v2_models.metadata(self._views, reference)

    async def _ready(self, reference: Reference, scope: Scope) -> tuple[int, Any]:
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        self._access.read(scope[problems.RECORD], reference.name)
        if query.get("load") == ["true"]:
            self._access.predict(scope[problems.RECORD], reference)
            await self._residency.load(reference)
        version, reason = await self._views.readiness(reference)
        about = {"name": version.name, "version": version.version, "ready": reason is None}
        if reason is None:
            return 200, about
        raise Problem("MODEL_UNAVAILABLE", reason, retry_after=1.0)

    async def _repository(self, scope: Scope, receive: Receive, rest: bytes) -> tuple[int, Any]:
        if scope["method"] != "POST":
            raise _NotAllowed("POST")
        if rest == b"index":
            record = scope[problems.RECORD]
            reads = self._access.reads(record)
            only_ready = await self._flag(scope, receive, "ready")
            return 200, await v2_models.index(self._views, reads, only_ready)
        if rest.startswith(b"models/"):
            target, _, verb = rest[7:].rpartition(b"/")
            if target and verb in (b"load", b"unload"):
                reference = _reference(target)
                act = self._residency.load if verb == b"load" else self._residency.unload
                call = f"POST {scope['path']}"
                standing = partial(self._views.state_of, reference)
                with self._access.audited(scope[problems.RECORD], call, reference, standing):
                    await act(reference)
                return 200, {}
        raise problems.not_found()

    async def _flag(self, scope: Scope, receive: Receive, name: str) -> bool:
        body = await self._bodies.read(receive, scope[problems.RECORD].headers)
        try:
            hint = f'send {{"{name}": true}}, or no body'
            return bool(body.strip()) and bodies.decode_object(body, hint=hint).get(name) is True
        finally:
            self._bodies.release(len(body))


class _NotAllowed(Exception):
    def __init__(self, allowed: str) -> None:
        super().__init__(allowed)
        self.allowed = allowed


def _get(scope: Scope, content: Callable[[], Any]) -> tuple[int, Any]:
    if scope["method"] not in ("GET", "HEAD"):
        raise _NotAllowed("GET, HEAD")
    return 200, content()


def _reference(raw: bytes) -> Reference:
    return names.parse_path(raw)
