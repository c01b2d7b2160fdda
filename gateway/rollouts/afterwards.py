"""The guards after a swap: is the version that serves worse than the one before it was in its last minutes?

The version before answers no requests any more, so the reference is its last ten minutes (`before`). Two
steps, each of which errs rarely. First, an upper bound of what the version before really did (`before`). Then
an e-process, as in `guards`, against "the new version is at most as bad as that bound and the allowed
excess". It may be looked at after every request. The probability that an identical version is rolled back is
at most the sum of both errors, which is alpha.

A request that fails on the new version may be given to the version before. If that fails too, the request is
not counted. Of two versions that both fail with probability p, the new one then fails p / (1 + p) of what is
counted, which is never more than half. So a version that fails nearly always is found even if nothing is
known of the minutes before.

Requests that arrive together fail together. So an observation is the mean of as many requests as count as
one, by the design effect of the minutes before.

Pure: numbers in, verdicts out. Knows no clock, registry, process or HTTP.
"""

from __future__ import annotations

import math
from typing import Any, Final

from gateway.rollouts.before import Reference
from gateway.rollouts.guards import ALPHA, KEYS, Arm, Bet, Limits, Outcome, Verdict

BOUND_SHARE: Final = 0.2
"""The part of alpha that the bound of the version before may err with; the rest is the e-process's."""

EXCESSES: Final = ((0.015, 0.1), (0.04, 0.5), (0.1, 0.25), (0.4, 0.15))
"""How much above the bound a rate is supposed to be, and the weight of that supposition."""

MOST_ALONE: Final = 0.5
"""The largest share of the counted requests on which one of two equal versions fails alone."""

MEASURES: Final = ("errors", "latency", "output")
WEIGHTS: Final = {"errors": 5.0, "latency": 1.0, "output": 1.0}
"""How alpha is divided among the active guards."""


class Afterwards:
    """The guards of a watch. `limits` as in `guards`; a guard without a bound (too little was seen before the
    swap) never finds anything. `repeats`: requests that fail are given to the version before."""

    def __init__(
        self, limits: Limits, before: Reference, *, alpha: float = ALPHA, repeats: bool = False
    ) -> None:
        self._repeats = repeats
        #: Only failures that the version before did not have count, because nothing else bounds them.
        self._alone = False
        self.limits = limits
        self.before = before
        self.candidate = Arm()
        active = [name for name in MEASURES if getattr(limits, name) is not None]
        total = sum(WEIGHTS[name] for name in active)
        self._bounds: dict[str, float] = {}
        self._limits: dict[str, float | None] = {}
        self._sizes: dict[str, int] = {}
        self._bets: dict[str, Bet] = {}
        self._open: dict[str, list[float]] = {}
        for name in active:
            part = alpha * WEIGHTS[name] / total
            self._bounds[name] = 1 / (part * (1 - BOUND_SHARE))
            self._limits[name] = limit = self._limit(name, part * BOUND_SHARE)
            self._sizes[name] = math.ceil(before.weight(name) - 0.5) or 1
            self._open[name] = []
            if limit is not None:
                self._bets[name] = Bet(0.5) if name == "latency" else _against(limit)
        self._failing: dict[str, set[str]] = {"errors": set(), "output": set()}

    def _limit(self, name: str, alpha: float) -> float | None:
        """What the version may do: a rate, or the seconds that half of its calls may exceed. None: too little
        is known."""
        if name == "latency":
            assert self.limits.latency is not None
            slowest = self.before.slowest_median(alpha)
            return None if slowest is None else slowest * self.limits.latency
        if name == "errors":
            most = self.before.most_failures(alpha)
            if self._repeats and most > MOST_ALONE:
                self._alone, most = True, MOST_ALONE
            limit = most + (self.limits.errors or 0.0)
        else:
            limit = self.before.most_violations(alpha) + (self.limits.output or 0.0)
        return limit if limit < 1 else None

    def observe(self, outcome: Outcome, *, candidate: bool = True) -> None:
        """Adds a finished request of the version that serves. One of the version before, which was on its way
        at the swap, says nothing."""
        if not candidate:
            return
        self.candidate.add(outcome)
        for name, bad in (("errors", outcome.failed), ("output", outcome.violated)):
            if bad and len(self._failing[name]) < KEYS:
                self._failing[name].add(outcome.key)
        if outcome.repeated or not (outcome.failed and self._alone):
            self._add("errors", float(outcome.failed))
        if not outcome.failed:
            self._add("output", float(outcome.violated))
            limit = self._limits.get("latency")
            if limit is not None:
                self._add("latency", float(outcome.seconds > limit))

    def _add(self, name: str, value: float) -> None:
        bet = self._bets.get(name)
        if bet is None:
            return
        values = self._open[name]
        values.append(value)
        if len(values) >= self._sizes[name]:
            null = 0.5 if name == "latency" else self._limits[name]
            assert null is not None
            bet.observe(sum(values) / len(values) - null)
            values.clear()

    def end_block(self) -> None:
        """Nothing waits here: incomplete means are not looked at."""

    @property
    def breached(self) -> str | None:
        """The first guard whose evidence has ever reached its bound, or None."""
        for name, bet in self._bets.items():
            enough = name not in self._failing or len(self._failing[name]) >= KEYS
            if bet.peak >= self._bounds[name] and enough:
                return name
        return None

    def verdict(self) -> Verdict:
        shown: dict[str, Any] = {}
        for name, bound in self._bounds.items():
            bet = self._bets.get(name)
            candidate, service = self._measured(name)
            shown[name] = {
                "candidate": candidate,
                "service": service,
                "allowed": getattr(self.limits, name),
                "limit": self._limit_shown(name),
                "evidence": 1.0 if bet is None else round(min(bet.peak, 1e9), 3),
                "bound": round(bound, 1),
            }
        evidence = {
            "test": "betting e-process against an upper bound",
            "reference": "before",
            "candidate": self.candidate.to_json(),
            "service": self._service(),
            "guards": shown,
        }
        return Verdict(self.breached, evidence)

    def _service(self) -> dict[str, Any]:
        before = self.before
        shown: dict[str, Any] = {
            "requests": before.requests,
            "errors": before.failures,
            "output_violations": before.violations,
        }
        return shown if before.median is None else {**shown, "median_seconds": round(before.median, 6)}

    def _limit_shown(self, name: str) -> float | None:
        limit = self._limits[name]
        return None if limit is None else round(limit, 6)

    def _measured(self, name: str) -> tuple[str, str]:
        """Both versions as text for people."""
        arm, before = self.candidate, self.before
        if name == "latency":
            shown = arm.to_json().get("median_seconds")
            return tuple(
                "no answer" if seconds is None else f"{seconds * 1000:.2f} ms"
                for seconds in (shown, before.median)
            )  # type: ignore[return-value]
        if name == "errors":
            return f"{arm.failures} of {arm.requests}", f"{before.failures} of {before.requests}"
        answered = arm.requests - arm.failures
        return f"{arm.violations} of {answered}", f"{before.violations} of {before.checked}"


def _against(limit: float) -> Bet:
    """Bets against "the rate is at most `limit`". The stake that fits a rate q is (q - limit) / (limit (1 -
    limit)); the bets of several rates are averaged."""
    stakes = []
    for excess, weight in EXCESSES:
        rate = min(limit + excess, (1 + limit) / 2)
        stakes.append(((rate - limit) / (limit * (1 - limit)), weight))
    return Bet.of(stakes)
