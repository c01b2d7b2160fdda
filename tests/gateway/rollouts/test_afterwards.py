"""The guards after a swap: what they find, how soon, and how rarely they are wrong."""

from __future__ import annotations

import random

import pytest

from gateway.rollouts.afterwards import Afterwards
from gateway.rollouts.before import Before, Reference
from gateway.rollouts.guards import Limits, Outcome
from tests.support.controlled import Clock
from tests.support.rollouts import after_swap


def reference(requests: int = 3000, failures: int = 3, seconds: float = 0.01) -> Reference:
    clock = Clock()
    before = Before(clock)
    for number in range(requests):
        clock.now += 0.1
        failed = failures > 0 and number % (requests // failures) == 0
        before.observe(failed=failed, seconds=seconds * (1 + number % 7 / 10), violated=False)
    return before.reference()


def breached_after(guards: Afterwards, outcome: Outcome, most: int = 2000) -> int:
    for number in range(1, most + 1):
        guards.observe(Outcome(outcome.failed, outcome.seconds, outcome.violated, str(number)))
        if guards.breached is not None:
            return number
    return most


@pytest.mark.parametrize(
    ("outcome", "guard", "most"),
    [
        (Outcome(True, 0.01), "errors", 8),
        (Outcome(False, 0.05), "latency", 30),
        (Outcome(False, 0.01, violated=True), "output", 8),
    ],
)
def test_a_version_that_is_always_worse_is_found_in_a_few_requests(
    outcome: Outcome, guard: str, most: int
) -> None:
    guards = Afterwards(Limits(), reference())
    assert breached_after(guards, outcome) <= most
    assert guards.breached == guard
    verdict = guards.verdict()
    assert str(verdict).startswith(f"{guard}: ")
    assert verdict.evidence["reference"] == "before"
    assert verdict.evidence["guards"][guard]["evidence"] >= verdict.evidence["guards"][guard]["bound"]
    assert verdict.evidence["service"]["requests"] == 3000


def test_a_guard_that_is_off_finds_nothing() -> None:
    guards = Afterwards(Limits(errors=None, latency=1.25, output=None), reference())
    breached_after(guards, Outcome(True, 0.01, violated=True), 200)
    assert guards.breached is None
    assert set(guards.verdict().evidence["guards"]) == {"latency"}


def test_promise_12_without_a_reference_nothing_is_found_and_the_evidence_says_so() -> None:
    guards = Afterwards(Limits(), Reference())
    assert breached_after(guards, Outcome(True, 5.0, violated=True), 500) == 500
    assert guards.verdict().evidence["guards"]["errors"]["limit"] is None
    few = Afterwards(Limits(), reference(requests=10, failures=0))
    assert breached_after(few, Outcome(False, 5.0), 500) == 500  # ten calls bound no median


def test_without_a_reference_a_version_that_fails_what_the_version_before_answers_is_found() -> None:
    guards = Afterwards(Limits(), Reference(), repeats=True)
    for number in range(60):
        guards.observe(Outcome(True, 0.01, key=str(number)))  # nobody else answered
    assert guards.breached is None
    for number in range(20):
        guards.observe(Outcome(True, 0.01, key=str(number), repeated=True))
    assert guards.breached == "errors"
    assert guards.verdict().evidence["guards"]["errors"]["limit"] == 0.51


def test_two_versions_that_fail_nearly_always_are_equal() -> None:
    draw = random.Random(9)
    for _ in range(50):
        guards = Afterwards(Limits(), Reference(), repeats=True)
        for number in range(1000):
            failed, other = draw.random() < 0.9, draw.random() < 0.9
            if not failed or not other:  # where both fail, nothing is observed
                guards.observe(Outcome(failed, 0.01, key=str(number), repeated=failed))
        assert guards.breached is None


def test_failures_of_one_caller_decide_nothing() -> None:
    guards = Afterwards(Limits(), reference())
    for _ in range(100):
        guards.observe(Outcome(True, 0.01, key="one"))
    assert guards.breached is None


def test_requests_of_the_version_before_say_nothing() -> None:
    guards = Afterwards(Limits(), reference())
    for number in range(100):
        guards.observe(Outcome(True, 0.01, key=str(number)), candidate=False)
    assert (guards.breached, guards.candidate.requests) == (None, 0)


@pytest.mark.parametrize("bursty", [False, True])
def test_an_identical_version_stays(bursty: bool) -> None:
    draw = random.Random(7)
    runs = [
        after_swap(draw, rate=3, service=0.01, candidate=0.01, requests=600, bursty=bursty) for _ in range(60)
    ]
    assert [run.breached for run in runs if run.breached] == []


def test_a_worse_and_a_slower_version_are_found_by_their_guards() -> None:
    draw = random.Random(8)
    worse = [after_swap(draw, rate=10, service=0.001, candidate=0.051, requests=2000) for _ in range(12)]
    assert {run.breached for run in worse} == {"errors"}
    assert sorted(run.requests for run in worse)[6] < 350
    slow = [after_swap(draw, rate=10, slower=1.5, requests=2000) for _ in range(12)]
    assert {run.breached for run in slow} == {"latency"}
    assert sorted(run.requests for run in slow)[6] < 350
