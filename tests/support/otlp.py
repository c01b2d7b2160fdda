"""A collector of traces: it takes OTLP over HTTP, decodes it, and keeps the spans."""

from __future__ import annotations

import gzip
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

PATIENCE = 30.0


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
        self.came = threading.Condition()
        self.answers = threading.Event()
        self.answers.set()
        self.reached = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def wait(self, wanted: Callable[[list[Span]], bool]) -> list[Span]:
        """The spans so far, once they are as `wanted`."""
        deadline = time.monotonic() + PATIENCE
        with self.came:
            while not wanted(self.spans):
                left = deadline - time.monotonic()
                assert left > 0, [(span.name, span.attributes) for span in self.spans]
                self.came.wait(left)
            return list(self.spans)

    def named(self, *names: str) -> list[Span]:
        """One span of each name, the first that came, in this order."""
        found = self.wait(lambda spans: set(names) <= {span.name for span in spans})
        return [next(span for span in found if span.name == name) for name in names]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service

        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        request = service.ExportTraceServiceRequest.FromString(body)
        self.server.reached.set()
        self.server.answers.wait(PATIENCE)
        with self.server.came:
            for resource in request.resource_spans:
                about = _values(resource.resource.attributes)
                for scope in resource.scope_spans:
                    self.server.spans += [_span(span, about) for span in scope.spans]
            self.server.came.notify_all()
        answer = service.ExportTraceServiceResponse().SerializeToString()
        self.send_response(200 if self.path == "/v1/traces" else 404)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass


def _span(span: Any, resource: dict[str, Any]) -> Span:
    return Span(
        span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.kind,
        span.start_time_unix_nano, span.end_time_unix_nano, _values(span.attributes), span.status.code == 2,
        resource,
    )  # fmt: skip


def _values(attributes: Any) -> dict[str, Any]:
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
