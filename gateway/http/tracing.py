"""A request's trace: the headers of W3C Trace Context, and its span where traces are exported.

The answer's header `traceresponse` gives the id of the gateway's part in the client's trace, in the form of
the working group's draft. Only clients that sent a trace get it; others ignore it. Knows headers; must not
know what a trace is used for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from starlette.types import Message, Scope, Send

from gateway import tracing
from gateway.http.problems import Header

if TYPE_CHECKING:
    from gateway.record import RequestRecord
    from gateway.spans import Spans

#: Probes and scrapes come every few seconds, and their traces would say nothing.
UNTRACED: Final = frozenset({"/livez", "/readyz", "/metrics"})
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
#: What a path may begin with. Only such a path has a route: an unknown one may be anything.
_FIRST: Final = frozenset(
    {
        "predict", "invocations", "ping", "health", "version", "v1", "v2", "api", "endpoints", "models",
        "rollouts", "registry", "registry.yaml", "webhooks", "usage", "events", "docs", "openapi.json",
        "console",
    }
)  # fmt: skip
#: After these words a path names something.
_NAMES: Final = {
    "predict": "{model}", "models": "{model}", "endpoints": "{model}", "rollouts": "{alias}",
    "versions": "{version}", "labels": "{alias}", "aliases": "{alias}", "console": "{page}",
}  # fmt: skip
_MOST_PARTS: Final = 10


def traced(headers: Sequence[Header], send: Send) -> Send:
    """Begins the request's part in the trace that its header `traceparent` names. A request with two such
    headers has no trace."""
    parent, state = _given(headers)
    trace = tracing.begin(parent, state) if parent else None
    if trace is None:
        return send
    response = (b"traceresponse", trace.parent.encode())

    async def answer(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], response]}
        await send(message)

    return answer


def observed(spans: Spans, scope: Scope, record: RequestRecord, send: Send) -> Send:
    """Begins the span of a request, below the client's if it names one. The end is `Spans.answered`."""
    path: str = scope["path"]
    method = scope["method"] if scope["method"] in METHODS else "_OTHER"
    route = route_of(path)
    attributes: dict[str, Any] = {
        "http.request.method": method,
        "url.path": path,
        "url.scheme": scope.get("scheme", "http"),
        "network.protocol.version": scope.get("http_version", "1.1"),
    }
    if route is not None:
        attributes["http.route"] = route
    if (server := scope.get("server")) is not None:
        attributes["server.address"], attributes["server.port"] = server[0], server[1] or 0
    parent, state = _given(scope["headers"])
    headers = (
        {"traceparent": parent.decode("latin-1"), "tracestate": state.decode("latin-1")} if parent else {}
    )
    trace = spans.request(record, method if route is None else f"{method} {route}", attributes, headers)
    named = trace is not None and trace.trace_id.encode() in parent

    async def answer(message: Message) -> None:
        if message["type"] == "http.response.start":
            record.status = message["status"]
            if named and trace is not None:
                response = (b"traceresponse", trace.parent.encode())
                message = {**message, "headers": [*message["headers"], response]}
        await send(message)

    return answer


def route_of(path: str) -> str | None:
    """The path with names in place of what it names; None for an unknown one."""
    parts = path.split("/")[1:]
    if parts[0] not in _FIRST or len(parts) > _MOST_PARTS:
        return "/" if parts == [""] else None
    route: list[str] = []
    variable: str | None = None
    for part in parts:
        if variable is None or not part:
            variable = _NAMES.get(part)
            route.append(part)
        else:
            verb = part.rpartition(":")[2] if ":" in part else ""  # V1: NAME:predict
            route.append(f"{variable}:{verb}" if verb in ("predict", "explain") else variable)
            variable = None
    return "/" + "/".join(route)


def _given(headers: Sequence[Header]) -> tuple[bytes, bytes]:
    """The client's `traceparent` and `tracestate`. A request with two parents has none."""
    parents = [value for name, value in headers if name == b"traceparent"]
    state = b",".join(value for name, value in headers if name == b"tracestate")
    return (parents[0], state) if len(parents) == 1 else (b"", b"")
