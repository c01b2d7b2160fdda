"""When a process that ended may be started again, and when not any more. A pure decision: the time and
the chance are arguments.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """The first restart within `window` seconds is immediate; the second waits `base` seconds, each further
    one twice as long, at most `longest`. `crashes` of them within the window end it: quarantine."""

    window: float = 60.0
    base: float = 0.5
    longest: float = 30.0
    crashes: int = 5
    jitter: float = 0.2


class Restarts:
    """The memory of one model's ended processes."""

    def __init__(self, policy: Policy | None = None, chance: random.Random | None = None) -> None:
        self._policy = policy or Policy()
        self._chance = chance or random.Random()
        self._ends: deque[tuple[float, bool]] = deque()
        self.crashes = 0

    def ended(self, now: float, *, crashed: bool) -> float | None:
        """A process ended at `now` (any clock, seconds). How long to wait before the next; None: quarantine.

        Ends that are not crashes (the operator's timeout) delay the next start but never quarantine.
        """
        policy = self._policy
        self._ends.append((now, crashed))
        self.crashes += crashed
        while self._ends and now - self._ends[0][0] > policy.window:
            self._ends.popleft()
        if sum(was for _, was in self._ends) >= policy.crashes:
            return None
        if len(self._ends) == 1:
            return 0.0
        delay = min(policy.longest, policy.base * 2.0 ** (len(self._ends) - 2))
        return delay * self._chance.uniform(1 - policy.jitter, 1 + policy.jitter)
