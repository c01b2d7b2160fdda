"""Predictions through a real socket, with real models behind it."""

from __future__ import annotations

import base64
import gzip
import json
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from sklearn.datasets import load_iris

import gateway
from gateway.http.predict import REFUSAL_SECONDS
from tests.support.served import MAX_BODY, ODD_NAME, Reply, Served, path_of, settings

COLUMNS = ["sl", "sw", "pl", "pw"]
ROWS = load_iris().data[::30].tolist()
SPLIT = {"dataframe_split": {"columns": COLUMNS, "data": ROWS}}
RECORDS = {"dataframe_records": [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]}
ONE = {"dataframe_records": [{"x": 1.0}]}

TIMING = re.compile(
    r"parse;dur=\d+\.\d{3}, queue;dur=\d+\.\d{3}, predict;dur=\d+\.\d{3}, encode;dur=\d+\.\d{3}\Z"
)


@pytest.fixture(scope="module")
def expected(registry_file: str) -> list[int]:
    model = gateway.load_model("models:/iris/1", registry=registry_file)
    labels: list[int] = model.predict(pd.DataFrame(ROWS, columns=COLUMNS)).tolist()
    return labels


IRIS_1 = {"name": "iris", "version": "1", "alias": "champion"}


@pytest.mark.parametrize(
    ("path", "headers", "extra", "model"),
    [
        ("/predict/iris", {}, {}, IRIS_1),
        ("/predict/iris@champion", {}, {}, IRIS_1),
        ("/predict/iris@champion?trace=1", {}, {}, IRIS_1),
        ("/predict/%69ris@champ%69on", {}, {}, IRIS_1),
        ("/predict/iris/versions/1", {}, {}, {**IRIS_1, "alias": None}),
        ("/predict", {"x_model": "iris"}, {}, IRIS_1),
        ("/predict", {"x_model": "models:/iris@champion"}, {}, IRIS_1),
        ("/predict", {"x_model": "models:/iris/1"}, {}, {**IRIS_1, "alias": None}),
        ("/predict", {}, {"model": "models:/iris/1"}, {**IRIS_1, "alias": None}),
        ("/predict", {}, {"model": "models:/iris"}, IRIS_1),
        ("/predict", {}, {}, IRIS_1),
        ("/predict/iris", {}, {"model": "models:/iris"}, IRIS_1),
    ],
)
@pytest.mark.parametrize("body", [SPLIT, RECORDS], ids=["split", "records"])
def test_every_way_to_name_a_model(
    server: Served,
    expected: list[int],
    path: str,
    headers: dict[str, str],
    extra: dict[str, Any],
    model: dict[str, Any],
    body: dict[str, Any],
) -> None:
    reply = server.post(path, body | extra, **headers)
    assert reply.status == 200, reply.body
    assert reply.json == {"predictions": expected, "model": model}
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-model-name"] == "iris"
    assert reply.headers["x-model-version"] == "1"
    assert TIMING.match(reply.headers["server-timing"])
    assert len(reply.headers["x-request-id"]) == 32
    assert reply.headers.get("connection") != "close"


def test_a_name_with_everything_in_it(server: Served) -> None:
    reply = server.post(f"/predict/{path_of(ODD_NAME)}", SPLIT)
    assert reply.json["model"]["name"] == ODD_NAME
    assert reply.headers["x-model-name"] == "odd @%25+%C3%B1 %E5%90%8D"
    assert server.post(f"/predict/{path_of(ODD_NAME)}@champion", SPLIT).json["model"]["alias"] == "champion"
    named = {"model": f"models:/{ODD_NAME}@champion"}
    assert server.post("/predict", SPLIT | named).json["model"]["name"] == ODD_NAME


def test_the_callers_request_id_comes_back(server: Served) -> None:
    assert server.post("/predict/iris", SPLIT, x_request_id="req-1").headers["x-request-id"] == "req-1"
    refused = server.post("/predict/nobody", SPLIT, x_request_id="req-2")
    assert (refused.headers["x-request-id"], refused.json["request_id"]) == ("req-2", "req-2")


def test_csv(server: Served, expected: list[int]) -> None:
    text = ",".join(COLUMNS) + "\n" + "\n".join(",".join(map(str, row)) for row in ROWS)
    reply = server.request("POST", "/predict/iris", text, 'Text/CSV; charset="UTF-8"')
    assert reply.json["predictions"] == expected


def test_gzip(server: Served, expected: list[int]) -> None:
    body = gzip.compress(json.dumps(SPLIT).encode())
    assert server.post("/predict/iris", body, content_encoding="gzip").json["predictions"] == expected


