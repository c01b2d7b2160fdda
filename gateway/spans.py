"""Traces as OpenTelemetry spans: one of each request, with the model's call, and one of each load.

`otel` says whether they are on; the SDK reads its own variables (sampler, limits, batches). A thread of the
SDK exports; a queue that is full drops spans, so a collector that is slow or away delays nothing. Must not
know HTTP: its callers name methods, routes and attributes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from gateway import __version__, otel, tracing
from gateway.serving.servable import Phase

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import SpanKind

    from gateway.record import RequestRecord
    from gateway.serving.servable import Servable

log = logging.getLogger("gateway")

#: The parts of a load by their spans' names.
_PARTS: Final = {
    Phase.FETCHING: "fetch",
    Phase.BUILDING: "build",
    Phase.QUEUED: "wait",
    Phase.RESERVING: "reserve",
    Phase.LOADING: "start",
    Phase.WARMING: "warm up",
}


def begin(environ: Mapping[str, str]) -> Spans | None:
    """The spans of a gateway with these variables; None if they are off, or if a library is missing."""
    found = otel.exporters(environ, "traces")
    if not found:
        return None
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=otel.resource(), shutdown_on_exit=False)
    for exporter in found:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return Spans(provider)


class Spans:
    """The spans of one gateway. Only the event loop uses it."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api = trace
        self._provider = provider
        self._tracer = provider.get_tracer("gateway", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def request(
        self, record: RequestRecord, name: str, attributes: Mapping[str, Any], parent: Mapping[str, str]
    ) -> tracing.Trace | None:
        """Begins the span of a request, and makes the running task a part of its trace. `parent`: the headers
        `traceparent` and `tracestate`, empty without a valid caller's trace."""
        from opentelemetry.context import Context

        context = self._propagator.extract(parent, Context())
        kind = self._api.SpanKind.SERVER
        span = record.span = self._tracer.start_span(name, context, kind, attributes)
        about = span.get_span_context()
        return tracing.enter(
            f"{about.trace_id:032x}",
            f"{about.span_id:016x}",
            int(about.trace_flags) & tracing.SAMPLED,
            about.trace_state.to_header(),
        )

    def answered(self, record: RequestRecord, failed: bool) -> None:
        """Ends the span of a request. `failed`: by a fault that is not the client's."""
        span = record.span
        if span.is_recording():
            span.set_attributes(_facts(record))
            if failed:
                span.set_attribute("error.type", record.code or "_OTHER")
                span.set_status(self._api.StatusCode.ERROR)
            if record.work is not None:
                self._predict(record, record.work)
        span.end()

    def _predict(self, record: RequestRecord, work: tracing.Work) -> None:
        called = {"gateway.batch.rows": work.rows, "gateway.batch.requests": work.requests}
        attributes = {**_model(record.version), **called}
        self._child("predict", self._api.set_span_in_context(record.span), work.began, work.ended, attributes)

    def load(self, servable: Servable) -> None:
        """The spans of a load that has ended, and of its parts. Its parent is the request that caused it; a
        load without one is a trace of its own."""
        from opentelemetry.context import Context

        trace, api, context = tracing.origin(), self._api, Context()
        if trace is not None:
            flags = api.TraceFlags(trace.flags)
            caused = api.SpanContext(int(trace.trace_id, 16), int(trace.span_id, 16), False, flags)
            context = api.set_span_in_context(api.NonRecordingSpan(caused), context)
        phases = servable.phases
        attributes = _model(servable.version)
        span = self._tracer.start_span(
            "load", context, api.SpanKind.INTERNAL, attributes, start_time=phases[0][1]
        )
        if span.is_recording():
            within = api.set_span_in_context(span, Context())
            for (phase, began), (_, ended) in pairwise(phases):
                if (name := _PARTS.get(phase)) is not None:
                    self._child(name, within, began, ended, attributes)
            if servable.problem is not None:
                span.set_attribute("error.type", servable.problem.code)
                span.set_status(api.StatusCode.ERROR, servable.problem.message)
        span.end(phases[-1][1])

    def _child(self, name: str, parent: Any, began: int, ended: int, attributes: Mapping[str, Any]) -> None:
        kind: SpanKind = self._api.SpanKind.INTERNAL
        self._tracer.start_span(name, parent, kind, attributes, start_time=began).end(ended)

    async def close(self) -> None:
        """Sends the last spans, for a moment at most."""
        if not await otel.briefly(self._provider.shutdown):
            log.warning("the last traces were not sent within %g s", otel.PATIENCE)


def _model(version: Any) -> dict[str, str]:
    return {"gateway.model.name": version.name, "gateway.model.version": version.version}


def _facts(record: RequestRecord) -> dict[str, Any]:
    """Returns the attributes of a request that has ended."""
    facts: dict[str, Any] = {"gateway.request.id": record.shown_id}
    if record.code:
        facts["gateway.code"] = record.code
    if record.version is not None:
        facts |= _model(record.version)
    if record.alias is not None:
        facts["gateway.model.alias"] = record.alias
    if record.rows:
        facts["gateway.rows"] = record.rows
    if record.cached is not None:
        facts["gateway.model.loaded"] = record.cached
    return facts
