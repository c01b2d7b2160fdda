"""Scalars: casts JSON values, Python objects and CSV text to booleans, numbers, text, bytes and dates.

A cast never changes a value's meaning: text does not become a number, a fraction is not cut off, an integer
does not wrap, null does not become text. Safe casts are done: an integer to a double, text in ISO 8601 to a
date, base64 to bytes. Casts whole columns, and single values only if a column holds something unusual or
wrong. Must not know signatures, forms or frameworks.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import decimal
import math
from array import array as packed
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal

import numpy as np

from loaders.batch import to_nanoseconds
from loaders.enforcement import violations as v
from loaders.enforcement.violations import Faults
from loaders.schema import DTYPES, Scalar

Origin = Literal["json", "python", "text"]
Path = Callable[[int], str]
NDArray = np.ndarray[Any, np.dtype[Any]]

_FEW: Final = 16  # below this many values a plain loop is faster than packing
HOLDS_NULL: Final = frozenset({Scalar.double, Scalar.float, Scalar.string, Scalar.datetime})
_DOUBLE: Final = np.dtype(np.float64)
_NAT: Final = -(2**63)
_EPOCH: Final = datetime.datetime(1970, 1, 1)
_MICROSECOND: Final = datetime.timedelta(microseconds=1)
_FLOAT_MAX: Final = float(np.finfo(np.float32).max)
RANGES: Final = {Scalar.integer: (-(2**31), 2**31 - 1), Scalar.long: (-(2**63), 2**63 - 1)}


class Refused(Exception):
    """A value does not have the type. `problem` is a text of `violations`, `got` the value's kind."""

    def __init__(self, problem: str, got: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.got = got


def kind_of(value: object) -> str:
    """Names a value's kind in the terms of signatures, for example `string` or `array`."""
    for kinds, name in _KINDS:
        if isinstance(value, kinds):
            return name
    return "null" if is_null(value) else type(value).__name__


_KINDS: Final[tuple[tuple[Any, str], ...]] = (
    (type(None), "null"),
    (bool | np.bool_, "boolean"),
    (int | np.integer, "long"),
    (float | np.floating | decimal.Decimal, "double"),
    (str, "string"),
    (bytes | bytearray, "binary"),
    (datetime.date, "datetime"),
    (list | tuple | np.ndarray, "array"),
    (Mapping, "object"),
)


def is_null(value: object) -> bool:
    """Returns True for None, NaN, and pandas' NA and NaT. Compares class names, so that pandas is not
    imported."""
    if value is None:
        return True
    if isinstance(value, float | np.floating):
        return math.isnan(value)
    if isinstance(value, np.datetime64):
        return bool(np.isnat(value))
    return type(value).__name__ in ("NAType", "NaTType")


# --- columns of Python values


def cast_scalars(
    values: Sequence[Any], kind: Scalar, required: bool, origin: Origin, faults: Faults, path: Path
) -> NDArray:
    """Casts a column (dtypes as in `batch.Columns`); adds every violation to `faults`.

    `path(i)` names value i. After a violation the array must not be used.
    """
    if origin == "text":
        quick = _quick_text(values, kind)
    elif origin == "json" or kind in (Scalar.string, Scalar.boolean):
        quick = _QUICK[kind](values)
    else:
        quick = None
    if quick is not None:
        return quick
    convert = _TEXT[kind] if origin == "text" else _CONVERT[kind]
    if kind is Scalar.binary and origin == "json":
        convert = _from_base64
    elif kind is Scalar.datetime and origin == "json":
        convert = _nanoseconds_of_text
    null = null_problem(kind) if required and kind not in HOLDS_NULL else None

    def of_kind(value: Any) -> Any:
        return convert(value, kind)

    return _assembled(walked(values, of_kind, null, kind, origin, faults, path), kind)


def walked(
    values: Sequence[Any],
    convert: Callable[[Any], Any],
    why_not_null: str | None,
    expected: object,
    origin: Origin,
    faults: Faults,
    path: Path,
) -> list[Any]:
    """Converts value by value; null becomes None. `why_not_null` is the problem text for a null; None allows
    nulls."""
    result: list[Any] = []
    for i, value in enumerate(values):
        if value is None or (origin != "text" and is_null(value)):
            if why_not_null is not None:
                faults.add(partial(path, i), why_not_null, expected, "null")
            result.append(None)
            continue
        try:
            result.append(convert(value))
        except Refused as refused:
            faults.add(partial(path, i), refused.problem, expected, refused.got)
            result.append(None)
    return result


def null_problem(kind: Scalar) -> str:
    """Returns the problem text for a null in a required column."""
    if kind in RANGES:
        return v.NULL_INTEGER
    return v.NULL_BOOLEAN if kind is Scalar.boolean else v.NULL


def _assembled(values: list[Any], kind: Scalar) -> NDArray:
    if kind in (Scalar.string, Scalar.binary):
        return objects(values)
    if kind in (Scalar.double, Scalar.float):
        return np.array(values, dtype=np.float64).astype(kind.dtype)
    if kind is Scalar.datetime:
        stamps = [_NAT if value is None else value for value in values]
        return np.array(stamps, dtype=np.int64).view("datetime64[ns]")
    gaps = [value is None for value in values]
    if not any(gaps):
        return np.array(values, dtype=kind.dtype)
    return np.ma.MaskedArray(np.array([value or 0 for value in values], dtype=kind.dtype), mask=gaps)


def objects(values: Sequence[Any]) -> NDArray:
    """Returns a 1-D object array, even if the values are lists."""
    result = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        result[i] = value
    return result


# --- fast paths for JSON columns; None means: cast value by value


def _quick_doubles(values: Sequence[Any]) -> NDArray | None:
    try:
        if len(values) < _FEW:
            for value in values:
                kind = type(value)
                if kind is not float and kind is not int:
                    return None
            return np.array(values, _DOUBLE)
        result: NDArray = np.frombuffer(packed("d", values))
    except (TypeError, OverflowError):
        kinds = set(map(type, values))
        # numpy converts None to NaN.
        return np.array(values, dtype=np.float64) if kinds == {float, type(None)} else None
    return result if _no_boolean(values, result) else None


def _no_boolean(values: Sequence[Any], numbers: NDArray) -> bool:
    # Packing converts True to 1, so look for booleans only if there is a 0 or 1.
    return not ((numbers == 0) | (numbers == 1)).any() or bool not in set(map(type, values))


def _quick_floats(values: Sequence[Any]) -> NDArray | None:
    doubles = _quick_doubles(values)
    if doubles is None or (np.abs(doubles) > _FLOAT_MAX).any():
        return None
    return doubles.astype(np.float32)


def _quick_integers(values: Sequence[Any], code: str, dtype: np.dtype[Any]) -> NDArray | None:
    try:
        if len(values) < _FEW:
            for value in values:
                if type(value) is not int:
                    return None
            return np.array(values, dtype=dtype)
        result: NDArray = np.frombuffer(packed(code, values), dtype=dtype)
    except (TypeError, OverflowError):
        return None
    return result if _no_boolean(values, result) else None


def _quick_strings(values: Sequence[Any]) -> NDArray | None:
    try:
        "".join(values)
    except TypeError:
        if not set(map(type, values)) <= {str, type(None)}:
            return None
    return np.array(values, dtype=object)


def _quick_booleans(values: Sequence[Any]) -> NDArray | None:
    return np.array(values, dtype=np.bool_) if set(map(type, values)) <= {bool} else None


def _walk(values: Sequence[Any]) -> NDArray | None:
    return None


_QUICK: Final[Mapping[Scalar, Callable[[Sequence[Any]], NDArray | None]]] = {
    Scalar.boolean: _quick_booleans,
    Scalar.integer: partial(_quick_integers, code="i", dtype=DTYPES[Scalar.integer]),
    Scalar.long: partial(_quick_integers, code="q", dtype=DTYPES[Scalar.long]),
    Scalar.float: _quick_floats,
    Scalar.double: _quick_doubles,
    Scalar.string: _quick_strings,
    Scalar.binary: _walk,
    Scalar.datetime: _walk,
}


def _quick_text(values: Sequence[Any], kind: Scalar) -> NDArray | None:
    if kind is Scalar.string:
        return _quick_strings(values)
    try:
        text = "".join(values)
        if not text.isascii() or "_" in text:
            return None
        if kind in (Scalar.float, Scalar.double):
            return _QUICK[kind](list(map(float, values)))
        return _QUICK[kind](list(map(int, values))) if kind in RANGES else None
    except (TypeError, ValueError):
        return None


def quick_cast(kind: object) -> Callable[[Sequence[Any]], NDArray | None]:
    """Returns the fast cast for a JSON column of a type. The cast returns None if a value is unusual."""
    return _QUICK[kind] if isinstance(kind, Scalar) else _walk


# --- one value


def _boolean(value: Any, kind: Scalar) -> bool:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise Refused(v.WRONG_TYPE, kind_of(value))


def _whole(value: Any, kind: Scalar) -> int:
    return read_whole(value, "python", *RANGES[kind])


def read_whole(value: Any, origin: Origin, low: int, high: int) -> int:
    """Reads a whole number from `low` to `high`. Raises Refused."""
    if origin == "text":
        value = _read(int, value)
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        fraction = isinstance(value, float | np.floating) and not float(value).is_integer()
        raise Refused(v.FRACTION if fraction else v.WRONG_TYPE, kind_of(value))
    if not low <= value <= high:
        raise Refused(v.OUT_OF_RANGE, "long")
    return int(value)


def _number(value: Any, kind: Scalar) -> float:
    return read_number(value, "python", _FLOAT_MAX if kind is Scalar.float else math.inf)


def read_number(value: Any, origin: Origin, limit: float) -> float:
    """Reads a number whose magnitude is at most `limit`, or an infinite one. Raises Refused."""
    if origin == "text":
        value = _read(float, value)
    if isinstance(value, bool | np.bool_) or not isinstance(
        value, float | int | np.floating | np.integer | decimal.Decimal
    ):
        raise Refused(v.WRONG_TYPE, kind_of(value))
    try:
        number = float(value)
    except (OverflowError, ValueError):
        raise Refused(v.OUT_OF_RANGE, kind_of(value)) from None
    if limit < abs(number) < math.inf:
        raise Refused(v.OUT_OF_RANGE, kind_of(value))
    return number


def _string(value: Any, kind: Scalar) -> str:
    if isinstance(value, str):
        return str(value)
    raise Refused(v.WRONG_TYPE, kind_of(value))


def _bytes(value: Any, kind: Scalar) -> bytes:
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    raise Refused(v.WRONG_TYPE, kind_of(value))


def _from_base64(value: Any, kind: Scalar) -> bytes:
    if not isinstance(value, str):
        raise Refused(v.WRONG_TYPE, kind_of(value))
    try:
        # MIME and MLflow's saved examples break base64 into lines.
        return base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError):
        raise Refused(v.BAD_BASE64, "string") from None


