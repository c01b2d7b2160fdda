"""The order in which models go when room is needed. Pure: sees accounts, changes nothing.

A policy is a function from accounts to a sort key; the smallest key goes first. There is one so far:
least recently used, with what only lingers after a swap before everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Candidate(Protocol):
    """What a policy may look at. `last_used` is in the clock's seconds."""

    @property
    def lingering(self) -> bool: ...

    @property
    def last_used(self) -> float: ...

    @property
    def bytes(self) -> int: ...


Policy = Callable[[Candidate], Any]


def least_recently_used(account: Candidate) -> tuple[bool, float]:
    """Lingering ones first, then by the time of the last use."""
    return (not account.lingering, account.last_used)
