"""Predictions over HTTP: from an ASGI scope to the service and back, before any router.

This is the hot path: no pydantic, no regular expression, no log line and no request object. It knows the
contract's URLs and headers (CONTRACT §5) and nothing of how a model is found, loaded or asked.
"""

from __future__ import annotations

import asyncio
import string
from collections import deque
from collections.abc import Mapping
from functools import lru_cache
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import orjson
from starlette.types import Receive, Scope, Send

from gateway import names
from gateway.errors import Problem
from gateway.http import answers, arrow, bodies, large, problems
from gateway.http.problems import JSON, Header
from gateway.http.protocol import SPARE
from gateway.http.tracing import traced
from gateway.names import Reference
from gateway.service import Answer, Inference

if TYPE_CHECKING:
    from gateway.app import Gateway
    from gateway.registries.base import Version

#: Seconds of parse, queue, predict, encode.
Phases = tuple[float, float, float, float]

WATCH_AFTER_SECONDS: Final = 0.1
#: Who is refused for want of room hears it a moment later: clients that ask again at once, whatever they are
#: told, would otherwise take the loop's time from those whose requests wait.
REFUSAL_SECONDS: Final = 0.05

_PLAIN: Final = "".join(c for c in string.printable if c.isprintable() and c != "%")
_SERVER_TIMING: Final = b"parse;dur=%.3f, queue;dur=%.3f, predict;dur=%.3f, encode;dur=%.3f"
_MODEL_CODES: Final = frozenset({"PREDICTION_FAILED", "WORKER_CRASHED"})
_UNREAD_CODES: Final = frozenset({"BODY_TOO_LARGE", "OVERLOADED"})
_NO_TIME: Final = (0.0, 0.0, 0.0, 0.0)
_ARROW: Final[Header] = (b"content-type", arrow.MEDIA.encode())


