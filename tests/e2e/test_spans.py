"""Traces of a running gateway, as a collector gets them over OTLP."""

from __future__ import annotations

import re
import socket
import time
from itertools import accumulate
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import gateway
from tests.conftest import needs
from tests.support.flavors import graph
from tests.support.otlp import collector, values
from tests.support.running import Running, log_scaled
from tests.support.shell import free_port

needs("opentelemetry.exporter.otlp.proto.http")
pytestmark = pytest.mark.all

SERVER = 2  # the kind of a span
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
#: Spans leave at once, so that nothing waits for them.
AT_ONCE = {"OTEL_BSP_SCHEDULE_DELAY": "50"}


def ask(server: Running, path: str = "predict/scaled", flags: str | None = None) -> httpx.Response:
    body = {"dataframe_records": [{"x": 1.0}, {"x": 2.0}]}
    headers = {} if flags is None else {"traceparent": f"00-{TRACE}-{PARENT}-{flags}"}
    return httpx.post(f"{server.url}/{path}", json=body, headers=headers, timeout=60)


@pytest.fixture
def registry(tmp_path: Path) -> str:
    path = tmp_path / "registry.yaml"
    log_scaled(path, "scaled", 2.0, alias="champion")
    return str(path)


def traced(tmp_path: Path, registry: str, to: str, **environ: str) -> Running:
    return Running(
        tmp_path, ["--registry", registry], {"OTEL_EXPORTER_OTLP_ENDPOINT": to, **AT_ONCE, **environ}
    )


def test_a_cold_request_is_a_trace_from_the_client_to_the_models_process(
    tmp_path: Path, registry: str
) -> None:
    with collector() as seen:
        server = traced(tmp_path, registry, seen.url, OTEL_SERVICE_NAME="iris-team")
        try:
            httpx.get(f"{server.url}/livez")
            answer = ask(server, flags="01")
            assert answer.status_code == 200, answer.text
            request, load, predict = seen.named("POST /predict/{model}", "load", "predict")
            fetch, build, start, warmed = seen.named("fetch", "build", "start", "warm up")
            warm_id = ask(server).headers["X-Request-Id"]
            assert ask(server, "predict/nobody").status_code == 404
            seen.wait(lambda spans: sum(span.kind == SERVER for span in spans) == 3)
        finally:
            assert server.stop() == 0
    assert (request.trace, request.parent, request.kind) == (TRACE, PARENT, SERVER)
    assert answer.headers["traceresponse"] == f"00-{TRACE}-{request.id}-01"
    assert request.resource["service.name"] == "iris-team"
    about = request.attributes
    assert about["http.request.method"] == "POST"
    assert about["http.route"] == "/predict/{model}"
    assert about["http.response.status_code"] == 200
    assert about["gateway.model.name"] == "scaled"
    assert about["gateway.model.version"] == "1"
    assert about["gateway.model.alias"] == "champion"
    assert about["gateway.rows"] == 2
    assert about["gateway.model.loaded"] is False
    assert about["gateway.request.id"] == answer.headers["X-Request-Id"]
    assert not request.failed
    # The model's call, with the times of its process, within the request's.
    assert (predict.trace, predict.parent) == (TRACE, request.id)
    assert predict.attributes["gateway.batch.rows"] == 2
    assert predict.attributes["gateway.batch.requests"] == 1
    assert request.began <= predict.began <= predict.ended <= request.ended
    seen_here = float(re.search(r"predict;dur=([\d.]+)", answer.headers["Server-Timing"])[1])  # type: ignore[index]
    assert (predict.ended - predict.began) / 1e6 < seen_here - 0.003  # without the way there and back
    # The load that the request caused, and its parts in order.
    assert (load.trace, load.parent) == (TRACE, request.id)
    assert {part.parent for part in (fetch, build, start, warmed)} == {load.id}
    assert (
        load.began == fetch.began <= fetch.ended == build.began <= start.began <= warmed.began <= warmed.ended
    )
    second, third = (span for span in seen.spans if span.kind == SERVER and span.id != request.id)
    assert TRACE not in (second.trace, third.trace)
    assert second.attributes["gateway.model.loaded"] is True
    assert second.attributes["gateway.request.id"] == warm_id
    assert third.attributes["http.response.status_code"] == 404
    assert not third.failed  # the client's fault
    assert not any("livez" in span.name for span in seen.spans)


def test_sampling_is_the_clients_or_the_operators(tmp_path: Path, registry: str) -> None:
    with collector() as seen:
        server = traced(tmp_path, registry, seen.url, OTEL_TRACES_SAMPLER="parentbased_always_off")
        try:
            not_sampled = ask(server, flags="00")
            assert not_sampled.headers["traceresponse"].endswith("-00")  # and so to those that it asks
            assert ask(server).status_code == 200
            assert ask(server, flags="01").status_code == 200
            seen.named("predict")
        finally:
            server.stop()
    assert {span.name for span in seen.spans} == {"POST /predict/{model}", "predict"}
    assert {span.trace for span in seen.spans} == {TRACE}


