"""Every error code of the contract, from a running gateway: status, form of the body, headers."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

import gateway
from gateway.errors import STATUS
from tests.support.hostile import write_package
from tests.support.running import Running, running

KEY = "the-admin-key"
ROWS = {"dataframe_records": [{"x": 1.0}]}
DOES = """
give = params.get('give')
if give == 'exit':
    os._exit(7)
if give == 'kill':
    import signal
    os.kill(os.getpid(), signal.SIGKILL)
if give == 'raise':
    raise ValueError('row 4711 of /srv/secret/rows.csv is bad')
if give in ('sleep', 'hang'):
    import time
    time.sleep(0.6 if give == 'sleep' else 600)
"""
SIGNATURE = """signature:
  inputs: '[{"type": "double", "name": "x"}]'
  params: '[{"name": "give", "type": "string", "default": "", "shape": null}]'
"""
PLUGIN = """
from gateway.registries.file import FileRegistry

class Faulty(FileRegistry):
    def __init__(self, target, *, create=False):
        super().__init__(target.removeprefix("faulty://"), create=create)

    def delete_alias(self, name, alias):
        raise KeyError("/srv/secret/store has no such row")
"""


@dataclass(frozen=True)
class Gateways:
    """`open` is without an admin key, over a registry that has a bug of its own; `closed` has a key, a
    registry that cannot be written, and room for nothing."""

    directory: Path
    open: Running
    closed: Running

    def predict(self, model: str, body: Any = None, **headers: str) -> httpx.Response:
        url = f"{self.open.url}/predict/{model}"
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if isinstance(body, bytes):
            return httpx.post(url, content=body, headers=sent, timeout=60)
        return httpx.post(url, json=ROWS if body is None else body, headers=sent, timeout=60)

    def control(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        return httpx.request(
            method, self.open.url + path, json=body, headers={**self.open.key, **headers}, timeout=60
        )

    def with_key(self, method: str, path: str, body: Any = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.request(method, self.closed.url + path, json=body, headers=headers, timeout=60)


Ask = Callable[[Gateways], httpx.Response]


@dataclass(frozen=True)
class Row:
    """A request, the contract's answer to it, and words of the hint."""

    code: str
    status: int
    ask: Ask
    hint: str
    details: Sequence[str] = ()
    retryable: bool = False
    waits: bool = False


def give(what: str) -> dict[str, Any]:
    return {**ROWS, "params": {"give": what}}


def no_http(g: Gateways) -> httpx.Response:
    with socket.create_connection(("127.0.0.1", httpx.URL(g.open.url).port or 0), timeout=30) as connection:
        connection.sendall(b"GARBAGE\r\n\r\n")
        head, _, body = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = [tuple(line.split(": ", 1)) for line in lines[1:]]
    return httpx.Response(int(lines[0].split()[1]), headers=headers, content=body)


def too_many(g: Gateways) -> httpx.Response:
    """One is answered, one waits, and there is no room for a third. On a busy machine six callers may come
    one after the other, so they try until they meet."""
    end = time.monotonic() + 60
    with ThreadPoolExecutor(6) as pool:
        while True:
            for answer in pool.map(lambda _: g.predict("moody", give("sleep")), range(6)):
                if answer.status_code != 200:
                    return answer
            assert time.monotonic() < end


def broken_registry(g: Gateways) -> httpx.Response:
    registry = g.directory / "registry.yaml"
    content = registry.read_text()
    registry.write_text("models: [")
    try:
        return g.control("POST", "/registry/refresh")
    finally:
        registry.write_text(content)
        g.control("POST", "/registry/refresh").raise_for_status()


def stopping(g: Gateways) -> httpx.Response:
    """A gateway is told to stop, and a request does not end in the time that is left."""
    place = str(g.directory / "moody")
    with (
        running(g.directory / "closed", place, GATEWAY_DRAIN_TIMEOUT="1s") as server,
        ThreadPoolExecutor(1) as pool,
    ):
        url = f"{server.url}/predict/moody"
        answer = pool.submit(httpx.post, url, json={**ROWS, **give("hang")}, timeout=60)
        end = time.monotonic() + 60
        while not server.metric("gateway_inflight_requests", model="moody"):
            assert time.monotonic() < end
        assert server.stop() == 0
        return answer.result()


def failed_load(g: Gateways) -> httpx.Response:
    """The load ends before the request: under load it may take longer than `cold_wait`."""
    assert g.control("POST", "/models/moody/versions/2/load").status_code == 503
    return g.predict("moody/versions/2")


