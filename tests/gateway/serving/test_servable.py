"""A servable's life: the table of its phases, and its end."""

from __future__ import annotations

import asyncio
import itertools
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.errors import Problem
from gateway.serving import servable
from gateway.serving.servable import (
    STATUS,
    TRANSITIONS,
    IllegalTransition,
    Options,
    Phase,
    Servable,
    Status,
    Step,
    diagram,
)
from tests.support.controlled import turns, version


def at(phase: Phase) -> Servable:
    made = Servable(version(), Options())
    made.phase, made.status = phase, STATUS[phase]
    return made


@pytest.mark.parametrize(("phase", "step"), list(itertools.product(Phase, Step)))
def test_a_step_follows_the_table_or_raises(phase: Phase, step: Step) -> None:
    it = at(phase)
    after = TRANSITIONS[phase].get(step)
    if after is None:
        with pytest.raises(IllegalTransition, match=step.value):
            it.move(step)
        assert it.phase is phase
    else:
        it.move(step)
        assert (it.phase, it.status) == (after, STATUS[after])


def test_every_phase_has_a_row_and_is_reached() -> None:
    assert set(TRANSITIONS) == set(STATUS) == set(Phase)
    reached = {after for steps in TRANSITIONS.values() for after in steps.values()}
    assert reached | {Phase.FETCHING} == set(Phase)


def test_only_what_was_warmed_up_becomes_ready() -> None:
    """Promise 1, as the table has it."""
    to_ready = {
        (before, step)
        for before, steps in TRANSITIONS.items()
        for step, after in steps.items()
        if STATUS[after] is Status.READY
    }
    assert to_ready == {(Phase.WARMING, Step.READY)}


@pytest.mark.anyio
async def test_a_load_that_is_cancelled_twice_closes_what_it_began() -> None:
    go, closed = asyncio.Event(), asyncio.Event()

    async def close() -> None:
        await go.wait()
        closed.set()

    async def reserve(size: int) -> None: ...

    runner: Any = SimpleNamespace(start=asyncio.Event().wait, close=close)
    prepared: Any = SimpleNamespace(estimate=1)
    it = at(Phase.QUEUED)
    it.prepared = prepared
    loading = asyncio.ensure_future(it.load(reserve, lambda found: runner, lambda rows: None))
    for _ in range(2):
        await turns()
        loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    go.set()
    async with asyncio.timeout(60):
        await closed.wait()


def test_the_diagram_of_the_docs_is_printed_from_the_table() -> None:
    assert textwrap.indent(diagram(), " " * 4) in (servable.__doc__ or "")


def test_nothing_but_the_servable_assigns_its_phase() -> None:
    """The others ask for steps."""
    for file in Path(servable.__file__).parents[1].rglob("*.py"):
        for line in file.read_text().splitlines():
            if file.name != "servable.py" and "servable" in line:
                assert ".phase =" not in line and ".status =" not in line, f"{file.name}: {line}"  # noqa: PT018


def test_a_failed_load_has_its_problem_and_can_do_nothing_more() -> None:
    it = at(Phase.LOADING)
    it.fail(Problem("MODEL_UNAVAILABLE", "no such layer"))
    assert it.status is Status.FAILED
    assert it.problem is not None
    assert "FAILED (failed)" in repr(it)
    with pytest.raises(IllegalTransition):
        it.move(Step.CLOSE)
