"""The same data gets the same verdict and the same model input over V2 as over /predict."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gateway.errors import Problem
from gateway.http import bodies, v2_inputs, v2_models
from loaders.batch import Columns
from loaders.enforcement import RawInput, enforce
from loaders.schema import ColSpec, Scalar
from loaders.signature import Signature
from tests.support.verdicts import COLUMNS, REFUSED, Case, column_signature, ours

SCALARS = [kind for kind in COLUMNS if isinstance(kind, Scalar)]
CASES = [(kind, case) for kind in SCALARS for case in COLUMNS[kind]]


def request(kind: Scalar, sound: Case, case: Case) -> bytes:
    """Two columns, as the model's metadata says: `k` and the one that is looked at."""
    datatype = v2_models.tensors((ColSpec(kind, "x"),), "")[0]["datatype"]
    parameters: dict[str, Any] = {"nulls": [1]} if case.value is None else {}
    if kind is Scalar.binary:
        parameters["content_type"] = "base64"
    k = {"name": "k", "datatype": "FP64", "shape": [2], "data": [0.5, 0.5]}
    data = [sound.value, "" if case.value is None and datatype == "BYTES" else case.value]
    x = {"name": "x", "datatype": datatype, "shape": [2, 1], "data": data, "parameters": parameters}
    return json.dumps({"inputs": [k, x]}).encode()


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize(("kind", "case"), CASES, ids=[f"{kind}-{case.name}" for kind, case in CASES])
def test_json_tensors_get_the_verdicts_of_json_columns(kind: Scalar, case: Case, required: bool) -> None:
    signature = column_signature(kind, required)
    sound = COLUMNS[kind][0]
    expected = ours(signature, RawInput("inputs", {"k": [0.5, 0.5], "x": [sound.value, case.value]}))
    try:
        found = ours(signature, v2_inputs.parse(request(kind, sound, case), "").raw)
    except Problem as problem:
        found = REFUSED if problem.code == "INVALID_INPUT" else repr(problem)
    assert found == expected


ROWS = 1000
RANDOM = np.random.default_rng(7)
FRAME = pd.DataFrame(
    {
        "flag": RANDOM.random(ROWS) < 0.5,
        "small": RANDOM.integers(-(2**31), 2**31 - 1, ROWS, dtype=np.int32),
        "whole": RANDOM.integers(-(2**63), 2**63 - 1, ROWS, dtype=np.int64),
        "short": RANDOM.normal(size=ROWS).astype(np.float32),
        "number": RANDOM.normal(size=ROWS) * 10.0 ** RANDOM.integers(-300, 300, ROWS),
        "text": [f"ñ {n} 名" for n in RANDOM.integers(0, 10**9, ROWS)],
        "moment": pd.to_datetime(RANDOM.integers(0, 2**60, ROWS)),
    }
)
TYPES = ("boolean", "integer", "long", "float", "double", "string", "datetime")
SIGNATURE = Signature(inputs=tuple(ColSpec(kind, name) for name, kind in zip(FRAME, TYPES, strict=True)))
DATATYPES = [one["datatype"] for one in v2_models.tensors(SIGNATURE.inputs or (), "")]


def values(name: str) -> list[Any]:
    column = FRAME[name]
    return [moment.isoformat() for moment in column] if name == "moment" else column.tolist()


def as_v2() -> RawInput:
    inputs = [
        {"name": name, "datatype": datatype, "shape": [ROWS], "data": values(name)}
        for name, datatype in zip(FRAME, DATATYPES, strict=True)
    ]
    return v2_inputs.parse(json.dumps({"inputs": inputs}).encode(), "").raw


def as_binary() -> RawInput:
    inputs, raw = [], b""
    for name, datatype in zip(FRAME, DATATYPES, strict=True):
        if datatype == "BYTES":
            cells = [value.encode() for value in values(name)]
            part = b"".join(struct.pack("<I", len(cell)) + cell for cell in cells)
        else:
            part = FRAME[name].to_numpy().tobytes()
        about = {"binary_data_size": len(part)}
        inputs.append({"name": name, "datatype": datatype, "shape": [ROWS], "parameters": about})
        raw += part
    text = json.dumps({"inputs": inputs}).encode()
    return v2_inputs.parse(text + raw, str(len(text))).raw


def as_json() -> RawInput:
    body = json.dumps({"inputs": {name: values(name) for name in FRAME}}).encode()
    return bodies.parse_json(body).raw


@pytest.mark.parametrize("mode", ["strict", "mlflow"])
@pytest.mark.parametrize("form", [as_v2, as_binary, as_json])
def test_random_rows_give_the_same_input_in_all_forms(form: Any, mode: Any) -> None:
    found = enforce(SIGNATURE, form(), mode=mode).batch
    expected = enforce(SIGNATURE, RawInput("python", FRAME)).batch
    assert isinstance(found, Columns)
    assert isinstance(expected, Columns)
    assert found.texts == expected.texts
    for name, column in expected.arrays.items():
        assert found.arrays[name].dtype == column.dtype
        assert found.arrays[name].tolist() == column.tolist()
