"""The Open Inference Protocol over gRPC, rule by rule, against a real gateway with real models."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.linear_model import LinearRegression

import gateway
from loaders.flavors.base import MERGES_KEY
from loaders.signature import ColSpec, Signature, TensorSpec
from tests.support.served import MAX_BODY, Served, settings

grpc = pytest.importorskip("grpc", reason="the extra grpc is not installed")
pytest.importorskip("grpc_health", reason="the extra grpc is not installed")

from gateway.grpc import inference_pb2 as pb  # noqa: E402
from tests.support import rpc  # noqa: E402

CODE = grpc.StatusCode
COLUMNS: dict[str, tuple[str, Any]] = {
    "flag": ("BOOL", np.array([True, False])),
    "small": ("INT32", np.array([1, -2], np.int32)),
    "whole": ("INT64", np.array([2**60 + 1, -5])),
    "short": ("FP32", np.array([0.5, -1.5], np.float32)),
    "number": ("FP64", np.array([0.1, 1e300])),
    "text": ("BYTES", np.array([b"a", "ñ 名".encode()], object)),
    "bytes": ("BYTES", np.array([b"\x00\xff", b"ok"], object)),
}


def mirror() -> Any:
    """A model that answers its input. Its class is local, so that it is pickled by value."""

    class Mirror:
        def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
            return model_input

    return Mirror()


def made_elsewhere(registry: str, name: str) -> None:
    """Logs a model whose package says that it was made with an old scikit-learn."""
    frame = pd.DataFrame({"x": [0.0, 1.0]})
    model = LinearRegression().fit(frame, frame["x"])
    gateway.log_model(model, name, registry, input_example=frame, alias="champion", verify=False)
    place = Path(registry).parent / "models" / name / "1"
    described = yaml.safe_load((place / "MLmodel").read_text())
    described["flavors"]["sklearn"]["sklearn_version"] = "1.0.2"
    (place / "MLmodel").write_text(yaml.safe_dump(described))
    (place / "requirements.txt").write_text("scikit-learn==1.0.2\n")
    document = yaml.safe_load(Path(registry).read_text())
    document["models"][name]["versions"] = {"1": {"source": f"models/{name}/1"}}
    Path(registry).write_text(yaml.safe_dump(document))


def patient() -> Any:
    """A model that doubles `x`; where `port` is not 0, only once the listener there has closed the connection
    that the model made. It tells the listener how many rows it received."""

    class Patient:
        def predict(self, model_input: Any) -> Any:
            import socket

            for port in sorted(set(model_input["port"])):
                if port:
                    with socket.create_connection(("127.0.0.1", int(port))) as listener:
                        listener.sendall(str(len(model_input)).encode())
                        listener.shutdown(socket.SHUT_WR)
                        listener.recv(1)
            return model_input["x"].to_numpy() * 2

    return Patient()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("grpc")
    registry = str(directory / "registry.yaml")

    def log(model: Any, name: str, **options: Any) -> None:
        gateway.log_model(model, name, registry, alias="champion", verify=False, **options)

    frame = pd.DataFrame(
        {
            name: array if datatype != "BYTES" or name == "bytes" else [value.decode() for value in array]
            for name, (datatype, array) in COLUMNS.items()
        }
    )
    log(mirror(), "typed", input_example=frame)
    gateway.log_model(mirror(), "typed", registry, input_example=frame.head(1), verify=False)
    log(mirror(), "half", signature=Signature(inputs=(TensorSpec(np.dtype(np.float16), (-1, 2), "x"),)))
    log(mirror(), "gaps", signature=Signature(inputs=(ColSpec("long", "n", False),)))
    log(mirror(), "words", signature=Signature(inputs=(ColSpec("string", "w"),)))
    rows = pd.DataFrame({"x": [0.0], "port": [0]})
    log(patient(), "patient", input_example=rows, metadata={MERGES_KEY: True})
    made_elsewhere(registry, "old")
    chosen = settings(
        directory,
        grpc_port=0,
        max_body_bytes=MAX_BODY * 100,
        max_inflight_bytes=MAX_BODY * 400,
        models={"old": {"environment": "same"}},
        default_model="models:/typed",
    )
    with Served(chosen, registry) as running:
        yield running


@pytest.fixture(scope="module")
def called(served: Served) -> Iterator[rpc.Caller]:
    with rpc.caller(served.grpc) as made:
        yield made


def failed(called: rpc.Caller, request: Any, **options: Any) -> tuple[Any, str, dict[str, str]]:
    """The status, its text and the trailing metadata of a call that must fail."""
    method = options.pop("method", "ModelInfer")
    with pytest.raises(grpc.RpcError) as info:
        called.call(method, request, **options)
    return info.value.code(), info.value.details(), rpc.trailing(info.value)


@pytest.mark.parametrize("raw", [True, False])
def test_each_type_comes_back_in_the_form_it_was_sent(called: rpc.Caller, raw: bool) -> None:
    answer = called.infer(rpc.request("typed", COLUMNS, raw=raw, id="7"))
    assert (answer.model_name, answer.model_version, answer.id) == ("typed", "1", "7")
    assert bool(answer.raw_output_contents) == raw
    assert rpc.outputs(answer) == {name: list(array) for name, (_, array) in COLUMNS.items()}


def test_the_model_is_given_what_it_is_given_over_http(called: rpc.Caller, served: Served) -> None:
    inputs = [
        {
            "name": name,
            "datatype": datatype,
            "shape": [2],
            "data": [value.decode("latin-1") if name == "bytes" else value.decode() for value in array]
            if datatype == "BYTES"
            else array.tolist(),
        }
        for name, (datatype, array) in COLUMNS.items()
        if name != "bytes"
    ]
    inputs.append({"name": "bytes", "datatype": "BYTES", "shape": [2], "data": ["AP8=", "b2s="]})
    inputs[-1]["parameters"] = {"content_type": "base64"}
    over_http = served.post("/v2/models/typed/infer", {"inputs": inputs}).json["outputs"]
    told = {one["name"]: one["data"] for one in over_http}
    for raw in (True, False):
        got = rpc.outputs(called.infer(rpc.request("typed", COLUMNS, raw=raw)))
        assert got["whole"] == told["whole"]
        assert got["number"] == told["number"]
        assert [value.decode() for value in got["text"]] == told["text"]


def test_half_precision_comes_and_goes_raw(called: rpc.Caller) -> None:
    halves = np.array([[0.5, 1.0], [2.0, -3.0]], np.float16)
    answer = called.infer(rpc.request("half", {"x": ("FP16", halves)}))
    assert answer.outputs[0].datatype == "FP16"
    assert rpc.outputs(answer)["x"] == halves.reshape(-1).tolist()


def test_outputs_are_selected_in_their_order(called: rpc.Caller) -> None:
    wanted = [pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in ("text", "flag")]
    answer = called.infer(rpc.request("typed", COLUMNS, outputs=wanted))
    assert [one.name for one in answer.outputs] == ["text", "flag"]
    assert len(answer.raw_output_contents) == 2


@pytest.mark.parametrize(
    ("name", "version", "answers"),
    [("typed", "2", "2"), ("typed/2", "", "2"), ("typed@champion", "", "1"), ("", "", "1")],
)
def test_a_version_an_alias_and_no_name_at_all(
    called: rpc.Caller, name: str, version: str, answers: str
) -> None:
    assert called.infer(rpc.request(name, COLUMNS, model_version=version)).model_version == answers


def test_nulls_are_rows_as_text(called: rpc.Caller) -> None:
    asked = rpc.request("gaps", {"n": ("INT64", np.array([5, 0, 2**60]))})
    asked.inputs[0].parameters["nulls"].string_param = "[1]"
    answer = called.infer(asked)
    assert json.loads(answer.outputs[0].parameters["nulls"].string_param) == [1]
    assert rpc.outputs(answer)["n"][::2] == [5, 2**60]


def test_metadata_of_an_answer(called: rpc.Caller) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    _, trailing = called.call(
        "ModelInfer", rpc.request("typed", COLUMNS), x_request_id="mine", traceparent=parent
    )
    assert (trailing["x-request-id"], trailing["x-model-name"], trailing["x-model-version"]) == (
        *("mine", "typed", "1"),
    )
    assert trailing["traceresponse"].startswith(parent[:36])
    assert "x-model-warnings" not in trailing
    more = rpc.request("gaps", {"n": ("INT64", np.array([1])), "more": ("INT64", np.array([1]))})
    assert "more" in called.infer(more).parameters["warnings"].string_param


def test_promise_10_an_answer_from_another_environment_says_so(called: rpc.Caller) -> None:
    answer, trailing = called.call("ModelInfer", rpc.request("old", {"x": ("FP64", np.array([1.0]))}))
    assert trailing["x-model-warnings"] == "environment"
    assert "1.0.2" in answer.parameters["warnings"].string_param
    wrong = rpc.request("old", {"y": ("FP64", np.array([1.0]))})
    _, _, trailing = failed(called, wrong)
    assert trailing["x-model-warnings"] == "environment"


def test_a_refusal_before_the_model_is_asked_names_it_too(called: rpc.Caller) -> None:
    wrong = rpc.request("typed", {"x": ("FP64", np.array([1.0]))})
    wrong.inputs[0].shape[:] = [-1]
    _, _, trailing = failed(called, wrong)
    assert (trailing["x-model-name"], trailing["x-model-version"]) == ("typed", "1")


def bad_requests() -> dict[str, tuple[Any, Any, str]]:
    good = rpc.request("typed", COLUMNS)
    fewer, both, wrong, narrow, shape = (rpc.request("typed", COLUMNS) for _ in range(5))
    del fewer.raw_input_contents[-1]
    both.inputs[0].contents.bool_contents.append(True)
    wrong = rpc.request("typed", COLUMNS, raw=False)
    wrong.inputs[4].contents.fp32_contents.extend([0.1, 0.2])
    narrow = rpc.request("typed", {"small": ("INT32", np.array([300, 1], np.int32))}, raw=False)
    narrow.inputs[0].datatype = "INT8"
    half = rpc.request("half", {"x": ("FP32", np.array([[1.0, 2.0]], np.float32))}, raw=False)
    half.inputs[0].datatype = "FP16"
    shape.inputs[0].shape[:] = [3]
    twice = rpc.request("typed@champion", COLUMNS, model_version="1")
    return {
        "no message": (b"\xff\xff", CODE.INVALID_ARGUMENT, "MALFORMED_BODY"),
        "no inputs": (pb.ModelInferRequest(model_name="typed"), CODE.INVALID_ARGUMENT, "MALFORMED_BODY"),
        "too few raw contents": (fewer, CODE.INVALID_ARGUMENT, "MALFORMED_BODY"),
        "raw and typed": (both, CODE.INVALID_ARGUMENT, "MALFORMED_BODY"),
        "contents of another type": (wrong, CODE.INVALID_ARGUMENT, "INVALID_INPUT"),
        "beyond eight bits": (narrow, CODE.INVALID_ARGUMENT, "INVALID_INPUT"),
        "halves in typed contents": (half, CODE.INVALID_ARGUMENT, "INVALID_INPUT"),
        "another size": (shape, CODE.INVALID_ARGUMENT, "INVALID_INPUT"),
        "a column is missing": (
            rpc.request("typed", {"flag": COLUMNS["flag"]}),
            CODE.INVALID_ARGUMENT,
            "INVALID_INPUT",
        ),
        "alias and version": (twice, CODE.INVALID_ARGUMENT, "INVALID_REFERENCE"),
        "no version": (
            rpc.request("typed", COLUMNS, model_version="zero"),
            CODE.INVALID_ARGUMENT,
            "INVALID_REFERENCE",
        ),
        "unknown model": (rpc.request("nothing", COLUMNS), CODE.NOT_FOUND, "MODEL_NOT_FOUND"),
        "unknown version": (
            rpc.request("typed", COLUMNS, model_version="9"),
            CODE.NOT_FOUND,
            "VERSION_NOT_FOUND",
        ),
        "unknown output": (
            pb.ModelInferRequest.FromString(
                good.SerializeToString()
                + pb.ModelInferRequest(
                    outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="none")]
                ).SerializeToString()
            ),
            CODE.INVALID_ARGUMENT,
            "INVALID_INPUT",
        ),
    }


@pytest.mark.parametrize("kind", list(bad_requests()))
def test_what_is_wrong_is_said(called: rpc.Caller, kind: str) -> None:
    request, wanted, our_code = bad_requests()[kind]
    code, text, trailing = failed(called, request)
    assert code is wanted
    assert trailing["x-error-code"] == our_code
    assert text.startswith(f"{our_code}: ")
    assert "hint: " in text
    assert trailing["x-request-id"]


def test_a_refusal_names_every_field(called: rpc.Caller) -> None:
    _, text, _ = failed(called, rpc.request("typed", {"flag": COLUMNS["flag"]}))
    assert all(name in text for name in COLUMNS if name != "flag")


def test_control_needs_the_key(called: rpc.Caller, served: Served) -> None:
    unload = pb.RepositoryModelUnloadRequest(model_name="words")
    code, _, _ = failed(called, unload, method="RepositoryModelUnload")
    assert code is CODE.UNAUTHENTICATED
    key = f"Bearer {served.key}"
    load = pb.RepositoryModelLoadRequest(model_name="words")
    called.call("RepositoryModelLoad", load, authorization=key)
    assert states(called)["words", "1"] == "READY"
    called.call("RepositoryModelUnload", unload, authorization=key)
    assert states(called)["words", "1"] == "UNAVAILABLE"
    # KServe's messages have the name in the first field, and read it in the answer.
    answer, _ = called.call("RepositoryModelLoad", b"\n\x05words", authorization=key)
    assert (answer.model_name, answer.is_loaded) == ("words", True)


def states(called: rpc.Caller) -> dict[tuple[str, str], str]:
    index, _ = called.call("RepositoryIndex", pb.RepositoryIndexRequest())
    return {(one.name, one.version): one.state for one in index.models}


def test_what_models_take_is_said(called: rpc.Caller) -> None:
    metadata, _ = called.call("ModelMetadata", pb.ModelMetadataRequest(name="typed"))
    assert {one.name: one.datatype for one in metadata.inputs} == {k: v for k, (v, _) in COLUMNS.items()}
    assert list(metadata.versions) == ["1", "2"]
    ready, _ = called.call("ModelReady", pb.ModelReadyRequest(name="typed", version="2"))
    assert ready.ready
    code, _, _ = failed(called, pb.ModelReadyRequest(name="nothing"), method="ModelReady")
    assert code is CODE.NOT_FOUND


def test_a_message_may_be_as_large_as_a_body_and_no_larger(called: rpc.Caller, served: Served) -> None:
    limit = served.gateway.settings.max_body_bytes
    rows = (limit - 1000) // 8
    answer = called.infer(rpc.request("gaps", {"n": ("INT64", np.arange(rows))}))
    assert answer.outputs[0].shape == [rows]
    code, _, _ = failed(called, rpc.request("gaps", {"n": ("INT64", np.arange(limit // 8))}))
    assert code is CODE.RESOURCE_EXHAUSTED


def test_many_words_are_enforced_elsewhere(called: rpc.Caller) -> None:
    words = np.array([b"%d" % i for i in range(100_000)], object)
    for raw in (True, False):
        answer = called.infer(rpc.request("words", {"w": ("BYTES", words)}, raw=raw))
        assert rpc.outputs(answer)["w"] == words.tolist()


def test_a_message_that_would_take_too_much_is_refused_before_it_is_parsed(called: rpc.Caller) -> None:
    dense = b"\x0a\x05words" + b"\x2a\x00" * 2_000_000  # two million empty inputs
    code, text, _ = failed(called, dense)
    assert code is CODE.RESOURCE_EXHAUSTED
    assert text.startswith("BODY_TOO_LARGE")


def test_a_compressed_message_is_refused(called: rpc.Caller) -> None:
    request = rpc.request("words", {"w": ("BYTES", np.array([b"a" * 10_000], object))})
    with pytest.raises(grpc.RpcError) as info:
        called.method("ModelInfer")(request, timeout=60, compression=grpc.Compression.Gzip)
    assert info.value.code() is CODE.UNIMPLEMENTED


class Gate:
    """Where a model waits: it lets through, and reports how many rows the model received."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(60)
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def asked(self) -> tuple[int, socket.socket]:
        connection, _ = self._listener.accept()
        rows = b""
        while part := connection.recv(64):
            rows += part
        return int(rows), connection


