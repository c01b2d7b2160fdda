"""The two most common messages of one row or a few, at a fraction of the time: a call with a small table of
numbers of one dtype, and an answer of one small array of numbers.

Their headers are those that `packing` writes. A header that was read before, and that these functions would
write, describes its buffer completely: `unpacking` is needed only for its first frame. Must not know frames
or sockets.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from loaders.batch import Columns, Tensors
from loaders.compat.pythons import zipped
from loaders.worker.packing import ALIGN, JOIN_BELOW, JSON, TAG, Array

#: The most columns of a table for which there is a shortcut: their names are remembered.
_MOST_COLUMNS: Final = 64
#: Clients may choose the names of columns, and models their answers: only so much is remembered.
_MOST_REMEMBERED: Final = 512
_LONGEST_REMEMBERED: Final = 2048

_WRITTEN: Final[dict[Hashable, bytes]] = {}


def call(op: str, table: Columns) -> tuple[bytes, int] | None:
    """The header of `{"op": op, "batch": table, "params": {}}`, and the bytes of the table's arrays, which
    follow it without gaps. None for a table without a shortcut."""
    arrays = table.arrays
    if table.index is not None or table.texts or not 0 < len(arrays) <= _MOST_COLUMNS:
        return None
    dtype = None
    size = 0
    for array in arrays.values():
        if type(array) is not np.ndarray or not array.flags.c_contiguous:
            return None
        if dtype is None:
            dtype = array.dtype
        elif array.dtype is not dtype:
            return None
        size += array.nbytes
    if dtype is None or dtype.kind not in "biuf" or size >= JOIN_BELOW:
        return None
    key = (dtype, *arrays)
    tail = _WRITTEN.get(key)
    if tail is None:
        text = JSON.encode([[dtype.str, list(arrays)]])
        tail = _remembered(key, text.encode("ascii") + b',null,[]]},"params":{}}')
    header = b'{"op":"%b","batch":{"~":["columns",%d,%b' % (op.encode("ascii"), table.rows, tail)
    return header + b" " * (-len(header) % ALIGN), size


def answer(message: Mapping[str, Any]) -> tuple[bytes, bytes] | None:
    """The header and the buffer of `{"op": "answer", "batch": batch}` with one small array of numbers. None
    for a message without a shortcut."""
    batch = message.get("batch")
    if (
        type(batch) is not Tensors
        or len(batch.arrays) != 1
        or len(message) != 2
        or message.get("op") != "answer"
    ):
        return None
    array = batch.arrays.get("")
    if type(array) is not np.ndarray or array.dtype.kind not in "biuf" or not 0 < array.nbytes < JOIN_BELOW:
        return None
    key = (array.dtype, array.shape, batch.rows)
    header = _WRITTEN.get(key)
    if header is None:
        described = {TAG: ["array", array.dtype.str, list(array.shape)]}
        packed = {"op": "answer", "batch": {TAG: ["tensors", batch.rows, [["", described]]]}}
        text = JSON.encode(packed).encode("ascii")
        header = _remembered(key, text + b" " * (-len(text) % ALIGN))
    return header, array.tobytes()


def _remembered(key: Hashable, text: bytes) -> bytes:
    if len(text) <= _LONGEST_REMEMBERED:
        if len(_WRITTEN) >= _MOST_REMEMBERED:
            _WRITTEN.clear()
        _WRITTEN[key] = text
    return text


class _Layout(NamedTuple):
    """What a header says. `size`: the bytes of its buffer. `names`: the columns, None for an answer."""

    size: int
    op: str
    names: tuple[str | int, ...] | None
    rows: int | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


_READ: Final[dict[bytes, _Layout]] = {}


def read(frame: Array, header: int) -> dict[str, Any] | None:
    """The message of a frame with a header that was learnt; None for any other."""
    layout = _READ.get(frame[:header].tobytes()) if header <= _LONGEST_REMEMBERED else None
    if layout is None or layout.size != len(frame) - header:
        return None
    array: Array = np.ndarray(layout.shape, layout.dtype, frame.data, header)
    if layout.names is None:
        return {"op": layout.op, "batch": Tensors({"": array}, layout.rows)}
    table = Columns(dict(zipped(layout.names, array)), len(array[0]))
    return {"op": layout.op, "batch": table, "params": {}}


def learn(frame: Array, header: int, message: Mapping[str, Any]) -> None:
    """Remembers the header of a frame with this message if it is one that these functions write."""
    if header > _LONGEST_REMEMBERED:
        return
    batch, op, size = message.get("batch"), message.get("op"), len(frame) - header
    written: bytes | None = None
    if type(batch) is Columns and batch.rows and type(op) is str and op.isascii():
        if (known := call(op, batch)) is not None:
            names = tuple(batch.arrays)
            layout = _Layout(
                size, op, names, batch.rows, (len(names), batch.rows), batch.arrays[names[0]].dtype
            )
            written = known[0]
    elif type(batch) is Tensors and (answered := answer(message)) is not None:
        array = batch.arrays[""]
        layout = _Layout(size, "answer", None, batch.rows, array.shape, array.dtype)
        written = answered[0]
    text = frame[:header].tobytes()
    if text == written:
        if len(_READ) >= _MOST_REMEMBERED:
            _READ.clear()
        _READ[text] = layout
