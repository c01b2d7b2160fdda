"""The application as servers see it: below a mount point, under uvicorn's other parser, and failing."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.access import Access
from gateway.errors import Problem
from gateway.http.bodies import BodyReader
from gateway.http.build import build
from gateway.http.callers import Callers
from gateway.metrics import Metrics
from gateway.registries.base import Version
from gateway.service import Inference
from gateway.settings import Settings
from tests.gateway.http.test_hostile import GOOD, body_of, head, raw, read_all
from tests.support.served import Served, settings


def test_below_a_mount_point(registry_file: str, tmp_path: Path) -> None:
    with Served(settings(tmp_path), registry_file, root_path="/ml") as served:
        # uvicorn puts the root path before what the proxy passed on without it.
        assert served.post("/predict/iris@champion?x=/ml", GOOD).status == 200
        assert served.get("/models/iris").json["name"] == "iris"
        assert served.get("/ping").status == 200


def test_under_the_parser_in_plain_python(registry_file: str, tmp_path: Path) -> None:
    with Served(settings(tmp_path, max_body_bytes=1000), registry_file, http="h11") as served:
        assert served.post("/predict/iris", GOOD).json["predictions"] == [0]
        assert served.post("/predict/iris", b"x" * 1001).status == 413
        assert served.request("HEAD", "/predict/iris").status == 405
        size = 5_000_000
        with served.connect() as connection:
            connection.sendall(head(b"Content-Length: %d" % size))
            for _ in range(size // 100_000):
                connection.sendall(b"x" * 100_000)
            answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert body_of(answer)["error_code"] == "BODY_TOO_LARGE"
        data = json.dumps(GOOD).encode()
        one = head(b"Content-Length: %d" % len(data)) + data
        last = head(b"Content-Length: %d" % len(data), b"Connection: close") + data
        assert raw(served, one + last).count(b"HTTP/1.1 200") == 2


class Failing:
    """A service that fails in a way that a real one should not."""

    stopping = False

    def __init__(self, error: Exception, version: Version | None = None) -> None:
        self.error = error
        self.version = version

    async def predict(self, inference: Inference) -> Any:
        if self.version is not None:
            inference.record.version, inference.record.alias = self.version, "champion"
        raise self.error

    def name(self, record: Any) -> None:
        pass


def call(service: Any, *incoming: dict[str, Any], **scope: Any) -> list[dict[str, Any]]:
    """What the application sends to a server that calls it with this scope and these messages."""
    limits = SimpleNamespace(
        max_body_bytes=1000,
        max_inflight_bytes=40_000,
        max_answer_bytes=40_000,
        webhook_secret_file=None,
        access_log=False,
        console=False,
    )
    app: Any = SimpleNamespace(
        settings=limits,
        service=service,
        views=service,
        promotions=service,
        residency=service,
        watch=service,
        metrics=Metrics(),
        draining=lambda: False,
        bodies=BodyReader(limits.max_body_bytes, limits.max_inflight_bytes),
        large_bodies=None,
        access=Callers(Access(Settings(admin_key_file=Path("no-key")))),
        feed=None,
        spans=None,
        peers=None,
        usage=None,
        captures=None,
    )
    sent: list[dict[str, Any]] = []
    messages = list(incoming)

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(build(app)({"type": "http", "root_path": "", **scope}, receive, send))
    return sent


BODY = {"type": "http.request", "body": json.dumps(GOOD).encode()}
PREDICT = {
    "method": "POST",
    "path": "/predict/iris",
    "raw_path": b"/predict/iris",
    "headers": [(b"content-type", b"application/json"), (b"x-request-id", b"req-9")],
}


def test_an_unforeseen_failure_is_logged_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "gateway.http"):
        start, body = call(Failing(KeyError("/srv/secret")), BODY, **PREDICT)
    content = json.loads(body["body"])
    assert (start["status"], content["error_code"], content["request_id"]) == (500, "INTERNAL", "req-9")
    assert "secret" not in str(content)
    assert "req-9" in caplog.text
    assert "/srv/secret" in caplog.text


def test_a_view_that_fails_is_answered_too(caplog: pytest.LogCaptureFixture) -> None:
    view = {"method": "GET", "path": "/models", "raw_path": b"/models", "query_string": b"", "headers": []}
    start, body = call(SimpleNamespace(names=lambda page: 1 / 0), **view)
    assert (start["status"], json.loads(body["body"])["error_code"]) == (500, "INTERNAL")
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("seconds", [None, 2.5])
def test_a_problem_of_a_resolved_model_says_which(seconds: float | None) -> None:
    problem = Problem("MODEL_LOADING", "it loads", retry_after=seconds)
    start, _ = call(Failing(problem, Version("iris", "3", "/x")), BODY, **PREDICT)
    headers = dict(start["headers"])
    assert (start["status"], headers[b"x-model-name"], headers[b"x-model-version"]) == (503, b"iris", b"3")
    assert headers[b"retry-after"] == (b"1" if seconds is None else b"3")
    assert headers[b"server-timing"].startswith(b"parse;dur=")


def test_a_server_that_gives_no_raw_path() -> None:
    scope = {name: value for name, value in PREDICT.items() if name != "raw_path"}
    start, _ = call(Failing(Problem("MODEL_NOT_FOUND", "no")), BODY, **scope)
    assert start["status"] == 404


def test_a_client_that_left_is_not_answered() -> None:
    part = {"type": "http.request", "body": b"{", "more_body": True}
    assert call(Failing(Problem("INTERNAL", "never")), part, {"type": "http.disconnect"}, **PREDICT) == []


def test_websockets_and_lifespan() -> None:
    closed = call(None, {"type": "websocket.connect"}, type="websocket", path="/predict/iris")
    assert [message["type"] for message in closed] == ["websocket.close"]
    said = call(None, {"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}, type="lifespan")
    assert [message["type"] for message in said] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]
