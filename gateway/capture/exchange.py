"""Captured requests outside the store: as JSON for people and tools, and as frames that lose nothing.

Frames follow one another; each is a message of `loaders.worker.wire` with one record. Pure. Must not know
HTTP or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np

from gateway.capture.records import Record, Unreadable
from gateway.quantities import utc
from loaders.batch import Array, Batch, Columns, Tensors
from loaders.plain import NotPlain, plain
from loaders.worker import wire

#: A frame with its record; larger ones do not come from a gateway.
_LARGEST: Final = 64 << 20
_FACTS: Final = ("id", "model", "version", "digest", "at", "seconds", "rows")


def to_json(record: Record) -> dict[str, Any]:
    """A record for people. `input` is a body for `/predict`. What JSON cannot represent is named under
    `problem`."""
    shown: dict[str, Any] = {
        "id": record.id,
        "model": record.model,
        "version": record.version,
        "at": utc(record.at),
        "seconds": record.seconds,
        "rows": record.rows,
        "redacted": list(record.removed),
    }
    try:
        content = record.content()
        shown["input"] = _body(content.batch)
        if content.params:
            shown["input"]["params"] = plain(content.params, "params")
        shown["predictions"] = _values(content.answer)
    except (NotPlain, Unreadable) as error:
        shown["problem"] = str(error)
    return shown


def _body(batch: Batch) -> dict[str, Any]:
    if isinstance(batch, Columns):
        columns = [plain(_items(array), f"column {name!r}") for name, array in batch.arrays.items()]
        rows = [list(row) for row in zip(*columns, strict=True)] or [[] for _ in range(batch.rows)]
        return {"dataframe_split": {"columns": list(batch.arrays), "data": rows}}
    if isinstance(batch, Tensors):
        if batch.arrays.keys() == {""}:
            return {"inputs": plain(_items(batch.arrays[""]), "the input")}
        return {"inputs": {name: plain(_items(array), name) for name, array in batch.arrays.items()}}
    return {"inputs": plain(batch.value, "the input")}


def _values(batch: Batch) -> Any:
    if isinstance(batch, Columns):
        names = [str(name) for name in batch.arrays]
        columns = [plain(_items(array), f"column {name!r}") for name, array in batch.arrays.items()]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    if isinstance(batch, Tensors):
        if batch.arrays.keys() == {""}:
            return plain(_items(batch.arrays[""]), "the answer")
        return {name: plain(_items(array), name) for name, array in batch.arrays.items()}
    return plain(batch.value, "the answer")


def _items(array: Array) -> Any:
    if array.dtype.kind == "M":
        texts = np.datetime_as_string(array).astype(object)
        texts[np.isnat(array)] = None
        return texts.tolist()
    return array.tolist()


def to_frame(record: Record) -> bytes:
    facts = {name: getattr(record, name) for name in _FACTS}
    frame = np.frombuffer(record.frame, np.uint8)
    return b"".join(wire.encode({**facts, "removed": list(record.removed), "frame": frame}))


def from_frames(chunks: Iterable[bytes]) -> Iterator[Record]:
    """The records in a stream of frames. Raises Unreadable."""
    pending = bytearray()
    for chunk in chunks:
        pending += chunk
        while (size := _size(pending)) is not None and size <= len(pending):
            yield _record(bytes(pending[:size]))
            del pending[:size]
        if size is not None and size > _LARGEST:
            raise Unreadable("these are not captured requests: a frame is too large")
    if pending:
        raise Unreadable("the captured requests end inside a frame")


def _size(pending: bytearray) -> int | None:
    try:
        return wire.size(pending)
    except wire.WireError as error:
        raise Unreadable(f"these are not captured requests: {error}") from None


def _record(frame: bytes) -> Record:
    try:
        found = wire.loads(frame, _LARGEST)
        facts = {name: found[name] for name in _FACTS}
        return Record(**facts, removed=tuple(found["removed"]), frame=found["frame"].tobytes())
    except (wire.WireError, KeyError, TypeError, AttributeError) as error:
        raise Unreadable(f"a captured request cannot be read: {error}") from None
