"""The Open Inference Protocol (V2) over HTTP, rule by rule, against a real gateway with real models.

The rules are those of the protocol's text and of its binary tensor extension; each test names its rule.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import gateway
from gateway import __version__
from gateway.http import v2_inputs
from loaders.enforcement.violations import Faults
from loaders.signature import ColSpec, ParamSpec, Scalar, Signature, TensorSpec
from tests.support.served import Reply, Served, settings

COLUMNS = ("flag", "small", "whole", "short", "number", "text", "bytes", "moment")
ROWS = pd.DataFrame(
    {
        "flag": [True, False],
        "small": np.array([1, -2], np.int32),
        "whole": [2**60 + 1, -5],
        "short": np.array([0.5, -1.5], np.float32),
        "number": [0.1, 1e300],
        "text": ["a", "ñ 名"],
        "bytes": [b"\x00\xff", b"ok"],
        "moment": pd.to_datetime(["2024-01-02T03:04:05", "1999-12-31T00:00:00"]),
    }
)


def mirror() -> Any:
    """A model that answers its input. Its class is local, so that it is pickled by value."""

    class Mirror:
        def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
            return model_input

    return Mirror()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("v2")
    registry = str(directory / "registry.yaml")

    def log(name: str, **options: Any) -> None:
        gateway.log_model(mirror(), name, registry, alias="champion", verify=False, **options)

    log("typed", input_example=ROWS)
    optional = (ColSpec("long", "n", False), ColSpec("string", "t", False), ColSpec("double", "d", False))
    log("gaps", signature=Signature(inputs=optional))
    log("doubles", signature=Signature(inputs=tuple(ColSpec("double", name) for name in "abc")))
    tuned = Signature(inputs=(ColSpec("double", "a"),), params=(ParamSpec("threshold", Scalar.double, 0.1),))
    log("tuned", signature=tuned)
    half = TensorSpec(np.dtype(np.float32), (-1, 2), "x")
    log("tensors", signature=Signature(inputs=(half, TensorSpec(np.dtype(np.int64), (-1,), "k"))))
    log("floats", signature=Signature(inputs=(TensorSpec(np.dtype(np.float64), (-1,)),)))
    with pytest.warns(UserWarning, match="signature"):
        log("free")
    gateway.log_model(mirror(), "typed", registry, input_example=ROWS.head(1), verify=False)
    document = Path(registry).read_text()
    Path(registry).write_text(
        document.replace(
            "models:", "models:\n  gone: {versions: {1: {source: nowhere}}, aliases: {champion: 1}}", 1
        )
    )
    with Served(settings(directory), registry) as running:
        yield running


def tensor(name: str, datatype: str, shape: list[int], data: Any, **parameters: Any) -> dict[str, Any]:
    one = {"name": name, "datatype": datatype, "shape": shape, "data": data}
    return {**one, "parameters": parameters} if parameters else one


TYPED = [
    tensor("flag", "BOOL", [2], [True, False]),
    tensor("small", "INT32", [2], [1, -2]),
    tensor("whole", "INT64", [2, 1], [[2**60 + 1], [-5]]),
    tensor("short", "FP32", [2], [0.5, -1.5]),
    tensor("number", "FP64", [2], [0.1, 1e300]),
    tensor("text", "BYTES", [2], ["a", "ñ 名"]),
    tensor("bytes", "BYTES", [2], ["AP8=", "b2s="], content_type="base64"),
    tensor("moment", "BYTES", [2], ["2024-01-02T03:04:05", "1999-12-31"]),
]


def infer(served: Served, model: str, *inputs: dict[str, Any], **members: Any) -> Reply:
    return served.post(f"/v2/models/{model}/infer", {"inputs": list(inputs), **members})


def outputs(reply: Reply) -> dict[str, Any]:
    assert reply.status == 200, reply.body
    return {one["name"]: one for one in reply.json["outputs"]}


def packed(datatype: str, values: Any) -> bytes:
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(value)) + value for value in values)
    kinds = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "INT64": "<i8", "INT32": "<i4", "BOOL": "?"}
    return np.asarray(values, kinds[datatype]).tobytes()


def binary(
    served: Served,
    model: str,
    inputs: list[dict[str, Any]],
    raw: bytes,
    *,
    length: str | None = "",
    **members: Any,
) -> Reply:
    """`length`: what the header says; empty: the truth, None: no header."""
    text = json.dumps({"inputs": inputs, **members}).encode()
    said = str(len(text)) if length == "" else length
    headers = {} if said is None else {"inference_header_content_length": said}
    return served.request(
        "POST", f"/v2/models/{model}/infer", text + raw, "application/octet-stream", **headers
    )


def raw_tensor(name: str, datatype: str, shape: list[int], size: int, **parameters: Any) -> dict[str, Any]:
    return {
        "name": name,
        "datatype": datatype,
        "shape": shape,
        "parameters": {"binary_data_size": size, **parameters},
    }


def parted(reply: Reply) -> tuple[Any, bytes]:
    length = int(reply.headers["inference-header-content-length"])
    assert reply.headers["content-type"] == "application/octet-stream"
    return json.loads(reply.body[:length]), reply.body[length:]


# ---- 1 to 5: the server and its models


def test_01_server_metadata_names_the_extensions(served: Served) -> None:
    told = served.get("/v2").json
    assert told == {
        "name": "model-gateway",
        "version": __version__,
        "extensions": ["binary_tensor_data", "model_repository"],
    }


def test_02_health(served: Served) -> None:
    assert served.get("/v2/health/live").status == served.get("/v2/health/ready").status == 200


def test_03_metadata_has_names_types_and_shapes_that_infer_accepts(served: Served) -> None:
    told = served.get("/v2/models/typed@champion").json
    assert (told["name"], told["versions"]) == ("typed", ["1", "2"])
    assert [(one["name"], one["datatype"]) for one in told["inputs"]] == [
        (one["name"], one["datatype"]) for one in TYPED
    ]
    given = {one["name"]: one for one in TYPED}
    inputs = [{**given[one["name"]], "shape": [2], "datatype": one["datatype"]} for one in told["inputs"]]
    assert all(one["shape"] == [-1] for one in told["inputs"])
    inputs[2]["data"] = [1, 2]
    found = outputs(infer(served, "typed", *inputs))
    assert [found[one["name"]]["datatype"] for one in told["outputs"] or told["inputs"]] == [
        one["datatype"] for one in told["outputs"] or told["inputs"]
    ]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("typed/ready", 200),
        ("typed/versions/2/ready", 200),
        ("free/ready?load=true", 200),
        ("typed/versions/9/ready", 404),
        ("typed@nobody/ready", 404),
        ("nothing/ready", 404),
        ("nothing", 404),
    ],
)
def test_04_a_model_is_ready_when_its_reference_resolves(served: Served, path: str, status: int) -> None:
    reply = served.get(f"/v2/models/{path}")
    assert reply.status == status
    assert reply.json["ready"] if status == 200 else reply.json["error"]


def test_05_a_model_is_not_ready_once_its_load_failed(served: Served) -> None:
    assert served.get("/v2/models/gone/ready").status == 200  # it was not tried yet
    assert infer(served, "gone", tensor("x", "FP64", [1], [1])).status == 503
    reply = served.get("/v2/models/gone/ready")
    assert reply.status == 503
    assert reply.code == "MODEL_UNAVAILABLE"
    assert "retry-after" in reply.headers


# ---- 6 to 20: inference in JSON


def test_06_every_type_comes_back_as_it_was_sent(served: Served) -> None:
    found = outputs(infer(served, "typed", *TYPED))
    assert {name: one["data"] for name, one in found.items()} == {
        "flag": [True, False],
        "small": [1, -2],
        "whole": [2**60 + 1, -5],
        "short": [0.5, -1.5],
        "number": [0.1, 1e300],
        "text": ["a", "ñ 名"],
        "bytes": ["AP8=", "b2s="],
        "moment": ["2024-01-02T03:04:05", "1999-12-31T00:00:00"],
    }
    assert found["bytes"]["parameters"] == {"content_type": "base64"}
    assert all(one["shape"] == [2] for one in found.values())


def test_07_the_id_comes_back_and_only_where_there_was_one(served: Served) -> None:
    assert infer(served, "typed", *TYPED, id="x-1").json["id"] == "x-1"
    assert "id" not in infer(served, "typed", *TYPED).json


def test_08_the_answer_names_model_and_version(served: Served) -> None:
    told = infer(served, "typed", *TYPED).json
    assert (told["model_name"], told["model_version"]) == ("typed", "1")  # the alias is on version 1
    assert infer(served, "typed/versions/2", *TYPED).json["model_version"] == "2"


def test_09_outputs_selects_and_orders(served: Served) -> None:
    reply = infer(served, "typed", *TYPED, outputs=[{"name": "text"}, {"name": "flag"}])
    assert [one["name"] for one in reply.json["outputs"]] == ["text", "flag"]


def test_10_an_output_that_does_not_exist_is_refused(served: Served) -> None:
    reply = infer(served, "typed", *TYPED, outputs=[{"name": "nope"}])
    assert (reply.status, reply.code) == (422, "INVALID_INPUT")
    assert "text" in reply.json["hint"]


@pytest.mark.parametrize("data", [[1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]], ids=["flat", "nested"])
def test_11_one_matrix_stands_for_columns_of_one_type(served: Served, data: Any) -> None:
    found = outputs(infer(served, "doubles", tensor("all", "FP64", [2, 3], data)))
    assert {name: one["data"] for name, one in found.items()} == {"a": [1, 4], "b": [2, 5], "c": [3, 6]}


def test_11_a_matrix_of_too_few_columns_is_named(served: Served) -> None:
    reply = infer(served, "doubles", tensor("all", "FP64", [1, 2], [1, 2]))
    assert (reply.status, reply.code) == (422, "INVALID_INPUT")
    (detail,) = reply.json["details"]
    assert detail["path"] == "inputs.all"
    assert (detail["expected"], detail["got"]) == ("shape [n, 3]", "shape [1, 2]")


BAD = {
    "12 wrong size": tensor("number", "FP64", [2], [1]),
    "13 wrong nesting": tensor("number", "FP64", [2, 1], [[1, 2]]),
    "14 wrong value": tensor("number", "FP64", [2], [1, "x"]),
    "15 wrong type": tensor("whole", "FP64", [2], [1, 2]),
    "16 unknown type": tensor("number", "FP99", [2], [1, 2]),
    "17 negative dimension": tensor("number", "FP64", [-1], [1, 2]),
    "18 null": tensor("text", "BYTES", [2], ["a", None]),
    "19 beyond the type": tensor("small", "INT32", [2], [1, 2**31]),
    "20 boolean as number": tensor("flag", "BOOL", [2], [1, 0]),
    "21 wrong rank": tensor("number", "FP64", [2, 2], [1, 2, 3, 4]),
    "22 no data": {"name": "number", "datatype": "FP64", "shape": [2]},
    "23 no date": tensor("moment", "BYTES", [2], ["2024-01-02", "yesterday"]),
    "24 no shape": {"name": "number", "datatype": "FP64", "data": [1, 2]},
}


@pytest.mark.parametrize("rule", BAD)
def test_an_input_that_is_not_what_it_says_is_refused(served: Served, rule: str) -> None:
    bad = BAD[rule]
    inputs = [bad if one["name"] == bad["name"] else one for one in TYPED]
    reply = infer(served, "typed", *inputs)
    assert (reply.status, reply.code) == (422, "INVALID_INPUT")
    assert reply.json["error"] == reply.json["message"]
    assert all(one["path"].startswith(f"inputs.{bad['name']}") for one in reply.json["details"])


def test_25_a_missing_input_is_named(served: Served) -> None:
    reply = infer(served, "typed", *TYPED[1:])
    assert [one["path"] for one in reply.json["details"]] == ["inputs.flag"]


def test_26_an_extra_input_is_ignored_with_a_warning(served: Served) -> None:
    reply = infer(served, "typed", *TYPED, tensor("more", "INT32", [2], [1, 2]))
    assert "more" in reply.json["parameters"]["warnings"]
    assert list(outputs(reply)) == list(COLUMNS)


def test_31_only_a_model_with_params_warns_of_unknown_parameters(served: Served) -> None:
    for one in (TYPED, [tensor("flag", "BOOL", [2], [True, False], trace="a"), *TYPED[1:]]):
        reply = infer(served, "typed", *one, parameters={"trace": "a", "content_type": "pd"})
        assert list(outputs(reply)) == list(COLUMNS)
        assert "parameters" not in reply.json
    inputs = [tensor("a", "FP64", [1], [1.0])]
    reply = infer(served, "tuned", *inputs, parameters={"treshold": 0.5, "content_type": "pd"})
    assert "treshold" in reply.json["parameters"]["warnings"]
    assert "content_type" not in reply.json["parameters"]["warnings"]


def test_27_an_input_twice_is_refused(served: Served) -> None:
    reply = infer(served, "typed", *TYPED, TYPED[0])
    assert (reply.status, reply.json["details"][0]["problem"]) == (422, "occurs twice")


def test_28_an_empty_batch(served: Served) -> None:
    found = outputs(infer(served, "doubles", tensor("all", "FP64", [0, 3], [])))
    assert [one["shape"] for one in found.values()] == [[0], [0], [0]]


def test_29_nan_and_infinities_reach_the_model(served: Served) -> None:
    one = '{"name": "x", "datatype": "FP64", "shape": [4], "data": [NaN, Infinity, -Infinity, null]}'
    body = '{"inputs": [' + one + "]}"
    reply = served.post("/v2/models/floats/infer", body)
    assert outputs(reply)["predictions"]["data"] == [None] * 4  # JSON has no word for them
    reply = infer(served, "floats", tensor("x", "FP64", [1], [None]), parameters={"binary_data_output": True})
    assert np.isnan(np.frombuffer(parted(reply)[1], "<f8")).all()


def test_30_nulls_lists_the_rows_that_hold_null(served: Served) -> None:
    inputs = (
        tensor("n", "INT64", [3], [1, 0, 3], nulls=[1]),
        tensor("t", "BYTES", [3], ["a", "", "c"], nulls=[1]),
        tensor("d", "FP64", [3], [1.5, 0, 2.5], nulls=[2]),
    )
    found = outputs(infer(served, "gaps", *inputs))
    assert found["d"]["data"] == [1.5, 0, None]
    assert found["t"]["parameters"]["nulls"] == [1]
    refused = infer(served, "gaps", tensor("n", "INT64", [1], [1], nulls=[1]))
    assert refused.json["details"][0]["path"] == "inputs.n.parameters.nulls"


def test_31_unknown_parameters_are_ignored(served: Served) -> None:
    inputs = [{**one, "parameters": {"content_type": "np", **one.get("parameters", {})}} for one in TYPED]
    reply = infer(served, "typed", *inputs, parameters={"content_type": "pd", "headers": {}})
    assert reply.status == 200
    assert "parameters" not in reply.json


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"{}", b'{"inputs": []}', b'{"inputs": [1]}', b'{"inputs": [{"name": ""}]}',
     b'{"inputs": [{"name": "a"}], "id": 5}', b'{"inputs": [{"name": "a"}], "outputs": [{}]}',
     b'{"inputs": [{"name": "a", "parameters": 1}]}'],
)  # fmt: skip
def test_32_a_body_that_is_not_a_request_is_400(served: Served, body: bytes) -> None:
    reply = served.post("/v2/models/typed/infer", body)
    assert reply.status in (400, 422)
    assert reply.json["error"]
    assert "dataframe_split" not in reply.json["hint"]


def test_33_other_methods_and_paths(served: Served) -> None:
    assert served.get("/v2/models/typed/infer").status == 405
    assert served.post("/v2/models/typed/ready").status == 405
    assert served.get("/v2/nothing").json["error_code"] == "NOT_FOUND"
    assert served.get("/v2x").status == 404


def test_34_a_model_without_signature_takes_arrays(served: Served) -> None:
    found = outputs(infer(served, "free", tensor("x", "INT64", [2, 2], [1, 2, 3, 4])))
    assert found["predictions"]["shape"] == [2, 2]
    assert served.get("/v2/models/free").json["inputs"] == []


# ---- 40 onwards: the binary tensor extension


@pytest.mark.parametrize("wanted", ["all", "one"])
def test_40_binary_in_and_out(served: Served, wanted: str) -> None:
    x, k = packed("FP32", [[1, 2], [3, 4]]), packed("INT64", [2**60 + 1, 7])
    inputs = [raw_tensor("x", "FP32", [2, 2], len(x)), raw_tensor("k", "INT64", [2], len(k))]
    asked: dict[str, Any] = {"parameters": {"binary_data_output": True}}
    if wanted == "one":
        asked = {"outputs": [{"name": "k", "parameters": {"binary_data": True}}, {"name": "x"}]}
    told, raw = parted(binary(served, "tensors", inputs, x + k, **asked))
    by_name = {one["name"]: one for one in told["outputs"]}
    assert by_name["k"]["parameters"] == {"binary_data_size": 16}
    assert raw == (x + k if wanted == "all" else k)
    assert wanted == "all" or by_name["x"]["data"] == [1, 2, 3, 4]


def test_41_binary_and_json_inputs_may_be_mixed(served: Served) -> None:
    x = packed("FP32", [[1, 2]])
    inputs = [raw_tensor("x", "FP32", [1, 2], len(x)), tensor("k", "INT64", [1], [5])]
    found = outputs(binary(served, "tensors", inputs, x))
    assert (found["x"]["data"], found["k"]["data"]) == ([1, 2], [5])


def test_42_bytes_in_binary_form(served: Served) -> None:
    text, data = packed("BYTES", [b"a", "ñ 名".encode()]), packed("BYTES", [b"\x00\xff", b""])
    inputs = [one for one in TYPED if one["name"] not in ("text", "bytes")]
    inputs += [raw_tensor("text", "BYTES", [2], len(text)), raw_tensor("bytes", "BYTES", [2], len(data))]
    asked = [{"name": name, "parameters": {"binary_data": True}} for name in ("bytes", "text")]
    told, raw = parted(binary(served, "typed", inputs, text + data, outputs=asked))
    assert raw == data + text
    assert [one["name"] for one in told["outputs"]] == ["bytes", "text"]


@pytest.mark.parametrize(
    ("datatype", "raw"),
    [("FP16", packed("FP16", [1.5, -2])), ("BF16", struct.pack("<2H", 0x3FC0, 0xC000))],
)
def test_43_half_floats_come_as_raw_bytes(served: Served, datatype: str, raw: bytes) -> None:
    found = outputs(binary(served, "floats", [raw_tensor("x", datatype, [2], 4)], raw))
    assert found["predictions"]["data"] == [1.5, -2]


GOOD = packed("FP64", [1, 2])
WRONG: dict[str, tuple[dict[str, Any], bytes, str | None]] = {
    "negative": (raw_tensor("x", "FP64", [2], 16), GOOD, "-1"),
    "not a number": (raw_tensor("x", "FP64", [2], 16), GOOD, "x"),
    "absent": (raw_tensor("x", "FP64", [2], 16), GOOD, None),
    "beyond the body": (raw_tensor("x", "FP64", [2], 16), GOOD, "100000"),
    "more bytes than inputs": (raw_tensor("x", "FP64", [2], 16), GOOD + b"?", ""),
    "size beyond the body": (raw_tensor("x", "FP64", [2], 17), GOOD, ""),
    "negative size": (raw_tensor("x", "FP64", [2], -16), GOOD, ""),
    "size is not the shape's": (raw_tensor("x", "FP64", [3], 16), GOOD, ""),
    "text that ends early": (raw_tensor("x", "BYTES", [1], 16), struct.pack("<I", 99) + b"abcdefgh1234", ""),
    "a boolean of 2": (raw_tensor("x", "BOOL", [2], 2), b"\x01\x02", ""),
    "both forms": ({**raw_tensor("x", "FP64", [2], 16), "data": [1, 2]}, GOOD, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_44_wrong_binary_requests_are_refused(served: Served, case: str) -> None:
    one, raw, length = WRONG[case]
    reply = binary(served, "floats", [one], raw, length=length)
    assert reply.status in (400, 422)
    assert reply.json["error"]


def test_45_a_large_tensor_needs_no_process_of_its_own(served: Served) -> None:
    x = np.arange(600_000, dtype="<f8")  # 4.8 MB
    inputs = [raw_tensor("x", "FP64", [600_000], x.nbytes)]
    _, raw = parted(binary(served, "floats", inputs, x.tobytes(), parameters={"binary_data_output": True}))
    assert raw == x.tobytes()
    assert served.gateway.parts.large_bodies.pid is None


def test_46_large_json_is_parsed_elsewhere_and_keeps_id_and_outputs(served: Served) -> None:
    inputs = [tensor(name, "FP64", [60_000], [1.25] * 60_000) for name in "abc"]
    reply = infer(served, "doubles", *inputs, id="big", outputs=[{"name": "b"}])
    assert reply.json["id"] == "big"
    assert list(outputs(reply)) == ["b"]


def test_47_a_tensor_without_values_cannot_claim_many_rows(served: Served) -> None:
    reply = infer(served, "free", tensor("x", "FP64", [10**9, 0], []))
    assert (reply.status, reply.code) == (422, "INVALID_INPUT")


# ---- 50 onwards: the model repository


def test_50_the_index_lists_versions_with_their_state(served: Served) -> None:
    assert infer(served, "doubles", tensor("all", "FP64", [1, 3], [1, 2, 3])).status == 200
    index = {(one["name"], one["version"]): one for one in served.post("/v2/repository/index").json}
    assert index["doubles", "1"]["state"] == "READY"
    assert ("typed", "2") in index
    ready = served.post("/v2/repository/index", {"ready": True}).json
    assert ready
    assert all(one["state"] == "READY" for one in ready)


def test_51_load_and_unload_need_control_access(served: Served) -> None:
    assert served.post("/v2/repository/models/doubles/unload").status == 200
    index = {(one["name"], one["version"]): one for one in served.post("/v2/repository/index").json}
    assert index["doubles", "1"]["state"] == "UNAVAILABLE"
    assert served.post("/v2/repository/models/doubles@champion/load").status == 200
    refused = served.post("/v2/repository/models/doubles/unload", authorization="Bearer no")
    assert (refused.status, refused.code) == (401, "UNAUTHENTICATED")


# ---- 60: which enforcement holds where


def test_60_without_a_setting_only_mlflows_route_casts_and_warns(served: Served) -> None:
    body = {"dataframe_split": {"columns": ["a", "b", "c"], "data": [["1", 2, 3]]}}
    assert served.post("/predict/doubles", body).status == 422
    cast = served.post("/invocations", body, x_model="doubles")
    assert (cast.status, cast.headers["x-model-warnings"]) == (200, "lenient-cast")
    body["dataframe_split"]["data"] = [[1, 2, 3]]
    assert "x-model-warnings" not in served.post("/invocations", body, x_model="doubles").headers
    assert 'gateway_lenient_casts_total{model="doubles"} 1.0' in served.get("/metrics").body.decode()


@pytest.mark.parametrize(
    "shape", [["x", 10**8], [99] * 50_000, [-1, 2], {"x": 1}, [[1], 10**8]], ids=lambda shape: str(shape)[:12]
)
def test_70_only_a_shape_is_multiplied(shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    factors: list[Any] = []
    monkeypatch.setattr(v2_inputs.math, "prod", lambda given: factors.extend(given) or 1)
    text = json.dumps({"inputs": [{"name": "t", "datatype": "BYTES", "shape": shape}]}).encode()
    assert v2_inputs.memory(text + bytes(400), str(len(text))) > 100 * 100
    assert v2_inputs.most_texts(shape, 400) == 100
    assert factors == []


@pytest.mark.parametrize("nulls", [[0] * 5000, [1, 0, 1]])
def test_71_a_row_is_null_once(served: Served, nulls: list[int]) -> None:
    rows = 2
    gaps = tensor("d", "FP64", [rows, 3], [[1.0, 2.0, 3.0]] * rows, nulls=nulls)
    parsed = v2_inputs.read({"inputs": [gaps]}, lambda place, parameters, root: None)
    array = parsed.raw.data["d"]
    assert np.isnan(array).all(axis=1).tolist() == [row in nulls for row in range(rows)]
    assert v2_inputs._nulls(nulls, [rows, 3], "d", Faults()) == sorted(set(nulls))
