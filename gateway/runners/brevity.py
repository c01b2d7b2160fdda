"""Decides which calls of a model in the gateway's process are brief enough for the event loop itself.

A thread costs a brief call more than the call takes. A long call on the loop would delay all other requests,
so a model has to show in its thread that its calls are brief, and goes back there when one is not. Pure: must
not know models, threads or clocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from loaders.batch import Columns, Tensors

if TYPE_CHECKING:
    from loaders.batch import Batch
    from loaders.worker.wire import Framed

#: A brief call uses the processor for at most this time, in seconds.
BRIEF: Final = 0.0003
#: The quickest of the calls in the thread took at most this time. A model that waits for threads of its own
#: uses little of the processor in the thread that called it.
AWAITED: Final = 2 * BRIEF
#: A call on the loop that uses the processor for longer than the first time, or takes longer than the second,
#: is the last one there. The second is larger, because other processes may have had the processor.
USED_ON_LOOP: Final = 5 * BRIEF
TOOK_ON_LOOP: Final = 0.02
#: How many brief calls are needed first, and the most after calls on the loop that were not brief. A long
#: call takes the place of some brief ones: on a busy machine a call may be long for reasons of others.
CALLS: Final = 20
MOST_CALLS: Final = 20_000
LONG_COSTS: Final = 5
_AGAIN: Final = 10


class Brevity:
    """What the calls of one model showed. Sizes count numbers; times are in seconds."""

    def __init__(self) -> None:
        #: The largest size that was brief, and how many calls speak for it.
        self._size = 0
        self._calls = 0
        self._needed = CALLS
        self._quickest = math.inf

    def __repr__(self) -> str:
        return f"<Brevity {self._calls}/{self._needed} calls, up to {self._size} numbers>"

    def allows(self, size: int) -> bool:
        """Returns whether a call of this size may run on the event loop."""
        return self._calls >= self._needed and size <= self._size and self._quickest <= AWAITED

    def in_thread(self, size: int, used: float, took: float) -> None:
        """A call in the model's thread used the processor for `used` seconds, and took `took`. If it is
        larger than all that were brief, it starts the count again, or shows nothing where it is long."""
        if used > BRIEF:
            if size <= self._size:
                self._calls = max(0, self._calls - LONG_COSTS)
            return
        if size > self._size:
            self._forget()
            self._size = size
        self._calls += 1
        self._quickest = min(self._quickest, took)

    def on_loop(self, used: float, took: float) -> None:
        """The same for a call on the loop."""
        if used > USED_ON_LOOP or took > TOOK_ON_LOOP:
            self._needed = min(self._needed * _AGAIN, MOST_CALLS)
            self._forget()

    def _forget(self) -> None:
        self._size = self._calls = 0
        self._quickest = math.inf


def size_of(batch: Batch | Framed, params: Mapping[str, object]) -> int | None:
    """How many numbers a call has. None where its time may depend on more than that: on texts, values of any
    form, and params."""
    if params or not isinstance(batch, Columns | Tensors):
        return None
    size = 0
    for array in batch.arrays.values():
        if array.dtype.kind not in "biuf":
            return None
        size += array.size
    return size
