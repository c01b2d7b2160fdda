"""The door of a model: its rules, then a simulation of three times more requests than it can bear."""

from __future__ import annotations

import random
from collections import deque

import pytest

from gateway.serving.admission import Admission, NotAdmitted


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    door = Admission(max_queue=10)
    door.finished(1, 0.5)
    door.check(9, 0.0, None)
    with pytest.raises(NotAdmitted) as caught:
        door.check(10, 0.0, None)
    assert (caught.value.retry_after, caught.value.late) == (5.0, False)


def test_who_would_be_too_late_is_refused_at_once() -> None:
    door = Admission(max_queue=1000)
    door.finished(1, 0.1)
    door.check(10, 100.0, 101.5)
    with pytest.raises(NotAdmitted) as caught:
        door.check(20, 100.0, 101.5)
    assert caught.value.late


def test_merged_calls_and_several_slots_make_the_wait_shorter() -> None:
    door = Admission(max_queue=1000, slots=2)
    door.finished(10, 1.0)
    assert door.expected_wait(100) == pytest.approx(5.0)


def test_before_the_first_call_nothing_is_known_and_no_request_is_late() -> None:
    Admission(max_queue=10).check(5, 100.0, 100.001)


def test_overload_simulation() -> None:
    """One server of 10 ms, callers with one second of patience at three times its pace: with the door,
    more than nine tenths of the work reaches a caller who still waits; without it, almost none does."""

    def goodput(door: Admission | None) -> float:
        rng = random.Random(3)
        now, free_at, in_time, done = 0.0, 0.0, 0, 0
        queue: deque[float] = deque()
        while done < 5000:
            now += rng.expovariate(300.0)
            while queue and free_at <= now:
                started = max(free_at, queue[0])
                arrived = queue.popleft()
                free_at = max(started, arrived) + 0.01
                done += 1
                in_time += free_at <= arrived + 1.0
                if door is not None:
                    door.finished(1, 0.01)
            try:
                if door is not None:
                    door.check(len(queue), now, now + 1.0 - 0.02)
            except NotAdmitted:
                continue
            queue.append(now)
        return in_time / done

    assert goodput(Admission(max_queue=1000)) > 0.9
    assert goodput(None) < 0.2
