"""Converts any value of a live model to JSON's types, for examples and recorded answers.

numpy's numbers become Python's, times become ISO text, bytes base64, every kind of missing value null. A
value that JSON cannot represent is an error, which names its place. Must not know signatures or frameworks.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import enum
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np


class NotPlain(ValueError):
    """JSON cannot represent a value. The message names its place and its type, and shows no data."""


def plain(value: Any, place: str) -> Any:
    """`value` made of dicts, lists, text, numbers, booleans and None. `place` names it in errors, for
    example `column 'price'`. Raises NotPlain."""
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):  # np.float64 is one too
        number = float(value)
        if number in (float("inf"), float("-inf")):
            raise NotPlain(f"{place} holds an infinite number, which JSON cannot represent")
        return number if number == number else None
    if isinstance(value, np.ndarray):
        return [plain(item, place) for item in value] if value.ndim else plain(value.item(), place)
    if isinstance(value, np.generic):
        return _scalar(value, place)
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, place) for item in value]
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode("ascii")
    if type(value).__name__ in ("NAType", "NaTType"):  # pandas' own nulls
        return None
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, enum.Enum):
        return plain(value.value, place)
    if isinstance(value, (bool, int, str)):  # a subclass
        return next(kind(value) for kind in (bool, int, str) if isinstance(value, kind))
    inside = opened(value)
    if inside is not value:
        return plain(inside, place)
    raise NotPlain(f"{place} holds a {type(value).__name__}, which JSON cannot represent{_advice(value)}")


def opened(value: Any) -> Any:
    """Converts an object of a library one step towards JSON: an enumeration to its value, a UUID to text, a
    dataclass or pydantic model to a dict, a frame to a list of records, anything with `tolist` or `toarray`
    to the result of that. Returns `value` itself, the same object, if no conversion applies."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, type):
        return value
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return value.model_dump()
    if hasattr(value, "columns") and hasattr(value, "to_dict"):
        return value.to_dict("records")
    for method in ("tolist", "toarray"):
        if hasattr(value, method):
            return getattr(value, method)()
    return value


def _scalar(value: np.generic, place: str) -> Any:
    if isinstance(value, np.datetime64):
        return None if np.isnat(value) else plain(value.astype("datetime64[us]").item(), place)
    if isinstance(value, (np.timedelta64, np.complexfloating)):
        raise NotPlain(f"{place} holds a {type(value).__name__}, which JSON cannot represent{_advice(value)}")
    return plain(value.item(), place)


def _advice(value: object) -> str:
    kind = type(value).__name__
    if kind == "Decimal":
        return ": convert it to a float or text"
    if kind in ("timedelta", "Timedelta", "timedelta64"):
        return ": convert it to a number, such as its seconds"
    return ""
