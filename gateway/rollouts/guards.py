"""Guards of a rollout: is the candidate worse than the version in service, and how sure is that?

A guard watches one measure (errors, latency, output violations, disagreement) and keeps an *e-process*: a
number that starts at 1, and that stays small as long as the candidate is within the allowed excess. It may be
looked at after every request: the probability that it ever reaches 1/alpha is at most alpha (Ville's
inequality). The bets are those of Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
betting" (JRSS B, 2024), averaged over fixed stakes, so there is nothing to tune.

How arms are compared "on the same minutes": finished requests are collected in blocks of a fixed number. In a
block, each candidate request is put into a group with requests of the version in service, drawn at random.
Which arm a request belongs to is decided by a hash, independent of its content. So if both versions are
equal, the candidate's request is equally likely to be any member of its group, whatever the load or the error
rate does meanwhile. A group is one bet.

Too little data is never a pass: `breached` is then None, and the caller also requires a number of requests.

Pure: numbers in, verdicts out. Knows no clock, registry, process or HTTP.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median_high
from typing import Any, Final

ALPHA: Final = 0.01
"""The probability that an identical version is rolled back, over all guards of a rollout together."""

STAKES: Final = (0.12, 0.35, 0.7, 0.98)
"""Fractions of the largest stake that cannot lose everything. A small one finds a small excess slowly, a
large one a large excess fast; the average of all is never far from the best."""

WEIGHTS: Final = {"errors": 5.0, "latency": 2.0, "output": 2.0, "disagreement": 1.0}
"""How ALPHA is divided among the active guards. Errors get the largest part, because users notice them."""

SUSPICION: Final = 4.0
"""From this evidence on, a step does not end with a pass: it waits until the guard knows more. In simulations
of 400 canaries each, 0 to 1.5 % of the identical versions had so much when a step ended."""

BLOCK: Final = 64
"""The fewest requests of both arms that are grouped at once."""

KEYS: Final = 3
"""Failures of fewer distinct callers do not roll a version back. Otherwise, with a canary by user, one caller
whose requests no version can answer would decide."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One finished request. `seconds`: the duration of the model's call. `key`: the caller's canary key.
    `repeated`: it failed, and the other version then answered it."""

    failed: bool
    seconds: float
    violated: bool = False
    key: str = ""
    repeated: bool = False


class Bet:
    """An e-process against "the mean of the observations is at most 0".

    Observations are in [`-lowest`, …) and are given one by one. `evidence` is the current e-value, `peak` the
    largest one so far.
    """

    __slots__ = ("_logs", "_stakes", "_weights", "peak")

    def __init__(self, lowest: float) -> None:
        self._stakes = [fraction / lowest for fraction in STAKES]
        self._weights = [1 / len(STAKES)] * len(STAKES)
        self._logs = [0.0] * len(STAKES)
        self.peak = 1.0

    @classmethod
    def of(cls, stakes: Sequence[tuple[float, float]]) -> Bet:
        """Bets with other stakes, each with its weight; the weights add up to 1."""
        bet = cls(1.0)
        bet._stakes = [stake for stake, _ in stakes]
        bet._weights = [weight for _, weight in stakes]
        bet._logs = [0.0] * len(stakes)
        return bet

    def observe(self, value: float) -> None:
        logs = self._logs
        for index, stake in enumerate(self._stakes):
            logs[index] += math.log1p(stake * value)
        self.peak = max(self.peak, self.evidence)

    @property
    def evidence(self) -> float:
        most = max(self._logs)
        if most > 500.0:
            return math.inf
        return sum(weight * math.exp(log) for weight, log in zip(self._weights, self._logs, strict=True))


@dataclass(slots=True)
class Arm:
    """The counts of one arm that a verdict shows to people."""

    requests: int = 0
    failures: int = 0
    violations: int = 0
    seconds: list[float] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.requests += 1
        self.failures += outcome.failed
        self.violations += outcome.violated
        if not outcome.failed:
            if len(self.seconds) == 512:  # the newest suffice for the median that is shown
                del self.seconds[:256]
            self.seconds.append(outcome.seconds)

    def to_json(self) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "requests": self.requests,
            "errors": self.failures,
            "output_violations": self.violations,
        }
        if self.seconds:
            shown["median_seconds"] = round(median_high(self.seconds), 6)
        return shown


@dataclass(frozen=True, slots=True)
class Verdict:
    """`breached`: the guard that found the candidate worse, or None. `evidence` is JSON-ready: counts, rates,
    the bound, the test, and the reference."""

    breached: str | None
    evidence: dict[str, Any]

    def __str__(self) -> str:
        if self.breached is None:
            return "no guard found a difference"
        found = self.evidence["guards"][self.breached]
        return f"{self.breached}: {found['candidate']} against {found['service']}, allowed {found['allowed']}"


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of the policy; None switches a guard off.

    `errors`, `output`: the allowed excess of the rate (0.01: one more failure per hundred requests).
    `latency`: the allowed ratio of the median call times. `disagreement`: the allowed rate of differing
    shadow answers.
    """

    errors: float | None = 0.01
    latency: float | None = 1.25
    output: float | None = 0.01
    disagreement: float | None = None

    def active(self) -> list[str]:
        return [
            name
            for name in ("errors", "latency", "output", "disagreement")
            if getattr(self, name) is not None
        ]


