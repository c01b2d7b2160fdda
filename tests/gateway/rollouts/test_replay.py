"""Replay: a candidate answers captured requests before any caller gets it, and the answers decide."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.capture.records import Record, Taken, recorded
from gateway.capture.store import CaptureStore, Limits
from gateway.events import RolloutChanged
from gateway.registries.base import Alias
from gateway.rollouts import agreement
from gateway.rollouts.agreement import Compared
from gateway.rollouts.phases import Phase
from gateway.rollouts.replay import Replays
from gateway.runners.base import RunnerTimeout
from gateway.service import Inference
from loaders.batch import Batch, Columns, Tensors
from loaders.enforcement import RawInput
from loaders.schema import ColSpec, Scalar
from loaders.signature import Signature
from tests.support.controlled import Behaviour, run, turns, version
from tests.support.rollouts import CHAMPION, Setup, giving_way

POLICY = {"replay": {"requests": 20, "agreement": 0.9}}
WITH_CANARY = {**POLICY, "canary": {"steps": [50], "every": 0, "requests": 10, "within": "1h"}}


class AtOnce(Executor):
    """Runs work where it was submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - the future carries it
            done.set_exception(error)
        return done


def record(answer: Batch | None = None, batch: Batch | None = None, **more: Any) -> Record:
    """A request that version 1 answered with `answer`; 2 is what version 2 will answer."""
    given = {"model": "iris", "version": "1", "digest": "sha256:0", "at": 0.0, "seconds": 0.25, "params": {}}
    taken = Taken(
        batch=batch or Tensors({"": np.array([[1.0]])}, 1),
        answer=answer or Tensors({"": np.array([2])}, 1),
        **{**given, **{key: value for key, value in more.items() if key != "redact"}},
    )
    return recorded(taken, more.get("redact", ()), 1 << 20)


DIFFERS = Tensors({"": np.array([1])}, 1)


class Replayed(Setup):
    """A gateway whose captures are in `store`."""

    def __init__(self, directory: Path, policy: dict[str, Any], *, capturing: bool = True) -> None:
        self.store = CaptureStore(directory / "state", "test", clock=lambda: 1.0)
        self.capturing = capturing
        super().__init__(directory, policy)

    def start(self) -> None:
        super().start()
        conductor = self.aliases.conductor
        conductor._replays = Replays(
            self.store, self.bench.manager, AtOnce(), captured=lambda name: self.capturing
        )

    def captured(self, *records: Record) -> None:
        self.store.add(records, Limits(3600, 1 << 30))

    async def started(self) -> None:
        """Version 1 serves, and the alias moves to version 2."""
        self.say("1")
        assert await self.ask() == ["1"]
        self.say(Alias("2", previous=("1",), last_good="1"))
        await turns(400)

    async def begin_with_rows(self) -> None:
        """The same, for versions whose column is `age`."""
        self.say("1")
        row = RawInput("dataframe_records", [{"age": 1}])
        await self.service.predict(Inference(CHAMPION, row))
        self.say(Alias("2", previous=("1",), last_good="1"))
        await turns(400)

    @property
    def replay(self) -> dict[str, Any]:
        """The evidence of the first decision after the replay."""
        course = self.aliases.conductor.course("iris", "champion")
        assert course is not None
        found = [change["evidence"]["replay"] for change in course.changes if "evidence" in change]
        assert found
        return dict(found[0])

    @property
    def reason(self) -> str:
        course = self.aliases.conductor.course("iris", "champion")
        assert course is not None
        return course.reason or ""


def _run(
    directory: Path, test: Callable[[Replayed], Awaitable[None]], policy: dict[str, Any] = POLICY, **more: Any
) -> None:
    async def main() -> None:
        made = Replayed(directory, policy, **more)
        try:
            await test(made)
        finally:
            await made.aliases.close()
            made.store.close()

    run(main)


def test_a_version_that_answers_the_same_serves_after_the_replay(tmp_path: Path) -> None:
    async def test(setup: Replayed) -> None:
        setup.captured(*[record() for _ in range(25)])
        await setup.started()
        assert await setup.ask(2) == ["2", "2"]
        assert [event.phase for event in setup.bench.of(RolloutChanged)] == ["replaying", "done"]
        evidence = setup.replay
        assert (evidence["requests"], evidence["agreement"], evidence["exact"]) == (20, 1.0, 20)
        assert evidence["latency"]["captured_median_seconds"] == 0.25
        assert setup.reason.startswith("replay: 0 of 20 requests got another answer")

    _run(tmp_path, test)


