"""The memory that a body will take once it is parsed, computed from its bytes before anything is built.

Counts the bytes that announce values (`loaders.weight`). The result is an upper bound for the values that the
parsers in `bodies` build, and for the table that enforcement makes of them. Must not know requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from loaders import weight

#: A body up to this size, in bytes, is not counted: it is assumed to be as dense as a body can be.
UNCOUNTED: Final = 4096
#: The most bytes that one byte of a body becomes: `[1],` makes a list of its own.
DENSEST: Final = 36

#: What each of these bytes announces in CSV.
_CSV: Final = {
    b",": 80,  # the text of one cell (57 to 64), its place in a row (8) and in a column (8)
    b"\n": 144,  # the last cell of a row, and the row
    b"\r": 144,
    b'"': 8,
}


def json_bytes(body: bytes) -> int:
    """The memory that a JSON body takes as Python values, in bytes."""
    size = len(body)
    return size * DENSEST if size <= UNCOUNTED else _counted(body, weight.JSON)


def csv_bytes(body: bytes) -> int:
    """The memory that a CSV body takes as lists of text, in bytes."""
    return _counted(body, _CSV)


def _counted(body: bytes, weights: Mapping[bytes, int]) -> int:
    size = len(body)
    if size <= UNCOUNTED:
        return size * DENSEST
    # In a text with one character outside ASCII, every character takes up to four bytes.
    return (size if body.isascii() else 4 * size) + weight.counted(body, weights)