def test_calls_over_grpc_and_in_packs_have_spans_too(tmp_path: Path) -> None:
    rpc = needs("tests.support.rpc")
    needs("onnx")
    registry, port, example = str(tmp_path / "registry.yaml"), free_port(), np.ones((3, 3), np.float32)
    model = graph(tmp_path)
    gateway.log_model(
        model, name="graph", registry=registry, input_example=example, alias="champion", verify=False
    )
    with collector() as seen:
        server = traced(tmp_path, registry, seen.url, GATEWAY_GRPC_PORT=str(port))
        try:
            with rpc.caller(f"127.0.0.1:{port}") as caller:
                asked = rpc.request("graph", {"x": ("FP32", example)})
                _, trailing = caller.call("ModelInfer", asked, traceparent=f"00-{TRACE}-{PARENT}-01")
            call, load, predict = seen.named("inference.GRPCInferenceService/ModelInfer", "load", "predict")
            view = httpx.get(f"{server.url}/models/graph/versions/1", headers=server.key).json()
        finally:
            server.stop()
    assert view["runner"]["isolation"] == "pack"
    assert (call.trace, call.parent, call.kind) == (TRACE, PARENT, SERVER)
    assert trailing["traceresponse"] == f"00-{TRACE}-{call.id}-01"
    assert call.attributes["rpc.system"] == "grpc"
    assert call.attributes["rpc.method"] == "ModelInfer"
    assert call.attributes["rpc.grpc.status_code"] == 0
    assert call.attributes["gateway.model.name"] == "graph"
    assert {load.parent, predict.parent} == {call.id}
    assert predict.attributes["gateway.batch.rows"] == 3
    assert call.began <= predict.began <= predict.ended <= call.ended


def test_the_metrics_are_those_that_are_scraped(tmp_path: Path, registry: str) -> None:
    with collector() as seen:
        environ = {"OTEL_METRICS_EXPORTER": "otlp", "OTEL_METRIC_EXPORT_INTERVAL": "200"}
        server = traced(tmp_path, registry, seen.url, OTEL_TRACES_EXPORTER="none", **environ)
        try:
            assert [ask(server).status_code for _ in range(3)] == [200] * 3
            seen.wait_for_metrics(lambda metrics: "gateway_request_seconds" in metrics)
            assert ask(server).status_code == 200
            scraped = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
            families = {family.name: family for family in scraped}
        finally:
            server.stop()
    # The last ones are sent at the end.
    sent = {name: metric for name, metric in seen.metrics.items() if name != "gateway_unloads_total"}
    names = {name + ("_total" if one.type == "counter" else "") for name, one in families.items()}
    empty = {name for name, one in families.items() if not one.samples}
    assert set(sent) == names - empty - {f"{name}_total" for name in empty}
    (requests,) = sent["gateway_requests_total"].sum.data_points
    assert values(requests.attributes) == {"model": "scaled", "version": "1", "code": "2xx"}
    assert requests.as_double == 4
    assert sent["gateway_requests_total"].sum.is_monotonic
    (seconds,) = sent["gateway_request_seconds"].histogram.data_points
    samples = families["gateway_request_seconds"].samples
    below = [sample.value for sample in samples if sample.name.endswith("_bucket")]
    assert list(accumulate(seconds.bucket_counts)) == below
    assert seconds.count == 4
    assert len(seconds.explicit_bounds) == len(seconds.bucket_counts) - 1
    assert seconds.sum == next(sample.value for sample in samples if sample.name.endswith("_sum"))
    (version,) = sent["gateway_build_info"].gauge.data_points
    assert values(version.attributes)["version"] == gateway.__version__
    assert not seen.spans


@pytest.mark.parametrize("way", ["away", "silent"])
def test_a_collector_that_does_not_answer_costs_no_request_and_no_end(
    way: str, tmp_path: Path, registry: str
) -> None:
    with collector() as seen, socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # refuses connections: it does not listen
        seen.answers.clear()
        url = seen.url if way == "silent" else f"http://127.0.0.1:{bound.getsockname()[1]}"
        metrics = {"OTEL_METRICS_EXPORTER": "otlp", "OTEL_METRIC_EXPORT_INTERVAL": "100"}
        began = time.monotonic()
        server = traced(
            tmp_path,
            registry,
            url,
            OTEL_BSP_MAX_QUEUE_SIZE="4",
            OTEL_BSP_MAX_EXPORT_BATCH_SIZE="2",
            **metrics,
        )
        try:
            answers = [ask(server) for _ in range(20)]
            if way == "silent":
                assert seen.reached.wait(90)
            answers += [ask(server) for _ in range(20)]
            assert {answer.status_code for answer in answers} == {200}
        finally:
            assert server.stop(within=30.0) == 0
        lived = time.monotonic() - began
        said = [line for line in server.lines if "Transient error" in line or "Failed to export" in line]
        # One for each signal in ten seconds, and not for each attempt.
        assert len(said) <= 2 * (2 + lived / 10)
