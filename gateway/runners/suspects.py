"""Inputs whose call ended a model process: which of them may run again, and which are poison.

A process that ends in a call makes that call's inputs suspects. A suspect runs once more, alone. One that is
answered is innocent and forgotten: it was there when somebody killed the process. One that ends a second
process without an answer in between is poison and is refused for a while, so that one caller cannot take the
model away from the others. Where the processes were killed with SIGKILL, the input may be innocent: it is
poison only after a third one, its refusal is short, and its caller may try again. Pure: the
time is an argument. Knows digests, no rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

from loaders.worker import wire

if TYPE_CHECKING:
    from loaders.batch import Batch

#: An input that ended so many processes without an answer in between is poison; more where the last one was
#: killed with SIGKILL, because somebody may kill a process and its spare in one stroke.
ENDS, ENDS_BY_SIGKILL = 2, 3
#: How long poison is refused without a trial, in seconds; shorter where the process was killed with SIGKILL,
#: which may have come from outside (an operator, the kernel) and not from the input.
REFUSED, REFUSED_AFTER_SIGKILL = 60.0, 5.0
#: A suspect is forgotten after so many seconds without another end.
FORGOTTEN: Final = 600.0
#: So many are remembered at most, the latest.
KEPT: Final = 1000


class Poisoned(Exception):
    """This input ended the model's process each time it ran."""


def digest(batch: Batch | wire.Framed, params: Mapping[str, Any]) -> bytes:
    """Tells inputs apart by what the model would be sent. Empty for one that cannot be sent."""
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
    """The memory of one model. False while there is none, so that calls need not compute digests."""

    def __init__(self) -> None:
        #: By digest: how many processes it ended, until when this is remembered or refused, and whether
        #: somebody may have killed the last of them.
        self._ends: dict[bytes, tuple[int, float, bool]] = {}

    def __bool__(self) -> bool:
        return bool(self._ends)

    def __repr__(self) -> str:
        return f"<Suspects {len(self._ends)}>"

    def ended(self, digests: Iterable[bytes], now: float, *, outside: bool) -> None:
        """A process ended in a call of these inputs; `outside`: somebody may have killed it."""
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
        """Whether this input is refused now. One whose time is over gets another trial."""
        count, until, outside = self._ends.get(told, (0, 0.0, False))
        if now >= until:
            self._ends.pop(told, None)
            return False
        return count >= _enough(outside)

    def was_killed(self, told: bytes) -> bool:
        """Whether somebody may have killed the last process that ended under this input."""
        return self._ends.get(told, (0, 0.0, False))[2]


def _enough(outside: bool) -> int:
    return ENDS_BY_SIGKILL if outside else ENDS
