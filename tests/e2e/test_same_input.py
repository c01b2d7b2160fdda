"""The same 1,000 random rows of all types, through every form of every protocol, are the same model input:
the model answers the digest of what it was given."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import gateway
from gateway.http import v2_models
from loaders.signature import ColSpec, Scalar, Signature
from tests.conftest import needs
from tests.e2e.test_hosting import started
from tests.support.served import Reply, Served, settings
from tests.support.shell import free_port

ROWS = 1000
RANDOM = np.random.default_rng(11)
FRAME = pd.DataFrame(
    {
        "flag": RANDOM.random(ROWS) < 0.5,
        "small": RANDOM.integers(-(2**31), 2**31 - 1, ROWS, dtype=np.int32),
        "whole": RANDOM.integers(-(2**63), 2**63 - 1, ROWS, dtype=np.int64),
        "short": RANDOM.normal(size=ROWS).astype(np.float32),
        "number": RANDOM.normal(size=ROWS) * 10.0 ** RANDOM.integers(-300, 300, ROWS),
        "text": [f'ñ {n}, "名"' for n in RANDOM.integers(0, 10**9, ROWS)],
        "content": [bytes(part) for part in RANDOM.integers(0, 256, (ROWS, 9), dtype=np.uint8)],
        "moment": pd.to_datetime(RANDOM.integers(0, 2**60, ROWS)),
    }
)
TYPES = ("boolean", "integer", "long", "float", "double", "string", "binary", "datetime")
SIGNATURE = Signature(
    inputs=tuple(ColSpec(Scalar(kind), name) for name, kind in zip(FRAME, TYPES, strict=True))
)
#: What MLflow's enforcement takes in all forms: it reads no datetimes from CSV, no base64 from instances.
PLAIN = FRAME.drop(columns=["content", "moment"])
DATATYPES = [one["datatype"] for one in v2_models.tensors(SIGNATURE.inputs or (), "")]


def digesting() -> Any:
    """A model that answers the digest of its input: names, types and values of its columns. Its class is
    local, so that it is pickled by value."""

    class Digesting:
        def predict(self, model_input: Any) -> Any:
            import hashlib

            columns = [(name, str(one.dtype), one.tolist()) for name, one in model_input.items()]
            return [hashlib.sha256(repr(columns).encode()).hexdigest()]

    return Digesting()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = str(tmp_path_factory.mktemp("registry") / "registry.yaml")
    plain = Signature(inputs=tuple(spec for spec in SIGNATURE.inputs or () if spec.name in PLAIN))
    for name, signature in (("m", SIGNATURE), ("plain", plain)):
        gateway.log_model(digesting(), name, made, signature=signature, alias="champion", verify=False)
    return made


@pytest.fixture(scope="module")
def served(registry: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    port = {"grpc_port": 0} if _has("grpc") else {}
    chosen = settings(tmp_path_factory.mktemp("same"), default_model="models:/m", **port)
    with Served(chosen, registry) as running:
        yield running


@pytest.fixture(scope="module")
def digests(registry: str) -> dict[str, str]:
    """Those of the frames themselves, without a gateway, by model."""
    frames = {"m": FRAME, "plain": PLAIN}
    return {
        name: str(gateway.load_model(f"models:/{name}@champion", registry=registry).predict(frame)[0])
        for name, frame in frames.items()
    }


def _has(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


def values(name: str) -> list[Any]:
    """A column in JSON's types."""
    column = FRAME[name]
    if name == "moment":
        return [moment.isoformat() for moment in column]
    if name == "content":
        return [base64.b64encode(one).decode() for one in column]
    return list(column.tolist())


def lines(frame: pd.DataFrame = FRAME) -> list[list[Any]]:
    return [list(row) for row in zip(*map(values, frame), strict=True)]


def records() -> list[dict[str, Any]]:
    return [dict(zip(FRAME, row, strict=True)) for row in lines()]


def split() -> dict[str, Any]:
    return {"dataframe_split": {"columns": list(FRAME), "data": lines()}}


def table(frame: pd.DataFrame = FRAME) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(list(frame))
    writer.writerows(lines(frame))
    return text.getvalue().encode()


def posted(path: str, body: Any, **headers: str) -> Callable[[Served], Any]:
    def ask(served: Served) -> Any:
        reply = served.post(path, body(), **headers)
        assert reply.status == 200, reply.body[:2000]
        return reply.json["predictions"][0]

    return ask


def second(inputs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"inputs": inputs}


def answer_of(reply: Reply) -> Any:
    assert reply.status == 200, reply.body[:2000]
    return reply.json["outputs"][0]["data"][0]


