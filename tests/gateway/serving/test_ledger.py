"""The ledger: its rules one by one, then a seeded random walk with the books checked after each step."""

from __future__ import annotations

import random

import pytest

from gateway.serving.eviction import Candidate
from gateway.serving.ledger import LOOKED_AT, SHORTEST_TURN, AccountState, K, Ledger, Plan

MB = 1_000_000


def resident(ledger: Ledger[K], key: K, size: int, now: float = 0.0) -> None:
    ledger.open(key, now)
    ledger.ask(key, size)
    assert key in ledger.plan(now).grant
    ledger.grant(key)
    ledger.loaded(key, now)


def test_a_request_that_fits_is_granted() -> None:
    ledger = Ledger(100)
    ledger.open("a", 0)
    assert not ledger.ask("a", 60)
    assert ledger.plan(0) == Plan(grant=("a",))
    ledger.grant("a")
    assert ledger.bytes_in(AccountState.RESERVED) == 60


def test_the_least_valuable_goes_first_and_the_plan_says_why() -> None:
    ledger = Ledger(100)
    for key in ("a", "b"):
        resident(ledger, key, 50)
    ledger.lease("a")
    ledger.release("a", 5.0)
    ledger.open("c", 6.0)
    ledger.ask("c", 50)
    plan = ledger.plan(6.0)
    assert (plan.evict, plan.asking) == (("b",), "c")
    assert "least valuable of 2 idle" in plan.why[0]


def test_what_lingers_goes_before_what_is_older() -> None:
    ledger = Ledger(100)
    resident(ledger, "old", 50, now=0.0)
    resident(ledger, "replaced", 50, now=9.0)
    ledger["replaced"].lingering = True
    ledger.open("c", 10.0)
    ledger.ask("c", 50)
    assert ledger.plan(10.0).evict == ("replaced",)


@pytest.mark.parametrize("hold", ["lease", "pin"])
def test_what_is_leased_or_pinned_never_goes(hold: str) -> None:
    ledger = Ledger(100)
    resident(ledger, "a", 100)
    getattr(ledger, hold)("a")
    ledger.open("b", 1.0)
    ledger.lease("b")
    ledger.ask("b", 10)
    plan = ledger.plan(1.0)
    assert (plan.evict, plan.drain) == ((), ())


def test_memory_being_freed_is_not_free() -> None:
    ledger = Ledger(100)
    resident(ledger, "a", 100)
    ledger.open("b", 1.0)
    ledger.ask("b", 100)
    assert ledger.plan(1.0).evict == ("a",)
    ledger.begin_close("a")
    assert ledger.plan(1.0) == Plan(), "closing covers the need: no other model goes, nothing is granted yet"
    ledger.closed("a")
    assert ledger.plan(1.0).grant == ("b",)


def test_what_an_alias_serves_does_not_go_for_an_unwanted_load() -> None:
    ledger = Ledger(100)
    resident(ledger, "served", 100)
    ledger["served"].serving = True
    ledger.open("unwanted", 1.0)
    ledger.ask("unwanted", 50)
    assert ledger.plan(1.0) == Plan(end=("unwanted",))
    ledger.lease("unwanted")
    assert ledger.plan(1.0).evict == ("served",)


def test_a_load_that_nothing_needs_waits_for_a_model_that_is_young() -> None:
    ledger = Ledger(100, min_residency=5.0)
    resident(ledger, "young", 80, now=10.0)
    for key, size in (("unneeded", 50), ("small", 20)):
        ledger.open(key, 11.0)
        ledger.ask(key, size)
    assert ledger.plan(11.0) == Plan(grant=("small",), retry_at=15.0)
    ledger["unneeded"].draining = True
    assert ledger.plan(15.0).end == ()


