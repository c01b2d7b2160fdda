"""The order in which idle models are evicted when memory is needed. Pure: reads accounts, changes nothing.

A policy maps an account and the current time to a sort key; the smallest key is evicted first. Under every
policy, a version that only lingers after a swap is evicted before all others.

`gdsf` (Greedy Dual Size Frequency, the default) keeps models that are expensive to miss: requests per unit of
time × measured load seconds ÷ bytes. Requests count with a half-life, so a formerly hot model ages, and a
scan over many models does not evict a hot one. The counts outlive an eviction, so a model that becomes hot
is recognised although it was evicted between its requests. `lru` uses only the time of the last use.
`tests/bench/bench_eviction.py` compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

#: A model is not evicted for as long as its load took, but not for longer than this, in seconds.
MIN_RESIDENCY: Final = 0.1
#: The half-life of a request, in seconds: long enough to know models with a few requests a minute, and short
#: enough to follow callers who move on to other models.
HALF_LIFE: Final = 60.0
#: Shorter loads, in seconds, count as this long.
SHORTEST_LOAD: Final = 0.01


class Candidate(Protocol):
    """The facts that a policy may use. `last_used`: in the clock's seconds. `uses`: the requests with their
    half-life as of `last_used`. `load_seconds`: the measured time of the load."""

    @property
    def lingering(self) -> bool: ...

    @property
    def last_used(self) -> float: ...

    @property
    def bytes(self) -> int: ...

    @property
    def uses(self) -> float: ...

    @property
    def load_seconds(self) -> float: ...


Policy = Callable[[Candidate, float], Any]


def decayed(uses: float, seconds: float) -> float:
    """The value of `uses` after `seconds`."""
    return float(uses * 0.5 ** (seconds / HALF_LIFE)) if seconds > 0 else uses


def value(account: Candidate, now: float) -> float:
    """The value per byte: the load seconds that the requests of a half-life would have to wait."""
    uses = decayed(account.uses, now - account.last_used)
    return uses * max(account.load_seconds, SHORTEST_LOAD) / max(account.bytes, 1)


def gdsf(account: Candidate, now: float) -> tuple[bool, float, float]:
    """Lingering versions first, then by the value per byte, then by the time of the last use."""
    return (not account.lingering, value(account, now), account.last_used)


def lru(account: Candidate, now: float) -> tuple[bool, float]:
    """Lingering versions first, then by the time of the last use."""
    return (not account.lingering, account.last_used)


POLICIES: Final[dict[str, Policy]] = {"gdsf": gdsf, "lru": lru}


def reason(account: Candidate, now: float, among: str) -> str:
    """Why this one, for an operator. `among`: for example `12 idle`."""
    if account.lingering:
        return "it was replaced and only kept for a rollback"
    uses = decayed(account.uses, now - account.last_used)
    return (
        f"least valuable of {among}: last used {now - account.last_used:.1f} s ago, "
        f"{uses:.1f} recent requests × {account.load_seconds:.2f} s to load ÷ {account.bytes / 1e6:.1f} MB"
    )
