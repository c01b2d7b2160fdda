"""Estimates the memory of a parsed message from its bytes, without parsing it.

Protobuf's values are larger than their wire form: two bytes can become an empty tensor of a hundred bytes. So
this module counts the fields that can be large. It visits a limited number of fields, and assumes the maximum
for the rest. Knows the wire format and the field numbers of ModelInferRequest.
Source of the wire format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

#: Maximum number of fields visited.
MOST_FIELDS: Final = 4096
#: Maximum bytes of memory per byte of a message.
DENSEST: Final = 64

_INPUTS: Final = 5
_RAW: Final = 7
_CONTENTS: Final = 5
_BYTES_CONTENTS: Final = 8
#: Memory per byte of packed values, in protobuf's list and in an array, by field of InferTensorContents. A
#: number of eight bytes may be one byte on the wire.
_PACKED: Final[Mapping[int, int]] = {1: 2, 2: 8, 3: 16, 4: 8, 5: 16, 6: 2, 7: 2}
#: Memory of a value of type bytes in addition to its bytes.
_VALUE: Final = 160
_LENGTH_DELIMITED: Final = 2


def memory(body: bytes) -> int:
    """Returns the memory of a ModelInferRequest, in bytes. For an invalid message, returns the maximum for
    its bytes; parsing refuses it."""
    return _Walk().request(memoryview(body))


class _Walk:
    def __init__(self) -> None:
        self._left = MOST_FIELDS

    def request(self, view: memoryview) -> int:
        total = 0
        for number, part in self._fields(view):
            if number == _RAW:
                total += _VALUE + 2 * len(part)
            elif number == _INPUTS:
                total += self._input(part)
            else:
                total += DENSEST * max(2, len(part))
        return total

    def _input(self, view: memoryview) -> int:
        total = DENSEST
        for number, part in self._fields(view):
            if number != _CONTENTS:
                total += DENSEST * max(2, len(part))
                continue
            for kind, values in self._fields(part):
                if kind == _BYTES_CONTENTS:
                    total += _VALUE + 2 * len(values)
                else:
                    total += DENSEST + len(values) * _PACKED.get(kind, DENSEST)
        return total

    def _fields(self, view: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Yields the number and content of a message's fields. Yields the unvisited rest as one field 0."""
        at = 0
        while at < len(view):
            if not self._left:
                yield 0, view[at:]
                return
            self._left -= 1
            try:
                key, start = _varint(view, at)
                kind = key & 7
                if kind == _LENGTH_DELIMITED:
                    length, start = _varint(view, start)
                    end = start + length
                else:
                    end = {0: _varint(view, start)[1], 1: start + 8, 5: start + 4}[kind]
            except (IndexError, KeyError):
                yield 0, view[at:]
                return
            yield key >> 3, view[start:end]
            at = end


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """Returns the number that begins at `at`, and the index of its end. Raises IndexError."""
    value = shift = 0
    while True:
        byte = view[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise IndexError
