"""Bodies that are one value (a file, a text or an array), for models whose signature has one input.

Knows media types and numpy's file format. Enforcement decides which model accepts which kind (`Whole`).
Source of the format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from gateway.errors import Problem
from gateway.http import jsonbody, multipart
from gateway.http.bodies import ABSENT, FILES, Parsed, decode_object
from loaders.enforcement import RawInput, Whole
from loaders.enforcement.whole import Kind, kinds
from loaders.signature import Signature

#: Maximum length of an axis of an array without values: a model may answer for each position.
_LONGEST_EMPTY: Final = 65_536
#: Maximum dimensions of an array in every version of numpy.
_MOST_DIMENSIONS: Final = 32
_NUMBERS: Final = "biuf"
_MOST_PARAMS: Final = 65_536
_PARAMS: Final = "the part `params` is a JSON object with the params of the model"


def media_types(signature: Signature | None) -> tuple[str, ...]:
    """Returns the media types that a model accepts as one value, for documents."""
    suitable = kinds(signature)
    shown = tuple(shown for kind, shown in _SHOWN for one in suitable if one == kind)
    return (*shown, multipart.KIND) if shown else ()


_SHOWN: Final[tuple[tuple[Kind, str], ...]] = (
    ("octets", "application/octet-stream"),
    ("file", "image/*"),
    ("file", "audio/*"),
    ("text", "text/plain"),
    ("array", "application/x-npy"),
)


def _parsed(kind: Kind, value: object) -> Parsed:
    return Parsed(RawInput("whole", Whole(kind, value)), None, ABSENT)


def parse_file(body: bytes) -> Parsed:
    return _parsed("file", body)


def parse_octets(body: bytes) -> Parsed:
    return _parsed("octets", body)


def parse_text(body: bytes) -> Parsed:
    """Returns the text. Raises MALFORMED_BODY."""
    try:
        return _parsed("text", body.decode())
    except UnicodeDecodeError as error:
        message = f"the body is not UTF-8 at byte {error.start}"
        raise Problem("MALFORMED_BODY", message, hint="write the text in UTF-8") from None


def parse_npy(body: bytes) -> Parsed:
    """Reads a file written by `numpy.save`, with numbers or booleans. Unpickles nothing, and allocates
    nothing before the length is checked. Raises MALFORMED_BODY."""
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        header = np.lib.format
        read = header.read_array_header_1_0 if version == (1, 0) else header.read_array_header_2_0
        shape, is_fortran, dtype = read(file)
    except Exception:  # noqa: BLE001 - numpy reads a header as Python's text: a tokenizer's errors come too
        raise _no_npy("the body is not a .npy file") from None
    if dtype.kind not in _NUMBERS:
        raise _no_npy(f"an array of {dtype.name} cannot be sent: only numbers and booleans")
    at = file.tell()
    if len(shape) > _MOST_DIMENSIONS or not all(type(size) is int and size >= 0 for size in shape):
        raise _no_npy("the file's header has an impossible shape")
    count = math.prod(shape)
    if len(body) - at != count * dtype.itemsize or (not count and max(shape, default=0) > _LONGEST_EMPTY):
        raise _no_npy(
            f"the file's header has the shape {list(shape)}, but the array has {len(body) - at} bytes"
        )
    array = np.frombuffer(body, dtype, count, at) if count else np.zeros(0, dtype)
    array = array.reshape(shape, order="F" if is_fortran else "C")
    return _parsed("array", np.ascontiguousarray(array, dtype.newbyteorder("=")))


def _no_npy(message: str) -> Problem:
    return Problem("MALFORMED_BODY", message, hint="send a whole file, as numpy.save writes it")


def parse_form(body: bytes, boundary: str) -> Parsed:
    """The part of a form that is the input, and its params. Raises MALFORMED_BODY."""
    part, given = multipart.parts(body, boundary)
    parsed = PARSERS[_form(part)](bytes(part.content))
    if given is None:
        return parsed
    if len(given.content) > _MOST_PARAMS:
        message = f"the part `params` has more than {_MOST_PARAMS} bytes"
        raise Problem("MALFORMED_BODY", message, hint=_PARAMS)
    return parsed._replace(params=decode_object(bytes(given.content), jsonbody.loads, _PARAMS))


def cost_of_form(body: bytes, boundary: str) -> int:
    """The memory that a form takes, in bytes. Raises MALFORMED_BODY."""
    part, _ = multipart.parts(body, boundary)
    return len(body) + COSTS[_form(part)](bytes(part.content))


def _form(part: multipart.Part) -> str:
    """The form of a part: a field of a page has no type, and programs that send files know few types."""
    if part.kind.startswith(FILES):
        return "file"
    if part.kind == "application/x-npy" or (part.file or "").lower().endswith(".npy"):
        return "npy"
    is_text = part.kind.startswith("text/") or (not part.kind and part.file is None)
    return "text" if is_text else "octets"


PARSERS: Final[Mapping[str, Callable[[bytes], Parsed]]] = {
    "file": parse_file,
    "octets": parse_octets,
    "text": parse_text,
    "npy": parse_npy,
}


def _copied(body: bytes) -> int:
    return 2 * len(body)


def _text(body: bytes) -> int:
    """Returns the memory of a text: with any character outside ASCII, each may take up to four bytes."""
    return len(body) if body.isascii() else 4 * len(body)


COSTS: Final[Mapping[str, Callable[[bytes], int]]] = {
    "file": _copied,
    "octets": _copied,
    "text": _text,
    "npy": _copied,
}
