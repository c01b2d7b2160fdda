"""Wraps every call: makes its record with its id, trace, metrics, access log, and errors as statuses.

Knows metadata and statuses; must not know the methods that it wraps.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from gateway import tracing
from gateway.errors import Problem
from gateway.grpc import statuses
from gateway.http import access_log, problems
from gateway.http.callers import discreet
from gateway.http.predict import resolved
from gateway.record import RequestRecord
from gateway.service import MISMATCH

if TYPE_CHECKING:
    from gateway.grpc.arrivals import Arrivals
    from gateway.http.parts import Parts

#: Frequent calls without information, such as probes, have no line in the access log.
QUIET: Final = frozenset({"ServerLive", "ServerReady"})

#: Seconds by which the caller's deadline may be earlier than ours, because of the network.
CLOCKS: Final = 0.1

Work: TypeAlias = "Callable[[bytes, Call], Awaitable[bytes]]"


class Call:
    """One call, or one message of a stream. `marks`: the trailing metadata about its answer."""

    __slots__ = ("_context", "marks", "record")

    def __init__(self, context: Any) -> None:
        headers = [
            (name.encode(), value.encode("latin-1", "replace"))
            for name, value in context.invocation_metadata() or ()
            if isinstance(value, str)
        ]
        by_name = dict(headers)
        self._context = context
        self.record = RequestRecord(problems.request_id(by_name), by_name)
        if len(by_name) < len(headers):
            self.record.twice = problems.contradiction(headers)
        self.marks: tuple[str, ...] = ()

    @property
    def deadline(self) -> float | None:
        """Returns the caller's deadline in the event loop's time."""
        left = self._context.time_remaining()
        return None if left is None else asyncio.get_running_loop().time() + left

    def metadata(self) -> list[tuple[str, str]]:
        """Returns the trailing metadata of every call: the headers of an HTTP answer."""
        record = self.record
        pairs = [("x-request-id", record.shown_id)]
        if record.version is not None:
            _, *headers = resolved(record.version.name, record.version.version, record.alias)
            pairs += [(name.decode(), value.decode("latin-1")) for name, value in headers]
        # A failed call has no marks of an answer, and its model runs where it runs all the same.
        marks = self.marks or (MISMATCH if record.elsewhere else ())
        if marks:
            pairs.append(("x-model-warnings", ", ".join(marks)))
        if (trace := tracing.current()) is not None:
            pairs.append(("traceresponse", trace.parent))
        return pairs


class Calls:
    """Makes the handlers of methods. `service`: the full name of their service. `arrivals` receives the
    messages of calls, `on_streams` those of streams."""

    def __init__(
        self, parts: Parts, service: str, drained: asyncio.Event, arrivals: Arrivals, on_streams: Arrivals
    ) -> None:
        self._arrivals = arrivals
        self._on_streams = on_streams
        self._metrics = parts.metrics
        self._access = parts.access
        self._logged = parts.settings.access_log
        self._service = service
        self._spans = parts.spans
        self._drained = drained

    def unary(
        self, method: str, work: Work
    ) -> Callable[[AsyncIterator[bytes], Any], Awaitable[bytes | None]]:
        """Returns a handler for one message and one answer. It is a handler of a stream, which on the wire is
        the same: only such a handler begins before the message is complete."""

        async def handle(bodies: AsyncIterator[bytes], context: Any) -> bytes | None:
            body = await _received(self._arrivals, bodies)
            if body is None:
                body = Problem("MALFORMED_BODY", "the call has no message")
            call = self._begun(method, context)
            answer = await self._answered(method, work, body, call)
            if isinstance(answer, Problem):
                trailing = [*call.metadata(), *statuses.metadata(answer)]
                await context.abort(statuses.code(answer), statuses.text(answer), tuple(trailing))
                return None
            context.set_trailing_metadata(tuple(call.metadata()))
            return answer

        return handle

    def stream(
        self, method: str, work: Work, refused: Callable[[str], bytes]
    ) -> Callable[[AsyncIterator[bytes], Any], AsyncIterator[bytes]]:
        """Returns a handler for a stream, which answers one message after another. `refused` makes the answer
        to a failed message; the stream continues. It ends when the caller ends it, or when the gateway stops,
        after the current answer."""

        async def handle(bodies: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            drained = asyncio.ensure_future(self._drained.wait())
            try:
                while True:
                    coming = asyncio.ensure_future(_received(self._on_streams, bodies))
                    await asyncio.wait({coming, drained}, return_when=asyncio.FIRST_COMPLETED)
                    if not coming.done():
                        coming.cancel()
                        stopping = Problem("SHUTTING_DOWN", "the gateway is stopping", retry_after=1)
                        await context.abort(statuses.code(stopping), statuses.text(stopping))
                    body = coming.result()
                    if body is None:
                        return
                    if isinstance(body, Problem):
                        await context.abort(statuses.code(body), statuses.text(body))
                        return
                    answer = await self._answered(method, work, body, self._begun(method, context))
                    yield refused(statuses.text(answer)) if isinstance(answer, Problem) else answer
            finally:
                drained.cancel()

        return handle

    def _begun(self, method: str, context: Any) -> Call:
        call = Call(context)
        headers = call.record.headers
        if self._spans is not None and method not in QUIET:
            names = [name for name in (b"traceparent", b"tracestate") if name in headers]
            self._spans.request(
                call.record,
                f"{self._service}/{method}",
                {"rpc.system": "grpc", "rpc.service": self._service, "rpc.method": method},
                {name.decode(): headers[name].decode("latin-1") for name in names},
            )
        elif b"traceparent" in headers:
            tracing.begin(headers[b"traceparent"], headers.get(b"tracestate", b""))
        return call

    async def _answered(self, method: str, work: Work, body: bytes | Problem, call: Call) -> bytes | Problem:
        """Returns the answer or the Problem; counts and logs both. `body`: the message, or why there is
        none."""
        record = call.record
        answer: bytes | Problem | None = None
        try:
            if isinstance(body, Problem):
                raise body
            problems.check_headers(record)
            if self._access.guarded:
                await self._access.identify(record)
            answer = await work(body, call)
            record.code = "2xx"
        except asyncio.CancelledError:
            deadline = call.deadline
            late = deadline is not None and asyncio.get_running_loop().time() >= deadline - CLOCKS
            record.code = "DEADLINE_EXCEEDED" if late else "CLIENT_LEFT"
            raise
        except Problem as problem:
            answer = problem
        except Exception as error:  # noqa: BLE001 - nothing may reach the server without an answer
            answer = problems.unexpected(error, record.id)
        finally:
            if isinstance(answer, Problem):
                record.code = discreet(answer, record).code
                # The frames of a traceback keep the message alive.
                answer.__traceback__ = answer.__context__ = None
            if record.predicts and record.code:
                self._metrics.record(record)
            if self._logged and method not in QUIET:
                self._log(method, body, answer, record)
            if record.span is not None and self._spans is not None:
                code = statuses.code(answer).value[0] if isinstance(answer, Problem) else int(answer is None)
                record.span.set_attribute("rpc.grpc.status_code", code)  # 1: cancelled
                self._spans.answered(record, failed=isinstance(answer, Problem) and answer.status >= 500)
        return answer

    def _log(
        self, method: str, body: bytes | Problem, answer: bytes | Problem | None, record: RequestRecord
    ) -> None:
        line = access_log.Answered("gRPC", f"/{self._service}/{method}")
        line.bytes_in = 0 if isinstance(body, Problem) else len(body)
        if isinstance(answer, Problem):
            line.status = answer.status
        elif answer is not None:
            line.status, line.bytes_out = 200, len(answer)
        access_log.write(line, record)


async def _received(arrivals: Arrivals, messages: AsyncIterator[bytes]) -> bytes | Problem | None:
    try:
        return await arrivals.next(messages)
    except Problem as problem:
        return problem
