"""Routes of other model servers, for their clients: the V1 protocol of KServe and TensorFlow Serving below
`/v1/models`, and the endpoints of MLflow and SageMaker (`/endpoints/NAME/invocations`,
`/api/2.0/endpoints/`).

Knows their paths and documents; `predict.Prediction` answers predictions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, unquote_to_bytes

from starlette.types import Receive, Scope, Send

from gateway import names
from gateway.errors import Problem
from gateway.http import problems
from gateway.http.dialects import Dialect
from gateway.http.media import Media
from gateway.http.problems import JSON
from gateway.names import Reference
from gateway.views.paging import Page

if TYPE_CHECKING:
    from gateway.http.parts import Parts
    from gateway.http.predict import Prediction
    from gateway.record import RequestRecord

V1_MODELS: Final = b"/v1/models"
ENDPOINTS: Final = b"/endpoints/"
LISTED: Final = b"/api/2.0/endpoints"

_PREDICT: Final = b":predict"
_INVOCATIONS: Final = b"/invocations"


def _json(headers: Mapping[bytes, bytes]) -> Media:
    """JSON, because V1 clients send it with any content type or none."""
    return Media("json")


V1: Final = Dialect(_json, problems.error_document, bare=True, positional=True)
ENDPOINT: Final = Dialect(bare=True, lenient=True, positional=True)


def is_here(path: bytes) -> bool:
    """Returns True if a raw path is one of these routes."""
    return path.startswith((V1_MODELS, ENDPOINTS, LISTED))


class Lookalikes:
    """Answers every path for which `is_here` is true."""

    def __init__(self, parts: Parts, prediction: Prediction) -> None:
        self._views = parts.views
        self._access = parts.access
        self._prediction = prediction

    async def serve(self, scope: Scope, receive: Receive, send: Send, path: bytes) -> None:
        """Answers one request. `path` is the raw path, without the mount point."""
        record: RequestRecord = scope[problems.RECORD]
        document = problems.error_document if path.startswith(V1_MODELS) else problems.document
        try:
            if path.startswith(ENDPOINTS) and path.endswith(_INVOCATIONS):
                target = names.parse_path(path[len(ENDPOINTS) : -len(_INVOCATIONS)])
                await self._prediction.serve(scope, receive, send, target, ENDPOINT)
                return
            # Some clients escape the colon.
            plain = path[: -len(b"%3Apredict")] + _PREDICT if path.lower().endswith(b"%3apredict") else path
            if plain.startswith(V1_MODELS + b"/") and plain.endswith(_PREDICT):
                target = _v1_reference(plain[len(V1_MODELS) + 1 : -len(_PREDICT)])
                await self._prediction.serve(scope, receive, send, target, V1)
                return
            problems.check_headers(record)
            content = await self._view(path, record)
            if scope["method"] not in ("GET", "HEAD"):
                await problems.respond_not_allowed(send, record, scope["method"], "GET, HEAD", document)
                return
            head = [JSON, (b"x-request-id", record.id)]
            await problems.respond(send, 200, head, problems.json_line(content))
        except Exception as error:  # noqa: BLE001 - nothing may reach the server without an answer
            problem = error if isinstance(error, Problem) else problems.unexpected(error, record.id)
            await problems.respond_problem(send, problem, record, document=document)

    async def _view(self, path: bytes, record: RequestRecord) -> dict[str, Any]:
        if path == V1_MODELS:
            return {"models": await self._names(record)}
        if path.startswith(V1_MODELS + b"/"):
            reference = _v1_reference(path[len(V1_MODELS) + 1 :])
            self._access.read(record, reference.name)
            return await self._status(reference)
        if path in (LISTED, LISTED + b"/"):
            return {
                "endpoints": [_endpoint(name) for name in await self._names(record)],
                "next_page_token": None,
            }
        if path.startswith(LISTED + b"/"):
            reference = names.parse_path(path[len(LISTED) + 1 :])
            self._access.read(record, reference.name)
            await self._views.readiness(reference)
            return _endpoint(reference.name)
        raise problems.not_found()

    async def _names(self, record: RequestRecord) -> list[str]:
        return [*(await self._views.names(Page(reads=self._access.reads(record)))).items]

    async def _status(self, reference: Reference) -> dict[str, Any]:
        """The state of a model in KServe's form (`name`, `ready`) and in TensorFlow Serving's."""
        version, reason = await self._views.readiness(reference)
        status = {"error_code": "OK", "error_message": ""}
        if reason is not None:
            status = {"error_code": "UNAVAILABLE", "error_message": reason}
        state = "AVAILABLE" if reason is None else "END"
        return {
            "name": version.name,
            "ready": reason is None,
            "model_version_status": [{"version": version.version, "state": state, "status": status}],
        }


def _v1_reference(raw: bytes) -> Reference:
    """NAME, NAME@ALIAS, NAME/versions/VERSION or NAME/labels/ALIAS. Raises InvalidReference."""
    name, marker, label = raw.partition(b"/labels/")
    if not marker:
        return names.parse_path(raw)
    try:
        alias = unquote_to_bytes(label).decode()
    except UnicodeDecodeError:
        raise names.InvalidReference("the label in the path is not UTF-8") from None
    reference = names.parse_path(name)
    if reference.alias is not None or reference.version is not None:
        raise names.InvalidReference("the path names a label and also a version or an alias: give only one")
    return Reference(reference.name, alias=names.check_alias(alias))


def _endpoint(name: str) -> dict[str, Any]:
    """A model in the form that MLflow's deployments client reads."""
    return {
        "name": name,
        "endpoint_type": "model",
        "model": {"name": name, "provider": "model-gateway"},
        "endpoint_url": f"/endpoints/{quote(name, safe='')}/invocations",
        "limit": None,
    }
