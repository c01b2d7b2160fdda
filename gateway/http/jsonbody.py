"""The JSON parser for prediction bodies: strict, except for two things that Python clients write.

These are the bare words NaN, Infinity and -Infinity, and a byte order mark. Whole numbers of any length are
read exactly. orjson alone reads ordinary bodies. Must not know what the values mean: enforcement turns NaN
into null for types without NaN.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, Final

import orjson

#: Maps every digit to 0, so that a plain search finds a run of digits.
_DIGITS: Final = bytes.maketrans(b"123456789", b"000000000")
#: The fewest digits of a whole number beyond 64 bits, which orjson reads as a float.
_LONG: Final = b"0" * 19
#: What may stand before the digits of a whole number.
_BEFORE: Final = b"[,:- \t\n\r\f\v"
_MINUS: Final = ord("-")
_WHOLE: Final = re.compile(rb"[\[,:\s]-?\d{19,}\s*[,\]}]")


def loads(body: bytes) -> Any:
    """The value of a JSON text. Raises ValueError with the reason, which quotes nothing from the body."""
    if body[:3] == codecs.BOM_UTF8:
        body = body[len(codecs.BOM_UTF8) :]
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        if b"NaN" not in body and b"Infinity" not in body:
            raise
        return _loads(body)
    digits = body.translate(_DIGITS)
    return _loads(body) if _LONG in digits and _has_long(body, digits) else value


def _has_long(body: bytes, digits: bytes) -> bool:
    """Whether a whole number has so many digits. Fractions often do, and text: the pattern would take several
    times as long as the parser, so it looks only where digits begin that may be a whole number. `digits`: the
    body with a 0 for each digit."""
    at = digits.find(_LONG)
    while at >= 0:
        before = body[at - 1]
        if before in _BEFORE and _WHOLE.match(body, at - 2 if before == _MINUS else at - 1):
            return True
        at = digits.find(_LONG, at + len(_LONG))
    return False


def _loads(body: bytes) -> Any:
    """The same with the standard library, which reads the bare words and integers of any length."""
    try:
        text = body.decode("utf-8")
        value = json.loads(text)
        if "\\u" in text:
            # Half of a surrogate pair is not text: later code could not write it.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair in a string") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value
