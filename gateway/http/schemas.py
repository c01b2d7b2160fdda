"""The bodies of control calls as pydantic models, and what is wrong with a body as a `Problem`.

Knows the fields of control calls and nothing of what they do. A body is checked as a whole: every fault is in
`details`, with its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Final, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from gateway import names
from gateway.errors import Detail, Problem
from gateway.http import bodies
from gateway.registries.base import ANYWHERE

_EXPECTED: Final = {
    "string_type": "string",
    "bool_type": "boolean",
    "list_type": "array",
    "float_type": "number",
    "missing": "string",
}
_SHOWN_LENGTH: Final = 64


def _version(text: str) -> str:
    try:
        return names.check_version(text)
    except names.InvalidReference:
        raise PydanticCustomError("version", "a positive whole number, as a string") from None


def _rising(steps: list[float]) -> list[float]:
    if any(later <= earlier for earlier, later in pairwise(steps)):
        raise PydanticCustomError("steps", "percentages that rise, such as [5, 25, 50]")
    return steps


VersionNumber = Annotated[str, AfterValidator(_version)]
Percent = Annotated[float, Field(gt=0, lt=100)]
Share = Annotated[float, Field(gt=0, le=1)]
Steps = Annotated[list[Percent], Field(min_length=1), AfterValidator(_rising)]


class Body(BaseModel):
    """The body of a call that takes no fields, and the base of the others."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class Promotion(Body):
    """`PUT /models/NAME/aliases/ALIAS`."""

    version: VersionNumber
    """The version that the alias shall point to."""
    expect: VersionNumber | None = ANYWHERE
    """The version it must point to now; null: the alias must not exist yet. Left out: either."""
    force: bool = False
    """Move the alias although callers would notice."""
    canary: Steps | None = None
    """Percentages of the callers, step by step. Left out or null: as the policy says."""
    shadow: Share | None = None
    """The share of the requests whose copies it answers first. Left out or null: as the policy says."""


class Rollback(Body):
    """`POST /models/NAME/aliases/ALIAS/rollback`."""

    to: VersionNumber | None = None
    """The version to go back to. Left out or null: the one that served before."""


AnyBody = TypeVar("AnyBody", bound=Body)


def parsed(kind: type[AnyBody], document: Mapping[str, Any]) -> AnyBody:
    """The body. Raises MALFORMED_BODY for members that are not known, with the nearest that are, and
    INVALID_INPUT for values of another kind."""
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        found = error.errors(include_url=False)
    known = [fault["loc"][0] for fault in found if fault["type"] == "extra_forbidden"]
    if known:
        raise _unknown([str(key) for key in known], list(kind.model_fields))
    details = [_detail(kind, fault) for fault in found]
    first = details[0]
    raise Problem("INVALID_INPUT", f"{first.path} {first.problem}", details=details)


def _unknown(keys: list[str], known: list[str]) -> Problem:
    shown = [key if len(key) <= _SHOWN_LENGTH else f"{key[: _SHOWN_LENGTH - 3]}..." for key in keys]
    hint = names.did_you_mean(keys[0], known)
    if hint is None:
        hint = f"known fields: {', '.join(known)}" if known else "this takes no fields"
    return Problem(
        "MALFORMED_BODY",
        f"the field {shown[0]!r} is not known",
        details=[Detail(key, "is not known") for key in shown],
        hint=hint,
    )


def _detail(kind: type[Body], fault: ErrorDetails) -> Detail:
    """One of pydantic's faults: its place as `canary[1]`, what is wrong there, and what is expected."""
    field, *inside = fault["loc"]
    path = str(field) + "".join(f"[{place}]" for place in inside if isinstance(place, int))
    what = fault["type"]
    if what == "missing":
        return Detail(path, "is missing", _EXPECTED[what])
    if what in _EXPECTED:
        nullable = not inside and kind.model_fields[str(field)].default in (None, ANYWHERE)
        expected = _EXPECTED[what] + (" or null" if nullable else "")
        return Detail(path, "has the wrong type", expected, bodies.json_kind(fault["input"]))
    if what == "version":
        return Detail(path, "is not a version", fault["msg"])
    if field == "shadow":
        return Detail(path, "is not a share", "a number above 0, at most 1")
    expected = "percentages between 0 and 100 that rise: [5, 25, 50]"
    return Detail(path, "is not a step" if inside else "is not a list of steps", expected)
