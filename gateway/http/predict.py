"""Predictions over HTTP: from an ASGI scope to the service and back, before any router.

This is the hot path: no pydantic, no regular expression, no log line and no request object. Knows the
gateway's own URLs and headers; must not know how a model is found, loaded or called.
"""

from __future__ import annotations

import asyncio
import string
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import orjson
from starlette.types import Receive, Scope, Send

from gateway import names
from gateway.errors import Problem, overloaded
from gateway.http import answers, arrow, bodies, large, media, problems
from gateway.http.callers import discreet
from gateway.http.dialects import PREDICT, Dialect
from gateway.http.problems import JSON, Header
from gateway.http.protocol import SPARE
from gateway.names import Reference
from gateway.pools import in_large_thread
from gateway.service import MISMATCH, Answer, Inference

if TYPE_CHECKING:
    from gateway.http.parts import Parts
    from gateway.record import RequestRecord

WATCH_AFTER_SECONDS: Final = 0.1
#: How often the requests are looked at for those that have become so old.
LOOK_SECONDS: Final = 0.02
#: The delay before a 429 is sent: clients that retry at once would otherwise take the loop's time from the
#: requests that are queued.
REFUSAL_SECONDS: Final = 0.05

TIMEOUT: Final = b"x-request-timeout-ms"
TARGET_MODEL: Final = b"x-amzn-sagemaker-target-model"

_PLAIN: Final = "".join(c for c in string.printable if c.isprintable() and c != "%")
_SERVER_TIMING: Final = b"parse;dur=%.3f, queue;dur=%.3f, predict;dur=%.3f, encode;dur=%.3f"
_MODEL_CODES: Final = frozenset({"PREDICTION_FAILED", "WORKER_CRASHED"})
#: The request names no model, or two, or one that the caller may not know.
_NO_MODEL: Final = frozenset({"FORBIDDEN", "INVALID_REFERENCE", "MODEL_NOT_FOUND", "UNAUTHENTICATED"})
_UNREAD_CODES: Final = frozenset({"BODY_TOO_LARGE", "OVERLOADED"})
_ARROW: Final[Header] = (b"content-type", arrow.MEDIA.encode())
_JSON: Final = (JSON,)


