"""What clients send wrong, through a real socket: each its code, and afterwards the server still answers."""

from __future__ import annotations

import gzip
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.served import MAX_BODY, Reply, Served, settings

GOOD = {"dataframe_split": {"columns": ["sl", "sw", "pl", "pw"], "data": [[5.1, 3.5, 1.4, 0.2]]}}
BIG = b'{"inputs": "' + b"x" * (MAX_BODY + 1) + b'"}'


@pytest.fixture(autouse=True)
def still_answers(server: Served) -> Iterator[None]:
    yield
    assert server.post("/predict/iris", GOOD).json["predictions"] == [0]


def status_and_code(reply: Reply) -> tuple[int, str]:
    return reply.status, reply.code


MALFORMED = (400, "MALFORMED_BODY")
REFERENCE = (400, "INVALID_REFERENCE")
MEDIA = (415, "UNSUPPORTED_MEDIA_TYPE")
INVALID = (422, "INVALID_INPUT")
LARGE = (413, "BODY_TOO_LARGE")
NOWHERE = (404, "NOT_FOUND")
NO_MODEL = (404, "MODEL_NOT_FOUND")


def split(columns: list[Any], data: list[Any]) -> dict[str, Any]:
    return {"dataframe_split": {"columns": columns, "data": data}}


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (b"", MALFORMED),
        (b"{", MALFORMED),
        (b'{"inputs": NaN}', (422, "INVALID_INPUT")),
        (b"\xff\xfe\x00", MALFORMED),
        (b"[1, 2]", MALFORMED),
        (b"{}", MALFORMED),
        ({"inputs": [1], "instances": [1]}, MALFORMED),
        ({"dataframe_splits": {}}, MALFORMED),
        (b"[" * 100_000, MALFORMED),
        (GOOD | {"params": [1]}, INVALID),
        (GOOD | {"model": None}, REFERENCE),
        (GOOD | {"model": ""}, REFERENCE),
        (GOOD | {"model": 5}, REFERENCE),
        (GOOD | {"model": ["models:/iris"]}, REFERENCE),
        (GOOD | {"model": "iris"}, REFERENCE),
        (GOOD | {"model": "models:/"}, REFERENCE),
        (GOOD | {"model": "models:/tensor"}, REFERENCE),
        (GOOD | {"model": "file:///etc/passwd"}, REFERENCE),
        (GOOD | {"model": "s3://bucket/model"}, REFERENCE),
        (GOOD | {"model": "/etc"}, REFERENCE),
        (split(["sl", "sw", "pl"], [[1.0, 2.0, 3.0]]), INVALID),
        (split(["sl", "sw", "pl", "pw"], [["a", "b", None, True]]), INVALID),
        (split(["sl", "sw", "pl", "pw"], [[1.0]]), INVALID),
        (split([], []), INVALID),
        ({"dataframe_split": 5}, INVALID),
        ({"dataframe_records": []}, INVALID),
        ({"dataframe_records": [1, 2]}, INVALID),
        ({"instances": []}, INVALID),
        ({"inputs": None}, INVALID),
        ({"inputs": "text"}, INVALID),
        (BIG, LARGE),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bodies(server: Served, body: object, answer: tuple[int, str]) -> None:
    assert status_and_code(server.post("/predict/iris", body)) == answer


@pytest.mark.parametrize(
    "body",
    [GOOD | {"model": value} for value in (None, "", 5, "iris", "file:///etc", "runs:/1/model")],
    ids=str,
)
def test_an_invalid_model_never_means_the_default_one(server: Served, body: dict[str, Any]) -> None:
    for path in ("/predict", "/invocations"):
        assert status_and_code(server.post(path, body)) == REFERENCE


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "application/json; charset=latin-1",
        "application/json; x=1",
        "multipart/form-data",
    ],
)
def test_content_types(server: Served, content_type: str | None) -> None:
    assert status_and_code(server.request("POST", "/predict/iris", json.dumps(GOOD), content_type)) == MEDIA