def test_a_tensor(server: Served) -> None:
    assert server.post("/predict/tensor", {"inputs": ROWS}).status == 200
    assert server.post("/predict/tensor", {"instances": ROWS}).status == 200


def test_ignored_columns_are_told(server: Served, expected: list[int]) -> None:
    body = {"dataframe_split": {"columns": [*COLUMNS, "extra"], "data": [[*row, 1] for row in ROWS]}}
    reply = server.post("/predict/iris", body)
    assert reply.json["predictions"] == expected
    assert "extra" in " ".join(reply.json["warnings"])
    assert server.post("/invocations", body).json == {"predictions": expected}


@pytest.mark.parametrize(
    ("give", "predictions"),
    [
        ("nan", [None, None]),
        ("bytes", [base64.b64encode(b"\x00\xff" * 50).decode()]),
        ("decimal", [0.1]),
        ("big", [2**63 - 1]),
    ],
)
def test_answers_that_json_needs_help_with(server: Served, give: str, predictions: list[Any]) -> None:
    reply = server.post("/predict/echo", ONE | {"params": {"give": give}})
    assert reply.status == 200, reply.body
    assert reply.json["predictions"] == predictions


@pytest.mark.parametrize("form", ["dataframe_records", "instances", "inputs"])
def test_no_rows_at_all_are_said_to_be_none(server: Served, form: str) -> None:
    reply = server.post("/predict/iris", {form: []})
    assert (reply.status, reply.code) == (422, "INVALID_INPUT")
    (detail,) = reply.json["details"]
    assert (detail["path"], detail["problem"]) == (form, "is empty, so it names no columns")
    assert reply.json["hint"].startswith("send at least one row, and name the columns in each row: {")


def test_a_model_that_takes_no_empty_table_fails_with_a_hint(server: Served) -> None:
    reply = server.post("/predict/iris", {"dataframe_split": {"columns": COLUMNS, "data": []}})
    assert (reply.status, reply.code) == (500, "PREDICTION_FAILED")
    assert reply.json["hint"].startswith("the request has no rows, which not every model takes; ")


@pytest.mark.parametrize("give", ["object", "raise"])
def test_what_the_model_does_wrong_is_a_500_of_a_resolved_model(server: Served, give: str) -> None:
    reply = server.post("/predict/echo", ONE | {"params": {"give": give}})
    assert (reply.status, reply.code) == (500, "PREDICTION_FAILED")
    assert "4711" not in reply.body.decode(), "the row's data"
    assert "Traceback" not in reply.body.decode()
    assert reply.headers["x-model-name"] == "echo"
    assert reply.headers["x-model-version"] == "1"
    assert TIMING.match(reply.headers["server-timing"])


def test_all_offending_fields_at_once(server: Served) -> None:
    body = {"dataframe_split": {"columns": ["sl", "sw", "pl"], "data": [[1.0, "x", None], [True, 2.0, 3.0]]}}
    reply = server.post("/predict/iris", body)
    assert (reply.status, reply.code) == (422, "INVALID_INPUT")
    assert {detail["path"] for detail in reply.json["details"]} >= {
        "dataframe_split.data[0].sw",
        "dataframe_split.data[1].sl",
        "dataframe_split.pw",
    }
    assert reply.headers["x-model-version"] == "1"
    assert reply.json["retryable"] is False


def test_details_stop_at_a_hundred(server: Served) -> None:
    body = {"dataframe_split": {"columns": COLUMNS, "data": [["x"] * 4] * 50}}
    reply = server.post("/predict/iris", body)
    assert reply.status == 422
    assert 100 <= len(reply.json["details"]) <= 101
    assert "200" in reply.json["message"]


class Held:
    """A request to `echo` that is being answered, and ends with the `with` block."""

    def __init__(self, server: Served) -> None:
        self.reply: Reply | None = None
        self._server = server

    def __enter__(self) -> Held:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(60)
        self._thread = threading.Thread(target=self._ask, args=(self._listener.getsockname()[1],))
        self._thread.start()
        self._model, _ = self._listener.accept()
        return self

    def _ask(self, port: int) -> None:
        self.reply = self._server.post("/predict/echo", ONE | {"params": {"give": f"ask:{port}"}})

    def __exit__(self, *_: object) -> None:
        self._model.close()
        self._listener.close()
        self._thread.join()


