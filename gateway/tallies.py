"""Counts of requests that cost a request almost nothing: plain numbers, read at a scrape.

The classes of `prometheus_client` lock for each observation. These do not: only the event loop uses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from prometheus_client.utils import floatToGoString

PHASES: Final = ("parse", "queue", "predict", "encode")

_REQUEST_BUCKETS: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
_PHASE_BUCKETS: Final = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)
_COUNT_AT_ONCE: Final = 512


class Tally:
    """A histogram that takes many values at once, with `add`, or one by one, with `observe`, which counts
    many of them together. `Histogram` locks for each observation, which would cost a request more than all
    other counting."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = np.zeros(len(bounds) + 1, np.int64)
        self.sum = 0.0
        self._waiting: list[float] = []

    def observe(self, value: float) -> None:
        self._waiting.append(value)
        if len(self._waiting) >= _COUNT_AT_ONCE:
            self.count()

    def count(self) -> None:
        """Counts the observed values; before `buckets`."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            self.add(waiting)

    def add(self, values: Sequence[float]) -> None:
        places = np.searchsorted(self._bounds, values)
        self._counts += np.bincount(places, minlength=len(self._counts))
        self.sum += sum(values)

    def buckets(self) -> list[tuple[str, float]]:
        """Pairs of an upper bound and the number of values not above it, up to infinity."""
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        return list(zip(bounds, np.cumsum(self._counts).tolist(), strict=True))


@dataclass(slots=True)
class Cached:
    """The requests of one model that found it loaded, and those that did not."""

    hits: int = 0
    misses: int = 0


class Served:
    """The counts of one version. Only the event loop uses it."""

    def __init__(self) -> None:
        self.seen = 0.0
        self.codes: dict[tuple[str, str], int] = {}
        self.seconds = Tally(_REQUEST_BUCKETS)
        self.phases = [Tally(_PHASE_BUCKETS) for _ in PHASES]
        self._waiting: list[tuple[float, ...]] = []
        self._observed = 0

    def observe(self, times: tuple[float, ...]) -> None:
        """Keeps the seconds of a request and of its phases; `count` counts many of them together."""
        self._observed += 1
        self._waiting.append(times)
        if self._observed % _COUNT_AT_ONCE == 0:
            self.count()

    def count(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            for tally, values in zip([self.seconds, *self.phases], zip(*waiting, strict=True), strict=True):
                tally.add(values)
