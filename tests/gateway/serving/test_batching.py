"""The micro-batcher: who goes together, who waits, and that everybody gets the answer to his own rows."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
import pytest

from gateway.runners.base import Begin, NoProcess, RunnerCrashed, Then
from gateway.runners.suspects import Poisoned
from gateway.serving.admission import Admission, NotAdmitted
from gateway.serving.batching import Asked, Batcher, Outcome, Run, agree, repeated
from loaders.batch import Batch, Columns, Tensors, Value
from tests.support.controlled import bounded, turns


def beginning(run: Run) -> Begin:
    """Begins a call of `run` as a runner does that needs no task of the batcher."""

    def begin(batch: Asked, params: Mapping[str, Any], then: Then) -> bool:
        def ended(task: asyncio.Future[Batch]) -> None:
            error = task.exception()
            assert error is None or isinstance(error, Exception)
            then(None if error else task.result(), error)

        asyncio.ensure_future(run(batch, params)).add_done_callback(ended)
        return True

    return begin


Made: TypeAlias = Callable[..., Batcher]


@pytest.fixture(params=["in a task", "without a task", "in a task if need be"])
def made(request: pytest.FixtureRequest) -> Made:
    """The ways in which a batcher calls a model: the rules are the same for all."""
    times = itertools.count()

    def batcher(run: Run, **options: Any) -> Batcher:
        begin = beginning(run)
        if request.param == "in a task if need be":
            return Batcher(run, lambda *call: next(times) % 2 > 0 and begin(*call), **options)
        return Batcher(run, None if request.param == "in a task" else begin, **options)

    return batcher


class Doubler:
    """Doubles every value; `hold` makes it busy, `poison` is a value it cannot bear."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.hold: asyncio.Event | None = None
        self.poison: float | None = None
        self.drop_a_row = False

    async def __call__(self, batch: Batch, params: Mapping[str, Any]) -> Batch:
        assert isinstance(batch, Columns)
        x = batch.arrays["x"]
        self.calls.append(len(x))
        if self.hold is not None:
            await self.hold.wait()
        if self.poison is not None and self.poison in x:
            raise ValueError("poison")
        result = x * params.get("factor", 2)
        if self.drop_a_row and len(x) > 1:
            result = result[:-1]
        return Tensors({"": result}, len(result))


def rows(*values: float) -> Columns:
    return Columns({"x": np.array(values, dtype=float)}, len(values))


async def answers(*futures: asyncio.Future[Any]) -> list[list[float]]:
    outcomes = await asyncio.gather(*futures)
    return [outcome.result.arrays[""].tolist() for outcome in outcomes]


@pytest.mark.anyio
@bounded
@pytest.mark.parametrize("merges", [True, False])
async def test_requests_in_flight_are_those_that_wait_and_those_in_a_call(made: Made, merges: bool) -> None:
    model = Doubler()
    model.hold = asyncio.Event()
    batcher = made(model, merges=merges)
    futures = [batcher.submit(rows(float(n)), {}) for n in range(3)]
    await turns()
    assert (len(model.calls), batcher.inflight) == (1, 3)
    futures.append(batcher.submit(rows(-1.0), {}))
    assert batcher.inflight == 4
    model.poison = -1.0
    model.hold.set()
    await asyncio.gather(*futures, return_exceptions=True)
    await turns()
    assert batcher.inflight == 0


@pytest.mark.anyio
@bounded
async def test_promise_9_what_arrives_in_one_turn_goes_in_one_call(made: Made) -> None:
    model = Doubler()
    batcher = made(model, merges=True)
    futures = [batcher.submit(rows(float(n), n + 0.5), {}) for n in range(8)]
    assert await answers(*futures) == [[2.0 * n, 2.0 * n + 1] for n in range(8)]
    assert model.calls == [16]


@pytest.mark.anyio
@bounded
async def test_calls_that_fail_at_once_leave_the_loop_its_turns(made: Made) -> None:
    async def model(batch: Batch, params: Mapping[str, Any]) -> Batch:
        raise NoProcess("it is started again")

    batcher = made(model, merges=False)
    futures = [batcher.submit(rows(float(n)), {}) for n in range(50)]
    others = 0
    while not futures[-1].done():
        await asyncio.sleep(0)
        others += 1
    assert others >= len(futures)
    assert all(isinstance(future.exception(), NoProcess) for future in futures)


class Mortal:
    """A process that each input above 99 ends; `kills`: somebody ends that many calls besides."""

    def __init__(self, kills: int = 0) -> None:
        self.kills = kills
        self.ends = 0
        self.calls = 0

    async def __call__(self, batch: Batch, params: Mapping[str, Any]) -> Batch:
        self.calls += 1
        await asyncio.sleep(0)
        assert isinstance(batch, Columns)
        if self.kills or max(batch.arrays["x"]) > 99:
            self.ends += 1
            outside, self.kills = bool(self.kills), max(0, self.kills - 1)
            raise RunnerCrashed("it ended", outside=outside)
        return batch