def test_a_canary_follows_the_replay(tmp_path: Path) -> None:
    async def test(setup: Replayed) -> None:
        setup.captured(*[record() for _ in range(20)])
        await setup.started()
        assert setup.phase == "canary 50 %"
        assert setup.rollout.guards.service.requests == 0
        await setup.ask(60)
        assert setup.phase == "done"

    _run(tmp_path, test, WITH_CANARY)


def test_a_version_that_answers_otherwise_is_refused_before_any_caller_gets_it(tmp_path: Path) -> None:
    async def test(setup: Replayed) -> None:
        different = [record(DIFFERS) for _ in range(3)]
        setup.captured(*[record() for _ in range(17)], *different)
        await setup.started()
        assert set(await setup.ask(30)) == {"1"}
        assert setup.arms.count("candidate") == 0
        assert (setup.phase, setup.course) == ("refused", "refused")
        assert "3 of 20 requests got another answer: agreement 0.8500, wanted 0.9" in setup.reason
        assert setup.replay["examples"] == [one.id for one in different]
        assert setup.replay["label_flips"] == 3
        (observation,) = [one for one in setup.found if one.verdict is not None]
        assert observation.verdict is not None
        assert observation.verdict.outcome == "refused"
        assert "agreement 0.8500" in observation.verdict.reason
        assert setup.bench.manager.find(version(2)) is None  # its process ends

    _run(tmp_path, test, WITH_CANARY)


def test_a_version_that_fails_at_requests_is_refused_and_the_errors_are_named(tmp_path: Path) -> None:
    async def test(setup: Replayed) -> None:
        setup.captured(*[record() for _ in range(20)])
        setup.fails(2, "ValueError: row 7 of anna")
        await setup.started()
        assert setup.phase == "refused"
        assert setup.replay["failed"] == 20
        assert setup.replay["errors"] == {"ValueError": 20}
        assert "anna" not in json.dumps(setup.replay)
        assert "anna" not in setup.reason

    _run(tmp_path, test)


@pytest.mark.parametrize(("thin", "phase"), [("hold", "held"), ("refuse", "refused")])
def test_promise_12_too_few_captured_requests_are_no_pass(tmp_path: Path, thin: str, phase: str) -> None:
    async def test(setup: Replayed) -> None:
        setup.captured(*[record() for _ in range(19)])
        await setup.started()
        assert setup.phase == phase
        assert setup.reason == ("too few captured requests: 19 of 20 were replayed, 0 got another answer")
        assert set(await setup.ask(20)) == {"1"}

    _run(tmp_path, test, {**POLICY, "thin": thin})


def test_answers_are_compared_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[int] = set()

    def compare(answer: Batch, reference: Batch, tolerance: float) -> Compared:
        threads.add(threading.get_ident())
        return agreement.compare(answer, reference, tolerance)

    monkeypatch.setattr("gateway.rollouts.replay.compare", compare)

    async def test(setup: Replayed) -> None:
        setup.captured(*[record() for _ in range(20)])
        with ThreadPoolExecutor(1) as io:
            setup.aliases.conductor._replays = Replays(setup.store, setup.bench.manager, io)
            await setup.started()
            while setup.course == "replaying":
                await turns(1)
        assert threads
        assert threading.get_ident() not in threads

    _run(tmp_path, test)


def test_few_requests_refuse_a_version_that_is_surely_too_different(tmp_path: Path) -> None:
    async def test(setup: Replayed) -> None:
        setup.captured(*[record(DIFFERS) for _ in range(10)])
        await setup.started()
        assert setup.phase == "refused"

    _run(tmp_path, test)


def test_without_capture_the_reason_says_what_to_set(tmp_path: Path) -> None:
    async def test(setup: Replayed) -> None:
        await setup.started()
        assert setup.phase == "held"
        assert setup.reason.endswith("capture is off for iris: set capture.share")

    _run(tmp_path, test, capturing=False)


