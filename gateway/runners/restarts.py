"""Decides when an ended process may be started again, and when not. A pure decision: the time and the random
numbers are arguments.

Counts the crashes since the model last answered. A model that answers between its crashes is not broken: it
is killed from outside or by single inputs, so it starts again at once. A model that crashes repeatedly
without an answer waits longer each time. It goes into quarantine after enough crashes with different causes:
if the same input causes all of them, the fault is in that input, not in the model.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

from gateway import backoff


@dataclass(frozen=True, slots=True)
class Policy:
    """The first restart is immediate; the second waits `base` seconds, each further one twice as long, at
    most `longest` (see `backoff`). Quarantine: `crashes` crashes within `window` seconds, with at least
    `suspects` different inputs; a crash outside a call counts as its own input."""

    window: float = 60.0
    base: float = 0.5
    longest: float = 30.0
    crashes: int = 5
    suspects: int = 3


class _End(NamedTuple):
    at: float
    crashed: bool
    suspect: Hashable


class Restarts:
    """The history of one model's ended processes."""

    def __init__(self, policy: Policy | None = None, chance: random.Random | None = None) -> None:
        self._policy = policy or Policy()
        self._chance = chance
        self._ends: deque[_End] = deque()
        self.crashes = 0

    def ended(
        self, now: float, *, crashed: bool, suspect: Hashable | None = None, answered: bool = False
    ) -> float | None:
        """Records the end of a process at `now` (any clock, seconds). Returns how long to wait before the
        next start; None: quarantine.

        `suspect`: the input of its current call. `answered`: the model has answered since the last end. Ends
        that are not crashes (the operator's timeout) delay the next start but never cause quarantine.
        """
        policy = self._policy
        self.crashes += crashed
        if answered:
            self._ends.clear()
        self._ends.append(_End(now, crashed, object() if suspect is None else suspect))
        while now - self._ends[0].at > policy.window:
            self._ends.popleft()
        crashes = [end for end in self._ends if end.crashed]
        if len(crashes) >= policy.crashes and len({end.suspect for end in crashes}) >= policy.suspects:
            return None
        if len(self._ends) == 1:
            return 0.0
        return backoff.pause(
            len(self._ends) - 1, first=policy.base, longest=policy.longest, chance=self._chance
        )