def nanoseconds(moment: datetime.date) -> int:
    """Returns the nanoseconds since 1970 in UTC. A date means its midnight; a time without a zone is in
    UTC."""
    if not isinstance(moment, datetime.datetime):
        return (moment - _EPOCH.date()) // _MICROSECOND * 1000
    extra = getattr(moment, "nanosecond", 0)  # pandas' timestamps
    plain: datetime.datetime = (
        moment.to_pydatetime(warn=False) if hasattr(moment, "to_pydatetime") else moment
    )
    offset = plain.utcoffset() or datetime.timedelta(0)
    return (plain.replace(tzinfo=None) - _EPOCH - offset) // _MICROSECOND * 1000 + int(extra)


def _checked(stamp: int) -> int:
    if not _NAT < stamp < 2**63:
        raise Refused(v.OUT_OF_RANGE, "datetime")
    return stamp


def _nanoseconds_of_text(value: Any, kind: Scalar) -> int:
    if not isinstance(value, str):
        raise Refused(v.WRONG_TYPE, kind_of(value))
    return _checked(parse_date(value))


def parse_date(text: str) -> int:
    """Returns the nanoseconds since 1970 of `YYYY-MM-DD[Thh:mm[:ss[.fffffffff]][Z|±hh:mm]]`, for example
    `2024-05-31T12:00Z`. Raises Refused.

    Other ISO 8601 forms (weeks, no separators) are refused: a number of eight digits is not a date.
    """
    try:
        if not text.isascii() or text[4] != "-" or text[7] != "-" or text[10:11] not in ("", "T", "t", " "):
            raise Refused(v.BAD_DATE, "string")
        extra = 0
        text = text.replace(",", ".", 1)  # both are ISO 8601; the standard library cuts digits after either
        point = text.find(".")
        if point > 0:
            end = point + 1
            while end < len(text) and text[end].isdigit():
                end += 1
            digits = text[point + 1 : end]
            if not 1 <= len(digits) <= 9:
                raise Refused(v.BAD_DATE, "string")
            # The standard library reads microseconds (before Python 3.11 only three or six digits).
            extra = int(digits[6:].ljust(3, "0")) if len(digits) > 6 else 0
            text = f"{text[:point]}.{digits[:6].ljust(6, '0')}{text[end:]}"
        if text[-1] in "Zz":
            text = f"{text[:-1]}+00:00"
        if len(text) > 10 and text[13:14] != ":":
            raise Refused(v.BAD_DATE, "string")
        return nanoseconds(datetime.datetime.fromisoformat(text)) + extra
    except (ValueError, IndexError):
        raise Refused(v.BAD_DATE, "string") from None


