"""Limits: what a bucket lets pass, by a clock of the test, and that a refusal takes nothing."""

from __future__ import annotations

import pytest

from gateway.access.limits import Limits, enter
from gateway.credentials import Limit
from gateway.errors import Problem


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def refusal(quotas: tuple[object, ...]) -> Problem:
    with pytest.raises(Problem) as caught:
        enter(quotas)  # type: ignore[arg-type]
    assert caught.value.code == "OVERLOADED"
    return caught.value


def of(clock: Clock, **limits: Limit) -> tuple[object, ...]:
    return Limits(limits, clock).of("blue", "token:a")


def test_requests_per_second() -> None:
    clock = Clock()
    quotas = of(clock, blue=Limit(requests_per_second=2))
    for _ in range(2):
        enter(quotas)  # type: ignore[arg-type]
    problem = refusal(quotas)
    assert problem.retry_after == pytest.approx(0.5)
    assert "the team blue" in problem.message
    clock.now += 0.5
    enter(quotas)  # type: ignore[arg-type]
    refusal(quotas)
    clock.now += 3600
    for _ in range(2):  # one second's worth is kept, not an hour's
        enter(quotas)  # type: ignore[arg-type]
    refusal(quotas)


def test_a_slow_rate_lets_one_pass() -> None:
    clock = Clock()
    quotas = of(clock, blue=Limit(requests_per_second=0.1))
    enter(quotas)  # type: ignore[arg-type]
    assert refusal(quotas).retry_after == pytest.approx(10.0)


def test_requests_at_once() -> None:
    quotas = of(Clock(), blue=Limit(concurrency=1))
    enter(quotas)  # type: ignore[arg-type]
    refusal(quotas)
    quotas[0].leave()  # type: ignore[attr-defined]
    enter(quotas)  # type: ignore[arg-type]


def test_rows_are_paid_afterwards() -> None:
    clock = Clock()
    quotas = of(clock, blue=Limit(rows_per_second=10))
    enter(quotas)  # type: ignore[arg-type]
    quotas[0].rows(30)  # type: ignore[attr-defined]
    assert refusal(quotas).retry_after == pytest.approx(2.0)
    clock.now += 2.1
    enter(quotas)  # type: ignore[arg-type]


def test_a_token_has_its_own_and_its_teams_limit_and_a_refusal_takes_nothing() -> None:
    clock = Clock()
    limits = Limits({"blue": Limit(concurrency=1), "token:a": Limit(concurrency=5)}, clock)
    quotas = limits.of("blue", "token:a")
    assert len(quotas) == 2
    enter(quotas)
    refusal(quotas)
    assert [quota.running for quota in quotas] == [1, 1]
    assert limits.of("", "jwt:a") == ()
    assert limits.of("blue", "jwt:b")[0] is quotas[0], "a team shares its limit"


def test_a_team_that_is_called_like_another_caller_does_not_limit_it() -> None:
    limits = Limits({"admin": Limit(concurrency=1), "token:a": Limit(concurrency=1)}, Clock())
    assert limits.of("", "admin") == ()
    assert len(limits.of("admin", "token:b")) == 1
