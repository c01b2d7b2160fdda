"""The deadline of a process's current call: one timer for all calls, which never fires too late."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import pytest

from gateway.runners.deadline import Deadline


class Timer:
    def __init__(self, at: float, look: Callable[[], None]) -> None:
        self.at, self.look, self.cancelled = at, look, False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """The clock and the timers of an event loop."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[Timer] = []

    def time(self) -> float:
        return self.now

    def call_at(self, at: float, look: Callable[[], None]) -> Timer:
        self.timers.append(Timer(at, look))
        return self.timers[-1]

    def until(self, now: float) -> None:
        while due := [timer for timer in self.timers if timer.at <= now and not timer.cancelled]:
            timer = min(due, key=lambda timer: timer.at)
            self.timers.remove(timer)
            self.now = timer.at
            timer.look()
        self.now = now


class Case:
    def __init__(self) -> None:
        self.loop = Loop()
        self.passed: list[float] = []
        self.deadline = Deadline(
            cast(asyncio.AbstractEventLoop, self.loop), lambda: self.passed.append(self.loop.now)
        )

    def call(self, began: float, seconds: float | None, ended: float | None = None) -> None:
        self.loop.until(began)
        self.deadline.begin(began, seconds)
        if ended is not None:
            self.loop.until(ended)
            self.deadline.end()


@pytest.mark.parametrize("before", [None, 0.5, 5.0, 600.0])
def test_a_call_is_overdue_after_its_own_time_whatever_came_before(before: float | None) -> None:
    case = Case()
    case.call(0.0, before, ended=0.1)
    case.call(0.25, 2.0)
    case.loop.until(100.0)
    assert case.passed == [2.25]


def test_calls_that_end_in_time_are_never_overdue() -> None:
    case = Case()
    for n in range(100):
        case.call(n * 1.0, 2.0, ended=n + 0.9)
    case.call(100.0, None)
    case.loop.until(1000.0)
    assert case.passed == []
    assert case.loop.timers == []


def test_many_short_calls_set_few_timers() -> None:
    case = Case()
    sets = 0
    call_at = case.loop.call_at

    def counted(at: float, look: Callable[[], None]) -> Timer:
        nonlocal sets
        sets += 1
        return call_at(at, look)

    case.loop.call_at = counted  # type: ignore[method-assign]
    for n in range(1000):
        case.call(n / 100, 5.0, ended=n / 100 + 0.005)
    assert sets <= 4


def test_a_closed_one_does_nothing() -> None:
    case = Case()
    case.call(0.0, 1.0)
    case.deadline.close()
    case.loop.until(10.0)
    assert case.passed == []