TABLE = [
    Row(
        "MALFORMED_BODY",
        400,
        lambda g: g.predict("moody", b"{", content_type="application/json"),
        "exactly one",
    ),
    Row("MALFORMED_BODY", 400, lambda g: g.predict("moody", {"dataframe_record": []}), "did you mean"),
    Row("MALFORMED_BODY", 400, lambda g: g.predict("moody", {"inputs": [], "instances": []}), "exactly one"),
    Row(
        "MALFORMED_BODY",
        400,
        lambda g: g.predict("moody", b"x\n1,2\n", content_type="text/csv"),
        "column names",
    ),
    Row("MALFORMED_BODY", 400, lambda g: g.predict("moody", x_request_timeout_ms="soon"), "2000"),
    Row("MALFORMED_BODY", 400, no_http, "HTTP/1.1"),
    Row("INVALID_REFERENCE", 400, lambda g: g.predict("moody@a:b"), "NAME@ALIAS"),
    Row(
        "INVALID_REFERENCE", 400, lambda g: g.predict("moody", {**ROWS, "model": None}), "models:/NAME@ALIAS"
    ),
    Row("INVALID_REFERENCE", 400, lambda g: g.control("POST", "/predict", ROWS), "POST /predict/NAME"),
    Row("UNAUTHENTICATED", 401, lambda g: httpx.post(g.closed.url + "/registry/refresh"), "Bearer KEY"),
    Row("FORBIDDEN", 403, lambda g: g.control("POST", "/webhooks/mlflow", {}), "webhook_secret_file"),
    Row("MODEL_NOT_FOUND", 404, lambda g: g.predict("modey"), "did you mean moody?"),
    Row("MODEL_NOT_FOUND", 404, lambda g: g.predict("zebra"), "GET /models"),
    Row("VERSION_NOT_FOUND", 404, lambda g: g.predict("moody/versions/7"), "versions of moody: 2, 1"),
    Row("ALIAS_NOT_FOUND", 404, lambda g: g.predict("moody@nobody"), "aliases of moody: champion"),
    Row("NOT_FOUND", 404, lambda g: g.control("GET", "/modelz"), "GET /models"),
    Row("METHOD_NOT_ALLOWED", 405, lambda g: g.control("GET", "/predict/moody"), "use POST"),
    Row("METHOD_NOT_ALLOWED", 405, lambda g: g.control("POST", "/models"), "use GET"),
    Row(
        "ROLLOUT_REFUSED",
        409,
        lambda g: g.control("PUT", "/models/moody/aliases/champion", {"version": "2"}),
        "a version that passes",
    ),
    Row(
        "REGISTRY_READ_ONLY",
        409,
        lambda g: g.with_key("PUT", "/models/moody/aliases/champion", {"version": "1"}),
        "gateway push",
    ),
    Row(
        "PRECONDITION_FAILED",
        412,
        lambda g: g.control("PUT", "/models/moody/aliases/champion", {"version": "1", "expect": "5"}),
        "look",
    ),
    Row(
        "BODY_TOO_LARGE",
        413,
        lambda g: g.predict("moody", b"[" * 5000, content_type="text/csv"),
        "fewer rows",
    ),
    Row(
        "UNSUPPORTED_MEDIA_TYPE",
        415,
        lambda g: g.predict("moody", b"x", content_type="text/plain"),
        "text/csv",
        details=("body",),
    ),
    Row(
        "INVALID_INPUT",
        422,
        lambda g: g.predict("moody", {"dataframe_records": [{"x": "a"}, {"x": True}]}),
        "signature",
        details=("dataframe_records[0].x", "dataframe_records[1].x"),
    ),
    Row(
        "INVALID_INPUT",
        422,
        lambda g: g.predict("moody", {**ROWS, "params": {"give": 1}}),
        "signature",
        ("params.give",),
    ),
    Row(
        "INVALID_INPUT",
        400,
        lambda g: httpx.post(
            g.open.url + "/invocations", json={"inputs": {"y": [1]}}, headers={"X-Model": "moody"}
        ),
        "signature",
        details=("inputs.x",),
    ),
    Row("INVALID_INPUT", 422, lambda g: g.control("POST", "/registry/refresh?now=1"), "leave it", ("?now",)),
    Row("OVERLOADED", 429, too_many, "Retry-After", retryable=True, waits=True),
    Row("PREDICTION_FAILED", 500, lambda g: g.predict("moody", give("raise")), "log"),
    Row("PREDICTION_FAILED", 500, lambda g: g.predict("moody", give("exit")), "do not send it again"),
    Row("INTERNAL", 500, lambda g: g.control("DELETE", "/models/moody/aliases/champion"), "request_id"),
    Row(
        "WORKER_CRASHED",
        502,
        lambda g: g.predict("moody", give("kill")),
        "Retry-After",
        retryable=True,
        waits=True,
    ),
    Row("MODEL_LOADING", 503, lambda g: g.predict("slow"), "Retry-After", retryable=True, waits=True),
    Row(
        "MODEL_UNAVAILABLE",
        503,
        failed_load,
        "gateway load",
        retryable=True,
        waits=True,
    ),
    Row(
        "CAPACITY_EXCEEDED",
        503,
        lambda g: g.with_key("POST", "/predict/moody", ROWS),
        "memory_limit",
        retryable=True,
        waits=True,
    ),
    Row("REGISTRY_UNAVAILABLE", 503, broken_registry, "correct the registry", retryable=True, waits=True),
    Row("SHUTTING_DOWN", 503, stopping, "another gateway", retryable=True, waits=True),
    Row(
        "DEADLINE_EXCEEDED",
        504,
        lambda g: g.predict("moody", give("sleep"), x_request_timeout_ms="50"),
        "X-Request-Timeout-Ms",
        retryable=True,
    ),
]


