"""Bodies as Python's clients write them: bare words, a byte order mark, long numbers, deep nesting."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gateway.errors import Problem
from gateway.http import bodies, jsonbody
from loaders import batch as batches
from loaders.enforcement import InvalidInput, enforce
from loaders.schema import AnyType, Array
from loaders.signature import ColSpec, ParamSpec, Scalar, Signature, TensorSpec
from loaders.worker import wire

ROWS = Signature(
    (
        ColSpec(Scalar.double, "x"),
        ColSpec(Scalar.string, "t"),
        ColSpec(Scalar.long, "n", required=False),
        ColSpec(Scalar.datetime, "d"),
    )
)


def as_mlflow_writes(frame: Any) -> bytes:
    return json.dumps({"dataframe_split": frame.to_dict(orient="split")}, default=str).encode()


def test_the_bare_words_of_pythons_writer() -> None:
    frame = pd.DataFrame(
        {
            "x": [1.5, np.nan, np.inf],
            "t": ["a", np.nan, "c"],
            "n": pd.Series([1, np.nan, 3], dtype=object),
            "d": pd.Series(["2024-01-01", np.nan, None], dtype=object),
        }
    )
    body = as_mlflow_writes(frame)
    assert b"NaN" in body
    given = batches.native(enforce(ROWS, bodies.parse_json(body).raw).batch)
    assert given["x"].tolist()[::2] == [1.5, math.inf]
    assert given.isna().to_numpy().tolist() == [[False] * 4, [True] * 4, [False, False, False, True]]
    assert given["t"].dtype == pd.read_csv(io.StringIO("t,x\na,\n,1"))["t"].dtype


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_a_bare_word_where_no_float_may_be(word: str) -> None:
    signature = Signature((ColSpec(Scalar.long, "n"),))
    with pytest.raises(InvalidInput):
        enforce(signature, bodies.parse_json(f'{{"inputs": {{"n": [{word}]}}}}'.encode()).raw)


def test_words_inside_text_are_text() -> None:
    raw = bodies.parse_json(b'{"inputs": {"t": ["NaN", "say \\"Infinity\\""], "x": [NaN]}}').raw
    assert raw.data["t"] == ["NaN", 'say "Infinity"']


def test_a_byte_order_mark() -> None:
    assert bodies.parse_json(b'\xef\xbb\xbf{"inputs": [1]}').raw.data == [1]


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs": [NaN}',
        b'{"inputs": [nan]}',
        b'{"inputs": NaN, "t": "\\ud800"}',
        b'{"inputs": NaN, "t": "\xff"}',
        b'{"inputs": ' + b"[" * 100_000 + b"NaN",
        b'{"inputs": [' + b"1" * 5_000 + b"]}",
        b"NaN",
    ],
    ids=lambda body: repr(body)[:30],
)
def test_what_is_not_json_is_still_refused(body: bytes) -> None:
    with pytest.raises(Problem) as refused:
        bodies.parse_json(body)
    assert refused.value.code == "MALFORMED_BODY"


@pytest.mark.parametrize("number", [2**63, 2**64, -(2**63) - 1, 10**30])
def test_whole_numbers_of_any_length_are_exact(number: int) -> None:
    body = f'{{"inputs": [{number}]}}'.encode()
    batch = enforce(None, bodies.parse_json(body).raw).batch
    value = batch.value if isinstance(batch, batches.Value) else batch.arrays[""].tolist()
    assert value == [number]
    with pytest.raises(InvalidInput) as refused:
        enforce(Signature((ColSpec(Scalar.long),)), bodies.parse_json(body).raw)
    assert refused.value.violations[0].problem == "is out of range"
    records = f'{{"dataframe_records": [{{"n": {number}}}, {{"n": -1}}]}}'.encode()
    assert batches.native(enforce(None, bodies.parse_json(records).raw).batch)["n"].tolist() == [number, -1]


def test_long_fractions_stay_with_the_fast_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(body: bytes) -> Any:
        raise AssertionError("the standard library read an ordinary body")

    monkeypatch.setattr(jsonbody, "_loads", slow)
    body = b'{"inputs": [0.00012345678901234567, "12345678901234567890"]}'
    assert jsonbody.loads(body)["inputs"] == [0.00012345678901234567, "12345678901234567890"]


def test_the_pattern_for_long_whole_numbers_never_looks_at_fractions(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[bytes] = []

    class Pattern:
        def match(self, body: bytes, at: int) -> object:
            looked.append(body[at : at + 4])
            return whole.match(body, at)

    whole = jsonbody._WHOLE
    monkeypatch.setattr(jsonbody, "_WHOLE", Pattern())
    fractions = [0.0012345678901234567 * n for n in range(1, 500)] + [-1.2345678901234567e-05]
    body = json.dumps({"inputs": fractions, "id": "1" * 60, "x": float(12345678901234567890)}).encode()
    assert jsonbody.loads(body)["inputs"] == fractions
    assert looked == []
    body = b"[0.00012345678901234567,-12345678901234567890 ]"
    assert jsonbody.loads(body) == [0.00012345678901234567, -12345678901234567890]
    assert looked == [b",-12"]


def test_integers_with_gaps_without_a_signature_are_exact() -> None:
    body = b'{"dataframe_records": [{"n": 9007199254740993}, {"n": null}]}'
    assert batches.native(enforce(None, bodies.parse_json(body).raw).batch)["n"].tolist() == [
        2**53 + 1,
        pd.NA,
    ]


SIGNATURES = {
    "none": None,
    "any": Signature((ColSpec(AnyType(), "a"),)),
    "nested any": Signature((ColSpec(Array(AnyType()), "a"),)),
    "objects": Signature((TensorSpec(np.dtype(object), (-1,)),)),
    "params alone": Signature(None, None, (ParamSpec("p", Scalar.long, 1),)),
    "typed": Signature((ColSpec(Array(Array(Scalar.long)), "a"),)),
    "double": Signature((ColSpec(Scalar.double, "a"),)),
    "tensor": Signature((TensorSpec(np.dtype(np.float32), (-1, 2)),)),
}


@pytest.mark.parametrize("mode", ["strict", "mlflow", "warn"])
@pytest.mark.parametrize("depth", [50, 150, 1000])
@pytest.mark.parametrize("name", SIGNATURES)
@pytest.mark.parametrize(
    "shape", ['{"inputs": %s}', '{"inputs": [{"a": %s}]}', '{"dataframe_records": [{"a": %s}]}']
)
def test_deep_nesting_is_refused_or_reaches_the_model(name: str, depth: int, shape: str, mode: Any) -> None:
    """Never a RecursionError, in this process or in the model's."""
    body = (shape % ("[" * depth + "1" + "]" * depth)).encode()
    raw = bodies.parse_json(body).raw
    try:
        batch = enforce(SIGNATURES[name], raw, None, mode).batch
    except InvalidInput:
        return
    assert depth == 50
    pieces = wire.encode({"batch": batch})
    frame = np.frombuffer(b"".join(bytes(piece) for piece in pieces), np.uint8)
    wire.decode(frame[16:], int.from_bytes(frame[4:8].tobytes(), "little"))


def test_a_csv_cell_may_be_as_long_as_a_body() -> None:
    table = bodies.parse_csv(b"t\n" + b"x" * 1_000_000 + b"\n").raw.data
    assert [len(cell) for cell in table.cells[0]] == [1_000_000]