def test_a_request_with_a_redacted_column_is_counted_and_not_replayed(tmp_path: Path) -> None:
    async def test(setup: Replayed) -> None:
        table = Columns({"age": np.array([1.0]), "ssn": np.array(["secret"], object)}, 1)
        secret = [record(batch=table, redact=["ssn"]) for _ in range(5)]
        setup.captured(*[record() for _ in range(18)], *secret)
        await setup.started()
        assert setup.phase == "held"
        assert setup.reason.endswith(
            "18 of 20 were replayed, 0 got another answer; 5 more have a redacted column"
        )
        assert setup.replay["not_replayed"]["redacted"] == 5

    _run(tmp_path, test)


def test_only_the_last_requests_of_the_version_in_service_are_replayed(tmp_path: Path) -> None:
    async def test(setup: Replayed) -> None:
        old = [record(DIFFERS) for _ in range(20)]
        others = [record(DIFFERS, version="3"), record(DIFFERS, model="rent"), record(DIFFERS, digest="x")]
        setup.captured(*old, *[record() for _ in range(20)])
        for other in others:
            setup.captured(*[other for _ in range(20)])
        await setup.started()
        assert await setup.ask() == ["2"]
        assert setup.replay["captured"] == 20

    _run(tmp_path, test)


def test_a_held_replay_runs_again_with_what_was_captured_since(tmp_path: Path) -> None:
    async def test(setup: Replayed) -> None:
        await setup.started()
        assert setup.phase == "held"
        setup.captured(*[record() for _ in range(20)])
        found = setup.aliases.find("iris", "champion")
        assert found is not None
        setup.aliases.orders.give(found, "resume")
        await turns(400)
        assert setup.phase == "canary 50 %"

    _run(tmp_path, test, WITH_CANARY)


@pytest.mark.parametrize(("verb", "version"), [("finish", "2"), ("abort", "1")])
def test_a_person_ends_a_held_replay(tmp_path: Path, verb: str, version: str) -> None:
    async def test(setup: Replayed) -> None:
        await setup.started()
        found = setup.aliases.find("iris", "champion")
        assert found is not None
        setup.aliases.orders.give(found, verb)
        await turns(50)
        assert await setup.ask(3) == [version] * 3

    _run(tmp_path, test, WITH_CANARY)


def test_a_restart_during_the_replay_begins_it_again(tmp_path: Path) -> None:
    async def test(setup: Replayed) -> None:
        setup.captured(*[record() for _ in range(20)])
        setup.bench.on[version(2)] = Behaviour(hold_predict=asyncio.Event())
        await setup.started()
        assert setup.phase == "replaying"
        assert setup.rollout.replay is not None
        assert setup.rollout.step_view()["number"] == 0
        assert set(await setup.ask(20)) == {"1"}
        await setup.restart()
        assert setup.phase == "replaying"
        held = setup.bench.behaviour(version(2)).hold_predict
        assert held is not None
        held.set()
        await turns(400)
        assert setup.phase == "canary 50 %"
        assert setup.replay["requests"] == 20

    _run(tmp_path, test, WITH_CANARY)


def test_a_candidate_that_is_stopped_at_its_timeout_again_and_again_is_refused_with_that_reason(
    tmp_path: Path,
) -> None:
    async def test(setup: Replayed) -> None:
        setup.captured(*[record() for _ in range(20)])
        setup.bench.behaviour(version(2)).ends_predict = RunnerTimeout("it did not answer within 1 s")
        await setup.started()
        assert setup.phase == "refused"
        assert setup.replay["errors"] == {"RunnerTimeout": 3}  # the others would take as long
        assert "3 of 3 requests got another answer (3 of them none)" in setup.reason

    _run(tmp_path, test)


def test_processes_of_the_candidate_give_way_during_the_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_way = giving_way(monkeypatch)

    async def test(setup: Replayed) -> None:
        setup.captured(*[record() for _ in range(20)])
        await setup.started()
        assert setup.phase == "canary 50 %"
        assert given_way == [[], [7], []]

    _run(tmp_path, test, WITH_CANARY)