@pytest.mark.anyio
@pytest.mark.parametrize("merges", [True, False])
@bounded
async def test_a_killed_process_costs_no_request(made: Made, merges: bool) -> None:
    model = Mortal(kills=1)
    batcher = made(model, merges=merges)
    futures = [batcher.submit(rows(float(n)), {}) for n in range(5)]
    outcomes = await asyncio.gather(*futures)
    assert [outcome.result.arrays["x"][0] for outcome in outcomes] == [0, 1, 2, 3, 4]
    assert model.ends == 1


@pytest.mark.anyio
@pytest.mark.parametrize("merges", [True, False])
@bounded
async def test_promise_9_a_poisoned_input_ends_two_processes_and_fails_alone(
    made: Made, merges: bool
) -> None:
    model = Mortal()
    batcher = made(model, merges=merges)
    values = [1.0, 100.0, 3.0]
    results = await asyncio.gather(
        *(batcher.submit(rows(value), {}) for value in values), return_exceptions=True
    )
    assert isinstance(results[1], Poisoned)
    assert [r.result.arrays["x"][0] for r in (results[0], results[2]) if isinstance(r, Outcome)] == [1, 3]
    assert model.ends == 2
    calls = model.calls
    with pytest.raises(Poisoned):
        await batcher.submit(rows(100.0), {})
    assert model.calls == calls, "it is not tried again"
    await batcher.submit(rows(5.0), {})


@pytest.mark.anyio
@bounded
async def test_a_body_that_all_callers_send_is_not_poison_because_somebody_kills(made: Made) -> None:
    model = Mortal()
    batcher = made(model, merges=False)
    for _ in range(5):
        model.kills = 1
        await batcher.submit(rows(1.0), {})
    assert model.ends == 5


@pytest.mark.anyio
@bounded
async def test_where_nothing_is_merged_the_next_call_follows_at_once() -> None:
    started: list[asyncio.Future[Batch]] = []

    async def model(batch: Batch, params: Mapping[str, Any]) -> Batch:
        started.append(asyncio.get_running_loop().create_future())
        return await started[-1]

    batcher = Batcher(model, merges=False)
    futures = [batcher.submit(rows(float(n)), {}) for n in range(4)]
    await turns()
    for number in range(1, 4):
        assert len(started) == number
        started[-1].set_result(rows(float(number)))
        await asyncio.sleep(0)
        assert len(started) == number + 1
    started[-1].set_result(rows(4.0))
    outcomes = await asyncio.gather(*futures)
    assert [outcome.result.arrays["x"][0] for outcome in outcomes] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.anyio
@bounded
async def test_what_arrives_while_the_model_is_busy_goes_in_the_next_call(made: Made) -> None:
    model = Doubler()
    model.hold = asyncio.Event()
    batcher = made(model, merges=True)
    first = batcher.submit(rows(1.0), {})
    await turns()
    later = [batcher.submit(rows(float(n)), {}) for n in range(2, 6)]
    await turns()
    assert model.calls == [1]
    model.hold.set()
    assert await answers(first, *later) == [[2.0], [4.0], [6.0], [8.0], [10.0]]
    assert model.calls == [1, 4]


@pytest.mark.anyio
@bounded
async def test_without_merging_every_request_is_a_call(made: Made) -> None:
    model = Doubler()
    batcher = made(model, merges=False)
    assert await answers(*(batcher.submit(rows(float(n)), {}) for n in range(3))) == [[0.0], [2.0], [4.0]]
    assert model.calls == [1, 1, 1]


@pytest.mark.anyio
@bounded
async def test_other_params_and_other_layouts_do_not_merge(made: Made) -> None:
    model = Doubler()
    batcher = made(model, merges=True)
    futures = [
        batcher.submit(rows(1.0), {}),
        batcher.submit(rows(1.0), {"factor": 3}),
        batcher.submit(Columns({"x": np.array([1])}, 1), {}),
        batcher.submit(rows(2.0), {}),
        batcher.submit(rows(5.0), {"factor": [1]}),
    ]
    outcomes = await asyncio.gather(*futures)
    assert [o.result.arrays[""].tolist() for o in outcomes] == [[2.0], [3.0], [2], [4.0], [5.0]]
    assert sorted(model.calls) == [1, 1, 1, 2]


@pytest.mark.anyio
@bounded
async def test_a_call_has_at_most_max_rows(made: Made) -> None:
    model = Doubler()
    batcher = made(model, merges=True, max_rows=4)
    await answers(*(batcher.submit(rows(float(n), float(n)), {}) for n in range(5)))
    assert model.calls == [4, 4, 2]


@pytest.mark.anyio
@bounded
async def test_a_poisoned_member_fails_alone(made: Made) -> None:
    model = Doubler()
    model.poison = 13.0
    batcher = made(model, merges=True)
    futures = [batcher.submit(rows(value), {}) for value in (1.0, 13.0, 2.0)]
    results = await asyncio.gather(*futures, return_exceptions=True)
    assert isinstance(results[1], ValueError)
    assert await answers(futures[0], futures[2]) == [[2.0], [4.0]]


