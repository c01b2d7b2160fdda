"""A call to a model's process on the wire, and the meaning of its answer: the same in a process of one model
and in a pack. Must not know where the model runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from gateway import tracing
from gateway.pools import in_large_thread
from gateway.runners.base import ModelError, RunnerCrashed, model_error, unsendable
from loaders.batch import Columns, Tensors, Value
from loaders.worker import wire

if TYPE_CHECKING:
    from loaders.batch import Batch

#: A message with more Python objects than this is encoded in a thread.
_ENCODE_ON_LOOP: Final = 20_000


def pieces(op: str, batch: Batch | wire.Framed, params: Mapping[str, Any]) -> deque[wire.Segment] | None:
    """The pieces of a call's frame. `op`: predict or prewarm. None: use `pieces_apart`, because the event
    loop must not wait for it. Raises ModelError for a value that cannot be sent."""
    if not params and not isinstance(batch, wire.Framed):
        quick = wire.encode_call(op, batch)
        if quick is not None:
            return deque((quick,))
    if _objects(batch) > _ENCODE_ON_LOOP:
        return None
    return _encoded(op, batch, params)


async def pieces_apart(op: str, batch: Batch | wire.Framed, params: Mapping[str, Any]) -> deque[wire.Segment]:
    """The same, in the thread for large bodies."""
    return await in_large_thread(_encoded, op, batch, params)


def _encoded(op: str, batch: Batch | wire.Framed, params: Mapping[str, Any]) -> deque[wire.Segment]:
    if isinstance(batch, wire.Framed):
        return batch.pieces()
    try:
        return wire.encode({"op": op, "batch": batch, "params": dict(params)})
    except wire.WireError as error:
        raise unsendable(error) from None


def answer_of(reply: Mapping[str, Any], directory: str) -> Batch:
    """The batch of a process's reply. Raises ModelError, without the paths in `directory`, and RunnerCrashed
    for a reply that holds no batch: its process must be ended."""
    if reply["op"] == "error":
        raise without_path(model_error(reply), directory)
    if "worked" in reply:
        tracing.report(reply["worked"])
    answer = reply.get("batch")
    if not isinstance(answer, Columns | Tensors | Value):
        raise RunnerCrashed("the model process broke the protocol: its answer is not a batch")
    return answer


def without_path(error: ModelError, directory: str) -> ModelError:
    """The model's error without paths of this machine."""
    text = str(error).replace(directory, "(package)")
    return ModelError(text, error.trace, shown=error.shown, unsuitable=error.unsuitable)


def _objects(batch: Batch | wire.Framed) -> int:
    """About how many Python objects must be encoded to send it."""
    if isinstance(batch, wire.Framed):
        return 0
    if isinstance(batch, Columns):
        objects = 0
        for array in batch.arrays.values():
            objects += array.dtype.kind == "O"
        return batch.rows * objects
    if isinstance(batch, Tensors):
        return sum(int(array.size) for array in batch.arrays.values() if array.dtype.kind == "O")
    value = batch.value
    return 10 * len(value) if isinstance(value, list | dict) else 0
