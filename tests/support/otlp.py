"""A collector of traces and metrics: it takes OTLP over HTTP, decodes it, and keeps what came."""

from __future__ import annotations

import gzip
import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

PATIENCE = 90.0


@dataclass(frozen=True)
class Span:
    """One span. Times are in nanoseconds since the epoch, ids in hex, `parent` empty for a root."""

    name: str
    trace: str
    id: str
    parent: str
    kind: int
    began: int
    ended: int
    attributes: dict[str, Any]
    failed: bool
    resource: dict[str, Any]


class Collector(http.server.ThreadingHTTPServer):
    """`url` is for OTEL_EXPORTER_OTLP_ENDPOINT. It answers while `answers` is set; `reached`: a call came."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Span] = []
        #: The last metrics that came, by name, as protobuf.
        self.metrics: dict[str, Any] = {}
        self.came = threading.Condition()
        self.answers = threading.Event()
        self.answers.set()
        self.reached = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def wait(self, wanted: Callable[[list[Span]], bool]) -> list[Span]:
        """The spans so far, once they are as `wanted`."""
        with self.came:
            in_time = self.came.wait_for(lambda: wanted(self.spans), PATIENCE)
            assert in_time, [(span.name, span.attributes) for span in self.spans]
            return list(self.spans)

    def wait_for_metrics(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The last metrics, once they are as `wanted`."""
        with self.came:
            assert self.came.wait_for(lambda: wanted(self.metrics), PATIENCE), sorted(self.metrics)
            return dict(self.metrics)

    def named(self, *names: str) -> list[Span]:
        """One span of each name, the first that came, in this order."""
        found = self.wait(lambda spans: set(names) <= {span.name for span in spans})
        return [next(span for span in found if span.name == name) for name in names]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as traces

        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.reached.set()
        self.server.answers.wait(PATIENCE)
        with self.server.came:
            if self.path == "/v1/traces":
                for resource in traces.ExportTraceServiceRequest.FromString(body).resource_spans:
                    about = values(resource.resource.attributes)
                    for scope in resource.scope_spans:
                        self.server.spans += [_span(span, about) for span in scope.spans]
            else:
                assert self.path == "/v1/metrics", self.path
                for resource in metrics.ExportMetricsServiceRequest.FromString(body).resource_metrics:
                    for scope in resource.scope_metrics:
                        self.server.metrics |= {metric.name: metric for metric in scope.metrics}
            self.server.came.notify_all()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass


def _span(span: Any, resource: dict[str, Any]) -> Span:
    return Span(
        span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.kind,
        span.start_time_unix_nano, span.end_time_unix_nano, values(span.attributes), span.status.code == 2,
        resource,
    )  # fmt: skip


def values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


@contextmanager
def collector() -> Iterator[Collector]:
    with Collector() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.answers.set()
            server.shutdown()