class Prediction:
    """The prediction endpoints. Serves every path below `/predict`, and `/invocations` in MLflow's form."""

    def __init__(self, parts: Parts) -> None:
        settings = parts.settings
        self._service = parts.service
        self._access = parts.access
        self._bodies = parts.bodies
        self._large = parts.large_bodies
        self._max_answer = settings.max_answer_bytes
        self._watchers = _DisconnectWatchers()

    async def serve(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        target: bytes | Reference | None,
        dialect: Dialect = PREDICT,
    ) -> None:
        """Answers one request: reads and parses, calls the model, encodes, sends. `target` is the model: a
        reference, or the raw path after `/predict/`; None if the path names no model."""
        record: RequestRecord = scope[problems.RECORD]
        if scope["method"] != "POST":
            await problems.respond_not_allowed(send, record, scope["method"], "POST", dialect.document)
            return
        record.predicts = True
        record.late = self._service.stopping  # by its head: a body may come slowly
        if SPARE in scope:
            await problems.respond_problem(
                send, _too_many_connections(), record, problems.CLOSE, document=dialect.document
            )
            return
        held = bodies.Held(self._bodies)
        asked = 0.0
        watcher: _DisconnectWatcher | None = None
        try:
            try:
                inference, asks = await self._inference(record, receive, target, held, dialect)
                elsewhere = inference.unparsed
                asked = perf_counter()
                watcher = self._watchers.watch(receive, asked)
                answer = await self._service.predict(inference)
                if isinstance(elsewhere, large.LargeBody):
                    asks = elsewhere.asked
                head, parts = await self._success(record, answer, asks, dialect)
                held.release()
                if len(parts) > 1:
                    held.add(sum(map(len, parts)))  # counted until they are sent
                watcher.end()
                watcher = None
                status, record.code = 200, "2xx"
            except (bodies.ClientLeft, asyncio.CancelledError) as error:
                if isinstance(error, bodies.ClientLeft) or (watcher and watcher.left):
                    record.code = "CLIENT_LEFT"
                    self._name(record, target, error)
                    return
                if not self._service.stopping:
                    raise
                held.release()
                message = "the gateway stopped before this request was answered"
                stopped = Problem("SHUTTING_DOWN", message, retry_after=1)
                self._name(record, target, stopped)
                status, head, parts = _failure(record, stopped, asked, dialect)
            except Exception as error:  # noqa: BLE001 - nothing may reach the server without an answer
                held.release()
                self._name(record, target, error)
                status, head, parts = _failure(record, error, asked, dialect)
                if watcher is not None:
                    watcher.end()
                if record.code == "OVERLOADED":
                    await asyncio.sleep(REFUSAL_SECONDS)
            if record.code in _UNREAD_CODES and not held.complete:
                await problems.refuse_unread(send, receive, status, head, parts[0])
            elif len(parts) == 1:
                await problems.respond(send, status, head, parts[0])
            else:
                await problems.respond_in_parts(send, status, head, parts)
        finally:
            if held.size:
                held.release()
            if watcher is not None:
                watcher.end()

    async def _inference(
        self,
        record: RequestRecord,
        receive: Receive,
        target: bytes | Reference | None,
        held: bodies.Held,
        dialect: Dialect,
    ) -> tuple[Inference, Any]:
        """Reads the request: its head, its body, and the model that they name. Returns also what the answer's
        protocol needs. Raises Problem."""
        headers = record.headers
        if record.twice:
            problems.check_headers(record)
        if record.principal is not None:
            self._access.predict(record, None)
        form = dialect.media(headers)
        deadline = deadline_of(headers) if TIMEOUT in headers else None
        reference = _reference(target, headers)
        if record.principal is not None and reference is not None:
            self._access.predict(record, reference)
        body = await self._bodies.read(receive, headers)
        size = len(body)
        held.size += size
        held.complete = True
        started = perf_counter()
        if size > bodies.COUNT_ON_LOOP:
            becomes, is_large = await in_large_thread(media.weigh, form, body)
        else:
            becomes, is_large = media.weigh(form, body)
        asks: Any = None
        if is_large:
            unparsed = large.LargeBody(body, form, reference, self._large, held, becomes)
            held.size += await self._bodies.charge_elsewhere(size, becomes, deadline)
            if reference is None:
                reference = bodies.agreed(None, await unparsed.model(deadline))
            inference = Inference(reference, None, None, deadline, record, unparsed)
        else:
            held.size += self._bodies.charge(size, becomes)
            parsed = media.parse(form, body)
            asks = parsed.asked
            if parsed.model is not bodies.ABSENT:
                reference = bodies.agreed(reference, parsed.model)
            inference = Inference(reference, parsed.raw, parsed.params, deadline, record)
        inference.lenient, inference.positional = dialect.lenient, dialect.positional
        inference.memory = held.size
        record.parse = perf_counter() - started
        return inference, asks

    def _name(self, record: RequestRecord, target: bytes | Reference | None, error: BaseException) -> None:
        """Names the version in the record of a request that was refused before its model was called, if the
        caller may know it. A body that was not read may name another model than `default_model`."""
        if record.version is not None or (isinstance(error, Problem) and error.code in _NO_MODEL):
            return
        with suppress(Problem):
            if record.reference is None and (reference := _reference(target, record.headers)) is not None:
                self._access.predict(record, reference)
                record.reference = reference
            self._service.name(record)

    async def _success(
        self, record: RequestRecord, answer: Answer, asks: Any, dialect: Dialect
    ) -> tuple[list[Header], list[bytes]]:
        """The headers and the body: whole, or in parts if the answer is large. Raises Problem."""
        began = perf_counter()
        headers = record.headers
        accept = headers.get(b"accept") if dialect.encode is None else None
        as_table = accept is not None and arrow.wanted(accept)
        encoded: list[Header] = []
        if dialect.encode is not None:
            encoded, predictions = await dialect.encode(record, answer, asks, self._max_answer)
        elif as_table:
            answers.check(answer.result, self._max_answer)
            predictions = [await arrow.encode(answer.result, _about(record, answer))]
        elif answers.weight(answer.result) > answers.OFF_LOOP_BYTES:
            predictions = await answers.encode_apart(answer.result, self._max_answer)
        else:
            predictions = [answers.encode_now(answer.result)]
        record.encode = perf_counter() - began
        version = record.version
        assert version is not None
        model, name, number = resolved(version.name, version.version, record.alias)
        head = [name, number, (b"x-request-id", record.id), _timing(record)]
        if answer.marks:
            head.append((b"x-model-warnings", ", ".join(answer.marks).encode()))
        if dialect.encode is not None:
            return head + encoded, predictions
        if as_table:
            return [*head, _ARROW], predictions
        head += _JSON
        after = b"" if dialect.bare else model
        if answer.warnings and (dialect.positional or not dialect.bare):
            after += b',"warnings":' + orjson.dumps(answer.warnings)
        after += b"}" if dialect.bare else b"}\n"
        if len(predictions) > 1:
            return head, [b'{"predictions":', *predictions, after]
        return head, [b'{"predictions":' + predictions[0] + after]


def _failure(
    record: RequestRecord, error: Exception, asked: float, dialect: Dialect
) -> tuple[int, list[Header], list[bytes]]:
    """Status, headers and body. `asked`: when the model was called, 0 if it was not."""
    problem = error if isinstance(error, Problem) else problems.unexpected(error, record.id)
    # The frames of a traceback hold the body, and a refusal may take seconds to be sent.
    problem.__traceback__ = problem.__context__ = None
    record.code = discreet(problem, record).code
    attribute(record, asked)
    head = problems.header_list(problem, record.id)
    if record.version is not None:
        _, name, number = resolved(record.version.name, record.version.version, record.alias)
        head += (name, number, _timing(record))
    if record.elsewhere:
        head.append((b"x-model-warnings", ", ".join(MISMATCH).encode()))
    status = 400 if dialect.bare and problem.code == "INVALID_INPUT" else problem.status
    return status, head, [dialect.document(problem, record.id)]


