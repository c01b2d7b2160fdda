"""W3C Trace Context through a running gateway: from the caller to the log, the answer, and those it asks."""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest

from tests.support.running import Running, log_scaled, running

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
GIVEN = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}


class Asked(http.server.ThreadingHTTPServer):
    """A tracking server without models, which keeps the headers of its requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.headers: list[tuple[str, Mapping[str, str]]] = []

    def about(self, name: str) -> Mapping[str, str]:
        return next(headers for path, headers in self.headers if name in path)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Asked

    def do_GET(self) -> None:
        self.server.headers.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
        absent = {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no"}
        listing = "/search" in self.path
        body = json.dumps({} if listing else absent).encode()
        self.send_response(200 if listing else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass


@pytest.fixture
def asked() -> Iterator[Asked]:
    with Asked() as server:
        threading.Thread(target=server.serve_forever).start()
        yield server
        server.shutdown()


def span(answer: httpx.Response) -> str:
    """Under which id the gateway took part."""
    found = re.fullmatch(rf"00-{TRACE}-([0-9a-f]{{16}})-01", answer.headers["traceresponse"])
    assert found is not None
    assert found[1] != PARENT
    return found[1]


def ask(server: Running, name: str, x: object = 1.0, headers: Mapping[str, str] = GIVEN) -> httpx.Response:
    body = {"dataframe_records": [{"x": x}]}
    return httpx.post(f"{server.url}/predict/{name}", json=body, headers=headers, timeout=60)


def test_every_server_that_is_called_for_a_request_gets_its_trace(tmp_path: Path, asked: Asked) -> None:
    with running(tmp_path, "--registry", f"http://127.0.0.1:{asked.server_port}") as server:
        answer = ask(server, "nobody")
        assert answer.json()["error_code"] == "MODEL_NOT_FOUND"
        sent = asked.about("nobody")
        assert sent["traceparent"] == f"00-{TRACE}-{span(answer)}-01"
        assert sent["tracestate"] == "vendor=1"

        for name, headers in {"noone": {}, "nothing": {"traceparent": f"00-{TRACE}-{PARENT}"}}.items():
            answer = ask(server, name, headers=headers)
            assert answer.json()["error_code"] == "MODEL_NOT_FOUND"
            assert "traceresponse" not in answer.headers
            assert "traceparent" not in asked.about(name)


def test_the_lines_of_a_request_say_its_trace_and_no_others(tmp_path: Path) -> None:
    log_scaled(tmp_path / "registry.yaml", "scaled", 2.0, alias="champion")
    with running(tmp_path) as server:
        cold = ask(server, "scaled")
        refused = ask(server, "scaled", x="much", headers={**GIVEN, "X-Request-Id": "refused"})
        assert (cold.status_code, refused.status_code) == (200, 422)
        twice = httpx.get(f"{server.url}/livez", headers=[("traceparent", GIVEN["traceparent"])] * 2)
        assert "traceresponse" not in twice.headers
        assert span(httpx.get(f"{server.url}/ping", headers=GIVEN))
        assert span(httpx.get(f"{server.url}/models", headers=GIVEN))
        httpx.post(f"{server.url}/models/scaled/unload", headers=server.key).raise_for_status()
        server.stop()
        (loaded,), (said,), (unloaded,) = map(server.events, ("Loaded", "InputRefused", "Unloaded"))
        assert not server.events("Answered")  # an access log only where it is wanted
    assert (loaded["trace_id"], loaded["span_id"]) == (TRACE, span(cold))
    assert (said["trace_id"], said["span_id"]) == (TRACE, span(refused))
    assert (said["request_id"], said["model"], said["version"]) == ("refused", "scaled", "1")
    assert "trace_id" not in unloaded
