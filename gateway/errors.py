"""What can be answered instead of a prediction: one exception, one table of codes.

Knows the codes of the HTTP contract and nothing of HTTP libraries. A `Problem` is safe to show to a
client: no row data, no traceback, no path of the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gateway.registries.base import Version

STATUS: Final[dict[str, int]] = {
    "MALFORMED_BODY": 400,
    "INVALID_REFERENCE": 400,
    "UNAUTHENTICATED": 401,
    "FORBIDDEN": 403,
    "MODEL_NOT_FOUND": 404,
    "VERSION_NOT_FOUND": 404,
    "ALIAS_NOT_FOUND": 404,
    "NOT_FOUND": 404,
    "METHOD_NOT_ALLOWED": 405,
    "ROLLOUT_REFUSED": 409,
    "REGISTRY_READ_ONLY": 409,
    "PRECONDITION_FAILED": 412,
    "BODY_TOO_LARGE": 413,
    "UNSUPPORTED_MEDIA_TYPE": 415,
    "INVALID_INPUT": 422,
    "OVERLOADED": 429,
    "PREDICTION_FAILED": 500,
    "INTERNAL": 500,
    "WORKER_CRASHED": 502,
    "MODEL_LOADING": 503,
    "MODEL_UNAVAILABLE": 503,
    "CAPACITY_EXCEEDED": 503,
    "REGISTRY_UNAVAILABLE": 503,
    "SHUTTING_DOWN": 503,
    "DEADLINE_EXCEEDED": 504,
}

RETRYABLE: Final = frozenset(code for code, status in STATUS.items() if status in (429, 502, 503, 504))

MAX_DETAILS: Final = 100


@dataclass(frozen=True, slots=True)
class Detail:
    """One thing wrong with a request: where, what, what was wanted, what kind of thing came."""

    path: str
    problem: str
    expected: str | None = None
    got: str | None = None

    def to_json(self) -> dict[str, str]:
        pairs = {"path": self.path, "problem": self.problem, "expected": self.expected, "got": self.got}
        return {key: value for key, value in pairs.items() if value is not None}


class Problem(Exception):
    """An answer that is not a prediction. `code` is one of `STATUS`; `retry_after` is in seconds.

    `version` and `alias` say what was resolved, where the request came so far; the service sets them.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        details: Sequence[Detail] = (),
        hint: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = tuple(details)
        self.hint = hint
        self.retry_after = retry_after
        self.version: Version | None = None
        self.alias: str | None = None

    @property
    def status(self) -> int:
        return STATUS[self.code]

    @property
    def retryable(self) -> bool:
        return self.code in RETRYABLE

    def again(self, retry_after: float | None = None) -> Problem:
        """The same problem for another caller: an exception is raised once, never shared."""
        wait = self.retry_after if retry_after is None else retry_after
        return Problem(self.code, self.message, details=self.details, hint=self.hint, retry_after=wait)

    def __repr__(self) -> str:
        return f"<Problem {self.code}: {self.message}>"
