"""One prediction, without a protocol: which version answers, and what each failure is to a client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gateway.errors import Problem
from gateway.events import InputRefused, PredictionFailed, RequestRefused
from gateway.names import Reference
from gateway.record import RequestRecord
from gateway.runners.base import ModelError, NoProcess, RunnerCrashed, RunnerTimeout
from gateway.runners.suspects import Poisoned
from gateway.service import Inference
from gateway.serving.admission import NotAdmitted
from gateway.serving.servable import Servable
from loaders.enforcement import RawInput
from loaders.schema import Scalar
from loaders.signature import ColSpec, Signature
from tests.bench.bench_http import calls
from tests.support.composed import CHAMPION, Composed, composed
from tests.support.processes import until

pytestmark = pytest.mark.anyio


def servable(parts: Composed, number: int = 1) -> Servable:
    found = parts.bench.manager.find(parts.version(number))
    assert found is not None
    return found


async def refusal(parts: Composed, reference: Reference | None = CHAMPION, **more: object) -> Problem:
    with pytest.raises(Problem) as caught:
        await parts.ask(reference, **more)
    return caught.value


async def test_a_request_is_answered_and_its_record_filled(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        answer, inference = await parts.ask()
        record = inference.record
        assert (str(record.version), record.alias) == ("iris/1", "champion")
        assert np.asarray(next(iter(answer.result.arrays.values()))).tolist() == [1]  # type: ignore[union-attr]
        assert inference.raw is None  # only the typed rows were kept
        assert parts.bench.ledger[servable(parts)].leases == 0


@pytest.mark.parametrize(
    ("reference", "code"),
    [
        (None, "INVALID_REFERENCE"),
        (Reference("nobody"), "MODEL_NOT_FOUND"),
        (Reference("iris", alias="nobody"), "ALIAS_NOT_FOUND"),
        (Reference("iris", version="9"), "VERSION_NOT_FOUND"),
    ],
)
async def test_what_names_nothing(reference: Reference | None, code: str, tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        assert (await refusal(parts, reference)).code == code
        assert parts.bench.prepared == {}


async def test_the_default_model_answers_where_none_is_named(tmp_path: Path) -> None:
    async with composed(tmp_path, default_model=Reference("iris", version="2")) as parts:
        _, inference = await parts.ask(None)
        assert str(inference.record.version) == "iris/2"


async def test_a_request_that_came_when_the_gateway_was_stopping_is_refused(tmp_path: Path) -> None:
    async with composed(tmp_path, stopping=lambda: True) as parts:
        assert await parts.answers() == "1"  # its head came before
        record = RequestRecord(late=parts.service.stopping)
        assert (await refusal(parts, record=record)).code == "SHUTTING_DOWN"


async def test_the_caller_waits_for_a_cold_model_as_long_as_it_may(tmp_path: Path) -> None:
    async with composed(tmp_path, cold_wait=0.0) as parts:
        hold = parts.of(1).hold = asyncio.Event()
        assert (await refusal(parts)).code == "MODEL_LOADING"
        late = asyncio.get_running_loop().time()
        assert (await refusal(parts, deadline=late)).code == "DEADLINE_EXCEEDED"
        hold.set()
        await until(lambda: parts.bench.manager.is_ready(parts.version(1)))
        assert await parts.answers() == "1"


async def test_an_input_that_does_not_fit_is_422_with_its_place(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        parts.of(1).signature = Signature(inputs=(ColSpec(Scalar.long, "age"),))
        problem = await refusal(parts)
        assert (problem.code, problem.status) == ("INVALID_INPUT", 422)
        assert [detail.path for detail in problem.details] != []
        assert len(parts.bench.of(InputRefused)) == 1
        assert parts.of(1).calls == []


Failure = Callable[[], Exception]


@pytest.mark.parametrize(
    ("failure", "code", "status", "event"),
    [
        (lambda: NotAdmitted(1.5, late=False), "OVERLOADED", 429, RequestRefused),
        (lambda: NotAdmitted(1.5, late=True), "OVERLOADED", 429, RequestRefused),
        (lambda: TimeoutError(), "DEADLINE_EXCEEDED", 504, None),
        (lambda: RunnerTimeout("no answer within 2 s"), "DEADLINE_EXCEEDED", 504, None),
        (lambda: NoProcess("its processes ended", retry_after=3.0), "MODEL_UNAVAILABLE", 503, None),
        (lambda: RunnerCrashed("signal 9"), "WORKER_CRASHED", 502, None),
        (lambda: Poisoned("it ended the process"), "PREDICTION_FAILED", 500, PredictionFailed),
        (lambda: ModelError("ValueError: x"), "PREDICTION_FAILED", 500, PredictionFailed),
        (lambda: ModelError("AnswerTooLarge: x"), "PREDICTION_FAILED", 500, PredictionFailed),
    ],
    ids=["full", "late", "deadline", "timeout", "no process", "crash", "poison", "model", "too large"],
)
async def test_what_each_failure_is_to_a_client(
    failure: Failure, code: str, status: int, event: type | None, tmp_path: Path
) -> None:
    async with composed(tmp_path) as parts:
        await parts.answers()

        def submit(*args: object) -> object:
            raise failure()

        servable(parts).batcher.submit = submit  # type: ignore[assignment,method-assign]
        problem = await refusal(parts)
        assert (problem.code, problem.status) == (code, status)
        found = [one for one in parts.bench.events if isinstance(one, (RequestRefused, PredictionFailed))]
        assert [type(one) for one in found] == ([event] if event else [])
        assert parts.bench.ledger[servable(parts)].leases == 0


async def test_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        await parts.answers()

        def submit(*args: object) -> object:
            raise NotAdmitted(1.5, late=False)

        servable(parts).batcher.submit = submit  # type: ignore[assignment,method-assign]
        problem = await refusal(parts)
        assert (problem.retry_after, "max_queue" in problem.message) == (1.5, True)


async def test_a_leave_while_the_model_works_gives_the_lease_back(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        await parts.answers()
        hold = parts.of(1).hold_predict = asyncio.Event()
        asking = asyncio.create_task(parts.ask())
        await until(lambda: len(parts.of(1).calls) > 1)
        assert parts.bench.ledger[servable(parts)].leases == 1
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert parts.bench.ledger[servable(parts)].leases == 0
        hold.set()


#: A prediction calls 157 functions, those of three turns of the loop and of the model in this test included.
#: Raise this only with a reason.
MOST_CALLS = 158


async def test_a_prediction_of_a_loaded_model_calls_few_functions(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        parts.of(1).signature = Signature(inputs=(ColSpec(Scalar.double, "age"),))
        raw = RawInput("dataframe_split", {"columns": ["age"], "data": [[1.5]]})

        async def ask() -> None:
            await parts.service.predict(Inference(CHAMPION, raw))

        assert await calls(ask) <= MOST_CALLS
