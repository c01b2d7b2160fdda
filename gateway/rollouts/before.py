"""The version in service during its last minutes: what a new version is compared with after the swap.

`Before` records requests in slots of ten seconds and keeps the last ten minutes. `Reference` is their summary
at the moment of the swap, with bounds that the true error rate and the true median exceed only rarely.

Requests that arrive together often fail or slow down together, so many of them say less than as many
independent ones. The *design effect* (Kish, "Survey Sampling", 1965) says how much less: the variance between
slots, divided by the variance of independent requests. The bounds use the number of requests divided by it.

Pure: numbers in, numbers out. The clock is an argument. Must not know registries, processes or HTTP.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any, Final

SLOT_SECONDS: Final = 10.0
WINDOW_SECONDS: Final = 600.0
"""How far back the comparison goes."""
SAMPLES: Final = 64
"""The most call times that a slot keeps, drawn at random."""
CHECKS: Final = 20
"""The most answers of a slot that are compared with the output schema."""
SCALES: Final = (1, 3, 6, 12)
"""The lengths, in slots, at which the design effect is measured."""


@dataclass(slots=True)
class Slot:
    """Ten seconds of traffic. `seconds`: call times of answered requests, at most `SAMPLES`."""

    number: int
    requests: int = 0
    failures: int = 0
    checked: int = 0
    violations: int = 0
    seconds: list[float] = field(default_factory=list)


class Before:
    """The last minutes of one version in service. Recording a request costs a few additions."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, seed: int = 0) -> None:
        self._clock = clock
        self._random = random.Random(seed)
        self._slots: deque[Slot] = deque()

    def __repr__(self) -> str:
        return f"<Before {sum(slot.requests for slot in self._slots)} requests>"

    def _slot(self) -> Slot:
        number = int(self._clock() // SLOT_SECONDS)
        slots = self._slots
        if not slots or slots[-1].number != number:
            slots.append(Slot(number))
            while number - slots[0].number > WINDOW_SECONDS / SLOT_SECONDS:
                slots.popleft()
        return slots[-1]

    @property
    def checks(self) -> bool:
        """Returns True if the next answer is compared with the output schema."""
        return self._slot().checked < CHECKS

    def observe(self, *, failed: bool, seconds: float, violated: bool | None = None) -> None:
        """Adds a finished request. `seconds`: the duration of the model's call. `violated`: None where the
        answer was not compared with the output schema."""
        slot = self._slot()
        slot.requests += 1
        if failed:
            slot.failures += 1
            return
        if violated is not None:
            slot.checked += 1
            slot.violations += violated
        answered = slot.requests - slot.failures
        if answered <= SAMPLES:
            slot.seconds.append(seconds)
        elif (place := self._random.randrange(answered)) < SAMPLES:
            slot.seconds[place] = seconds

    def reference(self) -> Reference:
        """The summary of the last ten minutes."""
        last = int(self._clock() // SLOT_SECONDS)
        return summary([s for s in self._slots if last - s.number <= WINDOW_SECONDS / SLOT_SECONDS])


@dataclass(frozen=True, slots=True)
class Reference:
    """The traffic before a swap. `effects`: the design effect of failures, of violations and of slow calls.
    `quantiles`: call times at equal distances, the fastest first (empty without answers); `timed`: how many
    call times they are made of. `slowest`: the longest call."""

    requests: int = 0
    failures: int = 0
    checked: int = 0
    violations: int = 0
    timed: int = 0
    quantiles: tuple[float, ...] = ()
    slowest: float = 0.0
    effects: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def median(self) -> float | None:
        return self.quantiles[len(self.quantiles) // 2] if self.quantiles else None

    def weight(self, measure: str) -> float:
        """How many requests count as one, by their `errors`, `latency` or `output`. The design effects of the
        last two are those of samples; between them are more requests."""
        failures, violations, slow = self.effects
        effect, sampled = {
            "errors": (failures, self.requests),
            "latency": (slow, self.timed),
            "output": (violations, self.checked),
        }[measure]
        return 1 + (effect - 1) * max(1.0, (self.requests - self.failures) / max(1, sampled))

    def most_failures(self, alpha: float) -> float:
        """An upper bound of the true error rate; 1 if nothing is known. It is too low with a probability of
        at most `alpha`."""
        return upper_rate(self.failures, self.requests, self.effects[0], alpha)

    def most_violations(self, alpha: float) -> float:
        """The same for answers that do not match the output schema."""
        return upper_rate(self.violations, self.checked, self.effects[1], alpha)

    def slowest_median(self, alpha: float) -> float | None:
        """An upper bound of the true median of the call times, an order statistic; None with too few calls.

        By Hoeffding's inequality at most `alpha` of all samples have more than half of their values, plus the
        margin, below the true median.
        """
        if not self.quantiles:
            return None
        share = 0.5 + math.sqrt(math.log(1 / alpha) * self.effects[2] / (2 * self.timed))
        last = len(self.quantiles) - 1
        return None if share > 1 else self.quantiles[min(last, math.ceil(share * last))]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Reference:
        """The inverse of `to_json`."""
        facts = {**value, "quantiles": tuple(value["quantiles"])}
        first, second, third = value["effects"]
        return cls(**{**facts, "effects": (first, second, third)})


QUANTILES: Final = 200


def summary(slots: Sequence[Slot]) -> Reference:
    """Summarises slots, oldest first."""
    weighted = sorted(
        (seconds, (slot.requests - slot.failures) / len(slot.seconds))
        for slot in slots
        for seconds in slot.seconds
    )
    quantiles = _quantiles(weighted)
    middle = quantiles[len(quantiles) // 2] if quantiles else 0.0
    return Reference(
        requests=sum(slot.requests for slot in slots),
        failures=sum(slot.failures for slot in slots),
        checked=sum(slot.checked for slot in slots),
        violations=sum(slot.violations for slot in slots),
        timed=len(weighted),
        quantiles=quantiles,
        slowest=weighted[-1][0] if weighted else 0.0,
        effects=(
            design_effect([(slot.failures, slot.requests) for slot in slots]),
            design_effect([(slot.violations, slot.checked) for slot in slots]),
            design_effect([(sum(s > middle for s in slot.seconds), len(slot.seconds)) for slot in slots]),
        ),
    )


def _quantiles(weighted: Sequence[tuple[float, float]]) -> tuple[float, ...]:
    """`QUANTILES` + 1 values at equal distances of their weight; fewer if there are fewer values."""
    if not weighted:
        return ()
    sums = list(accumulate(weight for _, weight in weighted))
    wanted = min(QUANTILES, len(weighted) - 1)
    found: list[float] = []
    place = 0
    for step in range(wanted + 1):
        goal = sums[-1] * step / wanted if wanted else 0.0
        while place < len(sums) - 1 and sums[place] < goal:
            place += 1
        found.append(weighted[place][0])
    return tuple(found)


def design_effect(slots: Sequence[tuple[int, int]]) -> float:
    """How much more counts of slots differ than those of independent requests: 1 or more. `slots` are (count,
    total). A difference that chance explains once in forty times counts as none."""
    worst = 1.0
    for scale in SCALES:
        groups = [_sum(slots[start : start + scale]) for start in range(0, len(slots), scale)]
        groups = [(count, total) for count, total in groups if total]
        count, total = _sum(groups)
        if len(groups) < 3 or count < max(3, len(groups)) or count == total:
            continue  # too few events to tell
        rate = count / total
        differences = sum((k - n * rate) ** 2 / (n * rate * (1 - rate)) for k, n in groups)
        worst = max(worst, differences / _chi_square(len(groups) - 1))
    return worst


def _sum(slots: Iterable[tuple[int, int]]) -> tuple[int, int]:
    counts, totals = 0, 0
    for count, total in slots:
        counts, totals = counts + count, totals + total
    return counts, totals


def _chi_square(freedom: int) -> float:
    """The 97.5 % quantile of the chi-square distribution (Wilson and Hilferty, 1931)."""
    part = 2 / (9 * freedom)
    return freedom * float((1 - part + 1.96 * math.sqrt(part)) ** 3)


def upper_rate(count: int, total: int, effect: float, alpha: float) -> float:
    """An upper confidence bound of a rate (Clopper and Pearson, 1934): with this rate, so few events in
    `total` / `effect` independent requests have the probability `alpha`."""
    seen, weight = math.ceil(count / effect), math.floor(total / effect)
    if seen >= weight:
        return 1.0
    low, high = seen / weight, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(seen, weight, middle) > alpha else (low, middle)
    return high


def _at_most(most: int, total: int, rate: float) -> float:
    """The probability of at most `most` events, for a `rate` with which more are expected."""
    if rate >= 1:
        return 0.0
    ways = math.lgamma(total + 1) - math.lgamma(most + 1) - math.lgamma(total - most + 1)
    term = math.exp(ways + most * math.log(rate) + (total - most) * math.log1p(-rate))
    found, odds = 0.0, (1 - rate) / rate
    for count in range(most, -1, -1):
        found += term
        term *= count / (total - count + 1) * odds
        if term < found * 1e-9:
            break
    return found
