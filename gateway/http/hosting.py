"""Routes that a managed host expects of its containers: Vertex AI's own paths, and SageMaker's multi-model
contract (`/models`).

They exist only if the host configured them. Knows paths and bodies; `predict.Prediction` makes predictions.
Source: https://docs.aws.amazon.com/sagemaker/latest/dg/mms-container-apis.html and
https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson
from starlette.types import Receive, Scope, Send

from gateway.errors import Problem
from gateway.http import bodies, problems
from gateway.http.dialects import MLFLOW, Dialect
from gateway.http.media import Media
from gateway.http.problems import JSON
from gateway.names import Reference, check_name, parse_path
from gateway.registries.base import RegistryError

if TYPE_CHECKING:
    from gateway.http.parts import Parts
    from gateway.http.predict import Prediction
    from gateway.record import RequestRecord
    from gateway.registries.hosted import HostedModels

MODELS: Final = b"/models"
_INVOKE: Final = b"/invoke"
_MAX_BODY: Final = 64 * 1024
#: The status that makes SageMaker unload another model and retry.
INSUFFICIENT: Final = 507


@dataclass(frozen=True, slots=True)
class Hosting:
    """The host's configuration. `predict`, `health`: Vertex's paths. `models`: the models that SageMaker
    adds."""

    predict: bytes | None = None
    health: bytes | None = None
    models: HostedModels | None = None


def _media(headers: Mapping[bytes, bytes]) -> Media:
    return Media("vertex")


VERTEX: Final = Dialect(_media, bare=True, positional=True)


class Hosted:
    """Answers the paths for which `is_here` returns True."""

    def __init__(self, hosting: Hosting, parts: Parts, prediction: Prediction) -> None:
        self._hosting = hosting
        self._views = parts.views
        self._access = parts.access
        self._residency = parts.residency
        self._watch = parts.watch
        self._draining = parts.draining
        self._prediction = prediction
        self._bodies = bodies.BodyReader(_MAX_BODY, 16 * _MAX_BODY)

    def is_here(self, path: bytes) -> bool:
        """Returns True if a raw path is one of the host's."""
        if path in (self._hosting.predict, self._hosting.health):
            return True
        if self._hosting.models is None or not path.startswith(MODELS):
            return False
        rest = path[len(MODELS) :].removesuffix(_INVOKE)
        return not rest or (rest.startswith(b"/") and rest.count(b"/") == 1)

    async def serve(self, scope: Scope, receive: Receive, send: Send, path: bytes) -> None:
        """Answers one request. `path` is the raw path, without the mount point."""
        record: RequestRecord = scope[problems.RECORD]
        try:
            if path == self._hosting.predict:
                await self._prediction.serve(scope, receive, send, None, VERTEX)
                return
            if path == self._hosting.health:
                ready = self._views.ready().ready and not self._draining()
                await self._respond(send, record, 200 if ready else 503, {"ready": ready})
                return
            name = path[len(MODELS) + 1 :]
            if name.endswith(_INVOKE):
                self._access.predict(record, parse_path(name.removesuffix(_INVOKE)))
                reference = self._known(name.removesuffix(_INVOKE))
                await self._prediction.serve(scope, receive, send, reference, MLFLOW)
                return
            status, content = await self._models(scope, receive, name)
            await self._respond(send, record, status, content)
        except bodies.ClientLeft:
            record.code = "CLIENT_LEFT"
        except _Answered as answered:
            record.code = answered.problem.code
            head = problems.header_list(answered.problem, record.id)
            body = problems.document(answered.problem, record.id)
            await problems.respond(send, answered.status, head, body)
        except Exception as error:  # noqa: BLE001 - nothing may reach the server without an answer
            problem = error if isinstance(error, Problem) else problems.unexpected(error, record.id)
            await problems.respond_problem(send, problem, record)

    async def _respond(self, send: Send, record: RequestRecord, status: int, content: Any) -> None:
        await problems.respond(send, status, [JSON, (b"x-request-id", record.id)], orjson.dumps(content))

    async def _models(self, scope: Scope, receive: Receive, name: bytes) -> tuple[int, dict[str, Any]]:
        models = self._hosting.models
        assert models is not None
        method, record = scope["method"], scope[problems.RECORD]
        problems.check_headers(record)
        if not name and method == "POST":
            self._access.known(record)
            wanted = await self._wanted(scope, receive)
            with self._controlled(record, "POST /models", Reference(check_name(wanted[0]))):
                return await self._add(models, wanted)
        if not name and method in ("GET", "HEAD"):
            places = self._access.readable(record, models.places.items(), lambda place: place[0])
            return 200, {"models": [_shown(*one) for one in places], "nextPageToken": None}
        if name and method in ("GET", "HEAD"):
            self._access.read(record, parse_path(name).name)
            reference = self._known(name)
            return 200, _shown(reference.name, models.places[reference.name])
        if name and method == "DELETE":
            # The host removes a model with all its versions, by whatever alias it names it.
            with self._controlled(record, "DELETE /models", Reference(parse_path(name).name)):
                reference = self._known(name)
                await self._residency.unload(reference)
                models.remove(reference.name)
                self._watch.take(models.read(), "host")
            return 200, {"modelName": reference.name}
        allowed = "GET, HEAD, DELETE" if name else "GET, HEAD, POST"
        raise Problem("METHOD_NOT_ALLOWED", f"{method} is not allowed here", hint=f"use {allowed}")

    def _controlled(
        self, record: RequestRecord, call: str, reference: Reference
    ) -> AbstractContextManager[Any]:
        """Checks control of the model. The host calls its container without credentials, so only configured
        ones are required."""
        if not self._access.guarded:
            return nullcontext()
        return self._access.audited(record, call, reference, whole=True)

    async def _add(self, models: HostedModels, wanted: tuple[str, str]) -> tuple[int, dict[str, Any]]:
        """Adds a model and loads it. Removes it again if it cannot be loaded."""
        name, url = wanted
        if name in models.places:
            raise _Answered(409, Problem("PRECONDITION_FAILED", f"{name} is already loaded"))
        try:
            directory = await asyncio.to_thread(models.checked, name, url)
        except RegistryError as error:
            raise Problem("INVALID_REFERENCE", str(error)) from None
        if name in models.places:  # added meanwhile by another call
            raise _Answered(409, Problem("PRECONDITION_FAILED", f"{name} is already loaded"))
        added = models.add(name, directory)
        self._watch.take(models.read(), "host")
        try:
            await self._residency.load(Reference(name))
        except Problem as problem:
            models.remove(name, added)  # unless the host has removed it, and maybe added another
            self._watch.take(models.read(), "host")
            if problem.code == "CAPACITY_EXCEEDED":
                raise _Answered(INSUFFICIENT, problem) from None
            raise
        return 200, _shown(name, added.source)

    async def _wanted(self, scope: Scope, receive: Receive) -> tuple[str, str]:
        body = await self._bodies.read(receive, scope[problems.RECORD].headers)
        hint = '{"model_name": "NAME", "url": "/opt/ml/models/NAME/model"}'
        try:
            document = bodies.decode_object(body, hint=hint)
        finally:
            self._bodies.release(len(body))
        name, url = document.get("model_name"), document.get("url")
        if not isinstance(name, str) or not isinstance(url, str):
            raise Problem("MALFORMED_BODY", "the body needs model_name and url, as strings", hint=hint)
        return name, url

    def _known(self, raw: bytes) -> Reference:
        """Returns the model of that name. Raises MODEL_NOT_FOUND if the host has not added it."""
        reference = parse_path(raw)
        assert self._hosting.models is not None
        if reference.name not in self._hosting.models.places:
            raise Problem("MODEL_NOT_FOUND", f"{reference.name} was not loaded", hint="POST /models loads it")
        return reference


class _Answered(Exception):
    """A problem with the status that the host's contract requires."""

    def __init__(self, status: int, problem: Problem) -> None:
        super().__init__(problem.message)
        self.status = status
        self.problem = problem


def _shown(name: str, url: str) -> dict[str, Any]:
    return {"modelName": name, "modelUrl": url}