def test_a_callers_deadline_abandons_the_wait_and_nothing_else(server: Served) -> None:
    with Held(server) as held:
        late = server.post("/predict/echo", ONE, x_request_timeout_ms="50")
        assert (late.status, late.code) == (504, "DEADLINE_EXCEEDED")
        assert late.json["retryable"] is True
        assert late.headers["x-model-name"] == "echo"
    assert held.reply is not None
    assert held.reply.status == 200
    assert server.post("/predict/echo", ONE, x_request_timeout_ms="60000").status == 200


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "soon", "1e3", "", "9" * 12])
def test_an_invalid_timeout_is_refused(server: Served, value: str) -> None:
    assert server.post("/predict/iris", SPLIT, x_request_timeout_ms=value).status == 400


def test_a_client_that_leaves_gives_up_its_place(server: Served) -> None:
    with Held(server) as held:
        with server.connect() as leaving:
            body = json.dumps(ONE)
            head = "POST /predict/echo HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            leaving.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            wait_for(lambda: inflight(server, "echo") == 2)
        wait_for(lambda: inflight(server, "echo") == 1)
        counted = 'gateway_requests_total{code="CLIENT_LEFT",model="echo",version="1"} '
        wait_for(lambda: counted in server.get("/metrics").body.decode())
    assert held.reply is not None
    assert held.reply.status == 200


def test_who_is_refused_hears_it_a_moment_later_and_holds_nothing_meanwhile(
    registry_file: str, tmp_path: Path
) -> None:
    with Served(settings(tmp_path, max_queue=1), registry_file) as served, Held(served):
        waiting = threading.Thread(target=served.post, args=("/predict/echo", ONE))
        waiting.start()
        wait_for(lambda: inflight(served, "echo") == 2)
        began = time.monotonic()
        refused = served.post("/predict/echo", ONE)
        took = time.monotonic() - began
        assert (refused.status, refused.code) == (429, "OVERLOADED")
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["x-model-name"] == "echo"
        assert took >= REFUSAL_SECONDS
        # A client that does not wait for the answer leaves no trace.
        with served.connect() as leaving:
            body = json.dumps(ONE)
            head = "POST /predict/echo HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            leaving.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        counted = 'gateway_requests_total{code="OVERLOADED",model="echo",version="1"} 2.0'
        wait_for(lambda: counted in served.get("/metrics").body.decode())
        assert inflight(served, "echo") == 2
    waiting.join()