def attribute(record: RequestRecord, asked: float) -> None:
    """Says where the time of a failed request went: into the model, or into waiting for it. `asked`: when the
    model was called, 0 if it was not."""
    if asked and not record.predict:
        spent = perf_counter() - asked
        record.predict, record.queue = (spent, 0.0) if record.code in _MODEL_CODES else (0.0, spent)


def _too_many_connections() -> Problem:
    return overloaded("the gateway", "all connections are in use (max_connections)", 1.0)


def _about(record: RequestRecord, answer: Answer) -> dict[str, object]:
    """The members of the JSON answer next to the predictions."""
    assert record.version is not None
    model = {"name": record.version.name, "version": record.version.version, "alias": record.alias}
    return {"model": model, "warnings": list(answer.warnings)}


class _DisconnectWatchers:
    """Watches the requests that take longer than `WATCH_AFTER_SECONDS`. One timer serves all of them, at most
    every `LOOK_SECONDS`: a timer per request would slow down the short ones."""

    def __init__(self) -> None:
        self._young: deque[tuple[float, _DisconnectWatcher]] = deque()

    def watch(self, receive: Receive, since: float) -> _DisconnectWatcher:
        """Watches the current task, which waits for its answer since this time of `perf_counter`."""
        watcher = _DisconnectWatcher(receive, asyncio.current_task())
        if not self._young:
            asyncio.get_running_loop().call_later(WATCH_AFTER_SECONDS, self._begin)
        self._young.append((since, watcher))
        return watcher

    def _begin(self) -> None:
        old = perf_counter() - WATCH_AFTER_SECONDS
        while self._young and self._young[0][0] <= old:
            self._young.popleft()[1].begin()
        if self._young:
            asyncio.get_running_loop().call_later(LOOK_SECONDS, self._begin)


class _DisconnectWatcher:
    """Cancels the work for a client that leaves while it waits, so that its place in the queue is free."""

    __slots__ = ("_receive", "_request", "_watch", "left")

    def __init__(self, receive: Receive, request: asyncio.Task[Any] | None) -> None:
        self.left = False
        self._receive: Receive | None = receive
        self._request = request
        self._watch: asyncio.Task[None] | None = None

    def begin(self) -> None:
        if self._receive is not None:
            self._watch = asyncio.get_running_loop().create_task(self._look(self._receive))

    def end(self) -> None:
        self._receive = self._request = None  # it may stay in the queue for a moment after its end
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    async def _look(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left = True
        if self._request is not None:
            self._request.cancel()


def _timing(record: RequestRecord) -> Header:
    spent = 1e3 * record.parse, 1e3 * record.queue, 1e3 * record.predict, 1e3 * record.encode
    return b"server-timing", _SERVER_TIMING % spent


@lru_cache(maxsize=1024)
def resolved(name: str, version: str, alias: str | None) -> tuple[bytes, Header, Header]:
    """How every answer names its resolved model: the body's member and the two headers. A header can hold
    Latin-1 only, so other characters than printable ASCII are percent-encoded, and so is `%`."""
    model = b',"model":' + orjson.dumps({"name": name, "version": version, "alias": alias})
    return model, (b"x-model-name", quote(name, safe=_PLAIN).encode()), (b"x-model-version", version.encode())


def deadline_of(headers: Mapping[bytes, bytes]) -> float | None:
    """The client's X-Request-Timeout-Ms as a time on the loop's clock."""
    given = headers.get(TIMEOUT)
    if given is None:
        return None
    if not given.isdigit() or len(given) > 9 or int(given) == 0:
        raise Problem(
            "MALFORMED_BODY",
            "the header X-Request-Timeout-Ms must be a positive whole number of milliseconds",
            hint="X-Request-Timeout-Ms: 2000",
        )
    return asyncio.get_running_loop().time() + int(given) / 1000.0


def _reference(target: bytes | Reference | None, headers: Mapping[bytes, bytes]) -> Reference | None:
    """The model that the path names, else the header X-Model, else None. Raises INVALID_REFERENCE, also for
    SageMaker's target model: another model must never answer in its place."""
    if TARGET_MODEL in headers:
        raise Problem(
            "INVALID_REFERENCE",
            "X-Amzn-SageMaker-Target-Model selects a model on /invocations only",
            hint="name the model in the path and leave out the header",
        )
    try:
        if isinstance(target, Reference):
            return target
        if target is not None:
            return _path_reference(target)
        named = headers.get(b"x-model")
        return None if named is None else names.parse_short(named.decode())
    except UnicodeDecodeError:
        raise Problem("INVALID_REFERENCE", "the header X-Model is not UTF-8") from None


@lru_cache(maxsize=1024)
def _path_reference(target: bytes) -> Reference:
    return names.parse_path(target)
