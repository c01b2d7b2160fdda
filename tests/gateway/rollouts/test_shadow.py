"""A shadow: copies of requests for a candidate, which no caller notices, and what their answers decide."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.events import Crashed, RolloutChanged
from gateway.names import Reference
from gateway.registries.base import Alias
from gateway.rollout_settings import Shadow as Policy
from gateway.rollouts import agreement
from gateway.rollouts import shadow as module
from gateway.rollouts.agreement import Compared
from gateway.rollouts.rollout import SERVED
from gateway.rollouts.shadow import MAX_ANSWER, MAX_REQUEST, MAX_WAITING, QUEUE, Shadow
from gateway.runners import priority
from gateway.runners.base import NoProcess, RunnerTimeout
from loaders.batch import Batch, Columns, Tensors, Value
from loaders.enforcement import RawInput
from tests.support.controlled import ControlledRunner, turns, version
from tests.support.rollouts import Setup, conducted, giving_way

SHADOW: dict[str, Any] = {"share": 1.0, "requests": 20, "within": "1h", "agreement": 0.9}
POLICY = {"shadow": SHADOW}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AFTER_ANSWER", 0.0)


async def compared(setup: Setup, times: int, *, row: float | None = None) -> None:
    """So many callers, each of whose copies is answered before the next one asks. `row`: of all of them;
    None: each has its own."""
    shadow = setup.rollout.shadow
    assert shadow is not None
    for _ in range(times):
        wanted = shadow.requests + 1
        assert await setup.ask(row=setup.asked if row is None else row) == ["1"]
        while shadow.requests < wanted:
            await turns(1)
    await turns(30)


def same(setup: Setup, number: int = 2) -> None:
    """The version answers as version 1 does."""
    setup.bench.behaviour(version(number)).answers = 1


def test_a_version_that_agrees_goes_on_and_callers_never_got_it(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        same(setup)
        await setup.begun()
        assert (setup.phase, setup.rollout.percent) == ("shadowing", 0.0)
        await compared(setup, 20)
        assert setup.phase == "done"
        phases = [event.phase for event in setup.bench.of(RolloutChanged)]
        assert phases == ["shadowing", "done"]
        evidence = setup.bench.of(RolloutChanged)[-1].evidence["shadow"]
        assert (evidence["requests"], evidence["agreement"], evidence["differ"]) == (20, 1.0, 0)
        assert await setup.ask() == ["2"]

    conducted(tmp_path, test, POLICY)


def test_a_shadow_goes_before_a_canary_and_a_watch(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        same(setup)
        await setup.begun()
        await compared(setup, 20)
        assert setup.phase == "canary 50 %"
        while setup.phase != SERVED:
            await setup.ask()
        phases = [event.phase for event in setup.bench.of(RolloutChanged)]
        assert phases == ["shadowing", "canary 50 %", SERVED]

    conducted(tmp_path, test, {**POLICY, "watch": 60, "canary": {"steps": [50], "every": 0, "requests": 20}})


def test_a_version_that_disagrees_is_refused_with_its_evidence(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        while setup.phase == "shadowing":
            await compared(setup, 1)
        assert setup.phase == "refused"
        found = setup.aliases.find("iris", "champion")
        assert found is not None
        assert (found.error or "").endswith("agreement 0.0000, wanted 0.9; certain before 20 requests")
        evidence = setup.bench.of(RolloutChanged)[-1].evidence["shadow"]
        assert evidence["differ"] == evidence["requests"] < 20  # no need to wait for all
        assert all(len(example) == 32 for example in evidence["examples"])
        assert evidence["reference"] == "same requests"
        (observation,) = [one for one in setup.found if one.verdict is not None]
        assert observation.verdict is not None
        assert observation.verdict.outcome == "refused"
        assert set(await setup.ask(5)) == {"1"}

    conducted(tmp_path, test, POLICY)


@pytest.mark.parametrize("error", [None, "KeyError: x"])
def test_an_input_that_is_repeated_is_no_early_proof(tmp_path: Path, error: str | None) -> None:
    async def test(setup: Setup) -> None:
        rollout = await setup.begun()
        setup.fails(2, error)
        await compared(setup, 19, row=7.0)
        assert setup.phase == "shadowing"
        await compared(setup, 1, row=7.0)
        assert setup.phase == "refused"
        assert "20 of 20 requests got another answer" in (rollout.course.reason or "")
        assert "certain" not in (rollout.course.reason or "")
        assert len(setup.bench.of(RolloutChanged)[-1].evidence["shadow"]["examples"]) == 1

    conducted(tmp_path, test, POLICY)


def test_a_version_that_fails_on_copies_is_refused_and_no_caller_sees_it(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        same(setup)
        await setup.begun()
        setup.fails(2, "KeyError: secret value 17")
        while setup.phase == "shadowing":
            await compared(setup, 1)
        assert setup.phase == "refused"
        evidence = setup.bench.of(RolloutChanged)[-1].evidence["shadow"]
        assert evidence["errors"] == {"KeyError": evidence["failed"]}  # without the data
        assert evidence["failed"] < 20

    conducted(tmp_path, test, POLICY)


@pytest.mark.parametrize(("thin", "phase"), [("hold", "held"), ("refuse", "refused")])
def test_promise_12_too_few_copies_never_pass(tmp_path: Path, thin: str, phase: str) -> None:
    async def test(setup: Setup) -> None:
        same(setup)
        rollout = await setup.begun()
        await compared(setup, 5)
        setup.bench.clock.now += 3601
        rollout.changed.set()
        await turns(50)
        assert setup.phase == phase
        assert "too little traffic: 5 of 20 copies were compared" in (rollout.course.reason or "")
        assert set(await setup.ask(30)) == {"1"}
        if phase == "held":
            found = setup.aliases.find("iris", "champion")
            assert found is not None
            setup.aliases.orders.give(found, "resume")
            await turns(50)
            await compared(setup, 15)  # what was compared before counts
            assert setup.phase == "done"

    conducted(tmp_path, test, {**POLICY, "thin": thin})


def test_a_version_that_hangs_drops_its_own_copies_and_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        behaviour = setup.bench.behaviour(version(2))
        behaviour.hold_predict = asyncio.Event()
        assert set(await setup.ask(QUEUE + 40)) == {"1"}
        shadow = setup.rollout.shadow
        assert shadow is not None
        assert shadow.shed > 0
        assert shadow.requests == 0
        while not shadow.late:  # until its deadline passes
            await turns(1)
        assert set(await setup.ask(10)) == {"1"}
        assert setup.phase == "shadowing"
        behaviour.hold_predict.set()

    conducted(tmp_path, test, {"shadow": {**SHADOW, "deadline": 0.05}})


def test_copies_go_one_by_one_and_only_while_the_version_in_service_is_idle(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        same(setup)
        await setup.begun()
        service, candidate = (setup.bench.behaviour(version(number)) for number in (1, 2))
        shadow = setup.rollout.shadow
        assert shadow is not None
        service.hold_predict = asyncio.Event()
        waits = asyncio.create_task(setup.ask())
        await turns(20)
        before = len(candidate.calls)
        for _ in range(QUEUE + 5):
            shadow.offer(RawInput("instances", [[1.0]]), None, Tensors({"": np.ones(1)}, 1), memory=10)
        for _ in range(20):  # the version in service has a request all the time
            await asyncio.sleep(module.LOOK_EVERY)
        assert len(candidate.calls) == before
        assert shadow.shed == 5
        candidate.hold_predict = asyncio.Event()
        service.hold_predict.set()
        while len(candidate.calls) == before:
            await turns(1)
        await turns(50)
        assert len(candidate.calls) == before + 1  # the next one waits until this one is answered
        candidate.hold_predict.set()
        assert await waits == ["1"]
        while setup.phase == "shadowing":
            await turns(1)
        assert set(candidate.calls[before:]) == {1}

    conducted(tmp_path, test, POLICY)


def test_processes_of_the_candidate_give_way_until_the_shadow_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_way = giving_way(monkeypatch)

    async def test(setup: Setup) -> None:
        same(setup)
        await setup.begun()
        await compared(setup, 20)
        assert setup.phase == "done"
        assert given_way == [[], [7], []]

    conducted(tmp_path, test, POLICY)


def test_processes_give_way_no_longer_when_another_alias_serves_the_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_way = giving_way(monkeypatch)

    async def test(setup: Setup) -> None:
        same(setup)
        await setup.begun()
        await compared(setup, 5)
        assert given_way == [[], [7]]
        setup.bench.manager.serves(version(2), True)
        assert given_way == [[], [7], []]  # at once: no copy is needed
        await compared(setup, 15)
        assert given_way == [[], [7], []]

    conducted(tmp_path, test, POLICY)


def test_processes_give_way_no_longer_when_a_caller_names_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_way = giving_way(monkeypatch)
    held = asyncio.Event()

    async def test(setup: Setup) -> None:
        same(setup)
        await setup.begun()
        await compared(setup, 5)
        assert given_way == [[], [7]]
        setup.bench.behaviour(version(2)).hold_predict = held
        direct = asyncio.ensure_future(setup.ask(1, reference=Reference("iris", version="2")))
        await turns(5)
        assert given_way == [[], [7], []]  # while the caller waits
        held.set()
        assert await direct == ["2"]
        await compared(setup, 5)
        assert given_way == [[], [7], []]  # the next caller may come at any moment
        monkeypatch.setattr(priority, "QUIET", 0.0)
        await compared(setup, 5)
        assert given_way == [[], [7], [], [7]]

    conducted(tmp_path, test, POLICY)


@pytest.mark.parametrize("isolation", ["pack", "inline"])
def test_processes_that_other_models_use_do_not_give_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolation: str
) -> None:
    given_way = giving_way(monkeypatch)
    monkeypatch.setattr(ControlledRunner, "isolation", isolation)

    async def test(setup: Setup) -> None:
        same(setup)
        await setup.begun()
        await compared(setup, 20)
        assert given_way == [[]]

    conducted(tmp_path, test, POLICY)


def test_a_crash_loop_in_the_shadow_refuses(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        for _ in range(3):
            setup.aliases.notice(Crashed("iris", "2", "crashed", "signal 11"))
        await turns(50)
        assert (setup.phase, setup.course) == ("refused", "refused")
        assert set(await setup.ask(10)) == {"1"}

    conducted(tmp_path, test, POLICY)


def test_crashes_with_copies_answered_in_between_are_no_loop(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        same(setup)
        await setup.begun()
        for _ in range(10):
            setup.aliases.notice(Crashed("iris", "2", "crashed", "signal 11"))
            await compared(setup, 1)
        assert setup.phase == "shadowing"

    conducted(tmp_path, test, POLICY)


@pytest.mark.parametrize(
    ("error", "dropped"),
    [(RunnerTimeout("the model did not answer within 1 s"), "late"), (NoProcess("it starts again"), "shed")],
)
def test_a_model_that_is_stopped_at_its_own_timeout_drops_its_copies_and_is_no_crash_loop(
    tmp_path: Path, error: Exception, dropped: str
) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        setup.bench.behaviour(version(2)).ends_predict = error
        shadow = setup.rollout.shadow
        assert shadow is not None
        for times in range(1, 6):
            assert await setup.ask() == ["1"]
            while getattr(shadow, dropped) < times:
                await turns(1)
            setup.aliases.notice(Crashed("iris", "2", "timeout", str(error)))
            await turns(20)
        assert (setup.phase, shadow.requests) == ("shadowing", 0)
        setup.bench.clock.now += 3601
        setup.rollout.changed.set()
        await turns(50)
        assert setup.phase == "held"  # too few answers: no pass, and no refusal
        what = "not answered in time" if dropped == "late" else "dropped"
        assert f"5 {what}" in (setup.rollout.course.reason or "")

    conducted(tmp_path, test, POLICY)


def test_a_version_that_hangs_on_some_copies_does_not_pass(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        same(setup)
        await setup.begun()
        shadow = setup.rollout.shadow
        assert shadow is not None
        hanging = setup.bench.behaviour(version(2))
        for times in range(1, shadow.policy.requests + 1):
            hanging.ends_predict = RunnerTimeout("the model did not answer within 1 s")
            await setup.ask()
            while shadow.late < times:
                await turns(1)
            hanging.ends_predict = None
            await compared(setup, 1)
        await turns(50)
        assert (setup.phase, shadow.requests) == ("shadowing", shadow.policy.requests)
        setup.bench.clock.now += 3601
        setup.rollout.changed.set()
        await turns(50)
        assert setup.phase == "held"
        count = shadow.policy.requests
        assert f"{count} of {2 * count} copies had no answer in time" in (setup.rollout.course.reason or "")

    conducted(tmp_path, test, POLICY)


def test_the_share_of_a_promotion_overrides_that_of_the_policy(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        same(setup)
        setup.say("1")
        await setup.ask()
        setup.aliases.conductor.courses.plan("iris", "champion", "2", None, 0.5)
        setup.say(Alias("2", last_good="1"))
        await turns(50)
        assert setup.phase == "shadowing"
        assert setup.rollout.step_view()["percent"] == 50
        await setup.restart()
        assert await setup.ask() == ["1"]
        await turns(50)
        assert setup.phase == "shadowing"
        assert setup.rollout.step_view()["percent"] == 50

    conducted(tmp_path, test, {})


@pytest.mark.parametrize(("verb", "phase"), [("finish", "done"), ("abort", "rolled_back")])
def test_a_person_ends_a_shadow(tmp_path: Path, verb: str, phase: str) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        found = setup.aliases.find("iris", "champion")
        assert found is not None
        setup.aliases.orders.give(found, "pause")
        await setup.ask(5)
        assert setup.rollout.shadow is not None
        assert not setup.rollout.shadow.requests
        setup.aliases.orders.give(found, verb)
        await turns(50)
        assert setup.phase == phase

    conducted(tmp_path, test, POLICY)


def test_what_is_too_large_or_too_much_is_not_copied(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        rollout = await setup.begun()
        shadow = Shadow(version(2), version(1), Policy(), setup.bench.manager, changed=rollout.changed.set)
        answer, raw = Tensors({"": np.zeros(1)}, 1), RawInput("instances", [[1.0]])
        shadow.offer(None, None, answer, memory=10)
        shadow.offer(raw, None, answer, memory=MAX_REQUEST + 1)
        shadow.offer(raw, None, Tensors({"": np.zeros(MAX_ANSWER)}, 1), memory=10)
        shadow.offer(raw, None, Tensors({"": np.zeros(2000)}, 2000), memory=10)
        assert (shadow.large, shadow.shed) == (4, 0)
        for _ in range(10):  # small as they were sent, and large in memory
            shadow.offer(raw, None, answer, memory=MAX_WAITING // 8)
        assert shadow.shed == 3
        for _ in range(QUEUE):
            shadow.offer(raw, None, answer, memory=0)
        assert shadow.shed == 3 + 7

    conducted(tmp_path, test, POLICY)


@pytest.mark.parametrize(
    "answer",
    [
        Value([[0.5] * 10_000], 1),
        Value({"scores": [[0.5] * 100] * 100}),
        Value("x" * (MAX_ANSWER + 1)),
        Columns({"vector": np.array([[0.5] * 10_000, None], object)[:1]}, 1),
    ],
    ids=["lists", "nested", "text", "cells"],
)
def test_a_large_answer_is_not_copied_in_any_form(tmp_path: Path, answer: Batch) -> None:
    async def test(setup: Setup) -> None:
        rollout = await setup.begun()
        shadow = Shadow(version(2), version(1), Policy(), setup.bench.manager, changed=rollout.changed.set)
        shadow.offer(RawInput("instances", [[1.0]]), None, answer, memory=10)
        assert (shadow.large, shadow.shed) == (1, 0)

    conducted(tmp_path, test, POLICY)


def test_answers_that_wait_count_too(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        rollout = await setup.begun()
        shadow = Shadow(version(2), version(1), Policy(), setup.bench.manager, changed=rollout.changed.set)
        for _ in range(QUEUE):
            answer = Value([[0.5] * 6000], 1)  # just not too large
            shadow.offer(RawInput("instances", [[1.0]]), None, answer, memory=MAX_ANSWER)
        assert QUEUE * 0.4 < shadow.shed < QUEUE * 0.6

    conducted(tmp_path, test, POLICY)


def test_answers_are_not_compared_on_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[int] = set()

    def compare(answer: Batch, reference: Batch, tolerance: float) -> Compared:
        threads.add(threading.get_ident())
        return agreement.compare(answer, reference, tolerance)

    monkeypatch.setattr(module, "compare", compare)

    async def test(setup: Setup) -> None:
        await setup.begun()
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))  # a real thread
        await compared(setup, 1)
        assert threads
        assert threading.get_ident() not in threads

    conducted(tmp_path, test, POLICY)


def test_a_share_copies_that_part_of_the_requests(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        rollout = await setup.begun()
        shadow = Shadow(
            version(2), version(1), Policy(share=0.25), setup.bench.manager, changed=rollout.changed.set
        )
        for _ in range(2000):
            shadow.offer(None, None, Tensors({"": np.zeros(1)}, 1), memory=10)
        assert 400 < shadow.large < 600

    conducted(tmp_path, test, POLICY)
