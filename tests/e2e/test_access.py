"""The access log of a running gateway: a line for each request, and nothing in it that is not the log's."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.running import Running, log_scaled, running

TRACE = "0af7651916cd43dd8448eb211c80319c"
FIELDS = {
    *("time", "level", "logger", "message", "event", "method", "path", "status", "error_code", "seconds"),
    *("bytes_in", "bytes_out", "model", "version", "request_id"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("access")
    log_scaled(directory / "registry.yaml", "größe", 2.0, alias="champion")
    with running(directory, GATEWAY_ACCESS_LOG="true") as made:
        yield made


def line(server: Running, request_id: str) -> dict[str, Any]:
    """The line of one request; it is written after the answer."""
    end = time.monotonic() + 20
    while not (found := [e for e in server.events("Answered") if e["request_id"] == request_id]):
        assert time.monotonic() < end, server.lines
        time.sleep(0.01)
    (only,) = found
    return only


def test_a_prediction_has_its_line(server: Running) -> None:
    body = json.dumps({"dataframe_records": [{"x": 4711.0}]}).encode()
    headers = {
        "X-Request-Id": "one",
        "Content-Type": "application/json",
        "Authorization": "Bearer hush",
        "traceparent": f"00-{TRACE}-b7ad6b7169203331-01",
    }
    url = f"{server.url}/predict/gr%C3%B6%C3%9Fe?token=hush"
    answer = httpx.post(url, content=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    said = line(server, "one")
    assert said.keys() == FIELDS | {"trace_id", "span_id"}
    assert (said["method"], said["path"], said["status"]) == ("POST", "/predict/gr%C3%B6%C3%9Fe", 200)
    assert (said["bytes_in"], said["bytes_out"]) == (len(body), len(answer.content))
    assert (said["model"], said["version"], said["error_code"]) == ("größe", "1", None)
    assert 0 < said["seconds"] < answer.elapsed.total_seconds()
    assert said["trace_id"] == TRACE
    assert said["span_id"] in answer.headers["traceresponse"]
    assert not any(word in str(said) for word in ("hush", "4711"))


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "model"),
    [
        ("POST", "/predict/gr%C3%B6%C3%9Fe", 415, "UNSUPPORTED_MEDIA_TYPE", "größe"),
        ("POST", "/predict/nobody", 404, "MODEL_NOT_FOUND", None),
        ("GET", "/models", 200, None, None),
        ("GET", "/version", 200, None, None),
        ("DELETE", "/models", 405, "METHOD_NOT_ALLOWED", None),
        ("POST", "/predict/gr%C3%B6%C3%9Fe", 422, "INVALID_INPUT", "größe"),
    ],
)
def test_every_answer_has_its_line(
    server: Running, method: str, path: str, status: int, code: str | None, model: str | None
) -> None:
    identity = f"{method} {path} {status}"
    headers = {"X-Request-Id": identity, "Content-Type": "application/json" if status != 415 else "a/b"}
    body = b'{"dataframe_records": [{"x": "a"}]}' if method == "POST" else b""
    answer = httpx.request(method, server.url + path, content=body, headers=headers, timeout=60)
    said = line(server, identity)
    assert said.keys() == FIELDS
    assert (said["method"], said["path"], said["status"], said["error_code"]) == (method, path, status, code)
    assert (said["model"], said["bytes_out"]) == (model, len(answer.content))


def test_a_path_is_cut_and_cannot_write_lines_of_its_own(server: Running) -> None:
    port = httpx.URL(server.url).port or 0
    path = b"/predict/a\x1b[31m\xff" + b"z" * 5000
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nX-Request-Id: odd\r\n" % path)
        connection.sendall(b"Content-Type: a/b\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    if b" 415 " in answer:  # the parser may as well refuse it, and then there was no request
        said = line(server, "odd")
        assert said["path"].startswith(r"/predict/a\x1b[31m\xffzzz")
        assert len(said["path"]) < 300
    else:
        assert answer.startswith(b"HTTP/1.1 400 "), answer
    shown = b"/predict/%0A%22" + b"z" * 400
    httpx.post(server.url + shown.decode(), headers={"X-Request-Id": "long"})
    assert line(server, "long")["path"] == shown[:256].decode() + "…"


def test_who_leaves_has_a_line_without_an_answer(server: Running) -> None:
    port = httpx.URL(server.url).port or 0
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        head = b"POST /predict/left HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\nExpect: 100-continue\r\n"
        head += b"X-Request-Id: gone\r\n"
        connection.sendall(head + b"Content-Type: application/json\r\n\r\n")
        assert b"100 Continue" in connection.recv(1000)
        connection.sendall(b"{")
    end = time.monotonic() + 20
    while not (found := [e for e in server.events("Answered") if e["path"] == "/predict/left"]):
        assert time.monotonic() < end
        time.sleep(0.01)
    (said,) = found
    assert (said["status"], said["bytes_out"], said["request_id"]) == (None, 0, "gone")
    assert said["error_code"] == "CLIENT_LEFT"
    assert server.metric("gateway_requests_total", code="CLIENT_LEFT", model="") == 1


def test_text_says_the_same(tmp_path: Path) -> None:
    (tmp_path / "registry.yaml").write_text("models: {}\n")
    with running(tmp_path, GATEWAY_ACCESS_LOG="yes", GATEWAY_LOG_FORMAT="text") as made:
        for quiet in ("/livez", "/readyz", "/metrics", "/ping", "/health"):
            httpx.get(made.url + quiet)
        answer = httpx.get(made.url + "/models?q=hush", headers={"X-Request-Id": "a b"})
        made.stop()
        (said,) = [text for text in made.lines if " INFO GET " in text]
    size = len(answer.content)
    wanted = rf".* INFO GET /models 200 in \d+\.\d{{4}} s, 0 bytes in, {size} out, request 'a b'\s*"
    assert re.fullmatch(wanted, said), said
