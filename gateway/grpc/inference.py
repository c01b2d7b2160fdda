"""The methods of `inference.GRPCInferenceService`, with the same rules as V2 over HTTP.

Knows the protocol's methods. `v2_inputs` reads tensors, `v2_outputs` writes them, `Service` predicts, and
`Views` interprets a model's state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from gateway import names
from gateway.errors import Problem
from gateway.grpc import cost
from gateway.grpc import inference_pb2 as pb
from gateway.grpc.messages import Request, parsed, response
from gateway.http import answers, bodies, large, media, v2_models, v2_outputs
from gateway.http.predict import REFUSAL_SECONDS, attribute, deadline_of
from gateway.names import Reference
from gateway.pools import in_large_thread
from gateway.service import Inference

if TYPE_CHECKING:
    from gateway.grpc.calls import Call, Work
    from gateway.http.parts import Parts

SERVICE: Final = "inference.GRPCInferenceService"

#: A message above this many bytes is parsed in a thread.
PARSED_ON_LOOP: Final = 16 << 10
#: Bytes of memory of a value of type BYTES as a separate object, in addition to its bytes.
_TEXT_BYTES: Final = 120


class OpenInference:
    """Answers the calls. `methods`: by name, the functions from a message to an answer; `stream` is the one
    for the streaming method."""

    def __init__(self, parts: Parts) -> None:
        self._service = parts.service
        self._views = parts.views
        self._residency = parts.residency
        self._access = parts.access
        self._draining = parts.draining
        self._bodies = parts.bodies
        self._large = parts.large_bodies
        self._max_answer = parts.settings.max_answer_bytes
        self.methods: Mapping[str, Work] = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ServerMetadata": self._server,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model,
            "ModelInfer": self.infer,
            "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
        }

    async def infer(self, body: bytes, call: Call) -> bytes:
        """Answers a prediction request. Raises Problem."""
        record = call.record
        record.predicts, record.late = True, self._service.stopping
        self._access.predict(record, None)
        held = bodies.Held(self._bodies)
        asked = 0.0
        try:
            held.add(len(body))
            held.complete = True
            started = perf_counter()
            is_long = len(body) > bodies.COUNT_ON_LOOP
            becomes = await in_large_thread(cost.memory, body) if is_long else cost.memory(body)
            held.size += self._bodies.charge(len(body), becomes)
            request, asks, inference = await self._inference(body, call, held)
            record.parse = perf_counter() - started
            asked = perf_counter()
            elsewhere = inference.unparsed
            answer = await self._service.predict(inference)
            if isinstance(elsewhere, large.LargeBody):
                asks = elsewhere.asked
            call.marks = answer.marks
            began = perf_counter()
            assert record.version is not None
            about: dict[str, Any] = {
                "model_name": record.version.name,
                "model_version": record.version.version,
                "id": request.document["id"] or "",
            }
            if answer.warnings:
                about["parameters"] = {"warnings": "; ".join(answer.warnings)}

            def encode() -> bytes:
                outputs = v2_outputs.outputs(answer.result, v2_models.output_names(answer.signature))
                typed = request.typed
                return response(about, outputs, asks, typed=typed, limit=self._max_answer)

            heavy = answers.weight(answer.result) > answers.OFF_LOOP_BYTES
            encoded = await in_large_thread(encode) if heavy else encode()
            record.encode = perf_counter() - began
            return encoded
        except Problem as problem:
            record.code = problem.code
            self._service.name(record)
            attribute(record, asked)
            if problem.code == "OVERLOADED" and asked:
                held.release()
                await asyncio.sleep(REFUSAL_SECONDS)
            raise
        finally:
            held.release()

    async def _inference(self, body: bytes, call: Call, held: bodies.Held) -> tuple[Request, Any, Inference]:
        """Reads a message: the request, its wishes for the answer (None: read later), and the inference.
        Raises Problem."""
        heavy = len(body) > PARSED_ON_LOOP
        request = await in_large_thread(Request, body) if heavy else Request(body)
        reference = _reference(request.model, request.version)
        if reference is not None:
            self._access.predict(call.record, reference)
            call.record.reference = reference
        texts = _TEXT_BYTES * request.texts
        deadlines = [one for one in (call.deadline, deadline_of(call.record.headers)) if one is not None]
        about = partial(Inference, reference, deadline=min(deadlines, default=None), record=call.record)
        if texts > media.PARSED_BYTES:
            whole, length = request.as_body()
            form = media.Media("v2", length)
            unparsed = large.LargeBody(whole, form, reference, self._large, held, texts)
            deadline = min(deadlines, default=None)
            held.size += await self._bodies.charge_elsewhere(len(body), texts, deadline)
            return request, None, about(None, None, unparsed=unparsed)
        held.size += self._bodies.charge(0, texts)
        found = await in_large_thread(request.read) if heavy else request.read()
        return request, found.asked, about(found.raw, found.params, memory=held.size)

    async def _live(self, body: bytes, call: Call) -> bytes:
        return _bytes(pb.ServerLiveResponse(live=True))

    async def _ready(self, body: bytes, call: Call) -> bytes:
        ready = self._views.ready().ready and not self._draining()
        return _bytes(pb.ServerReadyResponse(ready=ready))

    async def _server(self, body: bytes, call: Call) -> bytes:
        return _bytes(pb.ServerMetadataResponse(**v2_models.SERVER))

    async def _model_ready(self, body: bytes, call: Call) -> bytes:
        request = parsed(pb.ModelReadyRequest, body)
        reference = _named(request.name, request.version)
        self._access.read(call.record, reference.name)
        _, reason = await self._views.readiness(reference)
        return _bytes(pb.ModelReadyResponse(ready=reason is None))

    async def _model(self, body: bytes, call: Call) -> bytes:
        request = parsed(pb.ModelMetadataRequest, body)
        reference = _named(request.name, request.version)
        self._access.read(call.record, reference.name)
        found = await v2_models.metadata(self._views, reference)
        answer = pb.ModelMetadataResponse(
            name=found["name"], versions=found["versions"], platform=found["platform"]
        )
        for tensors, said in ((answer.inputs, found["inputs"]), (answer.outputs, found["outputs"])):
            for one in said:
                tensors.add(name=one["name"], datatype=one["datatype"], shape=one["shape"])
        return _bytes(answer)

    async def _index(self, body: bytes, call: Call) -> bytes:
        request = parsed(pb.RepositoryIndexRequest, body)
        answer = pb.RepositoryIndexResponse()
        reads = self._access.reads(call.record)
        for one in await v2_models.index(self._views, reads, request.ready):
            answer.models.add(**one)
        return _bytes(answer)

    async def _load(self, body: bytes, call: Call) -> bytes:
        request = parsed(pb.RepositoryModelLoadRequest, body)
        name = request.model_name or request.repository_name
        with self._audited("RepositoryModelLoad", call, name) as reference:
            await self._residency.load(reference)
        return _bytes(pb.RepositoryModelLoadResponse(model_name=name, is_loaded=True))

    async def _unload(self, body: bytes, call: Call) -> bytes:
        request = parsed(pb.RepositoryModelUnloadRequest, body)
        name = request.model_name or request.repository_name
        with self._audited("RepositoryModelUnload", call, name) as reference:
            await self._residency.unload(reference)
        return _bytes(pb.RepositoryModelUnloadResponse(model_name=name, is_unloaded=True))

    @contextmanager
    def _audited(self, method: str, call: Call, name: str) -> Iterator[Reference]:
        reference = _named(name, "")
        standing = partial(self._views.state_of, reference)
        with self._access.audited(call.record, method, reference, standing):
            yield reference


def streamed(answer: bytes) -> bytes:
    """Returns an answer as a message of the stream, in its field 2."""
    return _bytes(pb.ModelStreamInferResponse(infer_response=pb.ModelInferResponse.FromString(answer)))


def refused(text: str) -> bytes:
    """Returns a failure as a message of the stream."""
    return _bytes(pb.ModelStreamInferResponse(error_message=text))


def _bytes(message: Any) -> bytes:
    return bytes(message.SerializeToString())


def _named(name: str, version: str) -> Reference:
    reference = _reference(name, version)
    if reference is None:
        raise names.InvalidReference("the request has no model name")
    return reference


def _reference(name: str, version: str) -> Reference | None:
    """Reads NAME, NAME@ALIAS or NAME/VERSION, and a separate version; None if there is no model name.
    Raises InvalidReference."""
    if not name:
        return None
    reference = names.parse_short(name)
    if not version:
        return reference
    if reference != Reference(reference.name):
        raise names.InvalidReference("the request has a version in addition to the one in the model's name")
    return Reference(reference.name, version=names.check_version(version))
