"""One captured request: the typed input, the params and the answer, in the format of the model processes
(`loaders.worker.wire`: a JSON header and raw arrays; nothing executes when it is read).

Redacted columns are removed before anything is encoded. Pure: batches in, bytes out, and back. Must not know
files, settings or models.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

import numpy as np

from loaders.batch import Array, Batch, Columns, Tensors, Value
from loaders.worker import wire
from loaders.worker.wire import Framed

#: Reading a record takes at most this much memory for lists, objects and text, as a multiple of its bytes.
_GROWTH: Final = 100


class Unnamed(ValueError):
    """The input has values without names, so that redacted columns cannot be recognised."""


class Unreadable(ValueError):
    """The bytes are not a record."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A request as the event loop hands it over. `digest`: of the version's files. `at`: unix seconds.
    `seconds`: the duration of the model's call."""

    model: str
    version: str
    digest: str
    at: float
    seconds: float
    batch: Batch | Framed
    params: Mapping[str, Any]
    answer: Batch


@dataclass(frozen=True, slots=True)
class Record:
    """A captured request as it is stored. `id`: its hash. `removed`: the redacted columns that its input had;
    such a request is not replayed. `frame`: the encoded content."""

    id: str
    model: str
    version: str
    digest: str
    at: float
    seconds: float
    rows: int
    removed: tuple[str, ...]
    frame: bytes

    @property
    def size(self) -> int:
        return len(self.frame)

    def content(self) -> Content:
        """Raises Unreadable."""
        return decoded(self.frame)


@dataclass(frozen=True, slots=True)
class Content:
    batch: Batch
    params: dict[str, Any]
    answer: Batch


def recorded(taken: Taken, redact: Collection[str], limit: int) -> Record:
    """The record of a request, without the columns, tensors, params and members named in `redact` (in any
    case of letters). `limit`: the largest record, in bytes. Raises Unnamed, and WireError for a larger one or
    for an answer that cannot be encoded."""
    batch, params = taken.batch, dict(taken.params)
    if isinstance(batch, Framed):
        if len(batch.frame) > limit:
            raise wire.TooLarge("the input is too large")
        message = batch.message()
        batch, params = message["batch"], message["params"]
    removed: set[str] = set()
    answer = taken.answer
    if redact:
        names = frozenset(name.casefold() for name in redact)
        if not _is_named(batch):
            raise Unnamed("the input has values without names")
        batch = _without(batch, names, removed)
        params = _pruned(params, names, removed)
        answer = _without(answer, names, set())
    pieces = wire.encode({"batch": batch, "params": params, "answer": answer}, limit, lenient=True)
    frame = b"".join(pieces)
    # Part of the id is random, so that the content of a request cannot be found by trial.
    identity = blake2b(frame, key=os.urandom(16), digest_size=8).hexdigest()
    return Record(
        identity, taken.model, taken.version, taken.digest, taken.at, taken.seconds, batch.rows or 1,
        tuple(sorted(removed)), frame,
    )  # fmt: skip


def decoded(frame: bytes) -> Content:
    """The content of a record. Its arrays may be changed. Raises Unreadable."""
    try:
        message = wire.loads(frame, _GROWTH * len(frame))
        batch, params, answer = message["batch"], message["params"], message["answer"]
    except (wire.WireError, KeyError) as error:
        raise Unreadable(f"a captured request cannot be read: {error}") from None
    kinds = Columns | Tensors | Value
    if not isinstance(batch, kinds) or not isinstance(answer, kinds) or not isinstance(params, dict):
        raise Unreadable("a captured request cannot be read: it has other parts")
    return Content(batch, params, answer)


def _is_named(batch: Batch) -> bool:
    if isinstance(batch, Columns):
        return all(isinstance(name, str) for name in batch.arrays)
    if isinstance(batch, Tensors):
        return "" not in batch.arrays
    rows = batch.value if isinstance(batch.value, list) else [batch.value]
    return all(isinstance(row, dict) for row in rows)


def _without(batch: Batch, names: frozenset[str], removed: set[str]) -> Batch:
    if isinstance(batch, Columns):
        arrays = {name: _array(array, names, removed) for name, array in batch.arrays.items()
                  if not _is_secret(name, names, removed)}  # fmt: skip
        return Columns(arrays, batch.rows, batch.index, batch.texts)
    if isinstance(batch, Tensors):
        kept = {name: _array(array, names, removed) for name, array in batch.arrays.items()
                if not _is_secret(name, names, removed)}  # fmt: skip
        return Tensors(kept, batch.rows)
    return Value(_pruned(batch.value, names, removed), batch.rows)


def _is_secret(name: object, names: frozenset[str], removed: set[str]) -> bool:
    if str(name).casefold() not in names:
        return False
    removed.add(str(name))
    return True


def _array(array: Array, names: frozenset[str], removed: set[str]) -> Array:
    """The array without the redacted members of the objects in it."""
    if array.dtype.kind != "O":
        return array
    pruned = np.empty(array.shape, object)
    flat = pruned.reshape(-1)
    for at, value in enumerate(array.reshape(-1).tolist()):
        flat[at] = _pruned(value, names, removed)
    return pruned


def _pruned(value: Any, names: frozenset[str], removed: set[str]) -> Any:
    if isinstance(value, dict):
        return {
            key: _pruned(item, names, removed)
            for key, item in value.items()
            if not _is_secret(key, names, removed)
        }
    if isinstance(value, list | tuple):
        return [_pruned(item, names, removed) for item in value]
    return value
