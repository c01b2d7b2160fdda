"""When a version that failed may be tried again."""

from __future__ import annotations

import random

import pytest

from gateway.errors import Problem
from gateway.serving.failures import FORGET_AFTER, LONGEST_BACKOFF, Failures, backoff
from tests.support.controlled import Clock, version


def test_pauses_grow_to_a_minute_and_no_further() -> None:
    chance = random.Random(1)
    assert 0.8 <= backoff(1, chance) <= 1.0
    assert 48 <= backoff(7, chance) <= 60
    assert 48 <= backoff(100_000, chance) <= 60


def test_a_version_that_failed_is_tried_after_a_pause_that_grows() -> None:
    clock = Clock()
    failures = Failures(clock, random.Random(1))
    pauses = []
    for _ in range(3):
        failures.remember(version(), Problem("MODEL_UNAVAILABLE", "no such layer"))
        with pytest.raises(Problem, match="no such layer") as caught:
            failures.check(version())
        assert caught.value.retry_after is not None
        pauses.append(caught.value.retry_after)
        clock.now += caught.value.retry_after
        failures.check(version())
    assert pauses == sorted(pauses)
    assert failures.find(version()) is not None, "it is still shown"
    failures.forget(version())
    assert failures.find(version()) is None


def test_what_is_not_the_versions_fault_is_not_remembered() -> None:
    failures = Failures(Clock())
    failures.remember(version(), Problem("CAPACITY_EXCEEDED", "no room"))
    failures.check(version())


def test_a_quarantine_lasts_the_longest_pause_and_is_forgotten_later() -> None:
    clock = Clock()
    failures = Failures(clock)
    failures.quarantine(version(), Problem("MODEL_UNAVAILABLE", "it ends each time"))
    clock.now += LONGEST_BACKOFF - 1
    with pytest.raises(Problem):
        failures.check(version())
    clock.now += 1
    failures.check(version())
    clock.now += FORGET_AFTER + 1
    assert failures.find(version()) is None
