"""What can be answered instead of a prediction: one exception, one table of codes.

Knows the codes of the HTTP contract and nothing of HTTP libraries. A `Problem` is safe to show to a
client: no row data, no traceback, no path of the server.
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
    "UNAUTHENTICATED": "control calls need Authorization: Bearer KEY, webhooks the secret they were given",
    "FORBIDDEN": "control needs admin_key_file or a writable state_dir, webhooks need webhook_secret_file",
    "MODEL_NOT_FOUND": "GET /models lists the models there are",
    "VERSION_NOT_FOUND": "GET /models/NAME lists the versions there are",
    "ALIAS_NOT_FOUND": "GET /models/NAME lists the aliases there are",
    "NOT_FOUND": "predictions: POST /predict/NAME; models: GET /models",
    "METHOD_NOT_ALLOWED": "the header Allow lists the methods of this path",
    "ROLLOUT_REFUSED": "the alias stays where it is; promote a version that passes",
    "REGISTRY_READ_ONLY": "change the registry at its source; the gateway follows it",
    "PRECONDITION_FAILED": "GET /models/NAME shows where the alias points now: look, and decide again",
    "BODY_TOO_LARGE": "send fewer rows in one request",
    "UNSUPPORTED_MEDIA_TYPE": "send application/json or text/csv",
    "INVALID_INPUT": "details names each field; GET /models/NAME/versions/VERSION shows the signature",
    "OVERLOADED": "wait as long as Retry-After says, and send fewer requests at once",
    "PREDICTION_FAILED": "the model failed, not the gateway: give this request_id to the owner of the model",
    "INTERNAL": "give this request_id to the operator of the gateway",
    "WORKER_CRASHED": "try again after Retry-After; rows that end it each time, the model cannot take",
    "MODEL_LOADING": "try again after Retry-After, the load goes on; preload has it done before the first",
    "MODEL_UNAVAILABLE": "it is tried again by itself; gateway load REF tries it at once",
    "CAPACITY_EXCEEDED": "unload what is not needed, or raise memory_limit",
    "REGISTRY_UNAVAILABLE": "loaded models go on answering; try again after Retry-After",
    "SHUTTING_DOWN": "send it to another gateway, or again after Retry-After",
    "DEADLINE_EXCEEDED": "allow more time (X-Request-Timeout-Ms, the model's timeout), or send fewer rows",
}
"""What a client may do about a code where the place that raised it knows nothing better."""

MAX_DETAILS: Final = 100

#: What looks like a place on this machine in the words of a library; what follows a URL's scheme is none.
_LOGIN: Final = re.compile(r"(?<=://)[^\s/@]{1,200}@")
_PATH: Final = re.compile(r"(?:file://|(?<![\w./])(?!(?<=\w:)//))/+(?:[^\s'\":,;()\[\]/]+/+)+")


def pathless(text: str) -> str:
    """Without the server's paths: a client sees the names of files, not where they lie. And without the
    names and passwords in URLs."""
    return _PATH.sub("…/", _LOGIN.sub("…@", text))


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
    """An answer that is not a prediction. `code` is one of `STATUS`; `retry_after` is in seconds."""

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
    def retryable(self) -> bool:
        """Whether the same request may succeed later; what only the operator can change does not count."""
        return self.code in RETRYABLE if self._retryable is None else self._retryable

    def again(self, retry_after: float | None = None) -> Problem:
        """The same problem for another caller: an exception is raised once, never shared."""
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
