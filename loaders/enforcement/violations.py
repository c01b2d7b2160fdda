"""Collects the violations of an input field by field, so that one answer reports all of them.

A violation names the place, the problem, the expected type and the received kind, never the data. Problems
are a fixed set of texts, so that they can be counted. Must not know types, forms or numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

MAX_KEPT: Final = 100
MAX_COUNTED: Final = 10_000

MISSING: Final = "is missing"
WRONG_TYPE: Final = "has the wrong type"
NULL: Final = "is null, which this type does not allow"
NULL_INTEGER: Final = "is null: declare the column as double, or make it optional"
NULL_BOOLEAN: Final = "is null: make the column optional"
FRACTION: Final = "is not a whole number"
OUT_OF_RANGE: Final = "is out of range"
LOSSY: Final = "would lose precision"
BAD_DATE: Final = "is not a date in ISO 8601"
BAD_BASE64: Final = "is not base64"
UNREADABLE: Final = "holds a value that Python cannot represent"
BAD_TEXT: Final = "cannot be read as this type"
UNKNOWN: Final = "is not in the signature"
DUPLICATE: Final = "occurs twice"
WRONG_LENGTH: Final = "has the wrong number of values"
WRONG_SHAPE: Final = "has the wrong shape"
RAGGED: Final = "has parts of different lengths"
RAGGED_RECORDS: Final = "has too many names that are absent from most records"
NO_COLUMNS: Final = "has no column names"
EMPTY: Final = "is empty, so it names no columns"
WRONG_FORM: Final = "cannot be sent in this form"
NOT_WHOLE: Final = "is one value, which the signature does not accept"
TOO_DEEP: Final = "is nested too deep"


@dataclass(frozen=True, slots=True)
class Violation:
    """A violation in one field. `got` is a kind (string, null, array), never a value; for a missing column it
    names the unknown column that the caller probably meant."""

    path: str
    problem: str
    expected: str | None = None
    got: str | None = None

    def __str__(self) -> str:
        wanted = f" (expected {self.expected}" if self.expected else ""
        if wanted and self.got:
            wanted += f", got {self.got}"
        return f"{self.path} {self.problem}{wanted}{')' if wanted else ''}"


class InvalidInput(ValueError):
    """The input or the params do not fit the signature. `total` counts the violations up to 10,000;
    `violations` holds the first 100."""

    def __init__(self, violations: list[Violation], total: int | None = None) -> None:
        self.violations = violations[:MAX_KEPT]
        self.total = len(violations) if total is None else total
        rest = self.total - 1
        first = str(self.violations[0]) if self.violations else "invalid input"
        others = f"{rest:,} or more others" if self.total >= MAX_COUNTED else f"{rest:,} more"
        super().__init__(first + (f", and {others}" if rest > 0 else ""))

    @property
    def count_text(self) -> str:
        """Returns the number of violations as text; counting stops at 10,000."""
        if self.total == 1:
            return "1 problem"
        return f"{self.total:,} {'or more ' if self.total >= MAX_COUNTED else ''}problems"


class Faults:
    """Collects violations. Keeps the first 100, counts up to 10,000, and then raises InvalidInput, so that a
    large body with violations everywhere costs little."""

    __slots__ = ("kept", "total")

    def __init__(self) -> None:
        self.kept: list[Violation] = []
        self.total = 0

    def add(
        self,
        path: str | Callable[[], str],
        problem: str,
        expected: object = None,
        got: str | None = None,
    ) -> None:
        """Adds a violation. `path` may be a function, so that no text is built above the limit."""
        self.total += 1
        if len(self.kept) < MAX_KEPT:
            where = path if isinstance(path, str) else path()
            self.kept.append(Violation(where, problem, None if expected is None else str(expected), got))
        elif self.total == MAX_COUNTED:
            raise InvalidInput(self.kept, self.total)


def shown(name: object) -> str:
    """Returns a name for use in a path. Shortens long names, because callers may choose them."""
    text = str(name)
    return text if len(text) <= 64 else f"{text[:61]}..."