def test_a_load_that_nothing_needs_does_not_keep_others_waiting() -> None:
    ledger = Ledger(100)
    resident(ledger, "served", 60)
    ledger["served"].serving = True
    for key, size in (("unwanted", 80), ("small", 10), ("wanted", 80)):
        ledger.open(key, 1.0)
        ledger.ask(key, size)
    ledger.lease("wanted")
    plan = ledger.plan(1.0)
    assert (plan.end, plan.grant) == (("unwanted",), ("small",))
    assert (plan.evict, plan.asking) == (("served",), "wanted")
    ledger.begin_close("served")
    assert ledger.plan(1.0).end == (), "enough memory is being freed for it"


def busy(limit: int = 100) -> Ledger[str]:
    """Two models of 50 that are in use, loaded at 0 in 0.1 s, and a request that waits for a third."""
    ledger: Ledger[str] = Ledger(limit, shortest_turn=2.0)
    for key in ("a", "b"):
        resident(ledger, key, 50)
        ledger.lease(key)
    ledger["b"].load_seconds = 10.0
    ledger.open("c", 1.0)
    ledger.lease("c")
    ledger.ask("c", 50)
    return ledger


def test_busy_models_share_the_room_by_turns() -> None:
    ledger = busy()
    assert ledger.plan(1.0) == Plan(retry_at=2.0)
    plan = ledger.plan(2.0)
    assert (plan.drain, plan.evict, plan.asking) == (("a",), (), "c")
    ledger["a"].draining = True
    assert ledger.plan(2.1).drain == (), "what drains already will do"


@pytest.mark.parametrize("spared", ["pinned", "wanted by nobody", "its turn is not over"])
def test_a_busy_model_does_not_drain(spared: str) -> None:
    ledger = busy()
    if spared == "pinned":
        ledger.pin("a")
    elif spared == "wanted by nobody":
        ledger.release("c", 1.0)
    else:
        ledger["a"].load_seconds = 10.0
    assert ledger.plan(40.0).drain == ()


def test_what_can_never_fit_is_refused() -> None:
    ledger = Ledger(100)
    ledger.open("a", 0)
    ledger.ask("a", 101)
    assert ledger.plan(0).refuse == ("a",)


def test_no_load_overtakes_the_first_that_waits() -> None:
    ledger = Ledger(100)
    resident(ledger, "a", 60)
    ledger.lease("a")
    for key, size in (("large", 80), ("small", 10)):
        ledger.open(key, 1.0)
        ledger.lease(key)
        ledger.ask(key, size)
    plan = ledger.plan(1.0)
    assert (plan.grant, plan.evict, plan.drain) == ((), (), ())


def test_the_young_stay_and_the_plan_says_when_to_ask_again() -> None:
    ledger = Ledger(100, min_residency=5.0)
    resident(ledger, "a", 100, now=10.0)
    ledger.open("b", 11.0)
    ledger.lease("b")
    ledger.ask("b", 50)
    assert ledger.plan(11.0) == Plan(retry_at=15.0)
    assert ledger.plan(15.0).evict == ("a",)


def test_a_model_that_loads_quickly_is_young_for_a_short_time() -> None:
    ledger = Ledger(100, min_residency=5.0)
    ledger.open("a", 10.0)
    ledger.ask("a", 100)
    ledger.grant("a")
    ledger.loaded("a", 10.0, load_seconds=0.25)
    ledger.open("b", 10.0)
    ledger.lease("b")
    ledger.ask("b", 50)
    assert ledger.plan(10.0) == Plan(retry_at=10.25)
    assert ledger.plan(10.25).evict == ("a",)


def test_nothing_is_evicted_when_it_would_not_be_enough() -> None:
    ledger = Ledger(100)
    resident(ledger, "a", 30)
    resident(ledger, "b", 70)
    ledger.lease("b")
    ledger.open("c", 1.0)
    ledger.lease("c")
    ledger.ask("c", 90)
    assert ledger.plan(1.0) == Plan(retry_at=SHORTEST_TURN)


