"""Converts problems to gRPC's form: a status code, a text and trailing metadata.

Only this module has the table of our codes. Source of the meanings:
https://grpc.io/docs/guides/status-codes/
"""

from __future__ import annotations

from typing import Final

import grpc

from gateway.errors import HINTS, Problem

_CODES: Final[dict[str, grpc.StatusCode]] = {
    "MALFORMED_BODY": grpc.StatusCode.INVALID_ARGUMENT,
    "INVALID_REFERENCE": grpc.StatusCode.INVALID_ARGUMENT,
    "INVALID_INPUT": grpc.StatusCode.INVALID_ARGUMENT,
    "UNSUPPORTED_MEDIA_TYPE": grpc.StatusCode.INVALID_ARGUMENT,
    "UNAUTHENTICATED": grpc.StatusCode.UNAUTHENTICATED,
    "FORBIDDEN": grpc.StatusCode.PERMISSION_DENIED,
    "ROLLOUT_REFUSED": grpc.StatusCode.FAILED_PRECONDITION,
    "REGISTRY_READ_ONLY": grpc.StatusCode.FAILED_PRECONDITION,
    "PRECONDITION_FAILED": grpc.StatusCode.FAILED_PRECONDITION,
    "BODY_TOO_LARGE": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "OVERLOADED": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "DEADLINE_EXCEEDED": grpc.StatusCode.DEADLINE_EXCEEDED,
}
_SHOWN_DETAILS: Final = 10
#: Longer text is cut, because it is sent in a header.
_MOST_TEXT: Final = 3000


def code(problem: Problem) -> grpc.StatusCode:
    """Returns the status by code, else by HTTP status. A call that may succeed later is UNAVAILABLE, which
    clients retry by themselves."""
    if problem.code in _CODES:
        return _CODES[problem.code]
    if problem.status == 404:
        return grpc.StatusCode.NOT_FOUND
    return grpc.StatusCode.UNAVAILABLE if problem.retryable else grpc.StatusCode.INTERNAL


def text(problem: Problem) -> str:
    """Returns our code, the message, the first details and the hint."""
    lines = [f"{problem.code}: {problem.message}"]
    for one in problem.details[:_SHOWN_DETAILS]:
        wanted = f" (expected {one.expected}{f', got {one.got}' if one.got else ''})" if one.expected else ""
        lines.append(f"{one.path} {one.problem}{wanted}")
    if (more := len(problem.details) - _SHOWN_DETAILS) > 0:
        lines.append(f"and {more} more")
    lines.append(f"hint: {problem.hint or HINTS[problem.code]}")
    return "; ".join(lines).encode("utf-8", "replace").decode()[:_MOST_TEXT]


def metadata(problem: Problem) -> list[tuple[str, str]]:
    """Returns our code, and the seconds to wait before a retry."""
    pairs = [("x-error-code", problem.code)]
    if problem.retry_after is not None:
        pairs.append(("retry-after", f"{max(1.0, problem.retry_after):.0f}"))
    return pairs
