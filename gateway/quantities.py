"""Parses and formats durations, sizes, lists and times: `5s`, `20GB`, `a,b`,
`2026-01-31T09:00:00Z`.

Must not know any setting.
"""

from __future__ import annotations

import re
import time
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"": 1, "b": 1, **{f"{u}{b}": 1000**i for i, u in enumerate("kmgt", 1) for b in ("", "b")}}
_BYTES |= {f"{u}{b}": 1024**i for i, u in enumerate("kmgt", 1) for b in ("i", "ib")}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z%]*)\s*\Z")


def seconds(value: object) -> object:
    """Seconds from a number or from text such as `5s`, `2m`, `250ms` or `1h`. Raises ValueError."""
    match = _QUANTITY.match(value) if isinstance(value, str) else None
    if match is None:
        if isinstance(value, str | bool):
            raise ValueError("write seconds, or a duration such as 5s or 2m")
        return value
    number, unit = match.groups()
    if unit not in _SECONDS:
        raise ValueError(f"{unit} is not a unit of time; write ms, s, m, h or d")
    return float(number) * _SECONDS[unit]


def size(value: object, total: int | None = None) -> object:
    """Bytes from a number, `20GB` (powers of 1000), `16Gi` (of 1024) or a share of `total` such as `70%`.
    Raises ValueError."""
    if not isinstance(value, str | bool):
        return value
    match = None if isinstance(value, bool) else _QUANTITY.match(value)
    if match is None:
        raise ValueError("write bytes, or a size such as 20GB, 16Gi or 70%")
    number, unit = match.groups()
    if unit == "%":
        if total is None:
            raise ValueError("a percentage is not possible here; write a size such as 32MiB")
        if not 0 < float(number) <= 100:
            raise ValueError("a percentage must be more than 0% and at most 100%")
        return int(total * float(number) / 100)
    if unit.lower() not in _BYTES:
        raise ValueError(f"{unit} is not a unit of size; write KB, MB, GB, TB, Ki, Mi, Gi, Ti or %")
    return int(float(number) * _BYTES[unit.lower()])


def shown_size(count: int) -> str:
    """Bytes as people write them in settings: `256 MiB` or `20 GB` where that is exact, else rounded."""
    exact = [
        (count // base**power, unit)
        for base, units in ((1024, ("KiB", "MiB", "GiB", "TiB")), (1000, ("KB", "MB", "GB", "TB")))
        for power, unit in enumerate(units, 1)
        if count >= base**power and count % base**power == 0
    ]
    if exact and min(exact)[0] < 10_000:
        return "{} {}".format(*min(exact))
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.1f} {unit}"
    return f"{count} B"


def shown_seconds(count: float) -> str:
    """Seconds as people write them in settings: `30s`, `10m`, `250ms`."""
    if 0 < count < 1:
        return f"{count * 1000:g}ms"
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if count >= length and count % length == 0:
            return f"{count / length:g}{unit}"
    return f"{count:g}s"


def listed(value: object) -> object:
    """A list from a list or from text with commas, which is what a flag or variable can hold."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return value


def utc(moment: float) -> str:
    """Unix seconds as a UTC time: `2026-01-31T09:00:00Z`."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def _quantity(pattern: str, what: str) -> WithJsonSchema:
    """The JSON schema of a duration or size: it describes the text, not the parsed value."""
    text = {"type": "string", "pattern": pattern}
    return WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, text], "description": what})


DURATION_SCHEMA = _quantity(r"^\s*\d+(\.\d+)?\s*(ms|s|m|h|d)?\s*$", "seconds, or a duration such as 5s or 2m")
SIZE_SCHEMA = _quantity(r"^\s*\d+(\.\d+)?\s*[A-Za-z%]*\s*$", "bytes, or a size such as 20GB, 16Gi or 70%")

Duration = Annotated[float, BeforeValidator(seconds), Field(ge=0, allow_inf_nan=False), DURATION_SCHEMA]
Size = Annotated[int, BeforeValidator(size), Field(gt=0), SIZE_SCHEMA]


class Part(BaseModel):
    """A mapping of settings. It is frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, use_attribute_docstrings=True
    )