def by_v2(served: Served) -> Any:
    inputs = [
        {"name": name, "datatype": datatype, "shape": [ROWS, 1], "data": values(name)}
        for name, datatype in zip(FRAME, DATATYPES, strict=True)
    ]
    inputs[6]["parameters"] = {"content_type": "base64"}
    return answer_of(served.post("/v2/models/m/infer", second(inputs)))


def cells(name: str) -> list[bytes]:
    """A column of BYTES."""
    return list(FRAME[name]) if name == "content" else [one.encode() for one in values(name)]


def by_v2_binary(served: Served) -> Any:
    inputs, raw = [], b""
    for name, datatype in zip(FRAME, DATATYPES, strict=True):
        if datatype == "BYTES":
            part = b"".join(len(cell).to_bytes(4, "little") + cell for cell in cells(name))
        else:
            part = FRAME[name].to_numpy().tobytes()
        about = {"binary_data_size": len(part)}
        inputs.append({"name": name, "datatype": datatype, "shape": [ROWS], "parameters": about})
        raw += part
    text = json.dumps(second(inputs)).encode()
    return answer_of(
        served.post("/v2/models/m/infer", text + raw, inference_header_content_length=str(len(text)))
    )


def by_grpc(raw: bool) -> Callable[[Served], Any]:
    def ask(served: Served) -> Any:
        needs("grpc")
        from tests.support import rpc

        inputs = {
            name: (datatype, np.array(cells(name), object) if datatype == "BYTES" else FRAME[name].to_numpy())
            for name, datatype in zip(FRAME, DATATYPES, strict=True)
        }
        with rpc.caller(served.grpc) as called:
            answer = called.infer(rpc.request("m", inputs, raw=raw))
        ((found,),) = rpc.outputs(answer).values()
        return found.decode()

    return ask


def by_arrow(served: Served) -> Any:
    pa = needs("pyarrow")
    sink = pa.BufferOutputStream()
    made = pa.Table.from_pandas(FRAME, preserve_index=False)
    with pa.ipc.new_stream(sink, made.schema) as writer:
        writer.write_table(made)
    kind = "application/vnd.apache.arrow.stream"
    return posted("/predict/m", lambda: bytes(sink.getvalue()), content_type=kind)(served)


def by_parquet(served: Served) -> Any:
    pa = needs("pyarrow")
    sink = io.BytesIO()
    needs("pyarrow.parquet").write_table(pa.Table.from_pandas(FRAME, preserve_index=False), sink)
    return posted("/predict/m", sink.getvalue, content_type="application/vnd.apache.parquet")(served)


FORMS: dict[str, Callable[[Served], Any]] = {
    "dataframe_split": posted("/predict/m", split),
    "dataframe_records": posted("/predict/m", lambda: {"dataframe_records": records()}),
    "instances": posted("/predict/m", lambda: {"instances": records()}),
    "inputs of columns": posted("/predict/m", lambda: {"inputs": {name: values(name) for name in FRAME}}),
    "inputs of records": posted("/predict/m", lambda: {"inputs": records()}),
    "csv": posted("/predict/m", table, content_type="text/csv"),
    "invocations": posted("/invocations", split),
    "invocations with csv, plain": posted(
        "/invocations", lambda: table(PLAIN), content_type="text/csv", x_model="plain"
    ),
    "sagemaker": posted("/invocations", split, x_amzn_sagemaker_target_model="m.tar.gz"),
    "endpoints": posted("/endpoints/m/invocations", split),
    "endpoints by position, plain": posted(
        "/endpoints/plain/invocations", lambda: {"instances": lines(PLAIN)}
    ),
    "v1": posted("/v1/models/m:predict", lambda: {"instances": records()}),
    "v1 by position": posted("/v1/models/m:predict", lambda: {"instances": lines()}),
    "v2": by_v2,
    "v2 binary": by_v2_binary,
    "grpc": by_grpc(raw=True),
    "grpc typed": by_grpc(raw=False),
    "arrow": by_arrow,
    "parquet": by_parquet,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_model_the_same_input(
    served: Served, digests: dict[str, str], form: str
) -> None:
    assert FORMS[form](served) == digests["plain" if form.endswith("plain") else "m"]


def test_vertex_does_too(registry: str, digests: dict[str, str], tmp_path: Path) -> None:
    environ = {"AIP_HTTP_PORT": str(free_port()), "AIP_PREDICT_ROUTE": "/ask", "AIP_HEALTH_ROUTE": "/up"}
    environ["AIP_STORAGE_URI"] = str(Path(registry).parent / "models/m/1")
    with started(tmp_path, **environ) as client:
        for rows in (records(), lines()):
            answer = client.post("/ask", content=json.dumps({"instances": rows}))
            assert answer.json()["predictions"] == [digests["m"]]