class Prediction:
    """The prediction endpoints. Serves every path below `/predict`, and `/invocations` in MLflow's form."""

    def __init__(self, app: Gateway) -> None:
        self._service = app.service
        self._metrics = app.metrics
        self._bodies = bodies.BodyReader(app.settings.max_body_bytes, app.settings.max_inflight_bytes)
        self._large = app.large_bodies
        self._max_answer = app.settings.max_answer_bytes
        self._departures = _Departures()

    async def serve(
        self, scope: Scope, receive: Receive, send: Send, target: bytes | None, *, bare: bool = False
    ) -> None:
        """Answers one request. `target` is the raw path behind `/predict/`, None where the path names no
        model. `bare`: MLflow's answer, `{"predictions": …}` alone, with input errors as 400."""
        began = perf_counter()
        headers = dict(scope["headers"])
        identity = problems.request_id(headers)
        if b"traceparent" in headers:
            send = traced(scope["headers"], send)
        if scope["method"] != "POST":
            await problems.respond_not_allowed(send, identity, scope["method"], "POST")
            return
        if SPARE in scope:
            message = "the gateway is overloaded: too many connections (max_connections)"
            problem = Problem("OVERLOADED", message, retry_after=1.0)
            await problems.respond_problem(send, problem, identity, problems.CLOSE)
            return
        phases = _NO_TIME
        held = unsent = 0
        parsing = asked = 0.0
        unread: Receive | None = receive
        answer: Answer | None = None
        version: Version | None = None
        departure: _Departure | None = None
        inference: Inference | None = None
        body = b""
        try:
            media = bodies.media_type(headers.get(b"content-type", b""))
            deadline = _deadline(headers)
            reference = _reference(target, headers)
            body = await self._bodies.read(receive, headers)
            held = len(body)
            unread = None
            started = perf_counter()
            becomes = await self._bodies.charge(body, media)
            held += becomes
            if len(body) > large.RAW_BYTES or becomes > large.PARSED_BYTES:
                unparsed = large.LargeBody(body, media, reference, self._large)
                body = b""
                if reference is None:
                    reference = bodies.agreed(None, await unparsed.model())
                inference = Inference(reference, None, None, deadline, request_id=identity, unparsed=unparsed)
                del unparsed
            else:
                parsed = bodies.PARSERS[media](body)
                body = b""
                reference = bodies.agreed(reference, parsed.model)
                inference = Inference(reference, parsed.raw, parsed.params, deadline, request_id=identity)
                del parsed
            asked = perf_counter()
            parsing = asked - started
            departure = self._departures.watch(receive)
            answer = await self._service.predict(inference)
            answered = perf_counter()
            as_table = b"accept" in headers and arrow.wanted(headers[b"accept"])
            if as_table:
                answers.check(answer.result, self._max_answer)
                predictions = [await arrow.encode(answer.result, _about(answer))]
            else:
                predictions = await answers.encode(answer.result, self._max_answer)
            if len(predictions) > 1:
                unsent = self._bodies.hold(sum(map(len, predictions)))
            departure.end()
            encoding = perf_counter() - answered
            phases = (parsing, answer.queue_seconds, answer.predict_seconds, encoding)
            version, status, code = answer.version, 200, "2xx"
            head, parts = _success(identity, answer, predictions, phases, bare)
            if as_table:
                head[0], parts = _ARROW, predictions
            del predictions
        except bodies.ClientLeft:
            self._left(scope, identity, None, began)
            return
        except asyncio.CancelledError:
            if departure is None or not departure.left:
                raise
            self._left(scope, identity, None if inference is None else inference.version, began)
            return
        except Exception as error:  # noqa: BLE001 - nothing may reach the server without an answer
            problem = error if isinstance(error, Problem) else problems.unexpected(error, identity)
            # The frames of a traceback hold the body, and a refusal may take seconds to be sent.
            problem.__traceback__ = problem.__context__ = None
            body = b""
            if answer is not None:
                problem.version, problem.alias = answer.version, answer.alias
            elif asked:
                spent = perf_counter() - asked
                phases = (
                    (parsing, 0.0, spent, 0.0) if problem.code in _MODEL_CODES else (parsing, spent, 0.0, 0.0)
                )
            version, status, code = problem.version, problem.status, problem.code
            if bare and code == "INVALID_INPUT":
                status = 400
            head, content = _failure(identity, problem, phases)
            parts = [content]
            if code == "OVERLOADED" and departure is not None:
                departure.end()
                self._bodies.release(held)
                held = 0
                await asyncio.sleep(REFUSAL_SECONDS)
            if code not in _UNREAD_CODES:
                unread = None  # what is left of a body within the limit, the server itself skips
        finally:
            self._bodies.release(held)
            if departure is not None:
                departure.end()
        try:
            if unread is not None:
                await problems.refuse_unread(send, unread, status, head, parts[0])
            elif len(parts) == 1:
                await problems.respond(send, status, head, parts[0])
            else:
                await problems.respond_in_parts(send, status, head, parts)
        finally:
            self._bodies.release(unsent)
            name, number = (version.name, version.version) if version else ("", "")
            self._metrics.request(name, number, code, perf_counter() - began, phases)

    def _left(self, scope: Scope, identity: bytes, version: Version | None, began: float) -> None:
        """Counts a caller who did not wait for the answer; what its head would have said, the access log
        finds in the scope."""
        unsent = [(b"x-request-id", identity)]
        if version is not None:
            unsent += _resolved(version.name, version.version, None)[1:]
        scope[problems.UNSENT] = unsent
        name, number = (version.name, version.version) if version else ("", "")
        self._metrics.request(name, number, "CLIENT_LEFT", perf_counter() - began)


def _success(
    identity: bytes, answer: Answer, predictions: list[bytes], phases: Phases, bare: bool
) -> tuple[list[Header], list[bytes]]:
    """The headers, and the body: whole, or in parts where the answer is large."""
    model, name, number = _resolved(answer.version.name, answer.version.version, answer.alias)
    parts = [b'{"predictions":', *predictions]
    if not bare:
        parts.append(model)
        if answer.warnings:
            parts += (b',"warnings":', orjson.dumps(answer.warnings))
    parts.append(b"}")
    head = [JSON, name, number, (b"x-request-id", identity), _timing(phases)]
    return head, parts if len(predictions) > 1 else [b"".join(parts)]


