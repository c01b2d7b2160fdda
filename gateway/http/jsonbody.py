"""JSON of prediction bodies: strict, but for what Python's own clients write.

Those write NaN, Infinity and -Infinity as bare words, and sometimes a byte order mark; whole numbers of any
length are read exactly. Knows bytes and values, and nothing of what the values mean: enforcement makes a NaN
null where a type has no NaN. Ordinary bodies are read by orjson alone.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, Final

import orjson

#: Every digit as 0, so that a run of them is found by a plain search.
_DIGITS: Final = bytes.maketrans(b"123456789", b"000000000")
#: The fewest digits of a whole number beyond 64 bits, which orjson reads as a float.
_LONG: Final = b"0" * 19
_WHOLE: Final = re.compile(rb"[\[,:\s]-?\d{19,}\s*[,\]}]")


def loads(body: bytes) -> Any:
    """The value of a JSON text. Raises ValueError with the reason, which repeats nothing of the body."""
    if body.startswith(codecs.BOM_UTF8):
        body = body[len(codecs.BOM_UTF8) :]
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        if b"NaN" not in body and b"Infinity" not in body:
            raise
        return _loads(body)
    if _LONG in body.translate(_DIGITS) and _WHOLE.search(body):
        return _loads(body)
    return value


def _loads(body: bytes) -> Any:
    """The same by the standard library, which knows the bare words and has no longest integer."""
    try:
        text = body.decode("utf-8")
        value = json.loads(text)
        if "\\u" in text:
            # Half of a surrogate pair is no text: what comes later cannot write it.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair in a string") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value