def _moment(value: Any, kind: Scalar) -> int:
    if isinstance(value, datetime.date):
        return _checked(nanoseconds(value))
    if isinstance(value, np.datetime64):
        return _checked(int(to_nanoseconds(np.array([value]))[0]))
    raise Refused(v.WRONG_TYPE, kind_of(value))


_CONVERT: Final[Mapping[Scalar, Callable[[Any, Scalar], Any]]] = {
    Scalar.boolean: _boolean,
    Scalar.integer: _whole,
    Scalar.long: _whole,
    Scalar.float: _number,
    Scalar.double: _number,
    Scalar.string: _string,
    Scalar.binary: _bytes,
    Scalar.datetime: _moment,
}


# --- CSV text


def _boolean_text(value: str, kind: Scalar) -> bool:
    word = value.strip().lower()
    if word in ("true", "false"):
        return word == "true"
    raise Refused(v.BAD_TEXT, "string")


def _whole_text(value: str, kind: Scalar) -> int:
    return read_whole(value, "text", *RANGES[kind])


def _number_text(value: str, kind: Scalar) -> float:
    return read_number(value, "text", _FLOAT_MAX if kind is Scalar.float else math.inf)


def _nanoseconds_of_cell(value: str, kind: Scalar) -> int:
    return _nanoseconds_of_text(value.strip(), kind)


def _read(read: Callable[[str], Any], text: Any) -> Any:
    # Python's own parsers accept digits of every script, and underscores between digits.
    if not text.isascii() or "_" in text:
        raise Refused(v.BAD_TEXT, "string")
    try:
        return read(text)
    except ValueError:
        raise Refused(v.BAD_TEXT, "string") from None


_TEXT: Final[Mapping[Scalar, Callable[[Any, Scalar], Any]]] = {
    Scalar.boolean: _boolean_text,
    Scalar.integer: _whole_text,
    Scalar.long: _whole_text,
    Scalar.float: _number_text,
    Scalar.double: _number_text,
    Scalar.string: _string,
    Scalar.binary: _from_base64,
    Scalar.datetime: _nanoseconds_of_cell,
}
