"""What a body becomes is told from its bytes: never less than it takes, and not far more."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import pytest

from gateway.errors import Problem
from gateway.http import bodies, cost
from tests.support.processes import until

MANY = 20_000


def taken(value: Any) -> int:
    """The bytes of a value made of lists, objects, text and numbers, each object counted once."""
    total, seen, left = 0, set(), [value]
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        total += sys.getsizeof(one)
        if isinstance(one, dict):
            left += one.keys()
            left += one.values()
        elif isinstance(one, list | tuple):
            left += one
    return total


JSON = {
    "empty lists": b'{"inputs":[' + b"[]," * MANY + b"[]]}",
    "lists of one": b'{"inputs":[' + b"[1]," * MANY + b"[]]}",
    "empty objects": b'{"inputs":[' + b"{}," * MANY + b"[]]}",
    "objects of one": b'{"inputs":[' + b'{"":0},' * MANY + b"[]]}",
    "short numbers": b'{"inputs":[' + b"0.5," * MANY + b"1]}",
    "short text": b'{"inputs":[' + b'"ab",' * MANY + b"1]}",
    "wide text": b'{"inputs":["' + "名".encode() + b"a" * MANY + b'"]}',
    "names of its own": json.dumps({"inputs": [{f"k{i}": i} for i in range(MANY)]}).encode(),
    "an object": json.dumps({"inputs": {f"k{i}": i / 3 for i in range(MANY)}}).encode(),
    "nested": b'{"inputs":' + b"[" * 900 + b"]" * 900 + b"," * 0 + b',"x":[' + b"[[]]," * MANY + b"1]}",
    "rows": json.dumps({"inputs": [[i / 3, i / 7, i / 9] for i in range(MANY)]}).encode(),
}


@pytest.mark.parametrize("form", JSON)
def test_json_never_takes_more_than_it_was_said_to(form: str) -> None:
    body = JSON[form]
    assert taken(bodies.decode_object(body)) <= cost.json_bytes(body)


@pytest.mark.parametrize("form", ["rows", "an object", "empty objects"])
def test_json_is_not_taken_for_much_more_than_it_is(form: str) -> None:
    body = JSON[form]
    assert cost.json_bytes(body) <= 5 * taken(bodies.decode_object(body))


@pytest.mark.parametrize("row", [b"1,2", b"12,13", b'"",""', "é,名".encode(), b"a long cell,another"])
def test_csv_never_takes_more_than_it_was_said_to(row: bytes) -> None:
    body = b"a,b\n" + (row + b"\n") * MANY
    assert taken(bodies.parse_csv(body).raw.data.cells) <= cost.csv_bytes(body)


@pytest.mark.parametrize("body", [b"[1],", b"{},", b'{"":0},', b"[[]],", b'"ab",'])
def test_a_small_body_is_taken_for_the_densest(body: bytes) -> None:
    whole = b'{"inputs":[' + body * 500 + b"1]}"
    assert len(whole) <= cost.UNCOUNTED
    assert taken(bodies.decode_object(whole)) <= cost.json_bytes(whole)


def test_the_reader_refuses_what_alone_is_too_much_and_what_together_is() -> None:
    reader = bodies.BodyReader(10_000_000, 40_000_000)
    many, some = b"[]," * 1_000_000, b"[]," * 200_000
    with pytest.raises(Problem) as alone:
        reader.charge(len(many), cost.json_bytes(many))
    assert alone.value.code == "BODY_TOO_LARGE"
    assert reader.held == 0
    held = reader.charge(len(some), cost.json_bytes(some))
    with pytest.raises(Problem) as together:
        reader.charge(len(some), cost.json_bytes(some))
    assert together.value.code == "OVERLOADED"
    reader.release(held)
    assert reader.held == 0


@pytest.mark.anyio
async def test_what_is_parsed_elsewhere_leaves_room_and_the_next_ones_wait() -> None:
    reader = bodies.BodyReader(10_000_000, 40_000_000)
    now = asyncio.get_running_loop().time()

    async def one(deadline: float | None = None) -> int:
        return await reader.charge_elsewhere(reader.hold(5_000_000), 500_000_000, deadline)

    first = await one()
    assert (first, reader.charge(100, 1_000)) == (20_000_000, 1_000)
    reader.release(1_000)
    waiting = [asyncio.create_task(one()) for _ in range(2)]
    await until(lambda: reader.freed is not None)
    for late in (now - 1.0, None):  # past its deadline; one more than can wait without being in the way
        with pytest.raises(Problem) as refused:
            await reader.charge_elsewhere(5_000_000 if late else 15_000_000, 30_000_000, late)
        assert refused.value.code == "OVERLOADED"
    for task in waiting:
        reader.release(first + 5_000_000)
        assert await task == 20_000_000
    reader.release(first + 5_000_000)
    assert reader.held == 0