def inflight(server: Served, model: str) -> float:
    text = server.get("/metrics").body.decode()
    found = re.search(rf'^gateway_inflight_requests{{model="{model}"}} (.*)$', text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def wait_for(condition: Any) -> None:
    """Asks until it is so; the server says when, over HTTP."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_draining_gateway_closes_its_connections_and_still_answers(
    registry_file: str, tmp_path: Path
) -> None:
    with Served(settings(tmp_path), registry_file) as served:
        assert served.get("/readyz").status == 200
        served.gateway.draining = True
        answer = served.post("/predict/iris", SPLIT)
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        refused = served.post("/predict/nobody", SPLIT)
        assert (refused.status, refused.headers["connection"]) == (404, "close")
        ready = served.get("/readyz")
        assert (ready.status, ready.json["ready"], ready.headers["connection"]) == (503, False, "close")
        assert served.get("/livez").status == 200
        served.gateway.refuse()
        gone = served.post("/predict/iris", SPLIT)
        assert (gone.status, gone.code) == (503, "SHUTTING_DOWN")
        assert int(gone.headers["retry-after"]) >= 1


def test_requests_are_counted_and_unknown_names_are_not_series(server: Served) -> None:
    assert server.post("/predict/iris/versions/1", SPLIT).status == 200
    for i in range(50):
        assert server.post(f"/predict/invented-{i}", SPLIT).status == 404
        assert server.post(f"/predict/iris@invented-{i}", SPLIT).status == 404
        assert server.post(f"/predict/iris/versions/9{i}", SPLIT).status == 404
    text = server.get("/metrics").body.decode()
    assert "invented" not in text
    assert 'version="9' not in text
    assert re.search(r'^gateway_requests_total{code="2xx",model="iris",version="1"} ', text, re.MULTILINE)
    assert re.search(
        r'^gateway_requests_total{code="MODEL_NOT_FOUND",model="",version=""} ', text, re.MULTILINE
    )
    for phase in ("parse", "queue", "predict", "encode"):
        assert f'gateway_phase_seconds_count{{model="iris",phase="{phase}",version="1"}}' in text


V2_SHAPE = '{"inputs": [{"name": "sl", "datatype": "FP64", "shape": [-1], "data": [1]}]}'


@pytest.mark.parametrize(
    ("path", "body", "headers", "code"),
    [
        ("/predict/iris", "{", {}, "MALFORMED_BODY"),
        ("/predict/iris@champion", '{"inputs": [1], "params": 5}', {}, "INVALID_INPUT"),
        ("/predict/iris/versions/1", "x", {"content_type": "text/html"}, "UNSUPPORTED_MEDIA_TYPE"),
        ("/predict/iris", "{}", {"x_request_timeout_ms": "soon"}, "MALFORMED_BODY"),
        ("/predict/iris", "[" * (MAX_BODY + 1), {}, "BODY_TOO_LARGE"),
        ("/predict", "{", {"x_model": "models:/iris"}, "MALFORMED_BODY"),
        ("/invocations", "{", {"x_model": "iris"}, "MALFORMED_BODY"),
        ("/v1/models/iris:predict", "{}", {}, "MALFORMED_BODY"),
        ("/endpoints/iris/invocations", "{}", {}, "MALFORMED_BODY"),
        ("/v2/models/iris/infer", V2_SHAPE, {}, "INVALID_INPUT"),
        ("/v2/models/iris/infer", "{}", {"inference_header_content_length": "-1"}, "MALFORMED_BODY"),
        ("/v2/models/iris/versions/1/infer", '{"inputs": []}', {}, "MALFORMED_BODY"),
    ],
)
def test_a_refusal_before_the_model_is_asked_names_it_too(
    server: Served, path: str, body: str, headers: dict[str, str], code: str
) -> None:
    counted = f'gateway_requests_total{{code="{code}",model="iris",version="1"}}'

    def count() -> float:
        lines = server.get("/metrics").body.decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(counted))

    before = count()
    refused = server.post(path, body, **headers)
    assert refused.code == code
    assert (refused.headers["x-model-name"], refused.headers["x-model-version"]) == ("iris", "1")
    wait_for(lambda: count() == before + 1)


def test_a_refusal_that_names_two_models_or_none_names_no_version(server: Served) -> None:
    body = '{"inputs": [1], "model": "models:/echo"}'
    for path, sent in (("/predict/iris", body), ("/predict/nothing", "{"), ("/predict/iris@no", "{")):
        assert "x-model-name" not in server.post(path, sent).headers


# MLflow's own endpoints.


def test_invocations_answer_predictions_and_nothing_else(server: Served, expected: list[int]) -> None:
    reply = server.post("/invocations", SPLIT)
    assert reply.json == {"predictions": expected}
    assert reply.headers["x-model-name"] == "iris"
    assert server.post("/invocations", {"inputs": ROWS}, x_model="tensor").json.keys() == {"predictions"}


@pytest.mark.parametrize(
    "target", ["tensor", "tensor.tar.gz", "tensor@champion", "tensor/1", "models:/tensor@champion"]
)
def test_sagemakers_target_model_selects_the_model(server: Served, target: str) -> None:
    header = {"x_amzn_sagemaker_target_model": target}
    reply = server.post("/invocations", {"inputs": ROWS}, **header)
    assert reply.status == 200, reply.body
    assert reply.headers["x-model-name"] == "tensor"
    assert (
        server.post("/invocations", {"inputs": ROWS}, x_model=target.removesuffix(".tar.gz"), **header).status
        == 200
    )


@pytest.mark.parametrize(
    ("target", "other", "answer"),
    [
        ("", None, (400, "INVALID_REFERENCE")),
        ("a/b/c", None, (400, "INVALID_REFERENCE")),
        ("/opt/model", None, (400, "INVALID_REFERENCE")),
        ("nobody", None, (404, "MODEL_NOT_FOUND")),
        ("tensor", "iris", (400, "INVALID_REFERENCE")),
    ],
)
def test_another_model_than_the_target_never_answers(
    server: Served, target: str, other: str | None, answer: tuple[int, str]
) -> None:
    headers = {"x_amzn_sagemaker_target_model": target} | ({} if other is None else {"x_model": other})
    reply = server.post("/invocations", SPLIT, **headers)
    assert (reply.status, reply.code) == answer


@pytest.mark.parametrize("path", ["/predict/iris", "/predict", "/endpoints/iris/invocations"])
def test_a_target_model_is_refused_where_the_path_names_the_model(server: Served, path: str) -> None:
    reply = server.post(path, SPLIT, x_amzn_sagemaker_target_model="tensor")
    assert (reply.status, reply.code) == (400, "INVALID_REFERENCE")
    assert "/invocations" in reply.json["message"]


def test_invocations_say_400_of_the_input(server: Served) -> None:
    refused = server.post("/invocations", {"dataframe_split": {"columns": ["sl"], "data": [["x"]]}})
    assert (refused.status, refused.code) == (400, "INVALID_INPUT")
    assert refused.json["details"]
    assert server.post("/invocations", "{").status == 400
    assert server.post("/invocations", SPLIT, x_model="nobody").status == 404
    assert server.request("POST", "/invocations", SPLIT, "text/plain").status == 415
    assert server.request("POST", "/invocations", "x" * (MAX_BODY + 1)).status == 413
    assert server.get("/invocations").status == 405


def test_the_small_mlflow_endpoints(server: Served) -> None:
    for path in ("/ping", "/health"):
        assert (server.get(path).status, server.get(path).body) == (200, b"\n")
        assert server.post(path, {}).status == 405
    assert server.get("/version").body.decode() == gateway.__version__


def test_without_a_default_model_a_request_must_name_one(registry_file: str, tmp_path: Path) -> None:
    with Served(settings(tmp_path), registry_file) as served:
        for path in ("/invocations", "/predict"):
            reply = served.post(path, SPLIT)
            assert (reply.status, reply.code) == (400, "INVALID_REFERENCE")
        assert served.post("/invocations", SPLIT, x_model="iris").status == 200


@pytest.mark.parametrize(
    ("path", "first", "second", "code"),
    [
        ("/predict", "x-model: iris", "x-model: echo", "INVALID_REFERENCE"),
        ("/invocations", "x-model: iris", "x-model: echo", "INVALID_REFERENCE"),
        ("/predict/iris", "content-type: application/json", "content-type: text/csv", "MALFORMED_BODY"),
        ("/predict/iris", "content-encoding: gzip", "content-encoding: identity", "MALFORMED_BODY"),
        ("/predict/iris", "x-request-timeout-ms: 1", "x-request-timeout-ms: 2", "MALFORMED_BODY"),
        (
            "/v2/models/iris/infer",
            "inference-header-content-length: 1",
            "Inference-Header-Content-Length: 2",
            "MALFORMED_BODY",
        ),
        ("/models/iris/load", "authorization: Bearer a", "authorization: Bearer b", "MALFORMED_BODY"),
    ],
)
def test_a_header_with_two_values_is_refused(
    server: Served, path: str, first: str, second: str, code: str
) -> None:
    reply = _raw(server, path, first, second)
    assert (reply[0], reply[1]["error_code"]) == (400, code)
    assert second.partition(":")[0] in reply[1]["message"].lower() or "Length" in reply[1]["message"]
    once = _raw(server, path, first, first)
    assert "came twice" not in once[1].get("message", "")


def _raw(server: Served, path: str, *headers: str) -> tuple[int, Any]:
    body = json.dumps(SPLIT)
    lines = [f"POST {path} HTTP/1.1", "host: x", "connection: close", f"content-length: {len(body)}"]
    kinds = [] if any("content-type" in header for header in headers) else ["content-type: application/json"]
    with server.connect() as client:
        client.sendall("\r\n".join([*lines, *kinds, *headers, "", body]).encode())
        answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
    head, _, content = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(content)


def test_answers_end_their_line_and_those_of_mlflows_route_do_not(server: Served) -> None:
    assert server.post("/predict/iris", SPLIT).body.endswith(b"}}\n")
    assert server.post("/predict/nowhere", SPLIT).body.endswith(b"}\n")
    assert (
        server.post("/invocations", SPLIT).body
        == b'{"predictions":%s}'
        % json.dumps(server.post("/predict/iris", SPLIT).json["predictions"], separators=(",", ":")).encode()
    )
    for path in ("/models", "/v2", "/v2/models/iris", "/livez", "/nowhere", "/v2/nowhere"):
        assert server.get(path).body.endswith(b"\n"), path


def test_a_body_without_names_is_told_the_form_that_works(server: Served) -> None:
    for body in ({"dataframe_records": []}, {"instances": []}, {"dataframe_split": {"data": [[1, 2, 3, 4]]}}):
        reply = server.post("/predict/iris", body)
        assert (reply.status, reply.code) == (422, "INVALID_INPUT")
        assert '{"dataframe_records": [{"sl": …, "sw": …, "pl": …, "pw": …}]}' in reply.json["hint"]


def test_one_unknown_column_stands_for_one_missing_one(server: Served) -> None:
    row = {"sl": 5.1, "pl": 1.4, "s_w": 3.5, "p": 0.2}
    details = server.post("/predict/iris", {"dataframe_records": [row]}).json["details"]
    got = [detail["got"] for detail in details if "got" in detail]
    assert len(set(got)) == len(got)
