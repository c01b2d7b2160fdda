"""A model's load in a ledger, as the manager does it, without a process."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

from gateway.serving.ledger import Ledger

K = TypeVar("K", bound=Hashable)


def load(ledger: Ledger[K], key: K, size: int, seconds: float, now: float, name: Hashable = None) -> list[K]:
    """Makes room for an account and opens it with a lease. `size`: its bytes. `seconds`: how long it loads.
    Returns the evicted accounts. Raises AssertionError if there is no room."""
    evicted: list[K] = []
    ledger.open(key, now, name)
    ledger.lease(key)
    ledger.ask(key, size)
    while key not in (plan := ledger.plan(now)).grant:
        assert plan.evict, plan
        for victim in plan.evict:
            ledger.begin_close(victim)
            ledger.closed(victim)
        evicted += plan.evict
    ledger.grant(key)
    ledger.loaded(key, now, None, seconds)
    return evicted
