"""Problems as HTTP answers: the error form that README.md describes; also, how any answer is sent.

Knows status codes and headers; must not know routes or models. No answer made here holds a traceback, a row
of data or a path of the server.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from random import Random
from typing import Any, Final

import orjson
from starlette.types import Receive, Send

from gateway.errors import HINTS, MAX_DETAILS, Problem
from gateway.http.callers import discreet
from gateway.record import RequestRecord

Header = tuple[bytes, bytes]

JSON: Final[Header] = (b"content-type", b"application/json")
CLOSE: Final[Header] = (b"connection", b"close")

#: The key of a request's record in its scope.
RECORD: Final = "gateway.record"
LINGER_IDLE_SECONDS: Final = 1.0
LINGER_SECONDS: Final = 10.0
_MAX_REQUEST_ID: Final = 128
_IDENTITIES: Final = Random()
_WAIT_CODES: Final = frozenset({429, 502, 503})

_DECIDE: Final = {
    name.lower().encode(): name
    for name in (
        *("Authorization", "Content-Encoding", "Content-Type", "Inference-Header-Content-Length"),
        *("X-Amzn-SageMaker-Target-Model", "X-Model", "X-Request-Timeout-Ms"),
    )
}

_log = logging.getLogger("gateway.http")


def request_id(headers: Mapping[bytes, bytes]) -> bytes:
    """The client's X-Request-Id if it is 1 to 128 printable ASCII characters, else a new one."""
    given = headers.get(b"x-request-id")
    if given and len(given) <= _MAX_REQUEST_ID and given.isascii() and given.decode().isprintable():
        return given
    return b"%032x" % _IDENTITIES.getrandbits(128)  # unique, not secret: system randomness costs a call


def contradiction(headers: Iterable[Header]) -> str:
    """The name of a header that decides what is answered and that came with two values; empty: none did. What
    reads the first and what reads the last of them would answer, or let pass, different requests."""
    values: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in _DECIDE and values.setdefault(name, value.strip()) != value.strip():
            return _DECIDE[name]
    return ""


def check_headers(record: RequestRecord) -> None:
    """Raises INVALID_REFERENCE, MALFORMED_BODY where a header contradicts itself."""
    if record.twice:
        code = "INVALID_REFERENCE" if "Model" in record.twice else "MALFORMED_BODY"
        message = f"the header {record.twice} came twice, with different values"
        raise Problem(code, message, hint="send it once")


def unexpected(error: Exception, identity: bytes) -> Problem:
    """Returns what a client sees of an unexpected failure; the details go to the log."""
    said = identity.decode()
    _log.error("request %s failed unexpectedly", said, exc_info=error, extra={"request_id": said})
    return Problem("INTERNAL", "the gateway failed; its log has the reason under this request_id")


def not_found() -> Problem:
    return Problem("NOT_FOUND", "there is nothing at this path")


def json_line(content: object) -> bytes:
    """JSON that ends its line: an answer on a terminal must not run into the prompt."""
    return orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)


def document(problem: Problem, identity: bytes) -> bytes:
    """The JSON of a problem, with at most 100 details and then their count."""
    details = [detail.to_json() for detail in problem.details[:MAX_DETAILS]]
    if (more := len(problem.details) - MAX_DETAILS) > 0:
        details.append({"path": "", "problem": f"and {more} more"})
    content: dict[str, Any] = {
        "error_code": problem.code,
        "message": problem.message,
        "details": details,
        "hint": problem.hint or HINTS[problem.code],
        "retryable": problem.retryable,
        "request_id": identity.decode(),
    }
    try:
        return json_line(content)
    except orjson.JSONEncodeError:
        # Messages may quote what cannot be written as UTF-8: a lone surrogate in a name.
        safe = {
            k: v.encode(errors="replace").decode() if isinstance(v, str) else v for k, v in content.items()
        }
        return json_line(safe | {"details": []})


def header_list(problem: Problem, identity: bytes) -> list[Header]:
    """The headers of a problem: Retry-After is in whole seconds, at least 1."""
    head = [JSON, (b"x-request-id", identity)]
    if problem.status in _WAIT_CODES or problem.retry_after is not None:
        head.append((b"retry-after", b"%d" % max(1, math.ceil(problem.retry_after or 1.0))))
    if problem.code == "UNAUTHENTICATED":
        head.append((b"www-authenticate", b'Bearer realm="gateway"'))
    return head


def error_document(problem: Problem, identity: bytes) -> bytes:
    """The same with the member `error` in front, as the V1 and V2 protocols require."""
    message = orjson.dumps(problem.message.encode(errors="replace").decode())
    return b'{"error":' + message + b"," + document(problem, identity)[1:]


async def respond_problem(
    send: Send,
    problem: Problem,
    record: RequestRecord,
    *extra: Header,
    document: Callable[[Problem, bytes], bytes] = document,
) -> None:
    record.code = discreet(problem, record).code
    head = [*header_list(problem, record.id), *extra]
    await respond(send, problem.status, head, document(problem, record.id))


async def respond_not_allowed(
    send: Send,
    record: RequestRecord,
    method: str,
    allowed: str,
    document: Callable[[Problem, bytes], bytes] = document,
) -> None:
    problem = Problem("METHOD_NOT_ALLOWED", f"{method} is not allowed here", hint=f"use {allowed}")
    await respond_problem(send, problem, record, (b"allow", allowed.encode()), document=document)


async def respond(send: Send, status: int, head: Iterable[Header], body: bytes) -> None:
    """Sends a whole answer; its length is added to the headers."""
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [*head, length]})
    await send({"type": "http.response.body", "body": body})


async def respond_in_parts(send: Send, status: int, head: Iterable[Header], parts: list[bytes]) -> None:
    """Sends a large answer part by part, as fast as the client reads it; frees each part once it is sent."""
    length = (b"content-length", b"%d" % sum(map(len, parts)))
    await send({"type": "http.response.start", "status": status, "headers": [*head, length]})
    parts.reverse()
    while parts:
        await send({"type": "http.response.body", "body": parts.pop(), "more_body": True})
        await asyncio.sleep(0)  # otherwise a fast client would occupy the loop
    await send({"type": "http.response.body", "body": b""})


async def refuse_unread(
    send: Send, receive: Receive, status: int, head: Iterable[Header], body: bytes
) -> None:
    """Answers a request without reading its body, so that a client which is still sending gets the answer.

    Closing at once would reset the connection. So this sends the whole answer, discards for a moment what the
    client still sends, then closes the connection (web servers call this lingering close).
    """
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [*head, CLOSE, length]})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    loop = asyncio.get_running_loop()
    end = loop.time() + LINGER_SECONDS
    try:
        async with asyncio.timeout(LINGER_IDLE_SECONDS) as patience:
            while True:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    break
                patience.reschedule(min(end, loop.time() + LINGER_IDLE_SECONDS))
    except TimeoutError:
        pass  # the client continues to send: close anyway
    await send({"type": "http.response.body", "body": b""})
