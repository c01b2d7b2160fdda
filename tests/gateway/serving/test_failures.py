"""When a version that failed may be tried again."""

from __future__ import annotations

import random

import pytest

from gateway import backoff
from gateway.errors import Problem
from gateway.serving.failures import FORGET_AFTER, Failures
from tests.support.controlled import Clock, version


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
    clock.now += backoff.LONGEST - 1
    with pytest.raises(Problem):
        failures.check(version())
    clock.now += 1
    failures.check(version())
    clock.now += FORGET_AFTER + 1
    assert failures.find(version()) is None
