"""The delay of the event loop, and how busy the models are."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from gateway.vitals import SMOOTHED_SECONDS, Vitals


class FakeLoop:
    """Time and one timer, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: Any = None

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Any, *arguments: Any) -> FakeLoop:
        self.due = (when, callback, arguments)
        return self

    def cancel(self) -> None:
        self.due = None

    def run(self, late: float) -> None:
        when, callback, arguments = self.due
        self.now = when + late
        callback(*arguments)


def test_loop_lag_is_the_worst_of_the_last_half_minute() -> None:
    loop, vitals = FakeLoop(), Vitals()
    vitals.start(loop)  # type: ignore[arg-type]
    loop.run(late=0.0)
    loop.run(late=0.4)
    loop.run(late=0.1)
    assert vitals.lag == pytest.approx(0.4)
    while loop.now < 14.0:
        loop.run(late=0.0)
    assert vitals.lag == pytest.approx(0.4)
    while loop.now < 31.0:
        loop.run(late=0.0)
    assert vitals.lag == pytest.approx(0.0)
    vitals.stop()
    assert loop.due is None


@pytest.mark.anyio
async def test_loop_lag_sees_a_blocked_loop() -> None:
    vitals = Vitals()
    loop = asyncio.get_running_loop()
    vitals.start(loop)
    time.sleep(0.4)  # noqa: ASYNC251 - exactly what must not happen on a loop
    await asyncio.sleep(0)  # one turn: the timer that is late comes first
    await asyncio.sleep(0)
    vitals.stop()
    assert vitals.lag >= 0.1


def test_saturation_follows_the_load_and_a_short_burst_hardly_moves_it() -> None:
    loop, vitals = FakeLoop(), Vitals()
    load = (0, 2)
    vitals.load = lambda: load
    vitals.start(loop)  # type: ignore[arg-type]
    loop.run(late=0.0)
    assert vitals.saturation == 0.0
    load = (6, 2)
    loop.run(late=0.0)
    assert 0.0 < vitals.saturation < 0.1
    began = loop.now
    while loop.now < began + SMOOTHED_SECONDS:
        loop.run(late=0.0)
    assert vitals.saturation == pytest.approx(3 * 0.63, rel=0.05)
    while loop.now < began + 10 * SMOOTHED_SECONDS:
        loop.run(late=0.0)
    assert vitals.saturation == pytest.approx(3.0, rel=0.01)
    load = (0, 1)
    while loop.now < began + 20 * SMOOTHED_SECONDS:
        loop.run(late=0.0)
    assert vitals.saturation == pytest.approx(0.0, abs=0.01)