def test_of_many_models_only_some_are_compared_and_one_of_the_least_valuable_goes() -> None:
    compared: list[int] = []

    def by_number(account: Candidate, now: float) -> int:
        compared.append(0)
        return account.key  # type: ignore[attr-defined,no-any-return]

    many = 20 * LOOKED_AT
    ledger: Ledger[int] = Ledger(many, policy=by_number)
    for key in range(many):
        resident(ledger, key, 1)
    gone = []
    for key in range(many, many + 50):
        ledger.open(key, 1.0)
        ledger.lease(key)
        ledger.ask(key, 1)
        (victim,) = ledger.plan(1.0).evict
        gone.append(victim)
        ledger.begin_close(victim)
        ledger.closed(victim)
        ledger.grant(key)
    assert len(compared) <= 50 * LOOKED_AT
    assert sorted(gone)[25] < many * 0.02, "the median is among the two least valuable of a hundred"


def test_of_many_models_those_that_linger_and_the_only_idle_one_are_found() -> None:
    many = 5 * LOOKED_AT
    ledger: Ledger[int] = Ledger(many)
    for key in range(many):
        resident(ledger, key, 1)
        ledger.lease(key)
    ledger.open(many, 1.0)
    ledger.lease(many)
    ledger.ask(many, 1)
    ledger.release(7, 1.0)
    assert ledger.plan(1.0).evict == (7,)
    for key in range(many):
        if key != 7:
            ledger.release(key, 1.0)
    ledger[11].lingering = True
    assert ledger.plan(1.0).evict == (11,)


def test_a_measurement_gives_back_or_asks_for_more() -> None:
    ledger = Ledger(100)
    ledger.open("a", 0)
    ledger.ask("a", 60)
    ledger.grant("a")
    ledger.loaded("a", 0, measured=20)
    assert ledger.accounted == 20
    assert not ledger.ask("a", 90)
    assert ledger.plan(0).grant == ("a",)
    ledger.grant("a")
    assert ledger.bytes_in(AccountState.RESIDENT) == 90
    ledger.check()


def test_wrong_use_is_an_error() -> None:
    ledger = Ledger(100)
    resident(ledger, "a", 50)
    ledger.lease("a")
    with pytest.raises(ValueError, match="leased"):
        ledger.begin_close("a")
    ledger.release("a", 1.0)
    with pytest.raises(ValueError, match="no lease"):
        ledger.release("a", 1.0)
    ledger.begin_close("a")
    with pytest.raises(ValueError, match="closing"):
        ledger.lease("a")


def test_what_belongs_to_no_model_is_counted_and_makes_others_go() -> None:
    ledger = Ledger(100)
    resident(ledger, "a", 50)
    resident(ledger, "b", 40, now=1.0)
    ledger.share(30)
    assert ledger.accounted == 100
    assert ledger.bytes_in(AccountState.RESIDENT) == 100
    assert ledger.plan(2.0)[:4] == ((), ("a",), (), None)
    ledger.begin_close("a")
    ledger.closed("a")
    assert ledger.shared == 30
    assert ledger.accounted == 70
    assert ledger.uncounted == 0


def test_a_small_limit_keeps_half_of_it_for_models_and_tells_what_is_not_counted() -> None:
    ledger = Ledger(100)
    resident(ledger, "b", 40)
    ledger.share(90)
    assert ledger.accounted == 90
    assert ledger.accounted + ledger.uncounted == 40 + 90, "never less than is resident"
    assert ledger.excess == 40
    assert ledger.plan(2.0)[:4] == ((), (), (), None)


def test_a_large_limit_counts_all_that_belongs_to_no_model() -> None:
    ledger = Ledger(188 * MB)
    resident(ledger, "a", 30 * MB)
    resident(ledger, "b", 20 * MB, now=1.0)
    ledger.share(150 * MB)
    assert ledger.accounted == 188 * MB
    assert ledger.uncounted == 12 * MB, "until there is room"
    assert ledger.excess == 0, "the limit is high enough"
    assert ledger.plan(2.0).evict == ("a",)
    ledger.begin_close("a")
    ledger.closed("a")
    assert (ledger.accounted, ledger.uncounted) == (170 * MB, 0)


