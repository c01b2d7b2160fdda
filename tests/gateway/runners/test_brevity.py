"""Which calls may run on the event loop: only those that have shown that they are brief."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.runners.brevity import (
    AWAITED,
    BRIEF,
    CALLS,
    LONG_COSTS,
    MOST_CALLS,
    TOOK_ON_LOOP,
    USED_ON_LOOP,
    Brevity,
    size_of,
)
from loaders.batch import Columns, Tensors, Value

QUICK = BRIEF / 4
SLOW = BRIEF * 2


def shown(calls: int = CALLS, size: int = 4) -> Brevity:
    brevity = Brevity()
    for _ in range(calls):
        brevity.in_thread(size, QUICK, QUICK)
    return brevity


def test_calls_are_allowed_after_enough_brief_ones() -> None:
    assert not shown(CALLS - 1).allows(4)
    brevity = shown()
    assert brevity.allows(4)
    assert brevity.allows(1)
    assert not brevity.allows(5), "no call of this size was seen"


def test_a_larger_call_that_is_long_shows_nothing_about_the_others() -> None:
    brevity = shown()
    brevity.in_thread(4000, SLOW, SLOW)
    assert brevity.allows(4)
    assert not brevity.allows(4000)


def test_a_larger_call_that_is_brief_starts_the_count_again() -> None:
    brevity = shown()
    brevity.in_thread(4000, QUICK, QUICK)
    assert not brevity.allows(4000)
    assert not brevity.allows(4)
    for _ in range(CALLS - 1):
        brevity.in_thread(4, QUICK, QUICK)
    assert brevity.allows(4000)


def test_a_long_call_of_a_known_size_takes_the_place_of_some_brief_ones() -> None:
    brevity = shown()
    brevity.in_thread(3, SLOW, SLOW)
    for _ in range(LONG_COSTS):
        assert not brevity.allows(1)
        brevity.in_thread(4, QUICK, QUICK)
    assert brevity.allows(1)
    for _ in range(100 * CALLS):
        brevity.in_thread(4, SLOW, SLOW)
        brevity.in_thread(4, QUICK, QUICK)
    assert not brevity.allows(1), "as many are long as are brief"


def test_a_model_that_waits_for_other_threads_is_not_brief() -> None:
    brevity = Brevity()
    for _ in range(10 * CALLS):
        brevity.in_thread(4, QUICK, AWAITED * 2)
    assert not brevity.allows(4)


def test_waits_on_a_busy_machine_do_not_count() -> None:
    brevity = shown()
    brevity.in_thread(4, QUICK, 1.0)
    brevity.on_loop(QUICK, TOOK_ON_LOOP / 2)
    assert brevity.allows(4)


@pytest.mark.parametrize(("used", "took"), [(USED_ON_LOOP * 1.1, QUICK), (QUICK, TOOK_ON_LOOP * 1.1)])
def test_a_long_call_on_the_loop_ends_it_for_much_longer(used: float, took: float) -> None:
    brevity = shown()
    brevity.on_loop(used, took)
    for _ in range(CALLS * 10 - 1):
        brevity.in_thread(4, QUICK, QUICK)
        assert not brevity.allows(4)
    brevity.in_thread(4, QUICK, QUICK)
    assert brevity.allows(4)


def test_it_is_never_ended_for_ever() -> None:
    brevity = Brevity()
    for _ in range(20):
        brevity.on_loop(1.0, 1.0)
    for _ in range(MOST_CALLS):
        brevity.in_thread(4, QUICK, QUICK)
    assert brevity.allows(4)


RUN = st.tuples(st.integers(1, 50), st.sampled_from([QUICK, SLOW]), st.integers(1, 2 * CALLS))


@given(st.lists(RUN, max_size=10), st.integers(1, 60))
def test_no_size_is_allowed_that_was_not_brief(runs: list[tuple[int, float, int]], asked: int) -> None:
    calls = [(size, used) for size, used, times in runs for _ in range(times)]
    brevity = Brevity()
    for size, used in calls:
        brevity.in_thread(size, used, used)
    if brevity.allows(asked):
        assert any(size >= asked and used <= BRIEF for size, used in calls)
        largest = max(size for size, used in calls if used <= BRIEF)
        first = calls.index((largest, QUICK))
        brief = sum(used <= BRIEF for _, used in calls[first:])
        smallest = min(size for size, _ in calls)
        long = sum(used > BRIEF and size == smallest for size, used in calls[first:][-CALLS:])
        assert brief >= CALLS
        assert long * LONG_COSTS <= brief


def test_sizes() -> None:
    columns = Columns({"a": np.array([1.0, 2.0]), "b": np.array([True, False])}, 2)
    assert size_of(columns, {}) == 4
    assert size_of(Tensors({"": np.zeros((2, 3, 5))}, 2), {}) == 30
    assert size_of(columns, {"k": 1}) is None
    assert size_of(Columns({"a": np.array(["x" * 1000], dtype=object)}, 1), {}) is None
    assert size_of(Value([1, 2]), {}) is None