@pytest.mark.parametrize("body", ["", "a,b\n1,2,3", 'a\n"open', "a,a\n1,2"])
def test_csv(server: Served, body: str) -> None:
    assert status_and_code(server.request("POST", "/predict/iris", body, "text/csv")) == MALFORMED


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/predict/nobody", NO_MODEL),
        ("/predict/nobody@champion", NO_MODEL),
        ("/predict/iris@nobody", (404, "ALIAS_NOT_FOUND")),
        ("/predict/iris/versions/99", (404, "VERSION_NOT_FOUND")),
        ("/predict/iris%40champion", NO_MODEL),
        ("/predict/iris@", REFERENCE),
        ("/predict/iris@latest", REFERENCE),
        ("/predict/", REFERENCE),
        ("/predict/iris/", NOWHERE),
        ("/predict/iris/versions/", REFERENCE),
        ("/predict/iris/versions/0", REFERENCE),
        ("/predict/iris/versions/-1", REFERENCE),
        ("/predict/iris/versions/1.0", REFERENCE),
        ("/predict/iris/versions/01", REFERENCE),
        ("/predict/..%2f..%2fetc", REFERENCE),
        ("/predict/../../etc/passwd", NOWHERE),
        ("/predict/%ff", REFERENCE),
        ("/predict/a%00b", REFERENCE),
        ("/predict/a%0d%0aX-Evil:%201", REFERENCE),
        ("/predict/file:%2f%2f%2fetc", REFERENCE),
        ("/predict/" + "n" * 300, REFERENCE),
        ("/predictions", NOWHERE),
        ("/predict/iris/nope", NOWHERE),
        ("/predict/iris/versions/1/nope", NOWHERE),
        ("/predict/iris@champion/nope", NOWHERE),
        ("/v1/models/iris/metadata", NOWHERE),
        ("/v2/models/iris/stats/infer", NOWHERE),
        ("/predict/iris@champion/versions/1", REFERENCE),
        ("/predict/iris/versions/1@champion", REFERENCE),
        ("/v2/models/iris@champion/versions/1/infer", REFERENCE),
        ("/", (405, "METHOD_NOT_ALLOWED")),
        ("//predict/iris", (404, "NOT_FOUND")),
        ("/v2/models/iris/infer", (400, "MALFORMED_BODY")),
    ],
)
def test_paths(server: Served, path: str, answer: tuple[int, str]) -> None:
    reply = server.post(path, GOOD)
    assert status_and_code(reply) == answer
    assert "x-evil" not in reply.headers


def test_a_404_says_what_there_is(server: Served) -> None:
    assert "champion" in server.post("/predict/iris@nobody", GOOD).json["hint"]


@pytest.mark.parametrize(
    "reference",
    [
        "/etc",
        "../etc",
        "file:///etc/passwd",
        "s3://b/k",
        "http://127.0.0.1/x",
        "models:/",
        "models://iris",
        "iris@",
        "a:b",
        "",
    ],
)
def test_a_path_is_not_a_model_for_a_client(server: Served, reference: str) -> None:
    assert status_and_code(server.post("/predict", GOOD, x_model=reference)) == REFERENCE


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("/some/where", REFERENCE),
        ("models://some/where", REFERENCE),
        ("runs:/x/y", NO_MODEL),
        ("models:/m-0123456789abcdef0123456789abcdef", NO_MODEL),
    ],
)
def test_a_refused_reference_is_quoted_as_it_came(
    server: Served, reference: str, answer: tuple[int, str]
) -> None:
    reply = server.post("/predict", GOOD, x_model=reference)
    assert status_and_code(reply) == answer
    assert reference in reply.json["message"]
    assert reference == "models://some/where" or "models://some/where" not in reply.json["message"]


def test_a_wrong_deadline_is_said_to_be_a_header(server: Served) -> None:
    reply = server.post("/predict/iris", GOOD, x_request_timeout_ms="soon")
    assert status_and_code(reply) == (400, "MALFORMED_BODY")
    assert reply.json["message"].startswith("the header X-Request-Timeout-Ms ")


def test_a_name_in_a_header_is_not_unquoted(server: Served) -> None:
    assert status_and_code(server.post("/predict", GOOD, x_model="ir%69s")) == NO_MODEL


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("path", ["/predict/iris", "/predict", "/invocations"])
def test_methods(server: Served, method: str, path: str) -> None:
    reply = server.request(method, path)
    assert (reply.status, reply.headers["allow"]) == (405, "POST")
    assert (reply.body == b"") == (method == "HEAD")


def raw(server: Served, *parts: bytes, end: bool = False) -> bytes:
    """Sends parts as they are and returns all that comes until the server closes."""
    with server.connect() as connection:
        for part in parts:
            connection.sendall(part)
        if end:
            connection.shutdown(socket.SHUT_WR)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    got = b""
    while chunk := connection.recv(65536):
        got += chunk
    return got


def head(*lines: bytes, method: bytes = b"POST", path: bytes = b"/predict/iris") -> bytes:
    first = (method + b" " + path + b" HTTP/1.1", b"Host: 127.0.0.1", b"Content-Type: application/json")
    return b"\r\n".join((*first, *lines)) + b"\r\n\r\n"


def body_of(answer: bytes) -> dict[str, Any]:
    content = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert isinstance(content, dict)
    return content


def test_a_length_over_the_limit_is_refused_before_the_body_comes(server: Served) -> None:
    answer = raw(server, head(b"Content-Length: 99999999999"))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert body_of(answer)["error_code"] == "BODY_TOO_LARGE"
    assert b"connection: close" in answer.lower()


