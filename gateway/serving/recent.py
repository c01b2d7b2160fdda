"""Statistics of one servable over the last minute: requests, speed, failures, and the last failure.

Counts only the model's own work: a request counts after the load has ended, so a cold start never appears in
the percentile. Knows numbers and the kind of an error; must not know requests or rows.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

#: The window has this many slots of this many seconds; the oldest slot is dropped as a whole.
SLOTS: Final = 6
SLOT_SECONDS: Final = 10.0
#: With fewer requests, a percentile would only show the slowest one.
FEWEST: Final = 20
#: Upper bounds in seconds, each 1.25 times the one before: 0.1 ms to about 11 minutes.
BOUNDS: Final = tuple(1e-4 * 1.25**n for n in range(71))


@dataclass(slots=True)
class _Slot:
    number: int
    requests: int = 0
    errors: int = 0
    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))


class Recent:
    """`clock`: seconds that never go back; `wall`: unix time, for the moment of the last failure."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self._wall = wall
        self._began = clock()
        self._slots: list[_Slot] = []
        #: When the next slot begins.
        self._next = 0.0
        #: (unix time, what the model raised or did), of the last request that failed or process that ended.
        self.last_error: tuple[float, str] | None = None
        #: Failed requests since it was loaded.
        self.total_errors = 0

    def answered(self, seconds: float) -> None:
        """Counts an answered request. `seconds`: its time in the queue and in the call."""
        slot = self._slots[-1] if self._clock() < self._next else self._slot()
        slot.requests += 1
        slot.counts[bisect_left(BOUNDS, seconds)] += 1

    def failed(self, kind: str) -> None:
        """The model failed a request. `kind` holds no rows: the class of an exception, or what ended."""
        slot = self._slot()
        slot.requests += 1
        slot.errors += 1
        self.total_errors += 1
        self.last_error = self._wall(), kind

    def ended(self, reason: str) -> None:
        """Records that a process of it ended, in a request or not. `reason` holds no rows."""
        self.last_error = self._wall(), reason

    def rate(self) -> float:
        """Requests per second over the last full slot and the current one."""
        number = int(self._clock() // SLOT_SECONDS)
        requests = sum(slot.requests for slot in self._slots[-2:] if slot.number >= number - 1)
        return requests / (SLOT_SECONDS + self._clock() % SLOT_SECONDS)

    def view(self) -> dict[str, Any]:
        """JSON-ready. `p99_seconds` is None below `FEWEST` answers; `error_rate` is None without requests."""
        now = self._clock()
        slots = [s for s in self._slots if s.number > int(now // SLOT_SECONDS) - SLOTS]
        requests = sum(slot.requests for slot in slots)
        errors = sum(slot.errors for slot in slots)
        window = min(max(now - self._began, 1.0), (SLOTS - 1) * SLOT_SECONDS + now % SLOT_SECONDS)
        return {
            "window_seconds": round(window, 1),
            "requests": requests,
            "requests_per_second": round(requests / window, 2),
            "errors": errors,
            "error_rate": round(errors / requests, 4) if requests else None,
            "p99_seconds": _percentile([sum(c) for c in zip(*(s.counts for s in slots), strict=True)], 0.99),
        }

    def _slot(self) -> _Slot:
        now = self._clock()
        if now >= self._next:
            number = int(now // SLOT_SECONDS)
            self._next = (number + 1) * SLOT_SECONDS
            self._slots.append(_Slot(number))
            del self._slots[:-SLOTS]
        return self._slots[-1]


def _percentile(counts: list[int], share: float) -> float | None:
    """The percentile, interpolated within its bucket; beyond the last bound it is that bound."""
    total = sum(counts)
    if total < FEWEST:
        return None
    wanted, below = math.ceil(share * total), 0
    for place, count in enumerate(counts):
        if below + count >= wanted:
            if place == len(BOUNDS):
                return BOUNDS[-1]
            low = BOUNDS[place - 1] if place else 0.0
            return low + (BOUNDS[place] - low) * (wanted - below) / count
        below += count
    return None
