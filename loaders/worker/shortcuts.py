"""The most common messages of one row or a few, at a fraction of the time: a call with a small table of
numbers of one dtype, and a call or an answer with one small array of numbers.

Their headers are those that `packing` writes. A header that was read before, and that these functions would
write, describes its buffer completely: `unpacking` is needed only for its first frame. Must not know frames
or sockets.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from loaders.batch import Columns, Tensors
from loaders.compat.pythons import zipped
from loaders.worker.packing import ALIGN, JOIN_BELOW, JSON, TAG, Array

if TYPE_CHECKING:
    from loaders.batch import Batch

#: The most columns of a table for which there is a shortcut: their names are remembered.
_MOST_COLUMNS: Final = 64
#: Clients may choose the names of columns, and models their answers: only so much is remembered.
_MOST_REMEMBERED: Final = 512
_LONGEST_REMEMBERED: Final = 2048

_WRITTEN: Final[dict[Hashable, bytes]] = {}


def call(op: str, batch: Batch) -> tuple[bytes, int, Iterable[Any]] | None:
    """The header of `{"op": op, "batch": batch, "params": {}}`, how many bytes follow it, and what they are:
    buffers without gaps. None for a batch without a shortcut."""
    if type(batch) is Columns:
        return _call_with_table(op, batch)
    known = _with_array(op, batch, is_call=True)
    return None if known is None else (known[0], len(known[1]), known[1:])


def answer(message: Mapping[str, Any]) -> tuple[bytes, bytes] | None:
    """The header and the buffer of `{"op": "answer", "batch": batch}` with one small array of numbers. None
    for a message without a shortcut."""
    if len(message) != 2 or message.get("op") != "answer":
        return None
    return _with_array("answer", message.get("batch"), is_call=False)


def _call_with_table(op: str, table: Columns) -> tuple[bytes, int, Iterable[Any]] | None:
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
    return header + b" " * (-len(header) % ALIGN), size, arrays.values()


def _with_array(op: str, batch: object, *, is_call: bool) -> tuple[bytes, bytes] | None:
    """The header and the buffer of a message with one small array of numbers, a call's with `params`."""
    if type(batch) is not Tensors or len(batch.arrays) != 1:
        return None
    array = batch.arrays.get("")
    if type(array) is not np.ndarray or array.dtype.kind not in "biuf" or not 0 < array.nbytes < JOIN_BELOW:
        return None
    key = (op, is_call, array.dtype, array.shape, batch.rows)
    header = _WRITTEN.get(key)
    if header is None:
        described = {TAG: ["array", array.dtype.str, list(array.shape)]}
        packed: dict[str, Any] = {"op": op, "batch": {TAG: ["tensors", batch.rows, [["", described]]]}}
        if is_call:
            packed["params"] = {}
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
    """What a header says. `size`: the bytes of its buffer. `names`: the columns, None for one array."""

    size: int
    op: str
    is_call: bool
    names: tuple[str | int, ...] | None
    rows: int | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


_READ: Final[dict[bytes, _Layout]] = {}


def read(frame: Array, header: int) -> dict[str, Any] | None:
    """The message of a frame with a header that was learnt; None for any other."""
    layout = _READ.get(frame[:header].tobytes()) if header <= _LONGEST_REMEMBERED else None
    if layout is None:
        return None
    size, op, is_call, names, rows, shape, dtype = layout
    if size != len(frame) - header:
        return None
    array: Array = np.ndarray(shape, dtype, frame.data, header)
    batch: Batch
    if names is None:
        batch = Tensors({"": array}, rows)
    else:
        batch = Columns(dict(zipped(names, array)), shape[1])
    return {"op": op, "batch": batch, "params": {}} if is_call else {"op": op, "batch": batch}


def learn(frame: Array, header: int, message: Mapping[str, Any]) -> None:
    """Remembers the header of a frame with this message if it is one that these functions write."""
    if header > _LONGEST_REMEMBERED:
        return
    batch, op, size = message.get("batch"), message.get("op"), len(frame) - header
    if type(op) is not str or not op.isascii():
        return
    written: bytes | None = None
    is_call = "params" in message
    if type(batch) is Columns and batch.rows:
        if (table := _call_with_table(op, batch)) is not None:
            names = tuple(batch.arrays)
            dtype = batch.arrays[names[0]].dtype
            layout = _Layout(size, op, True, names, batch.rows, (len(names), batch.rows), dtype)
            written = table[0]
    elif type(batch) is Tensors and (known := _with_array(op, batch, is_call=is_call)) is not None:
        array = batch.arrays[""]
        layout = _Layout(size, op, is_call, None, batch.rows, array.shape, array.dtype)
        written = known[0]
    text = frame[:header].tobytes()
    if text == written:
        if len(_READ) >= _MOST_REMEMBERED:
            _READ.clear()
        _READ[text] = layout
