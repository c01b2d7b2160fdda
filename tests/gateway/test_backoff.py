"""Pauses after failures: they grow, differ, and are never shorter than the other side asks for."""

from __future__ import annotations

import random

import pytest

from gateway import backoff


def test_pauses_grow_to_the_longest_and_no_further() -> None:
    chance = random.Random(7)
    nominal = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    pauses = [backoff.pause(n, chance=chance) for n in range(1, 9)]
    for pause, longest in zip(pauses, nominal, strict=True):
        assert longest * (1 - backoff.JITTER) <= pause <= longest
    assert backoff.pause(10_000) <= backoff.LONGEST


def test_many_that_fail_together_do_not_come_back_together() -> None:
    assert len({round(backoff.pause(3), 6) for _ in range(50)}) > 40


def test_a_requested_pause_is_kept_within_reason() -> None:
    assert 30 <= backoff.pause(1, asked=30) <= 30 * (1 + backoff.JITTER)
    assert backoff.pause(1, asked=10**9) <= 10 * backoff.LONGEST * (1 + backoff.JITTER)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        (" 0 ", 0.0),
        ("Fri, 07 Aug 2026 10:00:30 GMT", 30.0),
        ("soon", None),
        (None, None),
        ("-1", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str | None, seconds: float | None) -> None:
    assert backoff.retry_after(header, now=1786096800.0) == seconds
