"""The watch after a swap: what brings the version before back, what ends the watch, and what it costs."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import Problem
from gateway.events import Crashed, RolloutChanged, Swapped
from gateway.record import RequestRecord
from gateway.registries.base import Alias, Verdict
from gateway.rollout_settings import RolloutPolicy
from gateway.rollouts.alias import LiveAlias
from gateway.rollouts.phases import Phase
from gateway.rollouts.rollout import SERVED, Rollout
from gateway.service import Inference
from loaders.enforcement import RawInput
from tests.support.controlled import MB, turns, version
from tests.support.rollouts import CHAMPION, Setup, conducted

WATCH = {"watch": "10m"}
NO_RETRY = {"watch": "10m", "canary": {"retry": False}}


async def swapped(setup: Setup, before: int = 300) -> Rollout:
    """Version 1 has answered some requests, and version 2 has taken its place a moment ago."""
    setup.say("1")
    await setup.ask(before)
    setup.say(Alias("2", previous=(), last_good="1"))
    await turns(50)
    assert await setup.ask() == ["2"]
    return setup.rollout


def alias(setup: Setup) -> LiveAlias:
    found = setup.aliases.find("iris", "champion")
    assert found is not None
    return found


def test_the_version_before_stays_loaded_until_the_watch_is_over(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        rollout = await swapped(setup)
        assert setup.phase == SERVED
        assert not alias(setup).diverged
        before = setup.bench.manager.find(version(1))
        assert before is not None
        assert setup.bench.ledger[before].pins == 1
        assert set(await setup.ask(100)) == {"2"}
        assert alias(setup).last_good == version(1)  # version 2 has not proved itself yet
        setup.bench.clock.now += 601
        rollout.changed.set()
        await turns(50)
        assert (setup.phase, setup.course) == ("done", "done")
        assert setup.bench.ledger[before].pins == 0
        await setup.ask()
        assert alias(setup).last_good == version(2)
        phases = [(event.version, event.phase) for event in setup.bench.of(RolloutChanged)]
        assert phases == [("2", SERVED), ("2", "done")]

    conducted(tmp_path, test, WATCH)


def test_a_version_that_fails_after_the_swap_is_rolled_back_and_no_caller_sees_it(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await swapped(setup)
        setup.fails(2)
        answered = await setup.ask(40)
        assert set(answered) == {"1"}  # the version before answered what version 2 could not
        assert setup.phase == "rolled_back"
        found = alias(setup)
        assert (found.serving, found.desired, found.last_good) == (version(1), version(2), version(1))
        assert found.diverged
        assert "errors: " in (found.error or "")
        assert setup.bench.manager.find(version(2)) is None  # its process ends
        (observation,) = [one for one in setup.found if one.verdict is not None]
        assert observation.verdict is not None
        assert (observation.verdict.outcome, observation.last_good) == ("rolled_back", "1")
        evidence = setup.bench.of(RolloutChanged)[-1].evidence
        assert evidence["reference"] == "before"
        assert (evidence["felt"], evidence["service"]["requests"]) == (0, 299)  # not the one that loaded it
        assert evidence["retried"] == evidence["candidate"]["errors"] < 20
        reason = next(served.reason for served in found.history if served.version == "2")
        assert reason is not None
        assert reason.startswith("rolled back: errors: ")
        assert [event.version for event in setup.bench.of(Swapped)] == ["1", "2", "1"]

    conducted(tmp_path, test, WATCH)


def test_a_rollback_survives_a_restart_and_the_version_is_not_tried_again(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await swapped(setup)
        setup.fails(2)
        await setup.ask(40)
        setup.fails(2, None)
        starts = setup.bench.behaviour(version(2)).starts
        await setup.restart()  # the registry could not be told
        assert setup.phase == "rolled_back"
        assert set(await setup.ask(30)) == {"1"}
        assert setup.bench.behaviour(version(2)).starts == starts
        setup.say(Alias("3", last_good="1"))
        await turns(50)
        assert await setup.ask() == ["3"]
        setup.say(Alias("2", previous=("3", "1"), last_good="1"))  # the alias moves to it again
        await turns(50)
        assert await setup.ask() == ["2"]
        assert setup.phase == SERVED

    conducted(tmp_path, test, WATCH)


def test_a_restart_goes_on_with_the_watch_and_its_reference(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await swapped(setup)
        await setup.restart()
        assert setup.phase == SERVED
        assert setup.bench.manager.is_ready(version(1))  # loaded again, to go back to
        assert await setup.ask(3) == ["2", "2", "2"]
        assert setup.rollout.evidence()["service"]["requests"] == 299
        setup.fails(2)
        assert set(await setup.ask(40)) == {"1"}
        assert setup.phase == "rolled_back"

    conducted(tmp_path, test, WATCH)


def test_a_restart_between_the_last_step_and_the_swap_watches(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        course = setup.rollout.course
        setup.aliases.conductor.courses.save("iris", "champion", course.to(Phase.WATCHING, 0.0))
        await setup.restart()
        assert await setup.ask(30) == ["2"] * 30  # no step is made again
        assert setup.phase == SERVED

    conducted(tmp_path, test, {**WATCH, "canary": {"steps": [20], "every": 0, "requests": 1000}})


def test_a_watch_follows_the_last_step_of_a_canary(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        while setup.phase != SERVED:
            await setup.ask()
        assert setup.rollout.evidence()["service"]["requests"] > 20  # recorded next to the canary
        setup.fails(2)
        assert set(await setup.ask(60)) == {"1"}
        assert setup.phase == "rolled_back"
        phases = [event.phase for event in setup.bench.of(RolloutChanged)]
        assert phases == ["canary 50 %", SERVED, "rolled_back"]

    conducted(tmp_path, test, {**WATCH, "canary": {"steps": [50], "every": 0, "requests": 100}})


@pytest.mark.parametrize(("times", "what"), [(3, "crashed"), (1, "quarantined")])
def test_a_crash_loop_rolls_back(tmp_path: Path, times: int, what: str) -> None:
    async def test(setup: Setup) -> None:
        await swapped(setup, before=0)  # nothing to compare with
        for _ in range(times):
            assert setup.phase == SERVED
            setup.aliases.notice(Crashed("iris", "2", what, "signal 11"))
            await turns(20)
        assert setup.phase == "rolled_back"
        assert "crash loop: " in (alias(setup).error or "")
        assert set(await setup.ask(10)) == {"1"}

    conducted(tmp_path, test, WATCH)


def test_crashes_with_answers_in_between_are_no_loop(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await swapped(setup)
        for _ in range(10):
            setup.aliases.notice(Crashed("iris", "2", "crashed", "signal 9"))
            assert await setup.ask() == ["2"]
        assert setup.phase == SERVED

    conducted(tmp_path, test, WATCH)


@pytest.mark.parametrize("what", ["timeout", "moved", "recycled"])
def test_a_process_that_ended_for_another_reason_than_a_crash_is_no_loop(tmp_path: Path, what: str) -> None:
    async def test(setup: Setup) -> None:
        await swapped(setup)
        for _ in range(5):
            setup.aliases.notice(Crashed("iris", "2", what, "the model did not answer within 1 s"))
            await turns(20)
        assert setup.phase == SERVED  # the guards count the requests

    conducted(tmp_path, test, WATCH)


def test_without_a_policy_a_crash_loop_soon_after_the_swap_rolls_back(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        setup.say("1")
        await setup.ask()
        setup.say(Alias("2", last_good="1"))
        await turns(50)
        assert await setup.ask() == ["2"]
        assert alias(setup).observer is None  # nothing is recorded
        for _ in range(4):
            setup.aliases.notice(Crashed("iris", "2", "crashed", "signal 11"))
        assert await setup.ask() == ["2"]
        setup.aliases.notice(Crashed("iris", "2", "quarantined", "signal 11"))
        setup.bench.manager.quarantine(version(2), "signal 11")
        assert set(await setup.ask(10)) == {"1"}
        assert (setup.phase, setup.course) == ("rolled_back", "rolled_back")
        (observation,) = [one for one in setup.found if one.verdict is not None]
        assert observation.last_good == "1"
        await setup.restart()
        assert set(await setup.ask(10)) == {"1"}

    conducted(tmp_path, test, {})


def test_a_version_that_serves_again_keeps_its_reference(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await swapped(setup)
        setup.say(Alias("1", last_good="1"))
        await turns(50)
        await setup.ask(3)
        setup.say(Alias("3", previous=("1",), last_good="1"))
        await turns(50)
        assert await setup.ask() == ["3"]
        assert setup.rollout.evidence()["service"]["requests"] == 302

    conducted(tmp_path, test, WATCH)


def test_without_a_reference_a_version_that_fails_always_does_not_pass(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await swapped(setup, before=1)
        setup.fails(2)
        assert set(await setup.ask(40)) == {"1"}
        assert setup.phase == "rolled_back"

    conducted(tmp_path, test, WATCH)


def test_an_input_that_no_version_can_answer_says_nothing_about_the_new_one(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await swapped(setup)
        for number in (1, 2):
            setup.fails(number)
        for _ in range(100):
            with contextlib.suppress(Problem):
                await setup.ask()
        assert setup.phase == SERVED

    conducted(tmp_path, test, WATCH)


def test_without_retry_callers_see_what_fails_until_the_guard_knows(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await swapped(setup)
        setup.fails(2)
        failures = 0
        while setup.phase != "rolled_back":
            with contextlib.suppress(Problem):
                await setup.ask()
                continue
            failures += 1
            assert failures < 20
        assert setup.bench.of(RolloutChanged)[-1].evidence["felt"] == failures > 0

    conducted(tmp_path, test, NO_RETRY)


@pytest.mark.parametrize(
    ("verb", "phase", "serves"), [("finish", "done", "2"), ("abort", "rolled_back", "1")]
)
def test_a_person_ends_a_watch(tmp_path: Path, verb: str, phase: str, serves: str) -> None:
    async def test(setup: Setup) -> None:
        await swapped(setup)
        setup.aliases.orders.give(alias(setup), verb)
        await turns(50)
        assert setup.phase == phase
        assert set(await setup.ask(10)) == {serves}

    conducted(tmp_path, test, WATCH)


def test_a_rollback_by_a_person_ends_the_watch_and_is_not_watched(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await swapped(setup)
        setup.say(Alias("1", last_good="1"))
        await turns(50)
        assert (setup.phase, setup.course) == ("done", "done")
        assert [(one["version"], one["phase"]) for one in setup.earlier] == [("2", "superseded")]
        assert set(await setup.ask(10)) == {"1"}
        assert setup.found == []

    conducted(tmp_path, test, WATCH)


def test_flapping_faster_than_a_load_watches_only_the_last_version(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await swapped(setup)
        starts = setup.bench.behaviour(version(3)).starts
        held = setup.bench.behaviour(version(3)).hold = asyncio.Event()
        for number in "32323":
            setup.say(Alias(number, previous=("1",), last_good="1"))
            await turns(3)
        assert set(await setup.ask(10)) == {"2"}  # what serves goes on
        held.set()
        await turns(50)
        assert await setup.ask() == ["3"]
        assert setup.rollout.candidate == version(3)
        assert setup.bench.behaviour(version(3)).starts - starts <= 3
        assert setup.course == "watching"

    conducted(tmp_path, test, WATCH)


ALL_PHASES = {
    "shadow": {"share": 1.0, "requests": 10, "agreement": 0.9, "within": "1h"},
    "canary": {"steps": [50], "every": 0, "requests": 20, "within": "1h"},
    "watch": "10m",
}


@pytest.mark.parametrize("stop", ["shadowing", "paused", "held", "canary 50 %", SERVED, "rolled_back"])
def test_a_restart_in_each_phase_resumes_it_and_skips_none(
    tmp_path: Path, stop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.rollouts.shadow.AFTER_ANSWER", 0.0)

    async def until(setup: Setup, phase: str) -> None:
        while setup.phase != phase:
            with contextlib.suppress(Problem):
                await setup.ask()
            await turns(20)

    async def test(setup: Setup) -> None:
        setup.bench.behaviour(version(2)).answers = 1  # it agrees with version 1
        await setup.begun()
        assert setup.phase == "shadowing"
        wanted = [phase for phase in ("shadowing", "canary 50 %", SERVED) if phase != "shadowing"]
        if stop == "held":
            setup.bench.clock.now += 3601
            setup.rollout.changed.set()
            await turns(50)
        elif stop == "paused":
            setup.aliases.orders.give(alias(setup), "pause")
        elif stop == "rolled_back":
            await until(setup, SERVED)
            setup.fails(2)
            await until(setup, stop)
            setup.fails(2, None)
        else:
            await until(setup, stop)
        before = setup.phase
        await setup.restart()
        await setup.ask()
        await turns(100)
        assert setup.phase == before
        if stop == "rolled_back":
            assert set(await setup.ask(20)) == {"1"}
            return
        if stop in ("held", "paused"):
            assert set(await setup.ask(30)) == {"1"}
            setup.aliases.orders.give(alias(setup), "resume")
            await turns(50)
        began = len(setup.bench.of(RolloutChanged))
        await until(setup, SERVED)
        later = [event.phase for event in setup.bench.of(RolloutChanged)][began:]
        assert later == wanted[wanted.index(before) + 1 :] if before in wanted else later == wanted

    conducted(tmp_path, test, ALL_PHASES)


def test_a_promotion_during_a_watch_watches_the_newer_version(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await swapped(setup)
        await setup.ask(50)
        setup.say(Alias("3", previous=("2", "1"), last_good="1"))
        await turns(50)
        assert await setup.ask() == ["3"]
        assert setup.rollout.service == version(2)
        assert setup.rollout.evidence()["service"]["requests"] == 51  # version 2 was recorded meanwhile
        phases = [(event.version, event.phase) for event in setup.bench.of(RolloutChanged)]
        assert phases == [("2", SERVED), ("2", "superseded"), ("3", SERVED)]

    conducted(tmp_path, test, WATCH)


def test_the_verdict_of_another_gateway_ends_a_watch(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await swapped(setup)
        verdict = Verdict("2", "rolled_back", "errors: 9 of 90 against 0 of 900")
        setup.say(Alias("2", last_good="1", verdict=verdict))
        await turns(50)
        assert (setup.phase, setup.course) == ("rolled_back", "rolled_back")
        assert set(await setup.ask(10)) == {"1"}

    conducted(tmp_path, test, WATCH)


def test_an_alias_deleted_during_a_watch_ends(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await swapped(setup)
        setup.say(None)
        await turns(50)
        assert setup.course == "superseded"
        with pytest.raises(Problem, match="has no alias champion"):
            await setup.ask()

    conducted(tmp_path, test, WATCH)


def test_under_memory_pressure_both_versions_stay(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await swapped(setup)
        lease = setup.bench.manager.lease(version(3))
        with pytest.raises(Problem) as refused:
            await setup.bench.manager.ready(lease)
        assert refused.value.code == "CAPACITY_EXCEEDED"
        assert setup.bench.manager.is_ready(version(1))
        assert setup.bench.manager.is_ready(version(2))

    conducted(tmp_path, test, WATCH, limit=25 * MB)


def test_a_version_before_that_the_operator_unloads_goes_and_comes_back_for_a_rollback(
    tmp_path: Path,
) -> None:
    async def test(setup: Setup) -> None:
        rollout = await swapped(setup)
        setup.bench.manager.retire(version(1), "unloaded")
        rollout.changed.set()
        await turns(50)
        assert setup.bench.manager.find(version(1)) is None
        setup.fails(2)
        assert set(await setup.ask(40)) == {"1"}
        assert setup.phase == "rolled_back"

    conducted(tmp_path, test, WATCH)


def test_a_policy_with_a_watch_records_from_the_moment_it_says_so(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        setup.say("1")
        await setup.ask(5)
        assert alias(setup).observer is None
        setup.policy = RolloutPolicy.model_validate(WATCH)
        alias(setup).said = {"watch": "another"}  # what the registry said before
        setup.say("1")
        await setup.ask(5)
        assert alias(setup).in_service is not None
        setup.policy = RolloutPolicy()
        alias(setup).said = {"watch": "another"}
        setup.say("1")
        assert alias(setup).observer is None

    conducted(tmp_path, test, {})


def test_a_version_that_never_answers_does_not_keep_callers_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.rollouts.rollout.PATIENCE_SECONDS", 0.02)
    monkeypatch.setattr("gateway.rollouts.rollout.PATIENCE_TIMES", 1.0)

    async def test(setup: Setup) -> None:
        await swapped(setup)
        behaviour: Any = setup.bench.behaviour(version(2))
        behaviour.hold_predict = asyncio.Event()
        assert set(await setup.ask(20)) == {"1"}
        assert setup.phase == "rolled_back"
        behaviour.hold_predict.set()

    conducted(tmp_path, test, WATCH)


class Rows(list[list[float]]):
    """Rows of a request that a test can wait to see freed."""


@pytest.mark.parametrize("policy", [WATCH, {}])
def test_a_recorded_request_keeps_only_its_typed_rows_while_it_waits(
    tmp_path: Path, policy: dict[str, Any]
) -> None:
    async def test(setup: Setup) -> None:
        setup.say("1")
        await setup.ask()
        setup.bench.behaviour(version(1)).hold_predict = held = asyncio.Event()
        rows = Rows([[1.0]])
        freed = weakref.ref(rows)
        inference = Inference(CHAMPION, RawInput("instances", rows), record=RequestRecord(b"1"))
        asked = asyncio.ensure_future(setup.service.predict(inference))
        del rows
        await turns(20)
        assert not asked.done()
        assert freed() is None
        held.set()
        await asked

    conducted(tmp_path, test, policy)
