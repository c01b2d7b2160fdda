"""What a body will take in memory once it is parsed, told from its bytes before anything is built.

Python's values are far larger than their text: 32 MB of `[],[],…` become 1.5 GB of empty lists. Every value
has a byte of JSON or CSV that announces it, so the bytes that announce values are counted. The result is an
upper bound for what the parsers of `bodies` build and the table that enforcement makes of it, within a
factor of two. Knows bytes, and nothing of requests.
"""

from __future__ import annotations

from typing import Final

import numpy as np

#: A body up to this size, in bytes, is not counted: it is taken to be as dense as any body can be.
UNCOUNTED: Final = 4096
#: The most bytes that one byte of a body becomes: `[1],` makes a list of its own.
DENSEST: Final = 36

#: What each of these bytes announces, in bytes of CPython 3.11 and later on 64 bits.
_JSON: Final = {
    b",": 40,  # the value behind it: a float (24), its place in a list (8) and in a column (8)
    b"[": 104,  # a list (56), the collector's head (16), the places it keeps free (32)
    b"{": 232,  # an object with its table of up to five members
    b'"': 24,  # one of the two that a text has: 49 bytes without its characters
}
_CSV: Final = {
    b",": 80,  # a text of one cell (57 to 64), its place in a row (8) and in a column (8)
    b"\n": 144,  # the last cell of a row, and the row
    b"\r": 144,
    b'"': 8,
}
_AT_ONCE: Final = 1 << 20


def json_bytes(body: bytes) -> int:
    """The memory that a JSON body takes as Python values, in bytes."""
    return _counted(body, _JSON)


def csv_bytes(body: bytes) -> int:
    """The memory that a CSV body takes as lists of text, in bytes."""
    return _counted(body, _CSV)


def _counted(body: bytes, weights: dict[bytes, int]) -> int:
    size = len(body)
    if size <= UNCOUNTED:
        return size * DENSEST
    # Characters outside of ASCII take up to four bytes each in a text that holds one of them.
    total = size if body.isascii() else 4 * size
    whole = np.frombuffer(body, np.uint8)
    for start in range(0, size, _AT_ONCE):
        piece = whole[start : start + _AT_ONCE]
        for byte, weight in weights.items():
            total += weight * int(np.count_nonzero(piece == byte[0]))
    return total
