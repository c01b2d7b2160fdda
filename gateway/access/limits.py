"""Limits per team and per token: requests and rows per second, and requests at once.

A rate is a bucket that fills steadily and holds one second's worth, at least one request. Rows are known only
after a body was read, so a request with more rows than the bucket holds passes when the bucket is not empty,
and the following ones wait until it is filled again. Knows numbers; must not know requests. Only the event
loop uses it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from gateway.errors import Problem, overloaded

if TYPE_CHECKING:
    from gateway.credentials import Limit

#: A refused request may try again after this time, in seconds, if only others' ends make room.
SOON = 1.0


class _Bucket:
    """`rate` per second; None: no limit."""

    __slots__ = ("_at", "_clock", "_filled", "_holds", "rate")

    def __init__(self, rate: float | None, clock: Callable[[], float]) -> None:
        self.rate = rate
        self._clock = clock
        self._holds = self._filled = max(1.0, rate or 0.0)
        self._at = clock()

    def wait(self, least: float) -> float:
        """The seconds until the bucket holds `least`; 0: it does."""
        if self.rate is None:
            return 0.0
        now = self._clock()
        self._filled = min(self._holds, self._filled + (now - self._at) * self.rate)
        self._at = now
        return max(0.0, (least - self._filled) / self.rate)

    def take(self, count: float) -> None:
        self._filled -= count


class Quota:
    """What one team or one token may use, together. `whose`: for messages."""

    def __init__(self, whose: str, limit: Limit, clock: Callable[[], float] = time.monotonic) -> None:
        self._whose = whose
        self._concurrency = limit.concurrency
        self._requests = _Bucket(limit.requests_per_second, clock)
        self._rows = _Bucket(limit.rows_per_second, clock)
        self.running = 0

    def check(self) -> None:
        """Raises OVERLOADED if another request may not enter now."""
        if self._concurrency is not None and self.running >= self._concurrency:
            raise self._refusal(f"{self._concurrency} requests at once", SOON)
        if (wait := self._requests.wait(1.0)) > 0:
            raise self._refusal(f"{self._requests.rate:g} requests per second", wait)
        # Any rows may follow while the bucket is not in debt.
        if (wait := self._rows.wait(0.0)) > 0:
            raise self._refusal(f"{self._rows.rate:g} rows per second", wait)

    def enter(self) -> None:
        """A request enters; `leave` follows."""
        self.running += 1
        self._requests.take(1.0)

    def leave(self) -> None:
        self.running -= 1

    def rows(self, count: int) -> None:
        """The request has so many rows."""
        self._rows.take(float(count))

    def _refusal(self, what: str, wait: float) -> Problem:
        return overloaded(self._whose, f"its limit is {what}", wait, "wait for the time in Retry-After")


class Limits:
    """The quotas of the settings. They outlive a change of the tokens file."""

    def __init__(self, limits: Mapping[str, Limit], clock: Callable[[], float] = time.monotonic) -> None:
        self._quotas = {
            name: Quota(name if name.startswith("token:") else f"the team {name}", limit, clock)
            for name, limit in limits.items()
        }

    def of(self, team: str, caller: str) -> tuple[Quota, ...]:
        """The quotas that a caller shares: its team's, and its token's (`caller`: `token:NAME`)."""
        # Other callers may be called like a team: `admin`.
        names = (team, caller if caller.startswith("token:") else "")
        return tuple(self._quotas[name] for name in names if name in self._quotas)


def enter(quotas: tuple[Quota, ...]) -> None:
    """A request enters all of them, or none. Raises OVERLOADED."""
    for quota in quotas:
        quota.check()
    for quota in quotas:
        quota.enter()
