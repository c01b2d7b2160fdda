"""Inputs whose call ended a model process: decides which may run again, and which are poison.

If a process ends during a call, the inputs of that call become suspects. A suspect runs once more, alone. If
it is answered, it is innocent and forgotten: the process was killed from outside. If it ends a second process
without an answer in between, it is poison, and is refused for a while, so that one caller cannot make the
model unavailable for others. If the processes were killed with SIGKILL, the input may be innocent: then it is
poison only after a third process, its refusal is short, and its caller may try again. Pure: the time is an
argument. Knows digests; must not know rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

from loaders.worker import wire

if TYPE_CHECKING:
    from loaders.batch import Batch

#: An input that ended this many processes without an answer in between is poison; more if the last one was
#: killed with SIGKILL, because a process and its spare may be killed from outside together.
ENDS, ENDS_BY_SIGKILL = 2, 3
#: How long poison is refused without a trial, in seconds; shorter if the process was killed with SIGKILL,
#: whose cause may be outside (an operator, the kernel).
REFUSED, REFUSED_AFTER_SIGKILL = 60.0, 5.0
#: A suspect is forgotten after this time without another crash, in seconds.
FORGOTTEN: Final = 600.0
#: The most suspects that are remembered; the latest are kept.
KEPT: Final = 1000


class Poisoned(Exception):
    """This input ended the model's process each time it ran."""


def digest(batch: Batch | wire.Framed, params: Mapping[str, Any]) -> bytes:
    """The digest of an input as it would be sent to the model. Empty if it cannot be sent."""
    try:
        if isinstance(batch, wire.Framed):
            pieces = batch.pieces()
        else:
            pieces = wire.encode({"batch": batch, "params": dict(params)})
    except wire.WireError:
        return b""
    told = blake2b(digest_size=16)
    for piece in pieces:
        told.update(piece)
    return told.digest()


class Suspects:
    """The suspects of one model. False while it has none, so that calls need not compute digests."""

    def __init__(self) -> None:
        #: By digest: how many processes it ended, until when this is remembered or refused, and whether the
        #: last one may have been killed from outside.
        self._ends: dict[bytes, tuple[int, float, bool]] = {}

    def __bool__(self) -> bool:
        return bool(self._ends)

    def __repr__(self) -> str:
        return f"<Suspects {len(self._ends)}>"

    def ended(self, digests: Iterable[bytes], now: float, *, outside: bool) -> None:
        """A process ended in a call with these inputs. `outside`: it may have been killed from outside."""
        for told in set(digests):
            count = self._ends.pop(told, (0, 0.0, False))[0] + 1
            kept = FORGOTTEN if count < _enough(outside) else REFUSED_AFTER_SIGKILL if outside else REFUSED
            self._ends[told] = count, now + kept, outside
        while len(self._ends) > KEPT:
            del self._ends[next(iter(self._ends))]

    def answered(self, digests: Iterable[bytes]) -> None:
        """The model answered these inputs: they are innocent."""
        for told in digests:
            self._ends.pop(told, None)

    def is_poison(self, told: bytes, now: float) -> bool:
        """Whether this input is refused now. After its time it gets another trial."""
        count, until, outside = self._ends.get(told, (0, 0.0, False))
        if now >= until:
            self._ends.pop(told, None)
            return False
        return count >= _enough(outside)

    def was_killed(self, told: bytes) -> bool:
        """Whether the last process that ended under this input may have been killed from outside."""
        return self._ends.get(told, (0, 0.0, False))[2]


def _enough(outside: bool) -> int:
    return ENDS_BY_SIGKILL if outside else ENDS
