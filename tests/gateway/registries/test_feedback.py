"""What a gateway writes back to the registry: a verdict gets there, also after an outage."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest

from gateway import backoff
from gateway.registries.base import (
    Observation,
    Registry,
    RegistryReadOnly,
    RegistryUnavailable,
    Snapshot,
    Verdict,
)
from gateway.registries.feedback import Feedback
from tests.support.processes import until

VERDICT = Verdict("2", "rolled_back", "errors: 9 of 90 against 0 of 900")
TAKEN_BACK = Observation("iris", "champion", "2", "1", VERDICT)


class Away:
    """A registry that fails so many times before it takes an observation."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.asked: list[Observation] = []
        self.taken: list[Observation] = []

    def record(self, observation: Observation) -> Snapshot:
        self.asked.append(observation)
        if self.errors:
            raise self.errors.pop(0)
        self.taken.append(observation)
        return Snapshot({}, "")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "pause", lambda failures: 0.0)


def feedback(registry: Away, io: ThreadPoolExecutor) -> Feedback:
    def take(snapshot: Snapshot) -> Any:
        return None

    return Feedback(cast("Registry", registry), io, take=take, status=False)


@pytest.mark.anyio
async def test_a_verdict_is_written_again_until_the_registry_has_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = Away(*[RegistryUnavailable("away")] * 3)
    with ThreadPoolExecutor(1) as io:
        feedback(registry, io).record(TAKEN_BACK)
        await until(lambda: bool(registry.taken))
    assert registry.asked == [TAKEN_BACK] * 4
    assert [one.message for one in caplog.records] == ["iris@champion: cannot write to the registry: away"]


@pytest.mark.anyio
async def test_a_newer_verdict_takes_the_place_of_one_that_could_not_be_written() -> None:
    newer = Observation("iris", "champion", "3", "1", Verdict("3", "refused", "no"))
    registry = Away(RegistryUnavailable("away"))
    with ThreadPoolExecutor(1) as io:
        written = feedback(registry, io)
        written.record(TAKEN_BACK)
        written.record(newer)
        await until(lambda: bool(registry.taken))
        for _ in range(20):
            await asyncio.sleep(0)
    assert registry.asked == [TAKEN_BACK, newer]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("observation", "error"),
    [
        (Observation("iris", "champion", "2", "2"), RegistryUnavailable("away")),
        (TAKEN_BACK, RegistryReadOnly("a ConfigMap")),
    ],
    ids=["no verdict", "read-only"],
)
async def test_what_needs_no_second_try_gets_none(observation: Observation, error: Exception) -> None:
    registry = Away(error)
    with ThreadPoolExecutor(1) as io:
        feedback(registry, io).record(observation)
        await until(lambda: bool(registry.asked))
        for _ in range(20):
            await asyncio.sleep(0)
    assert registry.asked == [observation]