@pytest.mark.anyio
@bounded
async def test_an_answer_with_other_rows_is_never_dealt_out(made: Made) -> None:
    model = Doubler()
    model.drop_a_row = True
    batcher = made(model, merges=True)
    assert await answers(*(batcher.submit(rows(float(n)), {}) for n in range(3))) == [[0.0], [2.0], [4.0]]


@pytest.mark.anyio
@bounded
async def test_who_leaves_before_his_turn_is_not_run(made: Made) -> None:
    model = Doubler()
    model.hold = asyncio.Event()
    batcher = made(model, merges=False)
    first, second, third = (batcher.submit(rows(float(n)), {}) for n in range(3))
    await turns()
    second.cancel()
    model.hold.set()
    assert await answers(first, third) == [[0.0], [4.0]]
    assert model.calls == [1, 1]


@pytest.mark.anyio
@bounded
async def test_who_is_too_late_is_not_run(made: Made) -> None:
    model = Doubler()
    model.hold = asyncio.Event()
    batcher = made(model, merges=True)
    first = batcher.submit(rows(1.0), {})
    await turns()
    late = batcher.submit(rows(2.0), {}, deadline=asyncio.get_running_loop().time())
    model.hold.set()
    with pytest.raises(TimeoutError):
        await late
    assert await answers(first) == [[2.0]]
    assert model.calls == [1]


@pytest.mark.anyio
@bounded
async def test_the_queue_is_bounded_and_the_dead_make_room(made: Made) -> None:
    model = Doubler()
    model.hold = asyncio.Event()
    batcher = made(model, merges=True, admission=Admission(2))
    running = batcher.submit(rows(0.0), {})
    await turns()
    waiting = [batcher.submit(rows(float(n)), {}) for n in (1, 2)]
    with pytest.raises(NotAdmitted):
        batcher.submit(rows(3.0), {})
    waiting[0].cancel()
    newest = batcher.submit(rows(3.0), {})
    model.hold.set()
    assert await answers(running, waiting[1], newest) == [[0.0], [4.0], [6.0]]


@pytest.mark.anyio
@bounded
async def test_who_has_given_up_makes_no_other_too_late(made: Made) -> None:
    model = Doubler()
    admission = Admission(1000)
    admission.finished(1, 30.0)
    batcher = made(model, merges=True, admission=admission)
    model.hold = asyncio.Event()
    running = batcher.submit(rows(0.0), {})
    await turns()
    soon = asyncio.get_running_loop().time() + 20.0
    gone = batcher.submit(rows(1.0), {}, deadline=soon)
    with pytest.raises(NotAdmitted):
        batcher.submit(rows(2.0), {}, deadline=soon)
    for number in range(3):
        gone.cancel()
        gone = batcher.submit(rows(float(number)), {}, deadline=soon)
        assert batcher.queued == 1
    model.hold.set()
    assert await answers(running, gone) == [[0.0], [4.0]]


@pytest.mark.anyio
@bounded
async def test_values_are_never_merged(made: Made) -> None:
    calls: list[Any] = []

    async def model(batch: Batch, params: Mapping[str, Any]) -> Batch:
        assert isinstance(batch, Value)
        calls.append(batch.value)
        return Value(batch.value)

    batcher = made(model, merges=True)
    await asyncio.gather(batcher.submit(Value({"a": 1}), {}), batcher.submit(Value({"a": 2}), {}))
    assert calls == [{"a": 1}, {"a": 2}]


def test_the_warm_up_sees_answers_that_depend_on_the_neighbours() -> None:
    one = Tensors({"": np.array([0.5])}, 1)
    assert agree(one, Tensors({"": np.array([0.5, 0.5 + 1e-12])}, 2), 2)
    assert not agree(one, Tensors({"": np.array([0.5, 0.6])}, 2), 2)
    assert not agree(one, Tensors({"": np.array([0.5])}, 1), 2)
    assert agree(Value(["a"], 1), Value(["a", "a"], 2), 2)
    assert not agree(Value(["a"], 1), Value(["a", "b"], 2), 2)
    many = repeated(rows(7.0, 8.0), 3)
    assert isinstance(many, Columns)
    assert many.arrays["x"].tolist() == [7.0, 7.0, 7.0]


@pytest.mark.anyio
@bounded
async def test_a_request_is_stalled_while_its_call_or_the_one_before_it_runs(made: Made) -> None:
    model = Doubler()
    model.hold = held = asyncio.Event()
    batcher = made(model, merges=False, slots=2)
    hanging = batcher.submit(rows(1.0), {})
    await turns()
    began = perf_counter()
    waiting = asyncio.get_running_loop().create_future()
    assert batcher.stalled(waiting) == 0.0  # a slot is free
    other = batcher.submit(rows(2.0), {})
    behind = batcher.submit(rows(3.0), {})
    await turns()
    now = perf_counter()
    assert batcher.stalled(hanging) >= now - began
    assert batcher.stalled(hanging) >= batcher.stalled(other) > 0.0
    assert batcher.stalled(behind) < batcher.stalled(hanging)  # the newest call may still end soon
    other.cancel()
    assert batcher.stalled(other) > 0.0  # its call runs on
    held.set()
    await asyncio.gather(hanging, behind)
    assert batcher.stalled(behind) == 0.0