class Guards:
    """The guards of one step of a rollout.

    `share`: the fraction of requests that the candidate gets, 0 < share < 1; it determines the size of a
    block. `reference`: `same minutes` or `before`, named in the evidence.
    """

    def __init__(
        self,
        limits: Limits,
        share: float,
        *,
        alpha: float = ALPHA,
        reference: str = "same minutes",
        seed: int = 0,
    ) -> None:
        self.limits = limits
        self.reference = reference
        self.candidate, self.service = Arm(), Arm()
        active = limits.active()
        total = sum(WEIGHTS[name] for name in active)
        self._bounds = {name: total / (WEIGHTS[name] * alpha) for name in active}
        self._size = max(BLOCK, math.ceil(2.0 / min(max(share, 0.001), 0.999)))
        self._block: list[tuple[bool, Outcome]] = []
        self._random = random.Random(seed)
        self._failing: dict[str, set[str]] = {"errors": set(), "output": set()}
        self._agreed = self._compared = 0
        self._bets: dict[str, Bet] = {}
        for name in active:
            limit = getattr(limits, name)
            if name == "latency":
                self._bets[name] = Bet(0.5)
            elif name == "disagreement":
                self._bets[name] = Bet(limit)
            else:
                self._bets[name] = Bet(1.0 + limit)

    def observe(self, outcome: Outcome, *, candidate: bool) -> None:
        """Adds a finished request of either arm, in the order in which the requests finished."""
        (self.candidate if candidate else self.service).add(outcome)
        if candidate:
            for name, bad in (("errors", outcome.failed), ("output", outcome.violated)):
                if bad and len(self._failing[name]) < KEYS:
                    self._failing[name].add(outcome.key)
        self._block.append((candidate, outcome))
        if len(self._block) >= self._size:
            self.end_block()

    def compare(self, agreed: bool) -> None:
        """Adds one request that both versions answered (a shadow or a replay)."""
        self._compared += 1
        self._agreed += agreed
        bet = self._bets.get("disagreement")
        if bet is not None and self.limits.disagreement is not None:
            bet.observe((0.0 if agreed else 1.0) - self.limits.disagreement)

    @property
    def agreement(self) -> float | None:
        """The share of compared requests whose answers agreed; None if none was compared."""
        return self._agreed / self._compared if self._compared else None

    @property
    def breached(self) -> str | None:
        """The first guard whose evidence has ever reached its bound, or None. Cheap enough for every
        request."""
        for name, bet in self._bets.items():
            if bet.peak >= self._bounds[name] and self._enough_callers(name):
                return name
        return None

    def suspected(self) -> str | None:
        """The guard that is closest to its bound, in words, if there is strong evidence but no proof; else
        None."""
        near = [
            (bet.evidence / self._bounds[name], name)
            for name, bet in self._bets.items()
            if bet.evidence >= SUSPICION and self._enough_callers(name)
        ]
        if not near:
            return None
        share, name = max(near)
        candidate, service = self._measured(name)
        bound = self._bounds[name]
        return (
            f"{name}: {candidate} against {service}, allowed {getattr(self.limits, name)}: "
            f"evidence {share * bound:.0f}, proved from {bound:.0f}"
        )

    def verdict(self) -> Verdict:
        shown: dict[str, Any] = {}
        for name, bet in self._bets.items():
            candidate, service = self._measured(name)
            shown[name] = {
                "candidate": candidate,
                "service": service,
                "allowed": getattr(self.limits, name),
                "evidence": round(bet.peak, 3) if bet.peak < 1e9 else 1e9,
                "bound": round(self._bounds[name], 1),
            }
        evidence: dict[str, Any] = {
            "test": "betting e-process",
            "reference": self.reference,
            "candidate": self.candidate.to_json(),
            "service": self.service.to_json(),
            "guards": shown,
        }
        if self._compared:
            evidence["compared"] = self._compared
            evidence["agreement"] = self._agreed / self._compared
        return Verdict(self.breached, evidence)

    def _enough_callers(self, name: str) -> bool:
        return name not in self._failing or len(self._failing[name]) >= KEYS

    def _measured(self, name: str) -> tuple[str, str]:
        """Both arms as text for people, such as `12 of 230` and `3 of 4410`."""
        if name == "disagreement":
            return f"{self._compared - self._agreed} of {self._compared} differ", "0"
        if name == "latency":
            return tuple(
                f"{median_high(arm.seconds) * 1000:.2f} ms" if arm.seconds else "no answer"
                for arm in (self.candidate, self.service)
            )  # type: ignore[return-value]
        counted = "failures" if name == "errors" else "violations"
        return tuple(f"{getattr(arm, counted)} of {arm.requests}" for arm in (self.candidate, self.service))  # type: ignore[return-value]

    def end_block(self) -> None:
        """Ends the block and bets on its groups: as many as the smaller arm has requests, drawn at random.

        Called when a block is full. With little traffic the caller also calls it by time, but never depending
        on the answers.
        """
        block, self._block = self._block, []
        candidates = [outcome for candidate, outcome in block if candidate]
        service = [outcome for candidate, outcome in block if not candidate]
        groups = min(len(candidates), len(service))
        if not groups:
            return
        self._random.shuffle(candidates)
        self._random.shuffle(service)
        for index in range(groups):
            self._bet(candidates[index::groups], service[index::groups])

    def _bet(self, candidates: Sequence[Outcome], service: Sequence[Outcome]) -> None:
        limits, bets = self.limits, self._bets
        if limits.errors is not None:
            excess = _rate(one.failed for one in candidates) - _rate(one.failed for one in service)
            bets["errors"].observe(excess - limits.errors)
        if limits.output is not None:
            excess = _rate(one.violated for one in candidates) - _rate(one.violated for one in service)
            bets["output"].observe(excess - limits.output)
        if limits.latency is not None:
            fast = [one.seconds for one in service if not one.failed]
            slow = [one.seconds for one in candidates if not one.failed]
            if fast and slow:
                # If the candidate is slower by exactly the allowed ratio, its rank in the group is uniform:
                # it exceeds the upper median of k with probability (k - k // 2) / (k + 1).
                expected = (len(fast) - len(fast) // 2) / (len(fast) + 1)
                exceeds = slow[0] > limits.latency * median_high(fast)
                bets["latency"].observe((1.0 if exceeds else 0.0) - expected)


def _rate(bad: Iterable[bool]) -> float:
    values = list(bad)
    return sum(values) / len(values)