def waiting(gate: Gate | None, x: float) -> dict[str, tuple[str, Any]]:
    return {"x": ("FP64", np.array([x])), "port": ("INT64", np.array([gate.port if gate else 0]))}


def test_the_callers_deadline_and_a_caller_who_leaves(called: rpc.Caller, served: Served) -> None:
    called.infer(rpc.request("patient", waiting(None, 1.0)))  # it is loaded
    with Gate() as gate:
        late = called.method("ModelInfer").future(rpc.request("patient", waiting(gate, 1.0)), timeout=3)
        _, connection = gate.asked()
        assert late.code() is CODE.DEADLINE_EXCEEDED
        connection.close()
        gone = called.method("ModelInfer").future(rpc.request("patient", waiting(gate, 1.0)))
        _, connection = gate.asked()
        gone.cancel()
        counted = 0.0
        while counted < 2:  # the caller's clock may end a call before the gateway's does
            lines = served.get("/metrics").body.decode().splitlines()
            ended = [
                float(line.rpartition(" ")[2])
                for line in lines
                if line.startswith("gateway_requests_total{") and 'model="patient"' in line
                if "DEADLINE_EXCEEDED" in line or "CLIENT_LEFT" in line
            ]
            counted = sum(ended)
        connection.close()


def test_calls_over_both_transports_share_a_batch(called: rpc.Caller, served: Served) -> None:
    with Gate() as gate, Gate() as second, ThreadPoolExecutor(3) as pool:
        first = pool.submit(called.infer, rpc.request("patient", waiting(gate, 1.0)))
        _, connection = gate.asked()  # the model is busy
        body = {"dataframe_records": [{"x": 3.0, "port": second.port}]}
        over_http = pool.submit(served.post, "/predict/patient", body)
        over_grpc = pool.submit(called.infer, rpc.request("patient", waiting(second, 2.0)))
        queued = 'gateway_queue_requests{model="patient"} 2.0'
        while queued not in served.get("/metrics").body.decode():
            pass
        connection.close()
        rows, connection = second.asked()
        connection.close()
        assert rows == 2
        assert rpc.outputs(first.result(30))["predictions"] == [2.0]
        assert rpc.outputs(over_grpc.result(30))["predictions"] == [4.0]
        assert over_http.result(30).json["predictions"] == [6.0]


def test_a_stream_answers_each_message_in_order_and_goes_on_after_a_failure(called: rpc.Caller) -> None:
    good = rpc.request("words", {"w": ("BYTES", np.array([b"a"], object))}, id="1")
    asked = [good, rpc.request("nothing", COLUMNS), good]
    answers = list(called.stream(iter(asked)))
    assert [bool(answer.error_message) for answer in answers] == [False, True, False]
    assert answers[1].error_message.startswith("MODEL_NOT_FOUND: ")
    assert rpc.outputs(answers[2].infer_response) == {"w": [b"a"]}


def test_health(served: Served) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    serving = health_pb2.HealthCheckResponse.SERVING
    with grpc.insecure_channel(served.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "inference.GRPCInferenceService"):
            asked = health_pb2.HealthCheckRequest(service=service)
            assert stub.Check(asked, timeout=30).status == serving
            watch = stub.Watch(asked, timeout=30)
            assert next(watch).status == serving
            watch.cancel()
        with pytest.raises(grpc.RpcError) as info:
            stub.Check(health_pb2.HealthCheckRequest(service="nothing"), timeout=30)
        assert info.value.code() is CODE.NOT_FOUND
