"""Large bodies are parsed and enforced in a process of their own, and give what small ones give."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gateway.cgroup import Usage
from gateway.errors import Problem
from gateway.http import bodies, cost, large
from gateway.http.media import RAW_BYTES, Media
from loaders.batch import Columns
from loaders.enforcement import InvalidInput, enforce
from loaders.inferred import infer_signature
from loaders.signature import Signature
from tests.conftest import needs
from tests.support.served import Served, settings

FRAME = pd.DataFrame({"x": np.arange(30_000) / 7, "n": np.arange(30_000), "t": ["täxt", "b"] * 15_000})
SIGNATURE = infer_signature(FRAME.head(3))
BUDGET = 256 << 20


def room(total: int = BUDGET) -> bodies.Held:
    return bodies.Held(bodies.BodyReader(total, total))


def in_arrow(frame: pd.DataFrame) -> bytes:
    pa: Any = needs("pyarrow")
    sink = io.BytesIO()
    table = pa.Table.from_pandas(frame, preserve_index=False)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


FORMS: dict[str, tuple[bodies.Media, bytes]] = {
    "split": ("json", json.dumps({"dataframe_split": FRAME.to_dict("split", index=False)}).encode()),
    "records": ("json", json.dumps({"dataframe_records": FRAME.to_dict("records")}).encode()),
    "inputs": ("json", json.dumps({"inputs": FRAME.to_dict("list")}).encode()),
    "csv": ("csv", FRAME.to_csv(index=False).encode()),
}


def form_of(name: str) -> tuple[bodies.Media, bytes]:
    return ("arrow", in_arrow(FRAME)) if name == "arrow" else FORMS[name]


async def asked(*bodies_: tuple[bodies.Media, bytes], signature: Signature | None = SIGNATURE) -> Any:
    place = large.LargeBodies(BUDGET)
    try:
        return [
            await large.LargeBody(body, Media(media), None, place, room()).enforce(
                signature, "strict", False, False
            )
            for media, body in bodies_
        ]
    finally:
        await place.close()


@pytest.mark.parametrize("form", [*FORMS, "arrow"])
def test_a_large_body_becomes_what_a_small_one_becomes(form: str) -> None:
    media, body = form_of(form)
    [enforced] = asyncio.run(asked((media, body)))
    message = enforced.batch.message()
    expected = enforce(SIGNATURE, bodies.PARSERS[media](body).raw).batch
    assert isinstance(expected, Columns)
    assert message["op"] == "predict"
    assert enforced.batch.rows == expected.rows == len(FRAME)
    for name, column in expected.arrays.items():
        np.testing.assert_array_equal(message["batch"].arrays[name], column)


def test_what_is_wrong_with_it_is_said_as_for_a_small_one() -> None:
    wrong = json.dumps({"dataframe_records": [{"x": "no", "n": 1, "t": "a"}] * 20_000}).encode()
    with pytest.raises(InvalidInput) as refused:
        asyncio.run(asked(("json", wrong)))
    assert refused.value.total == 10_000
    assert refused.value.violations[0].path == "dataframe_records[0].x"
    with pytest.raises(Problem) as problem:
        asyncio.run(asked(("json", b'{"inputs": ' + b"[" * 500_000)))
    assert problem.value.code == "MALFORMED_BODY"


def test_what_outgrows_the_memory_of_the_process_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    place = large.LargeBodies(1 << 20)
    monkeypatch.setattr(large, "_HEADROOM", 0)

    async def ask() -> None:
        try:
            body = b'{"inputs":[' + b"[]," * 10_000_000 + b"1]}"
            with pytest.raises(Problem) as refused:
                await large.LargeBody(body, Media("json"), None, place, room()).enforce(
                    None, "strict", False, False
                )
            assert refused.value.code == "BODY_TOO_LARGE"
        finally:
            await place.close()

    asyncio.run(ask())


@pytest.fixture
async def place() -> AsyncIterator[large.LargeBodies]:
    place = large.LargeBodies(BUDGET)
    yield place
    await place.close()


@pytest.mark.anyio
async def test_a_body_whose_caller_left_is_dropped_or_counted(
    place: large.LargeBodies, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = bodies.BodyReader(BUDGET, BUDGET)
    parses, go_on = threading.Event(), threading.Event()

    def ask(message: Any, becomes: int) -> Any:
        parses.set()
        assert go_on.wait(30)
        raise Problem("MALFORMED_BODY", "it is parsed at last")

    monkeypatch.setattr(place, "_ask", ask)

    def begun() -> asyncio.Task[Any]:
        held = bodies.Held(reader)
        held.size += reader.hold(1000)

        async def request() -> None:
            try:
                await large.LargeBody(b"x", Media("json"), None, place, held).enforce(
                    None, "strict", False, False
                )
            finally:
                held.release()

        return asyncio.get_running_loop().create_task(request())

    running, waiting = begun(), begun()
    assert await asyncio.to_thread(parses.wait, 30)
    for task in (running, waiting):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert reader.held == 1000  # the one that is parsed; the other is gone
    go_on.set()
    with pytest.raises(Problem):
        await begun()
    assert reader.held == 0


@pytest.mark.anyio
async def test_a_deadline_holds_while_a_body_waits_for_its_turn(
    place: large.LargeBodies, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(place, "_ask", lambda message, becomes: go_on.wait(30))
    body = large.LargeBody(b"x", Media("json"), None, place, room())
    with pytest.raises(Problem) as late:
        await body.model(asyncio.get_running_loop().time())
    assert late.value.code == "DEADLINE_EXCEEDED"
    go_on.set()


@pytest.mark.anyio
async def test_the_process_ends_after_a_body_that_made_it_grow(place: large.LargeBodies) -> None:
    small = large.LargeBody(FORMS["csv"][1], Media("csv"), None, place, room())
    await small.enforce(SIGNATURE, "strict", False, False)
    first = place.pid
    await small.enforce(SIGNATURE, "strict", False, False)
    assert first == place.pid is not None
    rows = b"1.5,2,some text that is long enough to take memory\n" * 400_000
    await large.LargeBody(b"x,n,t\n" + rows, Media("csv"), None, place, room()).enforce(
        SIGNATURE, "strict", False, False
    )
    assert place.pid is None
    await small.enforce(SIGNATURE, "strict", False, False)
    assert place.pid not in (None, first)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("total", "taken", "code"),
    [(16 << 20, 0, "BODY_TOO_LARGE"), (64 << 20, 40 << 20, "OVERLOADED"), (64 << 20, 0, "")],
)
async def test_the_rows_of_a_compressed_body_count_as_what_they_are(
    place: large.LargeBodies, total: int, taken: int, code: str
) -> None:
    pa: Any = needs("pyarrow")
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pa.table({"x": np.zeros(4_000_000)}), sink, compression="zstd")
    held = room(total)
    held.add(taken)
    body = large.LargeBody(sink.getvalue(), Media("parquet"), None, place, held)
    signature = Signature.from_json({"inputs": json.dumps([{"name": "x", "type": "double"}])})
    if not code:
        await body.enforce(signature, "strict", False, False)
        assert held.size >= 32_000_000
        return
    with pytest.raises(Problem) as refused:
        await body.enforce(signature, "strict", False, False)
    assert refused.value.code == code


@pytest.mark.anyio
async def test_a_process_that_was_killed_is_started_again(place: large.LargeBodies) -> None:
    body = large.LargeBody(FORMS["csv"][1], Media("csv"), None, place, room())
    await body.enforce(SIGNATURE, "strict", False, False)
    assert place.pid is not None
    os.kill(place.pid, signal.SIGKILL)
    await asyncio.to_thread(os.waitid, os.P_PID, place.pid, os.WEXITED | os.WNOWAIT)
    await body.enforce(SIGNATURE, "strict", False, False)


ROWS = 10_000
SPLIT = {"columns": ["sl", "sw", "pl", "pw"], "data": [[5.1, 3.5, 1.4, 0.2]] * ROWS}


@pytest.fixture(scope="module", params=["auto", "inline"])
def roomy(request: Any, registry_file: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    chosen = settings(tmp_path_factory.mktemp("roomy"), request.param, default_model="models:/iris")
    with Served(chosen, registry_file) as served:
        yield served


def test_over_http(roomy: Served) -> None:
    body = json.dumps({"dataframe_split": SPLIT}).encode() + b" " * RAW_BYTES
    reply = roomy.post("/predict/iris", body)
    assert reply.status == 200, reply.body
    assert reply.json["predictions"] == [0] * ROWS
    named = b'{"model": "models:/iris/2", ' + body[1:]
    assert roomy.post("/predict", named).json["model"]["version"] == "2"
    assert roomy.post("/predict/iris", named).code == "INVALID_REFERENCE"
    assert roomy.post("/predict", b'{"model": null, ' + body[1:]).code == "INVALID_REFERENCE"
    assert roomy.post("/predict/iris", body[:-10] + b"x" * 10).code == "MALFORMED_BODY"
    asked = {"dataframe_records": [{"x": 1.0}], "params": {"give": "big"}}
    echoed = roomy.post("/predict/echo", json.dumps(asked).encode() + b" " * RAW_BYTES)
    assert echoed.json["predictions"] == [2**63 - 1]


#: What takes 240 MB as Python's lists, of 8 MB.
DENSE = b'{"inputs":[' + b"[1,2]," * 1_400_000 + b"[1,2]]}"
GIB = 1 << 30


@pytest.mark.parametrize(
    ("used", "limit", "answer"),
    [
        (0, 8 * GIB, None),
        (GIB * 5 // 4, 2 * GIB, "OVERLOADED"),
        (7 * GIB, 8 * GIB, "OVERLOADED"),
        (0, GIB // 2, "BODY_TOO_LARGE"),
    ],
)
def test_a_dense_body_above_the_budget_needs_room(used: int, limit: int, answer: str | None) -> None:
    """A valid body is answered where memory permits, whatever the sum of all bodies may be."""
    becomes = cost.json_bytes(DENSE)

    async def ask() -> Any:
        place = large.LargeBodies(16 << 20, lambda: [Usage(GIB, 64 * GIB), Usage(used, limit)])
        try:
            body = large.LargeBody(DENSE, Media("json"), None, place, room(), becomes)
            return (await body.enforce(None, "strict", False, False)).batch.rows
        finally:
            await place.close()

    if answer is None:
        assert asyncio.run(ask()) == 1_400_001
        return
    with pytest.raises(Problem) as refused:
        asyncio.run(ask())
    assert refused.value.code == answer


def test_a_body_that_becomes_too_much_is_413(roomy: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """31 KB on the wire, 1.5 GB as Python's lists."""
    monkeypatch.setattr(roomy.gateway.parts.large_bodies, "_usages", lambda: [Usage(GIB, 64 * GIB)])
    bomb = gzip.compress(b'{"inputs":[' + b"[]," * 10_000_000 + b"[]]}")
    reply = roomy.post("/predict/iris", bomb, content_encoding="gzip")
    assert (reply.status, reply.code, reply.json["retryable"]) == (413, "BODY_TOO_LARGE", False)
    assert "fewer rows" in reply.json["hint"]
