"""Checks a model's input against the type hint of its `predict`, as MLflow does for PythonModels.

Rules (MLflow 2.20 and later): scalars by `isinstance`, but text is also accepted for bytes (base64) and for
times (ISO), as over HTTP; pydantic models strictly; lists and dicts item by item; Optional accepts None, and
Union accepts anything. Other hints are not checked. Must not know packages or signatures.
"""

from __future__ import annotations

import base64
import binascii
import sys
import typing
from datetime import datetime
from typing import Any, Final

from loaders.compat.pythons import union_types

SCALARS: Final = (int, str, bool, float, bytes, datetime)


class Mismatch(ValueError):
    """The data does not match the hint. The message names places and types, never values."""


def supported(hint: Any) -> bool:
    """Whether `checked` checks this hint: MLflow requires `list[...]` at the top."""
    return typing.get_origin(hint) is list and _known(typing.get_args(hint)[0])


def checked(data: Any, hint: Any, place: str = "input") -> Any:
    """The data, with dicts converted to the pydantic models of the hint. Raises Mismatch."""
    if hint is Any:
        return data
    if _is_model(hint):
        return _model(data, hint, place)
    if hint in SCALARS:
        return _scalar(data, hint, place)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        if not isinstance(data, list):
            raise Mismatch(f"{place}: expected a list, got {type(data).__name__}")
        return [checked(item, arguments[0], f"{place}[{i}]") for i, item in enumerate(data)]
    if origin is dict:
        if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
            raise Mismatch(f"{place}: expected a dict with text as keys, got {type(data).__name__}")
        return {key: checked(item, arguments[1], f"{place}.{key}") for key, item in data.items()}
    if origin in union_types():
        others = [argument for argument in arguments if argument is not type(None)]
        if len(others) == 1 and data is not None:
            return checked(data, others[0], place)
    return data


def _known(hint: Any) -> bool:
    if hint is Any or hint in SCALARS or _is_model(hint):
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in union_types():
        return all(argument is type(None) or _known(argument) for argument in arguments)
    if origin is dict:
        return arguments[0] is str and _known(arguments[1])
    return origin is list and _known(arguments[0])


def _scalar(data: Any, hint: Any, place: str) -> Any:
    if isinstance(data, str) and hint in (bytes, datetime):
        try:
            if hint is datetime:
                return datetime.fromisoformat(data)
            # MLflow breaks base64 into lines; any other foreign character is refused.
            return base64.b64decode("".join(data.split()), validate=True)
        except (binascii.Error, ValueError):
            raise Mismatch(f"{place}: expected {hint.__name__}, got other text") from None
    if not isinstance(data, hint):
        raise Mismatch(f"{place}: expected {hint.__name__}, got {type(data).__name__}")
    return data


def _model(data: Any, hint: Any, place: str) -> Any:
    from pydantic import ValidationError

    if isinstance(data, hint):
        return data
    if not isinstance(data, dict):
        raise Mismatch(f"{place}: expected an object, got {type(data).__name__}")
    try:
        return hint.model_validate(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join([place, *(str(part) for part in first["loc"])])
        raise Mismatch(f"{where}: {first['msg']}") from None


def _is_model(hint: Any) -> bool:
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and isinstance(hint, type) and issubclass(hint, pydantic.BaseModel)