def test_a_candidate_that_hangs_does_not_serve(tmp_path: Path) -> None:
    async def test(setup: Replayed) -> None:
        setup.captured(*[record() for _ in range(20)])
        setup.bench.on[version(2)] = Behaviour(hold_predict=asyncio.Event())
        await setup.started()
        while setup.phase == "replaying":
            await turns(50)
        assert setup.phase == "held"
        assert "the replay did not end in 0.05 s" in setup.reason
        assert setup.replay["errors"] == {"no answer in time": 1}

    _run(tmp_path, test, {"replay": {**POLICY["replay"], "within": 0.05}})


def test_a_move_elsewhere_ends_the_replay(tmp_path: Path) -> None:
    async def test(setup: Replayed) -> None:
        setup.captured(*[record() for _ in range(20)])
        setup.bench.on[version(2)] = Behaviour(hold_predict=asyncio.Event())
        await setup.started()
        replayed = len(setup.bench.behaviour(version(2)).calls)
        setup.say(Alias("3", previous=("1",), last_good="1"))
        await turns(400)
        assert setup.bench.of(RolloutChanged)[1].phase == "superseded"
        assert len(setup.bench.behaviour(version(2)).calls) == replayed

    _run(tmp_path, test)


def test_captures_that_cannot_be_read_are_no_pass(tmp_path: Path) -> None:
    async def test(setup: Replayed) -> None:
        setup.captured(*[record() for _ in range(20)])

        def broken(*_: Any) -> Any:
            raise sqlite3.OperationalError("disk I/O error")

        setup.store.read = broken  # type: ignore[method-assign]
        await setup.started()
        assert setup.phase == "held"
        assert setup.reason.endswith("the captured requests cannot be read")

    _run(tmp_path, test)


def test_an_unreadable_request_is_counted(tmp_path: Path) -> None:
    async def test(setup: Replayed) -> None:
        good = [record() for _ in range(19)]
        bad = record()
        setup.captured(*good, Record(**{**_fields(bad), "frame": bad.frame[:-3]}))
        await setup.started()
        assert setup.phase == "held"
        assert setup.replay["not_replayed"]["unreadable"] == 1

    _run(tmp_path, test)


def _fields(one: Record) -> dict[str, Any]:
    return {name: getattr(one, name) for name in Record.__slots__}


def test_a_candidate_with_a_wider_signature_gets_what_a_caller_would_give_it(tmp_path: Path) -> None:
    async def test(setup: Replayed) -> None:
        setup.bench.behaviour(version(1)).signature = Signature(inputs=(ColSpec(Scalar.long, "age"),))
        wider = (ColSpec(Scalar.double, "age"), ColSpec(Scalar.string, "note", required=False))
        setup.bench.behaviour(version(2)).signature = Signature(inputs=wider)
        table = Columns({"age": np.array([41])}, 1)
        setup.captured(*[record(batch=table) for _ in range(20)])
        await setup.begin_with_rows()
        assert setup.course == "done", setup.reason
        assert setup.replay["exact"] == 20

    _run(tmp_path, test)


def test_requests_that_the_candidate_refuses_do_not_agree(tmp_path: Path) -> None:
    async def test(setup: Replayed) -> None:
        setup.policy = setup.policy.model_copy(update={"gate": "none"})
        setup.bench.behaviour(version(1)).signature = Signature(inputs=(ColSpec(Scalar.long, "age"),))
        setup.bench.behaviour(version(2)).signature = Signature(inputs=(ColSpec(Scalar.string, "name"),))
        table = Columns({"age": np.array([41])}, 1)
        setup.captured(*[record(batch=table) for _ in range(20)])
        await setup.begin_with_rows()
        assert setup.phase == "refused"
        assert setup.replay["errors"] == {"input refused": 20}

    _run(tmp_path, test)


def test_the_phases_of_a_held_rollout_lead_back_to_where_it_was_held() -> None:
    from gateway.rollouts.course import Course

    course = Course("2").to(Phase.REPLAYING, 0.0).to(Phase.HELD, 1.0)
    assert course.stage is Phase.REPLAYING
    assert Course.from_json(json.loads(json.dumps(course.to_json()))).stage is Phase.REPLAYING
    assert Course("2").to(Phase.CANARY, 0.0).to(Phase.HELD, 1.0).stage is Phase.CANARY
