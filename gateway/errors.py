"""The errors that a client sees: the exception `Problem`, and the table of error codes.

Knows the codes of the HTTP contract, but no HTTP library. A `Problem` is safe to show to a client: it
holds no row data, no traceback and no path of the server.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

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

HINTS: Final[dict[str, str]] = {
    "MALFORMED_BODY": "a JSON body has exactly one of dataframe_split, dataframe_records, instances and "
    "inputs; a CSV body begins with a row of column names",
    "INVALID_REFERENCE": "write models:/NAME@ALIAS or models:/NAME/VERSION, in a path NAME, NAME@ALIAS or "
    "NAME/versions/VERSION",
    "UNAUTHENTICATED": "send the header Authorization: Bearer TOKEN; sign a webhook with its secret",
    "FORBIDDEN": "control needs admin_key_file or a writable state_dir, webhooks need webhook_secret_file",
    "MODEL_NOT_FOUND": "GET /models lists the models",
    "VERSION_NOT_FOUND": "GET /models/NAME lists the versions",
    "ALIAS_NOT_FOUND": "GET /models/NAME lists the aliases",
    "NOT_FOUND": "predictions: POST /predict/NAME, /v1/models/NAME:predict, /v2/models/NAME/infer; models: "
    "GET /models, /v2/models/NAME; GET /openapi.json lists every path",
    "METHOD_NOT_ALLOWED": "the header Allow lists the methods of this path",
    "ROLLOUT_REFUSED": "the alias stays where it is; promote a version that passes",
    "REGISTRY_READ_ONLY": "change the registry at its source; the gateway follows it",
    "PRECONDITION_FAILED": "look where the alias points now (GET /models/NAME), then decide again",
    "BODY_TOO_LARGE": "send fewer rows in one request",
    "UNSUPPORTED_MEDIA_TYPE": "send application/json or text/csv",
    "INVALID_INPUT": "details names each field; GET /models/NAME/versions/VERSION shows the signature",
    "OVERLOADED": "wait for the time in Retry-After, and send fewer requests at once",
    "PREDICTION_FAILED": "the model failed, not the gateway: give this request_id to the owner of the model",
    "INTERNAL": "give this request_id to the operator of the gateway",
    "WORKER_CRASHED": "try again after Retry-After; if the same rows crash it again, leave them out",
    "MODEL_LOADING": "try again after Retry-After: the load continues; the setting preload loads it at start",
    "MODEL_UNAVAILABLE": "the gateway tries again by itself; `gateway load REF` tries at once",
    "CAPACITY_EXCEEDED": "unload models that are not needed, or raise memory_limit",
    "REGISTRY_UNAVAILABLE": "loaded models continue to answer; try again after Retry-After",
    "SHUTTING_DOWN": "send the request to another gateway, or again after Retry-After",
    "DEADLINE_EXCEEDED": "allow more time (X-Request-Timeout-Ms, the model's timeout), or send fewer rows",
}
"""The hint for each code, used where the place that raises a problem gives none of its own."""

MAX_DETAILS: Final = 100

#: Matches what looks like a path on this machine in a library's message. The part after a URL's scheme does
#: not match.
_LOGIN: Final = re.compile(r"(?<=://)[^\s/@]{1,200}@")
_PATH: Final = re.compile(r"(?:file://|(?<![\w./])(?!(?<=\w:)//))/+(?:[^\s'\":,;()\[\]/]+/+)+")


def pathless(text: str) -> str:
    """Returns the text without directories and without logins in URLs: a client sees the names of files, not
    where they are."""
    return _PATH.sub("…/", _LOGIN.sub("…@", text))


@dataclass(frozen=True, slots=True)
class Detail:
    """One fault of a request: where it is, what it is, what was expected, what kind of value came."""

    path: str
    problem: str
    expected: str | None = None
    got: str | None = None

    def to_json(self) -> dict[str, str]:
        pairs = {"path": self.path, "problem": self.problem, "expected": self.expected, "got": self.got}
        return {key: value for key, value in pairs.items() if value is not None}


class Problem(Exception):
    """An error that a client sees. `code` is a key of `STATUS`; `retry_after` is in seconds."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        details: Sequence[Detail] = (),
        hint: str | None = None,
        retry_after: float | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = tuple(details)
        self.hint = hint
        self.retry_after = retry_after
        self._retryable = retryable

    @property
    def status(self) -> int:
        return STATUS[self.code]

    @property
    def of_input(self) -> bool:
        """Returns whether the request itself is the cause: its body, its reference or its rights."""
        return self.status < 500 and self.code != "OVERLOADED"

    @property
    def retryable(self) -> bool:
        """Returns whether the same request may succeed later without a change by the operator."""
        return self.code in RETRYABLE if self._retryable is None else self._retryable

    def again(self, retry_after: float | None = None) -> Problem:
        """Returns a copy for another caller: an exception object is raised once, never shared."""
        wait = self.retry_after if retry_after is None else retry_after
        return Problem(
            self.code,
            self.message,
            details=self.details,
            hint=self.hint,
            retry_after=wait,
            retryable=self._retryable,
        )

    def __repr__(self) -> str:
        return f"<Problem {self.code}: {self.message}>"


def overloaded(who: str, why: str, retry_after: float, hint: str | None = None) -> Problem:
    """The problem of a request that could be taken later: who cannot take it now, and why."""
    return Problem("OVERLOADED", f"{who} is overloaded: {why}", hint=hint, retry_after=retry_after)
