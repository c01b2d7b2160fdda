"""Who goes first: the policies as tables, and a hot model under a scan."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from gateway.serving.eviction import HALF_LIFE, POLICIES, Policy, decayed, gdsf, lru
from gateway.serving.ledger import Ledger
from tests.support.ledgers import load

MB = 1_000_000
NOW = 1000.0


@dataclass(frozen=True)
class Idle:
    """An account as a policy sees it."""

    bytes: int = 10 * MB
    uses: float = 10.0
    load_seconds: float = 1.0
    last_used: float = NOW
    lingering: bool = False


@pytest.mark.parametrize(
    ("goes", "stays"),
    [
        pytest.param(Idle(uses=1), Idle(uses=100), id="asked seldom"),
        pytest.param(Idle(bytes=100 * MB), Idle(bytes=10 * MB), id="large"),
        pytest.param(Idle(load_seconds=0.05), Idle(load_seconds=30), id="quick to load"),
        pytest.param(Idle(uses=1000, last_used=NOW - 20 * HALF_LIFE), Idle(uses=2), id="hot long ago"),
        pytest.param(Idle(last_used=NOW - 1), Idle(uses=decayed(10, 1)), id="a tie"),
        pytest.param(Idle(uses=1e6, lingering=True), Idle(uses=0), id="kept for a rollback"),
        pytest.param(Idle(uses=3), Idle(uses=500, last_used=NOW - 30), id="a scan, not the hot one"),
    ],
)  # fmt: skip
def test_gdsf(goes: Idle, stays: Idle) -> None:
    assert gdsf(goes, NOW) < gdsf(stays, NOW)


def test_lru() -> None:
    old, new = Idle(uses=1e6, last_used=NOW - 5), Idle(uses=0)
    assert lru(old, NOW) < lru(new, NOW)
    assert lru(replace(new, lingering=True), NOW) < lru(old, NOW)


def test_a_request_counts_half_after_its_half_life() -> None:
    assert decayed(8, HALF_LIFE) == 4
    assert decayed(8, 0) == 8


def evictions_of_the_hot_one(policy: Policy) -> int:
    """Thirty seconds: a 9 MB model at 50 requests/s, and six 70 MB models in turn, three at a time, in room
    for it and two of them."""
    ledger: Ledger[str] = Ledger(9 * MB + 2 * 70 * MB, policy=policy)
    sizes = {"hot": 9 * MB} | {f"scan{n}": 70 * MB for n in range(6)}
    evicted = 0

    def use(key: str, now: float) -> None:
        nonlocal evicted
        if key in ledger:
            ledger.lease(key)
        else:
            evicted += load(ledger, key, sizes[key], 0.3, now).count("hot")
        ledger.release(key, now)
        ledger.check()

    for tick in range(30 * 50):
        now = tick / 50
        # Just before the next request the hot one is the least recently used.
        if tick % 50 == 49:
            for n in range(3):
                use(f"scan{(tick // 50 * 3 + n) % 6}", now + 0.015 + n / 1000)
        use("hot", now)
    return evicted


def test_a_scan_does_not_push_out_the_hot_model() -> None:
    assert evictions_of_the_hot_one(gdsf) == 0
    assert evictions_of_the_hot_one(lru) > 0, "the trace is one that the simple policy fails"


def test_requests_count_also_after_an_eviction() -> None:
    """Room for two. Callers leave the two hot models for two others: these soon both stay."""
    ledger: Ledger[tuple[str, int]] = Ledger(20 * MB)
    loads = 0

    def use(name: str, now: float) -> None:
        nonlocal loads
        resident = {account.key for account in ledger}
        key = next((key for key in resident if key[0] == name), (name, loads))
        if key in ledger:
            ledger.lease(key)
        else:
            loads += 1
            load(ledger, key, 10 * MB, 0.3, now, name)
        ledger.release(key, now)
        ledger.check()

    for second in range(100):
        use("a", second)
        use("b", second)
    assert loads == 2
    for second in range(100, 400):
        use("cd"[second % 2], second)
    assert {account.name for account in ledger} == {"c", "d"}
    assert loads < 100


def test_requests_count_although_the_memory_is_not_free_yet() -> None:
    ledger: Ledger[str] = Ledger(20 * MB)
    ledger.open("first", 0.0, "a")
    ledger.ask("first", 10 * MB)
    ledger.grant("first")
    ledger.loaded("first", 0.0)
    for _ in range(9):
        ledger.lease("first")
        ledger.release("first", 0.0)
    ledger.begin_close("first")
    assert ledger.open("second", 0.0, "a").uses == 9.0
    ledger.closed("first")
    ledger.drop("second")  # its load failed
    assert ledger.open("third", 0.0, "a").uses == 9.0


def test_each_policy_has_a_name() -> None:
    assert set(POLICIES) == {"gdsf", "lru"}
