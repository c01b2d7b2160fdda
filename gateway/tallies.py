"""Counts of requests that cost a request almost nothing: plain numbers, read at a scrape.

The classes of `prometheus_client` lock for each observation. These do not: only the event loop uses them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import numpy as np

from gateway.exposition import Distribution

PHASES: Final = ("parse", "queue", "predict", "encode")
REQUEST_BOUNDS: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
PHASE_BOUNDS: Final = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)

_COUNT_AT_ONCE: Final = 512
#: Fewer values are counted one by one: an array would take longer to make.
_FEW: Final = 64


class Tally:
    """A histogram that takes many values at once, with `add`, or one by one, with `observe`, which counts
    many of them together. `bounds`: its upper bounds in their order, without infinity."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._waiting: list[float] = []

    def observe(self, value: float) -> None:
        self._waiting.append(value)
        if len(self._waiting) >= _COUNT_AT_ONCE:
            self._count()

    def add(self, values: Sequence[float]) -> None:
        counts = self._counts
        if len(values) < _FEW:
            for value in values:
                counts[bisect_left(self._bounds, value)] += 1
        else:
            places = np.searchsorted(self._bounds, values)
            for place, count in enumerate(np.bincount(places).tolist()):
                counts[place] += count
        self._sum += sum(values)

    def distribution(self) -> Distribution:
        """All values so far."""
        if self._waiting:
            self._count()
        return Distribution(tuple(accumulate(self._counts)), self._sum)

    def _count(self) -> None:
        waiting, self._waiting = self._waiting, []
        self.add(waiting)


class Tallies(dict[str, Tally]):
    """A tally for each name, made when it is first used."""

    def __init__(self, bounds: Sequence[float]) -> None:
        super().__init__()
        self.bounds = bounds

    def __missing__(self, name: str) -> Tally:
        tally = self[name] = Tally(self.bounds)
        return tally


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
        self.seconds = Tally(REQUEST_BOUNDS)
        self.phases = [Tally(PHASE_BOUNDS) for _ in PHASES]
        self._waiting: list[tuple[float, ...]] = []
        self._observed = 0

    def observe(self, times: tuple[float, ...]) -> None:
        """Keeps the seconds of a request and of its phases; `count` counts many of them together."""
        self._observed += 1
        self._waiting.append(times)
        if self._observed % _COUNT_AT_ONCE == 0:
            self.count()

    def count(self) -> None:
        """Counts what was observed; before the tallies are read."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            for tally, values in zip([self.seconds, *self.phases], zip(*waiting, strict=True), strict=True):
                tally.add(values)
