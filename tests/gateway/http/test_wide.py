"""Wide inputs cost work in proportion to their width, in each form that a body can have. Work is counted, not
timed: lines that run, and the length of each list that a call walks."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from gateway.errors import Problem
from gateway.http import arrow, bodies
from loaders.enforcement import InvalidInput, Mode, enforce
from loaders.signature import ColSpec, Signature, TensorSpec
from tests.conftest import needs

_WALKS = frozenset({"count", "index", "remove", "insert", "pop", "extend", "copy"})
NARROW, TIMES = 500, 4


def work(function: Callable[[], object]) -> int:
    done = 0

    def line(frame: Any, event: str, argument: Any) -> Any:
        nonlocal done
        done += event == "line"
        return line

    def call(frame: Any, event: str, argument: Any) -> None:
        nonlocal done
        owner = getattr(argument, "__self__", None)
        if event == "c_call" and isinstance(owner, list | tuple) and argument.__name__ in _WALKS:
            done += len(owner)

    sys.settrace(line)
    sys.setprofile(call)
    try:
        function()
    except (InvalidInput, Problem):
        pass
    finally:
        sys.settrace(None)
        sys.setprofile(None)
    return done


def in_arrow(names: list[str]) -> bytes:
    pa: Any = needs("pyarrow")
    sink = io.BytesIO()
    table = pa.table({name: [1.5] for name in names})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def as_json(**members: Any) -> bytes:
    return json.dumps(members).encode()


FORMS: dict[str, tuple[bodies.Media, Callable[[list[str]], bytes]]] = {
    "split": ("json", lambda n: as_json(dataframe_split={"columns": n, "data": [[1.5] * len(n)] * 2})),
    "records": ("json", lambda n: as_json(dataframe_records=[dict.fromkeys(n, 1.5)] * 2)),
    "ragged records": ("json", lambda n: as_json(dataframe_records=[{name: 1.5} for name in n])),
    "columns": ("json", lambda n: as_json(inputs={name: [1.5, 2] for name in n})),
    "one record": ("json", lambda n: as_json(inputs=dict.fromkeys(n, 1.5))),
    "instances": ("json", lambda n: as_json(instances=[dict.fromkeys(n, 1.5)] * 2)),
    "ragged instances": ("json", lambda n: as_json(instances=[{name: 1.5} for name in n])),
    "rows": ("json", lambda n: as_json(inputs=[[1.5] * len(n)] * 2)),
    "params": ("json", lambda n: as_json(inputs=[1], params=dict.fromkeys(n, 1))),
    "members": ("json", lambda n: as_json(**dict.fromkeys(n, 1))),
    "a name twice": ("json", lambda n: as_json(dataframe_split={"columns": n + n, "data": []})),
    "csv": ("csv", lambda n: (",".join(n) + "\n" + ",".join(["1.5"] * len(n))).encode()),
    "csv, each name twice": ("csv", lambda n: ",".join(n + n).encode()),
    "arrow": ("arrow", in_arrow),
}
SIGNATURES: dict[str, Signature | None] = {
    "none": None,
    "columns": Signature((ColSpec("double", "c1"), ColSpec("double", "absent"))),
    "tensors": Signature((TensorSpec("float64", (-1,), "c1"), TensorSpec("float64", (-1, 2), "absent"))),
    "a tensor": Signature((TensorSpec("float64", (-1, -1)),)),
}


@pytest.mark.parametrize("mode", ["strict", "mlflow"])
@pytest.mark.parametrize("signature", SIGNATURES)
@pytest.mark.parametrize("form", FORMS)
def test_work_grows_with_the_width_and_not_faster(form: str, signature: str, mode: Mode) -> None:
    media, made = FORMS[form]

    def ask(width: int) -> Callable[[], object]:
        body = made([f"c{i}" for i in range(width)])

        def answer() -> None:
            assert media != "arrow" or arrow.cost(body)
            parsed = bodies.PARSERS[media](body)
            enforce(SIGNATURES[signature], parsed.raw, parsed.params, mode)

        return answer

    work(ask(10))  # imports and caches
    narrow = work(ask(NARROW))
    assert work(ask(NARROW * TIMES)) <= 1.5 * TIMES * max(narrow, 1000)
