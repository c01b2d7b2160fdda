"""Which variables switch traces on, what a route is, and which call an answer names. What a collector gets
is in tests/e2e/test_spans.py."""

from __future__ import annotations

import asyncio
import logging
import sys
import time

import pytest

from gateway import otel, spans, tracing
from gateway.http.tracing import route_of
from gateway.serving.batching import Batcher
from tests.gateway.serving.test_batching import Doubler, rows
from tests.support.controlled import bounded

HTTP, GRPC = "otlp_proto_http", "otlp_proto_grpc"


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, []),
        ({"OTEL_SERVICE_NAME": "a"}, []),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, [HTTP]),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318"}, [HTTP]),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c:4318"}, []),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, [GRPC]),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, [HTTP]),
        ({"OTEL_TRACES_EXPORTER": "console, otlp"}, ["console", HTTP]),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, []),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, []),
    ],
)
def test_the_standard_variables_decide(environ: dict[str, str], wanted: list[str]) -> None:
    assert otel.wanted(environ, "traces") == wanted
    if not wanted:
        assert spans.begin(environ) is None


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, []),  # they are scraped
        ({"OTEL_TRACES_EXPORTER": "otlp"}, []),
        ({"OTEL_METRICS_EXPORTER": "otlp"}, [HTTP]),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c:4318/v1/metrics"}, [HTTP]),
        ({"OTEL_METRICS_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"}, []),
    ],
)
def test_metrics_are_sent_only_where_a_variable_of_metrics_says_so(
    environ: dict[str, str], wanted: list[str]
) -> None:
    assert otel.wanted(environ, "metrics") == wanted


def test_without_the_library_the_log_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with caplog.at_level(logging.WARNING, "gateway"):
        assert spans.begin({"OTEL_TRACES_EXPORTER": "otlp"}) is None
    assert "model-gateway[otel]" in caplog.text


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/", "/"),
        ("/predict", "/predict"),
        ("/predict/iris@champion", "/predict/{model}"),
        ("/predict/iris/versions/2", "/predict/{model}/versions/{version}"),
        ("/models", "/models"),
        ("/models/iris/aliases/champion", "/models/{model}/aliases/{alias}"),
        ("/models/iris/openapi.json", "/models/{model}/openapi.json"),
        ("/v2/models/models/infer", "/v2/models/{model}/infer"),
        ("/v1/models/iris:predict", "/v1/models/{model}:predict"),
        ("/v1/models/iris:4711", "/v1/models/{model}"),
        ("/wp-login.php", None),
        ("/predict" * 20, None),
    ],
)
def test_a_route_has_no_names(path: str, route: str | None) -> None:
    assert route_of(path) == route


@pytest.mark.anyio
@bounded
async def test_merged_requests_name_the_call_that_they_share() -> None:
    class Timed(Doubler):
        async def __call__(self, batch, params):  # type: ignore[no-untyped-def]
            tracing.report([11, 12])
            return await super().__call__(batch, params)

    traced = Batcher(Timed(), merges=True, traced=True)
    works = [
        outcome.work for outcome in await asyncio.gather(*(traced.submit(rows(1.0, 2.0), {}) for _ in "abc"))
    ]
    assert works == [tracing.Work(11, 12, requests=3, rows=6)] * 3
    untraced = Batcher(Timed(), merges=True)
    assert (await untraced.submit(rows(1.0), {})).work is None


@pytest.mark.parametrize(
    "told", [None, 5, [1], [2, 1], [0, 1], [1, 1 << 63], [1.0, 2.0], ["1", "2"], [True, 2, 3]]
)
def test_false_times_of_a_process_are_ignored(told: object) -> None:
    tracing.report(told)
    work = tracing.work(1, 1, 0.5)
    assert work.ended - work.began == 500_000_000
    assert abs(work.ended - time.time_ns()) < 60e9
