"""Casts the cells of one column, which are Python values or a typed array, to an array of the declared type.

Scalars follow the rules of `scalars`. Nested values are checked at every level. Arrays with a dtype (frames,
numpy, Arrow) are only widened. Must not know signatures or forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np

from loaders.batch import to_nanoseconds
from loaders.enforcement import violations as v
from loaders.enforcement.scalars import (
    HOLDS_NULL,
    RANGES,
    NDArray,
    Origin,
    Path,
    cast_scalars,
    is_null,
    kind_of,
    null_problem,
    objects,
)
from loaders.enforcement.violations import Faults, shown
from loaders.schema import AnyType, Array, Map, Object, Scalar, Type


def cast_values(
    values: Sequence[Any], kind: Type, required: bool, origin: Origin, faults: Faults, path: Path
) -> NDArray:
    """Casts a column of Python values (dtypes as in `batch.Columns`); adds violations to `faults`.

    `path(i)` names value i. After a violation the array must not be used.
    """
    if isinstance(kind, Scalar):
        return cast_scalars(values, kind, required, origin, faults, path)
    if isinstance(kind, AnyType):
        return objects(values)
    return objects(
        [nested(value, kind, required, origin, faults, partial(path, i)) for i, value in enumerate(values)]
    )


# --- nested values


def nested(
    value: Any,
    kind: Type,
    required: bool,
    origin: Origin,
    faults: Faults,
    path: Callable[[], str],
    *,
    closed: bool = True,
) -> Any:
    """Casts a value of any type to Python's types: lists, dicts, floats, ints, text, bytes, datetimes.

    Follows MLflow's rules for nested types: `closed` objects have no unknown fields, a required field is not
    null, and items of type double, float, string or datetime may be null. In addition, accepts whole numbers
    as doubles, and reads dates and bytes from text.
    """
    if isinstance(kind, AnyType):
        return value
    if value is None or (is_null(value) and kind not in (Scalar.double, Scalar.float)):
        if required:
            faults.add(path, v.NULL, kind, "null")
        return None
    if isinstance(kind, Scalar):
        if _EXACT.get(kind) is type(value) or (kind is Scalar.long and _is_long(value)):
            return value
        return _scalars([value], kind, origin, faults, lambda _: path(), path)[0]
    if isinstance(kind, Array):
        if not isinstance(value, list | tuple | np.ndarray) or (
            isinstance(value, np.ndarray) and not value.ndim
        ):
            faults.add(path, v.WRONG_TYPE, "array", kind_of(value))
            return None
        if isinstance(kind.items, Scalar):
            return _scalars(value, kind.items, origin, faults, partial(_item_path, path), path)
        return [
            nested(item, kind.items, required, origin, faults, partial(_item_path, path, i), closed=closed)
            for i, item in enumerate(value)
        ]
    if not isinstance(value, Mapping):
        faults.add(path, v.WRONG_TYPE, "object" if isinstance(kind, Object) else "map", kind_of(value))
        return None
    if isinstance(kind, Map):
        return {
            _key(name, faults, path): nested(
                item, kind.values, required, origin, faults, partial(_field_path, path, name), closed=closed
            )
            for name, item in value.items()
        }
    return _object(value, kind, origin, faults, path, closed)


def _object(
    value: Mapping[Any, Any],
    kind: Object,
    origin: Origin,
    faults: Faults,
    path: Callable[[], str],
    closed: bool,
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    known = set()
    for field in kind.properties:
        known.add(field.name)
        where = partial(_field_path, path, field.name)
        if field.name in value:
            item = value[field.name]
            result[field.name] = nested(
                item, field.type, field.required, origin, faults, where, closed=closed
            )
        elif field.required:
            faults.add(where, v.MISSING, field.type)
    # Keep the caller's order of the fields, as MLflow does.
    for name in value:
        if name not in known and closed:
            faults.add(partial(_field_path, path, name), v.UNKNOWN)
    return {name: result.get(name, value[name]) if name in known else value[name] for name in value}


def _key(name: Any, faults: Faults, path: Callable[[], str]) -> Any:
    if not isinstance(name, str):
        faults.add(path, v.WRONG_TYPE, "text keys", kind_of(name))
    return name


def _scalars(
    value: Any, kind: Scalar, origin: Origin, faults: Faults, where: Path, path: Callable[[], str]
) -> list[Any]:
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind != "O":
        return listed(cast_array(value, kind, True, faults, where, path), kind, faults, path)
    items = list(value)
    if kind in _EXACT and set(map(type, items)) == {_EXACT[kind]}:
        return items
    return listed(cast_values(items, kind, True, origin, faults, where), kind, faults, path)


# Scalars that equal a Python type. A 32-bit float is absent, because it is rounded.
_EXACT: Final[Mapping[Scalar, type]] = {Scalar.boolean: bool, Scalar.double: float, Scalar.string: str}


def _is_long(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def listed(array: NDArray, kind: Scalar, faults: Faults, path: Callable[[], str]) -> list[Any]:
    """Returns a cast column as Python values; missing values are None (NaN in floats)."""
    if kind is Scalar.datetime:
        micro = array.astype("datetime64[us]")
        if (micro.astype("datetime64[ns]") != array)[~np.isnat(array)].any():
            faults.add(path, v.LOSSY, "microseconds", "nanoseconds")
        array = micro
    return list(array.tolist())


def _item_path(path: Callable[[], str], i: int) -> str:
    return f"{path()}[{i}]"


def _field_path(path: Callable[[], str], name: object) -> str:
    return f"{path()}.{shown(name)}"


# --- typed arrays


def cast_array(
    values: NDArray, kind: Type, required: bool, faults: Faults, path: Path, whole: Callable[[], str]
) -> NDArray:
    """Casts a 1-D array with a dtype (from a frame, numpy or Arrow) to a column of type `kind`.

    Follows MLflow's rules for dtypes: only widens, and never casts a float to an integer. In addition,
    narrows a float if no value changes, casts int64 to double, and accepts floats with missing values for an
    optional integer column (a plain frame stores integers with missing values as floats). `whole()` names the
    column, `path(i)` value i.
    """
    if isinstance(values, np.ma.MaskedArray):
        mask = np.ma.getmaskarray(values)
        if mask.any():
            return _cast_masked(values, mask, kind, required, faults, path, whole)
        values = values.data
    if values.dtype.kind == "O":
        if kind is Scalar.string and _all_text(values):
            return values
        return cast_values(values.tolist(), kind, required, "python", faults, path)
    if not isinstance(kind, Scalar):
        if isinstance(kind, AnyType) or _all_null(values):
            return cast_values(_plain(values), kind, required, "python", faults, path)
        faults.add(whole, v.WRONG_TYPE, kind, _dtype_name(values))
        return values
    if values.dtype == kind.dtype:
        return values
    source = values.dtype.kind
    if kind in (Scalar.double, Scalar.float) and source in "iuf":
        return narrowed(values, kind.dtype, faults, path)
    if kind in RANGES and source in "iu" and np.can_cast(values.dtype, kind.dtype):
        return values.astype(kind.dtype)
    if kind in RANGES and source == "f":
        return _gapped(values, kind, required, faults, path, whole)
    if kind is Scalar.string and source == "U":
        return objects(values.tolist())
    if kind is Scalar.binary and source == "S":
        return objects(values.tolist())
    if kind is Scalar.datetime and source == "M":
        stamps = to_nanoseconds(values)
        for i in np.flatnonzero(np.isnat(stamps) & ~np.isnat(values)):
            faults.add(partial(path, int(i)), v.OUT_OF_RANGE, kind, "datetime")
        return stamps
    if _all_null(values):
        return cast_values([None] * len(values), kind, required, "python", faults, path)
    faults.add(whole, v.WRONG_TYPE, kind, _dtype_name(values))
    return values


def _all_text(values: NDArray) -> bool:
    try:
        "".join(values.tolist())
    except TypeError:
        return False
    return True


def _plain(values: NDArray) -> list[Any]:
    return list(
        to_nanoseconds(values).astype("datetime64[us]").tolist()
        if values.dtype.kind == "M"
        else values.tolist()
    )


def _all_null(values: NDArray) -> bool:
    return values.dtype.kind == "f" and bool(np.isnan(values).all())


def _dtype_name(values: NDArray) -> str:
    names = {
        np.dtype(np.int32): "integer",
        np.dtype(np.int64): "long",
        np.dtype(np.float32): "float",
        np.dtype(np.float64): "double",
        np.dtype(np.bool_): "boolean",
    }
    by_kind = {"U": "string", "S": "binary", "M": "datetime"}
    return names.get(values.dtype) or by_kind.get(values.dtype.kind) or values.dtype.name


def narrowed(values: NDArray, dtype: np.dtype[Any], faults: Faults, path: Path) -> NDArray:
    """Casts numbers to a float dtype; to a narrower one only if no value changes."""
    with np.errstate(over="ignore", invalid="ignore"):
        result = values.astype(dtype)
        if np.can_cast(values.dtype, dtype, "safe"):
            return result
        changed = ~((result.astype(values.dtype) == values) | (values != values))
    for i in np.flatnonzero(changed):
        overflow = bool(np.isinf(result[i]))
        faults.add(
            partial(path, int(i)), v.OUT_OF_RANGE if overflow else v.LOSSY, dtype.name, _dtype_name(values)
        )
    return result


def _gapped(
    values: NDArray, kind: Scalar, required: bool, faults: Faults, path: Path, whole: Callable[[], str]
) -> NDArray:
    gaps = np.isnan(values)
    low, high = RANGES[kind]
    filled = np.where(gaps, 0, values).astype(np.float64)
    # Above 2**53 a double cannot distinguish neighbouring integers.
    fits = (filled == np.floor(filled)) & (np.abs(filled) <= 2**53) & (filled >= low) & (filled <= high)
    if not gaps.any() or not fits.all():
        faults.add(whole, v.WRONG_TYPE, kind, _dtype_name(values))
    elif required:
        for i in np.flatnonzero(gaps):
            faults.add(partial(path, int(i)), v.NULL_INTEGER, kind, "null")
    else:
        return np.ma.MaskedArray(filled.astype(kind.dtype), mask=gaps)
    return values


def _cast_masked(
    values: Any,
    mask: NDArray,
    kind: Type,
    required: bool,
    faults: Faults,
    path: Path,
    whole: Callable[[], str],
) -> NDArray:
    if isinstance(kind, Scalar) and kind in HOLDS_NULL | RANGES.keys() | {Scalar.boolean}:
        data = cast_array(values.data, kind, required, faults, path, whole)
        if kind in (Scalar.double, Scalar.float):
            return np.where(mask, np.array(np.nan, dtype=kind.dtype), data) if not faults.total else data
        if kind in RANGES or kind is Scalar.boolean:
            if required:
                for i in np.flatnonzero(mask):
                    faults.add(partial(path, int(i)), null_problem(kind), kind, "null")
            return np.ma.MaskedArray(data, mask=mask)
        return data
    if isinstance(kind, AnyType) or mask.all():
        plain = [None if gone else item for item, gone in zip(values.data.tolist(), mask, strict=True)]
        return cast_values(plain, kind, required, "python", faults, path)
    faults.add(whole, v.WRONG_TYPE, kind, _dtype_name(values.data))
    return values.data  # type: ignore[no-any-return]
