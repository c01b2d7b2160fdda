"""Assignment to a canary: exact, sticky, monotone, different for each version."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.rollouts.canary import assigned, position

KEYS = [f"user-{number}" for number in range(10_000)]


@pytest.mark.parametrize("percent", [1, 5, 25, 50, 90])
def test_the_share_is_exact_to_one_percent_of_the_keys(percent: float) -> None:
    inside = sum(assigned(key, "iris", "2", percent) for key in KEYS)
    assert abs(inside / len(KEYS) * 100 - percent) <= 1


@given(st.text(), st.floats(0, 100), st.floats(0, 100))
def test_who_is_in_stays_in_when_the_share_grows(key: str, one: float, other: float) -> None:
    smaller, larger = sorted((one, other))
    assert not assigned(key, "iris", "2", smaller) or assigned(key, "iris", "2", larger)


@given(st.text())
def test_nothing_gets_no_caller_and_all_gets_every_caller(key: str) -> None:
    assert not assigned(key, "iris", "2", 0)
    assert assigned(key, "iris", "2", 100)
    assert 0 <= position(key, "iris", "2") < 100


@pytest.mark.parametrize(("model", "version"), [("iris", "3"), ("rent", "2")])
def test_another_version_or_model_draws_other_callers(model: str, version: str) -> None:
    first = {key for key in KEYS if assigned(key, "iris", "2", 50)}
    second = {key for key in KEYS if assigned(key, model, version, 50)}
    assert 0.45 < len(first & second) / len(first) < 0.55


def test_another_process_assigns_the_same() -> None:
    code = "from gateway.rollouts.canary import position; print(position('user-1', 'iris', '2'))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(told.stdout) == position("user-1", "iris", "2")
