"""Rollouts in steps: who answers whom, when a step ends, and what each surprise does to a canary."""

from __future__ import annotations

import contextlib
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.access.principal import ANONYMOUS, EVERYTHING, Principal
from gateway.errors import Problem
from gateway.events import RolloutChanged
from gateway.record import RequestRecord
from gateway.registries.base import Alias, Verdict
from gateway.rollout_settings import RolloutPolicy
from gateway.rollouts import guards
from gateway.rollouts.phases import Phase
from gateway.service import Inference
from gateway.serving.servable import Status
from loaders.enforcement import RawInput
from tests.support.controlled import MB, turns, version
from tests.support.rollouts import CHAMPION, STEPS, Setup, conducted, stepped


def test_an_identical_version_completes_its_steps(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        assert setup.phase == "canary 20 %"
        answered = await setup.ask(400)
        assert setup.phase == "done"
        assert answered[-1] == "2"
        assert [one for one in setup.found if one.verdict is not None] == []
        shares = [event.phase for event in setup.bench.of(RolloutChanged)]
        assert shares == ["canary 20 %", "canary 50 %", "done"]
        assert set(setup.arms) == {"candidate", "service"}
        assert await setup.ask(3) == ["2", "2", "2"]
        assert setup.arms.count("candidate") == 40  # 20 in each step, and none after the last

    conducted(tmp_path, test)


def test_a_caller_keeps_its_version_within_a_step_and_stays_in(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        rollout = await setup.begun()
        inside = [str(n) for n in range(200) if rollout.takes(str(n))]
        assert 20 < len(inside) < 60
        for _ in range(3):
            assert await setup.ask(key=inside[0]) == ["2"]
        await setup.ask(200)
        assert setup.phase in ("canary 50 %", "done")

    conducted(tmp_path, test, {"canary": {**STEPS["canary"], "requests": 30}})


def test_a_caller_is_named_by_the_header_of_the_policy(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        rollout = await setup.begun()
        assert rollout.caller({b"x-user-id": b"anna"}, "1") == rollout.caller({b"x-user-id": b"anna"}, "2")
        assert rollout.caller({}, "1") == "1"
        assert rollout.caller({}, "1", "token:anna") == "1"

    conducted(tmp_path, test, {"canary": {**STEPS["canary"], "key": "X-User-Id"}})


def test_a_caller_is_known_by_the_credential(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        rollout = await setup.begun()
        named = {b"principal": b"mallory"}  # a header of that name says nothing
        assert rollout.caller(named, "1", "token:anna") == rollout.caller({}, "2", "token:anna")
        assert rollout.caller(named, "1") == "1"
        anna = Principal("anna", "token", predict=EVERYTHING)
        mine = next(name for name in map(str, range(100)) if rollout.takes(f"token:{name}"))
        for principal, versions in ((replace(anna, name=mine), {"2"}), (ANONYMOUS, {"1", "2"})):
            answered = set()
            for number in range(40):
                record = RequestRecord(f"id-{number}".encode(), principal=principal)
                row = RawInput("instances", [[1.0]])
                await setup.service.predict(Inference(CHAMPION, row, record=record))
                assert record.version is not None
                answered.add(record.version.version)
            assert answered == versions

    conducted(tmp_path, test, {"canary": {**STEPS["canary"], "key": "principal", "requests": 1000}})


def test_a_version_that_fails_is_taken_back_and_no_caller_sees_it(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        setup.fails(2)
        answered = await setup.ask(300)
        assert set(answered) == {"1"}  # what failed on version 2 was answered by version 1
        assert setup.phase == "rolled_back"
        found = setup.aliases.find("iris", "champion")
        assert found is not None
        assert found.diverged
        assert "errors: " in (found.error or "")
        assert setup.bench.manager.find(version(2)) is None  # its process ends
        (observation,) = [one for one in setup.found if one.verdict is not None]
        assert observation.verdict is not None
        assert (observation.verdict.outcome, observation.last_good) == ("rolled_back", "1")
        evidence = setup.bench.of(RolloutChanged)[-1].evidence
        assert evidence["felt"] == 0
        assert evidence["retried"] == evidence["candidate"]["errors"] > 0
        assert evidence["reference"] == "same minutes"

    conducted(tmp_path, test, {"canary": {**STEPS["canary"], "requests": 1000}})


def test_without_retry_callers_see_what_fails_until_the_guard_knows(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        setup.fails(2)
        failures = 0
        while setup.phase != "rolled_back":
            with contextlib.suppress(Problem):
                await setup.ask()
                continue
            failures += 1
            assert failures < 40
        assert setup.bench.of(RolloutChanged)[-1].evidence["felt"] == failures > 0

    conducted(tmp_path, test, {"canary": {**STEPS["canary"], "requests": 1000, "retry": False}})


def test_promise_12_too_little_traffic_holds(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        rollout = await setup.begun()
        await setup.ask(5)
        setup.bench.clock.now += 3601
        rollout.changed.set()
        await turns(50)
        assert setup.phase == "held"
        assert "too little traffic" in (rollout.course.reason or "")
        await setup.ask(200)
        assert setup.phase == "held"  # a person decides
        found = setup.aliases.find("iris", "champion")
        assert found is not None
        setup.aliases.orders.give(found, "finish")
        await turns(50)
        assert await setup.ask(2) == ["2", "2"]
        assert setup.course == "done"

    conducted(tmp_path, test)


def test_a_step_waits_while_a_guard_suspects_the_version_and_is_held_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(setup: Setup) -> None:
        rollout = await setup.begun()
        monkeypatch.setattr(guards, "SUSPICION", 0.0)  # any evidence is suspicious
        await setup.ask(200)
        assert setup.phase == "canary 20 %"
        view = rollout.step_view()
        assert view["requests"] >= view["requests_wanted"]
        assert view["waits"].endswith("allowed 1.25: evidence 0, proved from 450")
        setup.bench.clock.now += 3601
        rollout.changed.set()
        await turns(50)
        assert setup.phase == "held"
        assert (rollout.course.reason or "").startswith("not decided in 3601 s: latency: ")
        monkeypatch.setattr(guards, "SUSPICION", math.inf)
        setup.say_verb("resume")
        await turns(50)
        await setup.ask(400)
        assert setup.phase == "done"

    conducted(tmp_path, test)


def test_a_worse_version_passes_less_often_when_a_step_waits_and_an_equal_one_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = RolloutPolicy.model_validate({"canary": {"steps": [10], "every": 1, "requests": 100}})

    def passed(candidate: float) -> int:
        draw = random.Random(7)
        runs = [stepped(draw, policy=policy, rate=10, candidate=candidate) for _ in range(30)]
        assert {run.phase for run in runs} <= {Phase.DONE, Phase.ROLLED_BACK}
        return sum(run.phase is Phase.DONE for run in runs)

    waits, equal = passed(0.06), passed(0.001)
    monkeypatch.setattr(guards, "SUSPICION", math.inf)
    assert equal == 30
    assert waits + 3 < passed(0.06)


def test_promise_12_too_little_traffic_refuses_where_the_policy_says_so(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        rollout = await setup.begun()
        setup.bench.clock.now += 3601
        rollout.changed.set()
        await turns(50)
        assert setup.phase == "refused"
        assert (
            "too little traffic: 0 of 20 requests" in (setup.found[-1].verdict or Verdict("", "", "")).reason
        )
        assert set(await setup.ask(50)) == {"1"}

    conducted(tmp_path, test, {**STEPS, "thin": "refuse"})


@pytest.mark.parametrize(
    ("verb", "phase", "serves"), [("finish", "done", "2"), ("abort", "rolled_back", "1")]
)
def test_a_person_ends_a_rollout(tmp_path: Path, verb: str, phase: str, serves: str) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        found = setup.aliases.find("iris", "champion")
        assert found is not None
        setup.aliases.orders.give(found, verb)
        await turns(50)
        assert setup.phase == phase
        assert set(await setup.ask(30)) == {serves}
        with pytest.raises(Problem, match="no rollout of iris@champion is under way"):
            setup.aliases.orders.give(found, verb)

    conducted(tmp_path, test)


def test_a_paused_rollout_goes_on_where_it_was(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        rollout = await setup.begun()
        found = setup.aliases.find("iris", "champion")
        assert found is not None
        setup.bench.clock.now += 40
        setup.aliases.orders.give(found, "pause")
        setup.bench.clock.now += 10_000
        await setup.ask(300)
        assert setup.phase == "canary 20 %"
        assert rollout.seconds == 40
        setup.aliases.orders.give(found, "resume")
        setup.bench.clock.now += 20
        await setup.ask(1)
        rollout.changed.set()
        await turns(50)
        assert setup.phase == "canary 50 %"

    conducted(tmp_path, test, {"canary": {**STEPS["canary"], "every": 60}})


def test_a_promotion_supersedes_a_canary(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        setup.say(Alias("3", previous=("1",), last_good="1"))
        await turns(50)
        assert setup.rollout.candidate == version(3)
        phases = [(event.version, event.phase) for event in setup.bench.of(RolloutChanged)]
        assert phases == [("2", "canary 20 %"), ("2", "superseded"), ("3", "canary 20 %")]
        assert set(await setup.ask(60)) == {"1", "3"}

    conducted(tmp_path, test, {"canary": {**STEPS["canary"], "requests": 1000}})


def test_the_evidence_of_a_finished_rollout_stays_after_the_next_move_and_a_restart(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        while setup.phase != "done":
            await setup.ask()
        setup.say(Alias("1", last_good="2"))
        await turns(50)
        setup.say(Alias("3", previous=("1",), last_good="1"))
        await turns(50)
        setup.say(Alias("1", last_good="1"))
        await turns(50)
        await setup.restart()
        await setup.ask()
        assert (setup.phase, setup.course) == ("serving", "superseded")  # version 3 never served
        (one,) = setup.earlier
        assert (one["version"], one["compared_with"], one["phase"]) == ("2", "1", "done")
        assert one["evidence"]["candidate"]["requests"] >= 40
        assert [change["phase"] for change in one["changes"]] == ["canary", "canary", "done"]

    conducted(tmp_path, test)


def test_a_finished_rollout_is_done_after_a_restart(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        while setup.phase != "done":
            await setup.ask()
        await setup.restart()
        assert (await setup.ask(), setup.phase) == (["2"], "done")

    conducted(tmp_path, test)


def test_a_version_that_was_taken_back_is_tried_again_when_the_alias_comes_back_to_it(
    tmp_path: Path,
) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        setup.fails(2)
        await setup.ask(100)
        assert setup.phase == "rolled_back"
        setup.fails(2, None)
        for number in "12":  # by a registry that this gateway cannot write
            setup.say(Alias(number, last_good="1"))
            await turns(50)
        assert setup.phase == "canary 20 %"
        assert [one["phase"] for one in setup.earlier] == ["rolled_back"]

    conducted(tmp_path, test)


def test_moving_back_ends_a_canary(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        setup.say(Alias("1", last_good="1"))
        await turns(50)
        assert setup.course == "superseded"
        assert set(await setup.ask(30)) == {"1"}
        assert setup.phase == "serving"

    conducted(tmp_path, test)


def test_flapping_leaves_one_rollout(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        for number in "1232312":
            setup.say(Alias(number, last_good="1"))
            await turns(3)
        await turns(100)
        assert setup.rollout.candidate == version(2)
        assert set(await setup.ask(60)) == {"1", "2"}

    conducted(tmp_path, test, {"canary": {**STEPS["canary"], "requests": 1000}})


def test_a_deleted_alias_ends_its_canary(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        setup.say(None)
        await turns(50)
        assert setup.course == "superseded"
        with pytest.raises(Problem, match="has no alias champion"):
            await setup.ask()

    conducted(tmp_path, test)


def test_the_verdict_of_another_gateway_ends_a_canary(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        verdict = Verdict("2", "rolled_back", "errors: 9 of 90 against 0 of 900")
        setup.say(Alias("2", previous=("1",), last_good="1", verdict=verdict))
        await turns(50)
        assert (setup.phase, setup.course) == ("rolled_back", "rolled_back")
        assert set(await setup.ask(30)) == {"1"}

    conducted(tmp_path, test)


def test_a_verdict_on_a_version_that_serves_here_says_why_and_lets_it_take_its_steps_again(
    tmp_path: Path,
) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        setup.say_verb("finish")
        await turns(50)
        assert set(await setup.ask(10)) == {"2"}
        verdict = Verdict("2", "rolled_back", "a person aborted it")
        setup.say(Alias("2", last_good="1", verdict=verdict))
        await turns(50)
        assert set(await setup.ask(10)) == {"1"}
        found = setup.aliases.view("iris", "champion")
        assert found is not None
        assert (found.phase, found.error) == (
            "rolled_back", "version 2 was rolled back: a person aborted it",
        )  # fmt: skip
        assert [(served.version, served.reason) for served in found.history] == [
            ("1", "replaced by 2"),
            ("2", "rolled back: another gateway: a person aborted it"),
            ("1", None),
        ]
        setup.say(Alias("2", last_good="1"))  # a person promotes it again
        await turns(50)
        assert setup.phase == "canary 20 %"

    conducted(tmp_path, test)


def test_a_verdict_that_a_kill_kept_from_the_registry_is_written_after_the_restart(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        setup.say_verb("abort")
        await turns(50)
        setup.found.clear()  # it did not get there
        await setup.restart()
        assert [(one.version, one.last_good) for one in setup.found] == [("2", "1")]
        verdict = setup.found[0].verdict
        assert verdict is not None
        assert (verdict.outcome, verdict.reason) == ("rolled_back", "a person aborted it")
        setup.found.clear()
        setup.say(Alias("2", previous=("1",), last_good="1", verdict=verdict))
        await setup.restart()
        assert setup.found == []  # it is there

    conducted(tmp_path, test)


def test_after_a_restart_the_version_that_was_in_service_answers_also_if_it_had_no_request(
    tmp_path: Path,
) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        setup.say_verb("finish")
        await turns(50)
        assert await setup.ask() == ["2"]
        setup.say(Alias("1", previous=("2",), last_good="2"))  # back, and no caller comes
        await turns(50)
        assert [(one.version, one.last_good) for one in setup.found[-1:]] == [("1", "1")]
        setup.say(Alias("3", previous=("1", "2"), last_good="1"))
        await turns(50)
        setup.say_verb("abort")
        await turns(50)
        await setup.restart()
        assert set(await setup.ask(10)) == {"1"}

    conducted(tmp_path, test)


def test_both_versions_are_pinned(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        lease = setup.bench.manager.lease(version(3))
        with pytest.raises(Problem) as refused:
            await setup.bench.manager.ready(lease)
        assert refused.value.code == "CAPACITY_EXCEEDED"
        assert setup.bench.manager.is_ready(version(1))
        assert setup.bench.manager.is_ready(version(2))

    conducted(tmp_path, test, limit=25 * MB)


def test_without_room_for_both_the_version_is_refused_with_the_numbers(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        setup.say("1")
        await setup.ask()
        setup.say(Alias("2", previous=("1",), last_good="1"))
        await turns(100)
        assert setup.phase == "refused"
        found = setup.aliases.find("iris", "champion")
        assert found is not None
        assert "MB" in (found.error or "")
        assert await setup.ask() == ["1"]

    conducted(tmp_path, test, limit=15 * MB)


def test_a_candidate_that_is_unloaded_is_taken_back(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        rollout = await setup.begun()
        setup.bench.manager.quarantine(version(2), "it ended again and again")
        rollout.changed.set()
        await turns(50)
        assert setup.phase == "rolled_back"
        assert set(await setup.ask(30)) == {"1"}

    conducted(tmp_path, test)


def test_a_restart_resumes_a_canary_in_its_step(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        while setup.phase == "canary 20 %":
            await setup.ask()
        await setup.restart()
        await turns(100)
        assert setup.phase == "canary 50 %"
        assert setup.rollout.step_view()["requests"] == 0  # the evidence begins again
        assert setup.bench.manager.is_ready(version(1))
        assert set(await setup.ask(10)) == {"1", "2"}

    conducted(tmp_path, test)


def test_a_restart_in_held_stays_held(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        rollout = await setup.begun()
        setup.bench.clock.now += 3601
        rollout.changed.set()
        await turns(50)
        await setup.restart()
        await turns(100)
        assert setup.phase == "held"

    conducted(tmp_path, test)


def test_a_restart_does_not_try_again_what_was_taken_back(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        setup.fails(2)
        await setup.ask(300)
        assert setup.phase == "rolled_back"
        setup.fails(2, None)
        starts = setup.bench.behaviour(version(2)).starts
        await setup.restart()  # the registry could not be told
        assert setup.phase == "rolled_back"
        assert set(await setup.ask(30)) == {"1"}
        assert setup.bench.behaviour(version(2)).starts == starts

    conducted(tmp_path, test, {"canary": {**STEPS["canary"], "requests": 1000}})


def test_a_verdict_that_is_taken_out_of_the_registry_lets_the_version_try_again(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        setup.fails(2)
        await setup.ask(300)
        verdict = setup.found[-1].verdict
        setup.say(Alias("2", previous=("1",), last_good="1", verdict=verdict))
        await turns(50)
        assert setup.phase == "rolled_back"
        setup.fails(2, None)
        setup.say(Alias("2", previous=("1",), last_good="1"))
        await turns(100)
        assert setup.phase == "canary 20 %"

    conducted(tmp_path, test, {"canary": {**STEPS["canary"], "requests": 1000}})


def test_an_alias_that_is_not_loaded_is_tried_in_steps_too(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        setup.say("1")
        await setup.ask()
        setup.bench.manager.retire(version(1), "unloaded")
        await turns(50)
        setup.say(Alias("2", previous=("1",), last_good="1"))
        await turns(50)
        assert version(2) not in setup.bench.prepared
        assert await setup.ask() == ["1"]
        await turns(100)
        assert setup.phase == "canary 20 %"

    conducted(tmp_path, test)


def test_a_first_version_and_the_way_back_take_no_steps(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        setup.say("1")
        assert await setup.ask() == ["1"]  # nothing to compare with
        assert setup.phase == "serving"  # and no move
        setup.say(Alias("2", previous=("1",), last_good="1"))
        await setup.ask(400)
        assert setup.phase == "done"
        setup.say(Alias("1", last_good="2"))
        await turns(50)
        assert setup.phase == "done"
        assert await setup.ask() == ["1"]

    conducted(tmp_path, test)


def test_a_policy_that_changes_counts_from_the_next_step(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        await setup.begun()
        setup.policy = RolloutPolicy.model_validate({"canary": {**STEPS["canary"], "steps": [20, 90]}})
        while setup.phase == "canary 20 %":
            await setup.ask()
        assert setup.phase == "canary 90 %"

    conducted(tmp_path, test)


def test_a_request_costs_nothing_more_while_no_rollout_is_under_way(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        setup.say("1")
        await setup.ask(50)
        assert setup.arms == []
        servable = setup.bench.manager.find(version(1))
        assert servable is not None
        assert servable.status is Status.READY

    conducted(tmp_path, test)
