"""The time at which the current call of a process must have ended.

One timer serves all calls and is not moved for each, because most end long before it: when it fires, it looks
whether a call is overdue, else it is set again. Must not know calls.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


class Deadline:
    """`passed` is called when the time has come. Times are the loop's."""

    def __init__(self, loop: asyncio.AbstractEventLoop, passed: Callable[[], None]) -> None:
        self._loop = loop
        self._passed = passed
        self._timer: asyncio.TimerHandle | None = None
        self._looks = self._due = math.inf

    def begin(self, now: float, seconds: float | None) -> None:
        """A call begins. None: it may take as long as it likes."""
        self._due = math.inf if seconds is None else now + seconds
        if self._due < self._looks:
            self._set(self._due)

    def end(self) -> None:
        """The call has ended; `begin` may follow."""
        self._due = math.inf

    def close(self) -> None:
        self._due = math.inf
        if self._timer is not None:
            self._timer.cancel()

    def _set(self, looks: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._looks = looks
        self._timer = self._loop.call_at(looks, self._look)

    def _look(self) -> None:
        self._timer, self._looks = None, math.inf
        if self._loop.time() >= self._due:
            self._passed()
        elif self._due < math.inf:
            self._set(self._due)