def _about(answer: Answer) -> dict[str, object]:
    """What the JSON form says beside the predictions."""
    model = {"name": answer.version.name, "version": answer.version.version, "alias": answer.alias}
    return {"model": model, "warnings": list(answer.warnings)}


def _failure(identity: bytes, problem: Problem, phases: Phases) -> tuple[list[Header], bytes]:
    head = problems.header_list(problem, identity)
    if problem.version is not None:
        _, name, number = _resolved(problem.version.name, problem.version.version, problem.alias)
        head += (name, number, _timing(phases))
    return head, problems.document(problem, identity)


class _Departures:
    """Looks after the requests that take longer than `WATCH_AFTER_SECONDS`, with one timer for all: a timer
    for each request would cost every quick one something."""

    def __init__(self) -> None:
        self._young: deque[tuple[float, _Departure]] = deque()

    def watch(self, receive: Receive) -> _Departure:
        loop = asyncio.get_running_loop()
        departure = _Departure(receive, asyncio.current_task(loop))
        if not self._young:
            loop.call_later(WATCH_AFTER_SECONDS, self._begin, loop)
        self._young.append((loop.time() + WATCH_AFTER_SECONDS, departure))
        return departure

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        while self._young and self._young[0][0] <= now:
            self._young.popleft()[1].begin()
        if self._young:
            loop.call_at(self._young[0][0], self._begin, loop)


class _Departure:
    """Cancels the work for a client that leaves while it waits, so that its place in a queue is free."""

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
        self._receive = self._request = None  # an ended one may stand in the queue for a moment yet
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    async def _look(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left = True
        if self._request is not None:
            self._request.cancel()


def _timing(phases: Phases) -> Header:
    parse, queue, predict, encode = phases
    return b"server-timing", _SERVER_TIMING % (parse * 1e3, queue * 1e3, predict * 1e3, encode * 1e3)


@lru_cache(maxsize=1024)
def _resolved(name: str, version: str, alias: str | None) -> tuple[bytes, Header, Header]:
    """What every answer of a resolved model says of it: the body's member and the two headers. A header
    holds Latin-1 at most, so what is not printable ASCII is percent-encoded, and `%` with it."""
    model = b',"model":' + orjson.dumps({"name": name, "version": version, "alias": alias})
    return model, (b"x-model-name", quote(name, safe=_PLAIN).encode()), (b"x-model-version", version.encode())


def _deadline(headers: Mapping[bytes, bytes]) -> float | None:
    """The caller's X-Request-Timeout-Ms as a moment of the loop's clock."""
    given = headers.get(b"x-request-timeout-ms")
    if given is None:
        return None
    if not given.isdigit() or len(given) > 9 or int(given) == 0:
        raise Problem(
            "MALFORMED_BODY",
            "the header X-Request-Timeout-Ms must be a positive whole number of milliseconds",
            hint="X-Request-Timeout-Ms: 2000",
        )
    return asyncio.get_running_loop().time() + int(given) / 1000.0


def _reference(target: bytes | None, headers: Mapping[bytes, bytes]) -> Reference | None:
    """What the path names, else the header X-Model; None where neither does. Raises INVALID_REFERENCE."""
    try:
        if target is not None:
            return _path_reference(target)
        named = headers.get(b"x-model")
        return None if named is None else names.parse_short(named.decode())
    except names.InvalidReference as error:
        raise Problem("INVALID_REFERENCE", str(error)) from None
    except UnicodeDecodeError:
        raise Problem("INVALID_REFERENCE", "the header X-Model is not UTF-8") from None


@lru_cache(maxsize=1024)
def _path_reference(target: bytes) -> Reference:
    return names.parse_path(target)
