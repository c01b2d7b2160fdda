"""What counts as a failure of a version in a rollout, and what is the fault of the load or of a caller."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gateway.errors import Problem
from gateway.record import RequestRecord
from gateway.rollouts.rollout import Rollout, hangs
from gateway.service import Inference
from gateway.serving.admission import NotAdmitted
from loaders.enforcement import RawInput
from loaders.worker.wire import Framed
from tests.support.controlled import turns, version
from tests.support.rollouts import CHAMPION, Setup, conducted

CANARY = {"steps": [99], "every": 0, "requests": 10_000, "within": "1h"}
PHASES = pytest.mark.parametrize("phase", [{"watch": "10m"}, {"canary": CANARY}], ids=["watch", "canary"])
Answer = Awaitable[Any]


async def begun(setup: Setup) -> Rollout:
    """Version 1 has answered some requests; version 2 answers all callers, and is compared with it."""
    setup.say("1")
    await setup.ask(50)
    setup.say("2")
    await turns(50)
    assert await setup.ask(3) == ["2", "2", "2"]
    return setup.rollout


def asked(setup: Setup, key: str, deadline: float | None = None) -> Answer:
    inference = Inference(
        CHAMPION, RawInput("instances", [[1.0]]), deadline=deadline, record=RequestRecord(key.encode())
    )
    return setup.service.predict(inference)


def sheds(setup: Setup, number: int, *, late: bool) -> None:
    """The queue of a version is full, or moves too slowly for its callers."""
    servable = setup.bench.manager.find(version(number))
    assert servable is not None

    def submit(*args: object) -> object:
        raise NotAdmitted(1.0, late=late)

    servable.batcher.submit = submit  # type: ignore[assignment,method-assign]


@PHASES
@pytest.mark.parametrize("late", [False, True])
def test_a_full_queue_is_no_failure_of_the_version(tmp_path: Path, phase: dict[str, Any], late: bool) -> None:
    async def test(setup: Setup) -> None:
        rollout = await begun(setup)
        sheds(setup, 2, late=late)
        assert set(await setup.ask(100)) == {"1"}  # which has room
        assert rollout.guards.candidate.requests == 3
        assert setup.rollout is rollout
        sheds(setup, 1, late=late)
        with pytest.raises(Problem, match="overloaded") as caught:
            await setup.ask()
        assert caught.value.code == "OVERLOADED"

    conducted(tmp_path, test, phase)


def test_a_full_queue_is_no_failure_of_the_version_before_either(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        setup.say("1")
        await setup.ask(50)
        sheds(setup, 1, late=False)
        for _ in range(20):
            with pytest.raises(Problem, match="overloaded"):
                await setup.ask()
        found = setup.aliases.find("iris", "champion")
        assert found is not None
        assert found.in_service is not None
        assert found.in_service.before.reference().failures == 0

    conducted(tmp_path, test, {"watch": "10m"})


async def out_of_time(setup: Setup, key: str) -> None:
    with contextlib.suppress(Problem):  # or version 1 answers, because the queue is too long for it
        await asked(setup, key, asyncio.get_running_loop().time() + 0.001)


async def leaves(setup: Setup, key: str) -> None:
    asking = asyncio.ensure_future(asked(setup, key))
    await turns(10)
    asking.cancel()
    await asyncio.wait({asking})
    assert asking.cancelled()


@PHASES
@pytest.mark.parametrize("gives_up", [out_of_time, leaves])
def test_a_caller_that_gives_up_early_says_nothing_about_the_version(
    tmp_path: Path, phase: dict[str, Any], gives_up: Callable[[Setup, str], Awaitable[None]]
) -> None:
    async def test(setup: Setup) -> None:
        rollout = await begun(setup)
        behaviour = setup.bench.behaviour(version(2))
        behaviour.hold_predict = held = asyncio.Event()
        callers = [str(number) for number in range(40) if rollout.watching or rollout.takes(str(number))]
        for caller in callers:
            await gives_up(setup, caller)
        assert rollout.guards.candidate.requests == 3
        assert setup.rollout is rollout
        behaviour.hold_predict = None
        held.set()
        await turns(20)
        assert await setup.ask(3) == ["2", "2", "2"]

    conducted(tmp_path, test, phase)


def test_a_version_that_hangs_is_taken_back_though_all_callers_are_impatient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.rollouts.rollout.PATIENCE_SECONDS", 0.02)
    monkeypatch.setattr("gateway.rollouts.rollout.PATIENCE_TIMES", 1.0)

    async def test(setup: Setup) -> None:
        await begun(setup)
        behaviour = setup.bench.behaviour(version(2))
        behaviour.hold_predict = held = asyncio.Event()
        for number in range(20_000):
            if setup.phase == "rolled_back":
                break
            await out_of_time(setup, f"impatient-{number}")
            await turns(5)
        assert setup.phase == "rolled_back"
        held.set()

    conducted(tmp_path, test, {"watch": "10m"})


class LargeBody:
    """A body whose first turn to be parsed never comes."""

    def __init__(self) -> None:
        self.turns = 0

    async def enforce(self, *rules: object) -> Any:
        self.turns += 1
        if self.turns == 1:
            await asyncio.Event().wait()
        return SimpleNamespace(batch=Framed(1, np.zeros(1), 0), warnings=(), lenient=False)


@PHASES
def test_a_body_that_waits_to_be_parsed_says_nothing_about_the_version(
    tmp_path: Path, phase: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.rollouts.rollout.PATIENCE_SECONDS", 0.02)
    monkeypatch.setattr("gateway.rollouts.rollout.PATIENCE_TIMES", 1.0)

    async def test(setup: Setup) -> None:
        rollout = await begun(setup)
        await setup.ask(200)  # one of them is answered by version 1, so it is known how long that takes
        before = rollout.guards.candidate.requests
        caller = next(name for name in map(str, range(100)) if rollout.watching or rollout.takes(name))
        body = LargeBody()
        inference = Inference(CHAMPION, None, record=RequestRecord(caller.encode()), unparsed=body)
        await setup.service.predict(inference)
        assert (body.turns, str(inference.record.version)) == (2, "iris/1")
        assert rollout.guards.candidate.requests == before

    conducted(tmp_path, test, phase)


@pytest.mark.parametrize(
    ("patience", "waited", "stalled", "hanging"),
    [
        (None, 100.0, 100.0, False),  # how long calls take is not known
        (2.0, 100.0, None, False),  # it was not given up
        (2.0, 0.1, 0.1, False),
        (2.0, 1.9, 1.9, False),
        (2.0, 2.0, 0.5, False),  # its queue moves
        (2.0, 2.0, 1.5, True),
        (2.0, 0.1, 2.0, True),  # it came when a call was hanging
    ],
)
def test_which_waits_are_failures(
    patience: float | None, waited: float, stalled: float | None, hanging: bool
) -> None:
    assert hangs(patience, waited, stalled) is hanging
