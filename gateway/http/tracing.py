"""The headers of W3C Trace Context on a request and its answer.

The answer's header `traceresponse` gives the id of the gateway's part in the client's trace, in the form of
the working group's draft. Only clients that sent a trace get it; others ignore it. Knows headers; must not
know what a trace is used for.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import Message, Send

from gateway import tracing
from gateway.http.problems import Header


def traced(headers: Sequence[Header], send: Send) -> Send:
    """Begins the request's part in the trace that its header `traceparent` names. A request with two such
    headers has no trace."""
    parents = [value for name, value in headers if name == b"traceparent"]
    state = b",".join(value for name, value in headers if name == b"tracestate")
    trace = tracing.begin(parents[0], state) if len(parents) == 1 else None
    if trace is None:
        return send
    response = (b"traceresponse", trace.parent.encode())

    async def answer(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], response]}
        await send(message)

    return answer