def test_a_client_that_waits_for_100_continue_is_told_at_once(server: Served) -> None:
    answer = raw(server, head(b"Content-Length: 99999999999", b"Expect: 100-continue"))
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_client_that_goes_on_sending_gets_the_answer(server: Served) -> None:
    """The whole of a large body is sent before the answer is read; a reset would lose the answer."""
    size = 20_000_000
    with server.connect() as connection:
        connection.sendall(head(b"Content-Length: %d" % size))
        for _ in range(size // 100_000):
            connection.sendall(b"x" * 100_000)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert body_of(answer)["error_code"] == "BODY_TOO_LARGE"


def test_chunks_over_the_limit(server: Served) -> None:
    with server.connect() as connection:
        connection.sendall(head(b"Transfer-Encoding: chunked"))
        for _ in range(MAX_BODY // 10_000 + 2):
            connection.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_chunks_within_the_limit(server: Served) -> None:
    data = json.dumps(GOOD).encode()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (data[:10], data[10:11], data[11:]))
    answer = raw(server, head(b"Transfer-Encoding: chunked", b"Connection: close"), chunks, b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_a_gzip_bomb(server: Served) -> None:
    bomb = gzip.compress(b"[" * 100_000_000)
    assert len(bomb) < MAX_BODY
    assert status_and_code(server.post("/predict/iris", bomb, content_encoding="gzip")) == LARGE
    assert status_and_code(server.post("/predict/iris", b"no gzip", content_encoding="gzip")) == MALFORMED
    assert status_and_code(server.post("/predict/iris", b"x", content_encoding="br")) == MEDIA


def test_pipelined_requests_are_answered_in_order(server: Served) -> None:
    data = json.dumps(GOOD).encode()
    good = head(b"Content-Length: %d" % len(data), b"X-Request-Id: r1") + data
    bad = head(b"Content-Length: 1", b"X-Request-Id: r2") + b"{"
    last = head(b"Content-Length: %d" % len(data), b"X-Request-Id: r3", b"Connection: close") + data
    answer = raw(server, good + bad + last).lower()
    order = [answer.index(b"x-request-id: r%d" % i) for i in (1, 2, 3)]
    assert order == sorted(order)
    assert [part[:3] for part in answer.split(b"http/1.1 ")[1:]] == [b"200", b"400", b"200"]


@pytest.mark.parametrize(
    "parts",
    [
        (b"POST /predict/iris HT",),
        (head(b"Content-Length: 500"), b'{"inputs": [1,'),
        (head(b"Content-Length: 500"),),
        (head(b"Transfer-Encoding: chunked"), b"5\r\nab"),
    ],
)
def test_half_a_request_and_then_nothing(server: Served, parts: tuple[bytes, ...]) -> None:
    raw(server, *parts, end=True)


@pytest.mark.parametrize(
    "request_line",
    [b"\x00\x01\x02", b"GET", b"POST /predict/iris HTTP/9.9", b"POST http://[ HTTP/1.1", b"\x16\x03\x01\x02"],
)
def test_a_request_that_is_not_http(server: Served, request_line: bytes) -> None:
    answer = raw(server, request_line + b"\r\n\r\n", end=True)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")


def test_the_bytes_of_a_request_are_given_back_however_it_ends(registry_file: str, tmp_path: Path) -> None:
    """What may be held in all is little more than one body: a leak of any kind of request would be a 429."""
    good, bad = json.dumps(GOOD).encode(), b"{" + b" " * 200
    limits = {"max_body_bytes": 300, "max_inflight_bytes": 37 * 300}
    with Served(settings(tmp_path, **limits), registry_file) as served:
        for _ in range(2):
            assert served.post("/predict/iris", good).status == 200
            assert served.post("/predict/iris", gzip.compress(good), content_encoding="gzip").status == 200
            assert status_and_code(served.post("/predict/iris", bad)) == MALFORMED
            assert status_and_code(served.post("/predict/nobody", good)) == NO_MODEL
            assert status_and_code(served.post("/predict/iris", b"x" * 400)) == LARGE
            bomb = gzip.compress(b"[" * 10_000)
            assert status_and_code(served.post("/predict/iris", bomb, content_encoding="gzip")) == LARGE
            raw(served, head(b"Content-Length: 300"), b"x" * 299, end=True)
            chunked = head(b"Transfer-Encoding: chunked", b"Connection: close")
            assert (
                raw(served, chunked, b"12c\r\n" + b"x" * 300 + b"\r\n", b"5\r\nabcde\r\n0\r\n\r\n")[9:12]
                == b"413"
            )


def test_too_many_bytes_at_once_are_turned_away(registry_file: str, tmp_path: Path) -> None:
    size = len(json.dumps(GOOD))
    limits = {"max_body_bytes": 300, "max_inflight_bytes": 37 * size + 40}
    with Served(settings(tmp_path, **limits), registry_file) as served, served.connect() as slow:
        slow.sendall(head(b"Content-Length: %d" % size) + b"x" * (size - 1))
        end = time.monotonic() + 60
        while (reply := served.post("/predict/iris", GOOD)).status == 200 and time.monotonic() < end:
            pass  # until the server has seen what the other connection sent
        assert status_and_code(reply) == (429, "OVERLOADED")
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.json["retryable"] is True
        slow.sendall(b"x")
        assert slow.recv(12) == b"HTTP/1.1 400"
        assert served.post("/predict/iris", GOOD).status == 200
