"""Checks the parameters of a request against the signature: fills in defaults, casts, reports violations.

The rules are MLflow's (`mlflow.types.schema.ParamSpec`): unknown names are ignored, null overrides the
default, an integer is accepted as a float, and no other type is cast. Must not know inputs.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, Final

import numpy as np

from loaders.enforcement import violations as v
from loaders.enforcement.casts import nested
from loaders.enforcement.scalars import Refused, kind_of, parse_date
from loaders.enforcement.violations import Faults, shown
from loaders.schema import Object, ParamSpec, Scalar


def enforce_params(
    specs: Sequence[ParamSpec] | None, params: object, faults: Faults
) -> tuple[dict[str, Any], list[str]]:
    """Returns the parameters for the model, and the ignored names."""
    given: Mapping[Any, Any] = {}
    if isinstance(params, Mapping):
        given = params
    elif params is not None:
        faults.add("params", v.WRONG_TYPE, "object", kind_of(params))
    if not specs:
        return {}, [shown(name) for name in given]
    result: dict[str, Any] = {}
    for spec in specs:
        if spec.name in given:
            result[spec.name] = _checked(given[spec.name], spec, faults)
        else:
            # The model may change its parameters; the default must not change.
            result[spec.name] = spec.default if spec.shape is None else deepcopy(spec.default)
            if isinstance(spec.type, Object):
                result[spec.name] = deepcopy(spec.default)
    return result, [shown(name) for name in given if name not in result]


def _checked(value: Any, spec: ParamSpec, faults: Faults) -> Any:
    path = f"params.{shown(spec.name)}"
    if isinstance(spec.type, Object):
        # Only check the value; the model receives it unchanged, as in MLflow.
        nested(value, spec.type, True, "json", faults, lambda: path)
        return value
    if spec.shape is None:
        return _scalar(value, spec.type, faults, path)
    if isinstance(value, np.ndarray):
        value = value.tolist() if value.ndim else value.item()
    if not isinstance(value, list | tuple):
        faults.add(path, v.WRONG_TYPE, f"array of {spec.type}", kind_of(value))
        return None
    return [
        _scalar(item, spec.type, faults, partial("{}[{}]".format, path, i)) for i, item in enumerate(value)
    ]


def _scalar(value: Any, kind: Scalar, faults: Faults, path: str | Callable[[], str]) -> Any:
    if value is None:
        return None
    if isinstance(value, np.generic) and not isinstance(value, np.datetime64):
        value = value.item()
    if kind is Scalar.datetime:
        return _date(value, faults, path)
    if kind in (Scalar.float, Scalar.double) and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            faults.add(path, v.OUT_OF_RANGE, kind, "long")
            return None
    if type(value) is not _PYTHON[kind]:
        whole = kind in (Scalar.integer, Scalar.long) and type(value) is float and not value.is_integer()
        faults.add(path, v.FRACTION if whole else v.WRONG_TYPE, kind, kind_of(value))
        return None
    return value


_PYTHON: Final[Mapping[Scalar, type]] = {
    Scalar.boolean: bool,
    Scalar.integer: int,
    Scalar.long: int,
    Scalar.float: float,
    Scalar.double: float,
    Scalar.string: str,
}


def _date(value: Any, faults: Faults, path: str | Callable[[], str]) -> Any:
    """Converts to a date, or to a time in UTC without a zone."""
    if isinstance(value, np.datetime64):
        value = value.item() if not np.isnat(value) else None
        if value is None or isinstance(value, datetime.date):
            return value
    if isinstance(value, datetime.datetime):
        return value.replace(tzinfo=None) - (value.utcoffset() or datetime.timedelta(0))
    if isinstance(value, datetime.date):
        return value
    if not isinstance(value, str):
        faults.add(path, v.WRONG_TYPE, Scalar.datetime, kind_of(value))
        return None
    try:
        stamp = parse_date(value)
        if len(value) == 10:
            return datetime.date.fromisoformat(value)
    except Refused as refused:
        faults.add(path, refused.problem, Scalar.datetime, refused.got)
        return None
    if stamp % 1000:
        faults.add(path, v.LOSSY, "microseconds", "nanoseconds")
    return datetime.datetime(1970, 1, 1) + datetime.timedelta(microseconds=stamp // 1000)