@pytest.fixture(scope="module")
def gateways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateways]:
    if sys.platform != "linux":
        pytest.skip("model processes need Linux")
    directory = tmp_path_factory.mktemp("errors")
    registry = str(directory / "registry.yaml")
    for name, lines in {
        "moody": {"at_predict": DOES},
        "broken": {"at_load": "raise OSError('no /srv/secret/weights.bin')"},
        "slow": {"at_load": "import time\ntime.sleep(2)"},
    }.items():
        write_package(directory / name, **lines)
        with (directory / name / "MLmodel").open("a") as file:
            file.write(SIGNATURE)
    gateway.push(directory / "moody", name="moody", registry=registry, alias="champion")
    gateway.push(directory / "broken", name="moody", registry=registry)
    gateway.push(directory / "slow", name="slow", registry=registry, alias="champion")
    (directory / "gateway.yaml").write_text("{max_queue: 1, max_body_bytes: 4000}\n")
    plugins = directory / "plugins"
    (plugins / "faulty-1.dist-info").mkdir(parents=True)
    (plugins / "faulty.py").write_text(PLUGIN)
    (plugins / "faulty-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: faulty\nVersion: 1\n"
    )
    (plugins / "faulty-1.dist-info" / "entry_points.txt").write_text(
        "[gateway.registries]\nfaulty = faulty:Faulty\n"
    )
    closed = directory / "closed"
    closed.mkdir()
    (closed / "key").write_text(KEY)
    path = os.pathsep.join([str(plugins), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (
        running(
            directory, "--registry", f"faulty://{registry}", PYTHONPATH=path, GATEWAY_COLD_WAIT="300ms"
        ) as open_,
        running(
            closed, str(directory / "moody"), GATEWAY_ADMIN_KEY_FILE="key", GATEWAY_MEMORY_LIMIT="1KB"
        ) as closed_,
    ):
        made = Gateways(directory, open_, closed_)
        made.control("POST", "/models/moody/load").raise_for_status()
        yield made


def test_no_code_is_without_a_row() -> None:
    assert {row.code for row in TABLE} == set(STATUS)


@pytest.mark.parametrize("row", TABLE, ids=[f"{i}-{row.code}" for i, row in enumerate(TABLE)])
def test_each_code_is_answered_in_the_contract_s_form(gateways: Gateways, row: Row) -> None:
    answer = row.ask(gateways)
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert (answer.status_code, body["error_code"]) == (row.status, row.code), answer.text
    assert list(body) == ["error_code", "message", "details", "hint", "retryable", "request_id"]
    assert body["message"]
    assert row.hint in body["hint"], body["hint"]
    assert body["retryable"] is row.retryable
    assert body["request_id"] == answer.headers["x-request-id"] != ""
    for detail in body["details"]:
        assert {"path", "problem"} <= set(detail) <= {"path", "problem", "expected", "got"}
        assert all(isinstance(text, str) for text in detail.values())
    assert [detail["path"] for detail in body["details"]] == list(row.details)
    wait = answer.headers.get("retry-after")
    assert (wait is not None) == row.waits
    assert wait is None or re.fullmatch(r"[1-9]\d*", wait)
    for word in (
        "Traceback",
        'File "',
        "4711",
        "/srv/",
        str(gateways.directory),
        sys.prefix,
        os.sep + "loaders",
    ):
        assert word not in answer.text.replace(body["request_id"], "")
