"""The last minute of a model, in numbers."""

from __future__ import annotations

import pytest

from gateway.serving.recent import Recent
from tests.support.controlled import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recent(clock: Clock) -> Recent:
    return Recent(clock, lambda: 1e9)


def test_nothing_yet(recent: Recent) -> None:
    view = recent.view()
    assert (view["requests"], view["error_rate"], view["p99_seconds"]) == (0, None, None)
    assert recent.last_error is None


def test_a_model_that_fails_all_of_its_requests_does_not_look_healthy(recent: Recent, clock: Clock) -> None:
    for _ in range(4):
        recent.failed("ValueError")
    clock.now += 2
    view = recent.view()
    assert (view["requests"], view["errors"], view["error_rate"]) == (4, 4, 1.0)
    assert view["requests_per_second"] == 2.0
    assert recent.last_error == (1e9, "ValueError")


def test_the_percentile_is_within_a_quarter_and_needs_twenty(recent: Recent) -> None:
    for _ in range(19):
        recent.answered(0.010)
    assert recent.view()["p99_seconds"] is None
    for n in range(81):
        recent.answered(0.010 if n else 0.5)
    assert recent.view()["p99_seconds"] == pytest.approx(0.010, rel=0.25)
    recent.answered(0.5)
    assert recent.view()["p99_seconds"] == pytest.approx(0.5, rel=0.25)
    for _ in range(1000):
        recent.answered(10_000.0)
    assert recent.view()["p99_seconds"] == pytest.approx(602, rel=0.2), (
        "beyond the last bound it is that bound"
    )


def test_what_is_older_than_a_minute_is_forgotten(recent: Recent, clock: Clock) -> None:
    recent.answered(0.1)
    recent.failed("ValueError")
    clock.now += 49
    assert recent.view()["requests"] == 2
    clock.now += 12
    recent.answered(0.1)
    view = recent.view()
    assert (view["requests"], view["errors"]) == (1, 0)
    assert recent.last_error is not None, "the last error stays to be seen"
    clock.now += 600
    assert recent.view()["requests"] == 0
