"""What is remembered of the version in service, and what its bounds promise."""

from __future__ import annotations

import json
import math
import random

import pytest

from gateway.rollouts.before import (
    CHECKS,
    SAMPLES,
    Before,
    Reference,
    design_effect,
    upper_rate,
)
from tests.support.controlled import Clock


def test_ten_minutes_are_kept_and_no_more() -> None:
    clock = Clock()
    before = Before(clock)
    for _ in range(100):
        before.observe(failed=False, seconds=1.0)
    clock.now += 300
    before.observe(failed=True, seconds=0.0)
    assert (before.reference().requests, before.reference().failures) == (101, 1)
    clock.now += 320
    assert before.reference().requests == 1
    clock.now += 10_000
    assert before.reference() == Reference()


def test_the_memory_of_a_slot_is_bounded_and_its_weight_is_not_lost() -> None:
    clock = Clock()
    before = Before(clock)
    for _ in range(10_000):
        before.observe(failed=False, seconds=3.0)
    clock.now += 10
    for _ in range(10):
        before.observe(failed=False, seconds=1.0)
    reference = before.reference()
    assert (reference.requests, reference.timed) == (10_010, SAMPLES + 10)
    assert reference.median == 3.0
    assert reference.slowest == 3.0


def test_only_some_answers_are_compared_with_the_schema() -> None:
    before = Before(Clock())
    checked = 0
    for _ in range(100):
        checks = before.checks
        checked += checks
        before.observe(failed=False, seconds=1.0, violated=True if checks else None)
    assert checked == CHECKS
    assert (before.reference().checked, before.reference().violations) == (CHECKS, CHECKS)


def test_a_reference_survives_a_restart() -> None:
    before = Before(Clock())
    for number in range(50):
        before.observe(failed=number % 10 == 0, seconds=number / 100, violated=False)
    reference = before.reference()
    assert Reference.from_json(json.loads(json.dumps(reference.to_json()))) == reference


def test_without_data_nothing_is_bounded() -> None:
    nothing = Reference()
    assert nothing.most_failures(0.01) == nothing.most_violations(0.01) == 1.0
    assert nothing.slowest_median(0.01) is None
    few = Before(Clock())
    for _ in range(8):
        few.observe(failed=False, seconds=1.0)
    assert few.reference().slowest_median(0.001) is None


@pytest.mark.parametrize(
    ("count", "total", "alpha", "expected"),
    [(0, 100, 0.05, 1 - 0.05**0.01), (10, 10, 0.05, 1.0), (0, 0, 0.05, 1.0), (3, 600, 0.002, 0.02014)],
)
def test_the_upper_bound_of_a_rate_is_that_of_clopper_and_pearson(
    count: int, total: int, alpha: float, expected: float
) -> None:
    assert upper_rate(count, total, 1.0, alpha) == pytest.approx(expected, rel=0.02)
    assert upper_rate(count, total, 3.0, alpha) >= upper_rate(count, total, 1.0, alpha)


def test_the_bounds_are_too_low_as_rarely_as_they_promise() -> None:
    draw = random.Random(1)
    low_rate = low_median = 0
    for _ in range(400):
        clock = Clock()
        before = Before(clock)
        for _ in range(200):
            clock.now += draw.expovariate(1.0)
            before.observe(failed=draw.random() < 0.05, seconds=math.exp(draw.gauss(0, 1)))
        reference = before.reference()
        low_rate += reference.most_failures(0.05) < 0.05
        low_median += (reference.slowest_median(0.05) or math.inf) < 1.0
    assert low_rate <= 30  # 5 % are 20
    assert low_median <= 30


def test_calls_that_are_slow_together_count_as_few() -> None:
    draw = random.Random(3)
    clock = Clock()
    before = Before(clock)
    for number in range(6000):
        clock.now += 0.1
        slow = number // 150 % 4 == 0  # 15 seconds of each minute
        before.observe(
            failed=False, seconds=(3.0 if slow else 1.0) * math.exp(draw.gauss(0, 0.4)), violated=False
        )
    reference = before.reference()
    assert reference.weight("latency") > 10
    assert reference.weight("errors") == reference.weight("output") == 1
    assert (reference.slowest_median(0.001) or 0) > 1.2


def test_the_design_effect_sees_bursts_and_only_those() -> None:
    draw = random.Random(2)
    even = [(sum(draw.random() < 0.05 for _ in range(100)), 100) for _ in range(60)]
    assert design_effect(even) < 1.3
    bursty = [
        (sum(draw.random() < (0.2 if n % 6 == 0 else 0.02) for _ in range(100)), 100) for n in range(60)
    ]
    assert design_effect(bursty) > 3
    assert design_effect([(0, 100)] * 60) == design_effect([(100, 100)] * 60) == design_effect([]) == 1.0
