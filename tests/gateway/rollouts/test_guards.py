"""Guards: equal versions are left alone, worse ones are found, and too little is never a verdict.

`tests/bench/bench_guards.py` measures the error rates over thousands of rollouts; here each rule has
a few, seeded ones.
"""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.rollouts.guards import BLOCK, KEYS, Bet, Guards, Limits, Outcome
from tests.support.rollouts import simulate

OFF = {"errors": None, "latency": None, "output": None}


@given(st.lists(st.booleans(), max_size=300), st.floats(0.001, 0.5))
@settings(max_examples=50)
def test_evidence_is_never_negative_and_the_peak_never_falls(bad: list[bool], allowed: float) -> None:
    bet, before = Bet(1 + allowed), 1.0
    for one in bad:
        bet.observe(float(one) - allowed)
        assert bet.evidence >= 0
        assert bet.peak >= before
        before = bet.peak


def test_the_evidence_against_a_true_hypothesis_is_one_on_average() -> None:
    found = []
    for outcomes in itertools.product((0.5, -0.5), repeat=8):
        bet = Bet(0.5)
        for outcome in outcomes:
            bet.observe(outcome)
        found.append(bet.evidence)
    assert sum(found) / len(found) == pytest.approx(1.0)


@pytest.mark.parametrize("bursty", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_an_identical_version_is_left_alone(share: float, bursty: bool) -> None:
    draw = random.Random(7)
    for _ in range(20):
        assert (
            simulate(draw, share=share, service=0.02, candidate=0.02, requests=300, bursty=bursty).breached
            is None
        )


def test_more_errors_are_found() -> None:
    run = simulate(random.Random(1), share=0.05, service=0.001, candidate=0.05, requests=2_000)
    assert run.breached == "errors"
    assert run.requests < 700


def test_slower_answers_are_found_and_slower_within_the_limit_are_not() -> None:
    slow = simulate(random.Random(2), share=0.25, slower=1.6, spread=0.2, requests=2_000)
    assert slow.breached == "latency"
    allowed = simulate(random.Random(3), share=0.25, slower=1.2, spread=0.2, requests=1_000)
    assert allowed.breached is None


def test_answers_against_the_schema_are_found() -> None:
    guards = Guards(Limits(), 0.5)
    for number in range(2_000):
        candidate = number % 2 == 0
        guards.observe(
            Outcome(False, 0.01, violated=candidate and number % 8 == 0, key=str(number)), candidate=candidate
        )
    assert guards.verdict().breached == "output"


def test_disagreement_is_found_and_counted() -> None:
    guards = Guards(Limits(**OFF, disagreement=0.02), 0.5)
    for number in range(400):
        guards.compare(number % 5 != 0)
    verdict = guards.verdict()
    assert verdict.breached == "disagreement"
    assert verdict.evidence["compared"] == 400
    assert verdict.evidence["agreement"] == guards.agreement == 0.8


def test_what_nobody_compares_has_no_agreement() -> None:
    assert Guards(Limits(), 0.5).agreement is None


@pytest.mark.parametrize("name", ["errors", "latency", "output", "disagreement"])
def test_a_guard_that_is_off_finds_nothing(name: str) -> None:
    guards = Guards(Limits(errors=None, latency=None, output=None), 0.5)
    for number in range(500):
        guards.observe(
            Outcome(number % 2 == 0, 9.0 if number % 2 == 0 else 1.0, True, str(number)),
            candidate=number % 2 == 0,
        )
        guards.compare(False)
    assert guards.verdict().breached is None
    assert name not in guards.verdict().evidence["guards"]


def test_failures_of_one_caller_alone_do_not_decide() -> None:
    guards = Guards(Limits(), 0.5)
    for number in range(1_000):
        candidate = number % 2 == 0
        guards.observe(
            Outcome(candidate, 0.01, key="the same" if candidate else str(number)), candidate=candidate
        )
    assert guards.verdict().breached is None
    for number in range(KEYS):
        guards.observe(Outcome(True, 0.01, key=f"another {number}"), candidate=True)
    assert guards.verdict().breached == "errors"


def test_an_incomplete_block_is_no_evidence_until_it_is_ended() -> None:
    guards = Guards(Limits(), 0.5)
    for number in range(BLOCK - 1):
        guards.observe(Outcome(number % 2 == 0, 0.01, key=str(number)), candidate=number % 2 == 0)
    assert guards.verdict().breached is None
    guards.end_block()
    assert guards.verdict().breached == "errors"


def test_one_arm_alone_is_no_evidence() -> None:
    guards = Guards(Limits(), 0.5)
    for number in range(3 * BLOCK):
        guards.observe(Outcome(True, 0.01, key=str(number)), candidate=True)
    guards.end_block()
    assert guards.verdict().breached is None


def test_a_verdict_names_its_evidence() -> None:
    run = simulate(random.Random(1), share=0.05, service=0.001, candidate=0.2, requests=2_000)
    evidence = run.verdict.evidence
    found = evidence["guards"]["errors"]
    assert evidence["reference"] == "same minutes"
    assert evidence["candidate"]["requests"] > 0
    assert found["evidence"] >= found["bound"]
    assert found["allowed"] == 0.01
    assert str(run.verdict) == f"errors: {found['candidate']} against {found['service']}, allowed 0.01"


def test_a_suspicion_is_strong_evidence_of_several_callers_and_ends_with_it() -> None:
    guards = Guards(Limits(latency=None, output=None), 0.5)

    def add(requests: int, failed: bool, key: str = "") -> None:
        for number in range(requests):
            for candidate in (True, False):
                outcome = Outcome(failed and candidate, 0.01, key=key or str(number))
                guards.observe(outcome, candidate=candidate)
        guards.end_block()

    add(6, failed=True, key="anna")
    assert guards.suspected() is None  # one caller does not decide
    add(2, failed=True)
    assert guards.breached is None
    found = guards.suspected()
    assert found is not None
    assert found.startswith("errors: 8 of 8 against 0 of 8, allowed 0.01: evidence ")
    assert found.endswith("proved from 100")
    add(1500, failed=False)
    assert guards.suspected() is None
