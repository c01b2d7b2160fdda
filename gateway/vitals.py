"""Looks four times a second: how late the event loop runs a due timer, and how busy the models are.

Must not know models: `load` is a callable that counts requests and capacity.
"""

from __future__ import annotations

import math
from asyncio import AbstractEventLoop, TimerHandle
from collections.abc import Callable
from typing import Final

_INTERVAL: Final = 0.25
_LAG_WINDOW: Final = 15.0
#: A change of the load shows to two thirds in the saturation after this many seconds. A scrape every half
#: minute would otherwise see one moment of thirty seconds.
SMOOTHED_SECONDS: Final = 10.0
_WEIGHT: Final = 1 - math.exp(-_INTERVAL / SMOOTHED_SECONDS)


class Vitals:
    """`load` gives the requests that models answer or that wait for them, and how many could be answered at
    the same time."""

    def __init__(self) -> None:
        self.load: Callable[[], tuple[int, int]] | None = None
        #: Requests in flight ÷ capacity, smoothed. 1 is full; above it, requests wait.
        self.saturation = 0.0
        self._current = self._previous = 0.0
        self._window_ends = 0.0
        self._due = 0.0
        self._timer: TimerHandle | None = None

    @property
    def lag(self) -> float:
        """The longest delay of the loop in the last 15 to 30 s, in seconds."""
        return max(self._current, self._previous)

    def start(self, loop: AbstractEventLoop) -> None:
        """Measures until `stop`."""
        self.stop()
        self._window_ends = loop.time() + _LAG_WINDOW
        self._arm(loop)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def look(self) -> None:
        """Takes the load of this moment into the saturation."""
        if self.load is not None:
            busy, capacity = self.load()
            self.saturation += _WEIGHT * (busy / capacity - self.saturation)

    def _arm(self, loop: AbstractEventLoop) -> None:
        self._due = loop.time() + _INTERVAL
        self._timer = loop.call_at(self._due, self._tick, loop)

    def _tick(self, loop: AbstractEventLoop) -> None:
        now = loop.time()
        if now >= self._window_ends:
            self._previous, self._current = self._current, 0.0
            self._window_ends = now + _LAG_WINDOW
        self._current = max(self._current, now - self._due)
        self.look()
        self._arm(loop)