def test_a_load_that_does_not_fit_next_to_what_belongs_to_no_model_is_refused_at_once() -> None:
    ledger = Ledger(188 * MB)
    resident(ledger, "a", 10 * MB)
    ledger.share(150 * MB)
    ledger.open("b", 1.0)
    ledger.ask("b", 40 * MB)
    assert ledger.plan(2.0)[:4] == ((), (), ("b",), None)
    ledger.ask("b", 30 * MB)
    assert ledger.plan(2.0).evict == ("a",)


def test_nothing_is_granted_while_what_belongs_to_no_model_is_not_counted() -> None:
    ledger = Ledger(188 * MB)
    resident(ledger, "a", 60 * MB)
    ledger.lease("a")
    ledger.share(150 * MB)
    ledger.open("b", 1.0)
    ledger.lease("b")
    ledger.ask("b", 1 * MB)
    assert ledger.plan(1.0).grant == ()
    drained = ledger.plan(100.0)
    assert (drained.grant, drained.drain) == ((), ("a",)), "a busy model gives way in its turn"


def test_its_repr_tells_the_story() -> None:
    ledger = Ledger(100 * MB)
    resident(ledger, "a", 61 * MB)
    assert repr(ledger) == "<Ledger 1 resident, 0 loading, 0 closing | 61/100 MB>"


def test_promise_7_random_walk_keeps_the_books() -> None:
    """Accounted bytes never pass the limit and a leased model never goes, over 100,000 random steps."""
    rng = random.Random(20261121)
    ledger = Ledger(1000, min_residency=3.0)
    now, fresh = 0.0, 0
    granted = evicted = refused = 0
    for _ in range(100_000):
        now += rng.random()
        accounts = list(ledger)
        account = rng.choice(accounts) if accounts else None
        action = rng.randrange(12)
        if action == 0 and len(accounts) < 40:
            fresh += 1
            ledger.open(fresh, now)
            ledger.ask(fresh, rng.choice((1, 50, 200, 600, 1001)))
        elif account is None:
            continue
        elif action == 1 and account.state is not AccountState.CLOSING:
            ledger.lease(account.key)
        elif action in (2, 9, 10) and account.leases:
            ledger.release(account.key, now)
        elif (
            action == 3
            and account.state is AccountState.RESERVED
            and account.bytes
            and account.wanted == account.bytes
        ):
            ledger.loaded(account.key, now, rng.choice((None, rng.randint(0, account.bytes))))
        elif action == 4 and account.state is AccountState.CLOSING:
            ledger.closed(account.key)
        elif action == 5 and account.state is AccountState.RESIDENT:
            ledger.ask(account.key, account.bytes + rng.randint(0, 100))
        elif (
            action == 6
            and not account.leases
            and account.state is not AccountState.CLOSING
            and rng.random() < 0.2
        ):
            ledger.begin_close(account.key)
        elif action == 7 and account.state is AccountState.RESIDENT:
            if account.pins:
                ledger.unpin(account.key)
            elif rng.random() < 0.3:
                ledger.pin(account.key)
        elif action == 11:
            ledger.share(rng.choice((0, 100, 300, 900)))
        elif action == 8:
            ledger.shrink(account.key, rng.randint(0, 50))
        plan = ledger.plan(now)
        for key in plan.grant:
            ledger.grant(key)
            granted += 1
        for key in plan.refuse + plan.end:
            ledger.withdraw(key)
            refused += 1
            if not ledger[key].leases and ledger[key].state is AccountState.RESERVED:
                ledger.begin_close(key)
        for key in plan.evict:
            assert ledger[key].leases == 0
            assert ledger[key].pins == 0
            ledger.begin_close(key)
            evicted += 1
        ledger.check()
    assert min(granted, evicted, refused) > 100, (granted, evicted, refused)
