"""What never becomes a request: heads too large or too slow, bytes that are no HTTP; through real sockets."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from gateway import logs
from gateway.http import protocol
from gateway.http.connections import Connections
from gateway.http.problems import respond, respond_in_parts
from gateway.server import loop_factory

pytest.importorskip("httptools")

READY = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
OVER = protocol.MAX_HEAD_BYTES + 1


class Hasty(protocol.Protocol):
    head_seconds = 0.5


class Impatient(protocol.Protocol):
    send_seconds = 0.5


class Brief(protocol.Protocol):
    """Closes idle connections soon. The loop stands still from the arrival of `/busy` until `go_on`."""

    busy, go_on = threading.Event(), threading.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.timeout_keep_alive = 3.0

    def data_received(self, data: bytes) -> None:
        if b"/busy" in data:
            self.busy.set()
            self.go_on.wait(30)
        super().data_received(data)


class Application:
    """Answers with the number of headers and of body bytes, to `/much` with so much that it has to wait for
    the client; to `/later` once `go` is set, to `/left` once
    the client is gone."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.asked = threading.Event()
        self.left = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked.set()
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size, more = size + len(message["body"]), message["more_body"]
        if scope["path"] == "/later":
            await self.go.wait()
        if scope["path"] == "/left":
            assert (await receive())["type"] == "http.disconnect"
        if scope["path"] == "/much":
            await respond_in_parts(send, 200, [], [bytes(1 << 16)] * 128)
            return
        await respond(send, 200, [], b"%d headers, %d bytes" % (len(scope["headers"]), size))
        if scope["path"] == "/left":
            self.left.set()


class Running:
    def __init__(self, kind: type[asyncio.Protocol]) -> None:
        self.app = Application()
        self._server = uvicorn.Server(
            uvicorn.Config(
                self.app, http=kind, lifespan="off", ws="none", log_config=None, server_header=False
            )
        )
        self._bound = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=lambda: self._run())

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        await self._server.serve(sockets=[self._bound])

    def __enter__(self) -> Running:
        self._thread.start()
        with self.connect() as client:
            client.sendall(READY)
            answered(client)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def connect(self) -> socket.socket:
        return socket.create_connection(self._bound.getsockname(), timeout=60)


@pytest.fixture(scope="module")
def hasty() -> Iterator[Running]:
    with Running(Hasty) as running:
        yield running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    kind = protocol.protocol()
    assert isinstance(kind, type)
    with Running(kind) as running:
        yield running


def test_a_client_that_reads_a_little_now_and_then_is_left() -> None:
    limiter = Connections(10)
    kind = type("Counted", (Impatient,), {"limiter": limiter})
    with Running(kind) as running, running.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(READY.replace(b"/", b"/much", 1))
        for _ in range(300):
            assert client.recv(2000)  # 20 kB a second
            time.sleep(0.1)
            if limiter.stalled:
                break
        assert limiter.stalled == 1


def test_a_client_that_reads_steadily_gets_all() -> None:
    kind = type(
        "Patient", (Impatient,), {"send_seconds": 20.0}
    )  # the reader may stand still on a busy machine
    with Running(kind) as running, running.connect() as client:
        client.sendall(READY.replace(b"/", b"/much", 1))
        assert len(whole(client)) > 8 << 20


def test_a_request_that_comes_as_the_connection_is_about_to_be_closed_is_answered() -> None:
    with Running(Brief) as running, running.connect() as other, running.connect() as client:
        client.sendall(READY)
        assert whole(client)
        other.sendall(READY.replace(b"/", b"/busy", 1))
        assert Brief.busy.wait(30)
        client.sendall(READY)
        threading.Timer(3.5, Brief.go_on.set).start()  # after the connection's time is over
        assert whole(client)
        assert client.recv(1) == b""  # and now it is idle for long enough


def whole(client: socket.socket) -> bytes:
    """One answer, in however many pieces it comes."""
    answer = b""
    while True:
        head, end, body = answer.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if end and length is not None and len(body) >= int(length[1]):
            return answer
        part = client.recv(1 << 16)
        assert part, answer
        answer += part


def everything(client: socket.socket) -> bytes:
    """Until the server closes."""
    parts = []
    while part := client.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def answered(client: socket.socket) -> bytes:
    """The body of one whole answer, on a connection that stays open."""
    head, _, body = whole(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    return body


def refused(answer: bytes, message: str) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    content = json.loads(body)
    assert status == "HTTP/1.1 400 Bad Request"
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    assert int(headers["content-length"]) == len(body)
    assert headers["x-request-id"] == content["request_id"] != ""
    assert content["error_code"] == "MALFORMED_BODY"
    assert content["retryable"] is False
    assert message in content["message"]


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
        b"NONSENSE / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n",
        READY + b"and then this\r\n\r\n",
    ],
)
def test_a_request_that_is_not_http_gets_a_json_error(server: Running, sent: bytes) -> None:
    with server.connect() as client:
        if sent.startswith(READY):
            client.sendall(READY)
            assert answered(client) == b"1 headers, 0 bytes"
        client.sendall(sent.removeprefix(READY))
        refused(everything(client), "the request is not valid HTTP")


LENGTH = b"content-length: 2\r\n"
CODED = b"transfer-encoding: "
CHUNKED = CODED + b"chunked\r\n"
PIECE = b"2\r\n{}\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "body", "why"),
    [
        (b"1.1\r\n" + LENGTH, b"{}", "no Host header"),
        (b"1.1\r\nhost: x\r\nhost: y\r\n" + LENGTH, b"{}", "more than one Host"),
        (b"1.1\r\nhost: x\r\nHOST: x\r\n" + LENGTH, b"{}", "more than one Host"),
        (b"1.0\r\nhost: x\r\nhost: y\r\n" + LENGTH, b"{}", "more than one Host"),
        (b"1.1\r\nhost: x y\r\n" + LENGTH, b"{}", "not the name of a host"),
        (b"1.1\r\nhost: x@y/\r\n" + LENGTH, b"{}", "not the name of a host"),
        (b"1.1\r\nhost: x\r\n" + CODED + b"gzip, chunked\r\n", PIECE, "only Transfer-Encoding"),
        (b"1.1\r\nhost: x\r\n" + CODED + b"gzip\r\n" + CHUNKED, PIECE, "only Transfer-Encoding"),
        (b"1.0\r\nhost: x\r\n" + CHUNKED, PIECE, "only Transfer-Encoding"),
        (b"2.0\r\nhost: x\r\n" + LENGTH, b"{}", "HTTP/2.0 is not spoken"),
        (b"1.1\r\nhost: x\r\n" + CODED + b"gzip\r\n", PIECE, "only Transfer-Encoding"),
        (b"1.1\r\nhost: x\r\n" + CODED + b"chunked, chunked\r\n", PIECE, "not valid HTTP"),
        (b"1.1\r\nhost: x\r\n" + CODED + b"identity\r\n" + LENGTH, b"{}", "not valid HTTP"),
        (b"1.1\r\nhost: x\r\n" + CODED + b"xchunked\r\n", PIECE, "only Transfer-Encoding"),
        (b"1.1\r\nhost: x\r\n" + CODED + b"\x0bchunked\r\n", PIECE, "not valid HTTP"),
        (b"1.1\r\nhost: x\r\n" + LENGTH + CHUNKED, PIECE, "not valid HTTP"),
        (b"1.1\r\nhost: x\r\n" + CHUNKED + LENGTH, PIECE, "not valid HTTP"),
        (b"1.1\r\nhost: x\r\n" + LENGTH + LENGTH, b"{}", "not valid HTTP"),
        (b"1.1\r\nhost: x\r\n" + LENGTH + b"content-length: 3\r\n", b"{} ", "not valid HTTP"),
        (b"1.1\r\nhost: x\r\ncontent-length: 2, 2\r\n", b"{}", "not valid HTTP"),
        (b"1.1\r\nhost: x\r\ncontent-length: +2\r\n", b"{}", "not valid HTTP"),
        (b"1.1\r\nhost: x\r\ncontent-length:\r\n 2\r\n", b"{}", "not valid HTTP"),
        (b"1.1\r\nhost: x\r\ntransfer-encoding:\r\n chunked\r\n", PIECE, "not valid HTTP"),
        (b"1.1\r\nhost: x\r\nx-a: b\r\n c\r\n" + LENGTH, b"{}", "not valid HTTP"),
        (b"1.1\r\nhost: x\r\n" + CHUNKED, b"-2\r\n{}\r\n0\r\n\r\n", "not valid HTTP"),
        (b"1.1\r\nhost: x\r\n" + CHUNKED, b"0x2\r\n{}\r\n0\r\n\r\n", "not valid HTTP"),
        (b"1.1\r\nhost: x\r\n" + CHUNKED, b"ffffffffffffffffff\r\n{}\r\n", "not valid HTTP"),
        (b"1.1\r\nhost: x\r\n" + CHUNKED, b"2\r\n{}x\r\n0\r\n\r\n", "not valid HTTP"),
        (b"1.1\r\nhost: x\r\n" + CHUNKED, b"2;a\n{}\r\n0\r\n\r\n", "not valid HTTP"),
        (b"1.1\r\nhost: x\r\nx: a\rcontent-length: 9\r\n" + LENGTH, b"{}", "not valid HTTP"),
    ],
)
def test_what_a_proxy_may_read_differently_is_refused(
    server: Running, head: bytes, body: bytes, why: str
) -> None:
    with server.connect() as client:
        client.sendall(b"POST / HTTP/" + head + b"\r\n" + body + READY)
        answers = everything(client)
    assert answers.count(b"HTTP/1.1 ") == 1  # what follows is not read as a request
    refused(answers, why)


@pytest.mark.parametrize(
    "head", [b"1.0\r\n", b"1.1\r\nhost:\r\n", b"1.1\r\nhost: [::1]:80\r\n", b"1.1\r\nHost: a.b_c-d:8\r\n"]
)
def test_hosts_that_are_none_of_its_business(server: Running, head: bytes) -> None:
    with server.connect() as client:
        client.sendall(b"POST / HTTP/" + head + LENGTH + b"\r\n{}")
        assert answered(client).endswith(b"2 bytes")


def test_a_head_that_does_not_end_is_cut_off(server: Running) -> None:
    with server.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nx-long: ")
        client.sendall(b"y" * OVER)
        refused(everything(client), "the request's head is larger than 64 KiB")


def test_many_small_headers_count_too(server: Running) -> None:
    with server.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * (OVER // 6 + 10) + b"\r\n")
        refused(everything(client), "64 KiB")


def test_a_long_path_counts_too(server: Running) -> None:
    with server.connect() as client:
        client.sendall(b"GET /" + b"y" * OVER + b" HTTP/1.1\r\n\r\n")
        refused(everything(client), "64 KiB")


@pytest.mark.parametrize("at_once", [True, False])
def test_a_large_body_is_not_a_large_head(server: Running, at_once: bool) -> None:
    """Twice on one connection, so that the count begins again."""
    head = b"POST / HTTP/1.1\r\nhost: x\r\nx-half: %s\r\ncontent-length: %d\r\n\r\n" % (
        b"y" * (OVER // 2),
        OVER,
    )
    with server.connect() as client:
        for _ in range(2):
            pieces = [head + b"z" * OVER] if at_once else [head, b"z" * OVER]
            for piece in pieces:
                client.sendall(piece)
            assert answered(client) == b"3 headers, 65537 bytes"


@pytest.mark.parametrize("before", [b"", READY])
def test_a_head_that_comes_too_slowly_is_given_up(hasty: Running, before: bytes) -> None:
    with hasty.connect() as client:
        if before:
            client.sendall(before)
            assert answered(client) == b"1 headers, 0 bytes"
        client.sendall(b"GET / HTTP/1.1\r\nhost:")
        refused(everything(client), "was not complete after 0.5 s")


def test_a_connection_on_which_nothing_comes_is_closed_silently(hasty: Running) -> None:
    with hasty.connect() as client:
        assert everything(client) == b""


def test_a_body_may_take_its_time(hasty: Running) -> None:
    """The head's time is over: another connection that began later has been closed."""
    with hasty.connect() as client, hasty.connect() as later:
        client.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nz")
        assert everything(later) == b""
        client.sendall(b"z")
        assert answered(client) == b"2 headers, 2 bytes"


def test_a_body_that_breaks_off_in_nonsense(server: Running) -> None:
    with server.connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\nz\r\n")
        client.sendall(b"no number\r\n")
        refused(everything(client), "the request is not valid HTTP")


def test_nonsense_behind_a_request_does_not_overtake_its_answer(server: Running) -> None:
    server.app.asked.clear()
    with server.connect() as client:
        client.sendall(b"GET /later HTTP/1.1\r\nhost: x\r\n\r\n")
        server.app.asked.wait(20)
        client.sendall(b"\x00nonsense\r\n\r\n")
        with server.connect() as other:  # the loop has seen the nonsense once it has answered this
            other.sendall(READY)
            answered(other)
        server.loop.call_soon_threadsafe(server.app.go.set)
        answer = everything(client)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"1 headers, 0 bytes")


def test_who_leaves_with_requests_behind_the_first_is_gone_for_all_of_them(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """The request being answered hears of it although it is not the last that came, and its answer goes
    nowhere."""
    server.app.asked.clear()
    with server.connect() as client:
        client.sendall(b"GET /left HTTP/1.1\r\nhost: x\r\n\r\n" + READY * 4)
        assert server.app.asked.wait(20)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close is a reset
    assert server.app.left.wait(20)
    with server.connect() as client:
        client.sendall(READY)
        assert answered(client) == b"1 headers, 0 bytes"
    assert not caplog.records


@pytest.mark.parametrize(
    "sent",
    [
        b"CONNECT a.example:443 HTTP/1.1\r\nhost: a.example\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
    ],
)
def test_strangers_do_not_write_the_log(
    server: Running, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.handler.addFilter(only_once := logs.OnceInAWhile())
    for _ in range(5):
        with server.connect() as client:
            client.sendall(sent)
            assert whole(client).startswith(b"HTTP/1.1 ")
    caplog.handler.removeFilter(only_once)
    assert len(caplog.records) <= 1, caplog.text
    assert "pip install" not in caplog.text


def test_a_client_that_goes_on_sending_gets_the_answer(server: Running) -> None:
    with server.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nx-long: ")
        for _ in range(40):
            client.sendall(b"y" * OVER)
        refused(everything(client), "64 KiB")


OFFERS = {
    "curl": b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAA\r\n",
    "jdk": b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAA\r\nUpgrade: h2c\r\n",
    "websocket": b"connection: keep-alive, upgrade\r\nupgrade: websocket\r\n",
}


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("pieces", ["at once", "body later", "byte by byte"])
def test_an_offer_to_upgrade_is_ignored_and_the_body_is_read(
    server: Running, offer: bytes, chunked: bool, pieces: str
) -> None:
    """RFC 9110, section 7.8. Twice on one connection: nothing of the body is taken for the next request."""
    length = b"transfer-encoding: chunked\r\n" if chunked else b"content-length: 5\r\n"
    head = b"POST / HTTP/1.1\r\nhost: x\r\n" + offer + length + b"\r\n"
    body = b"5\r\nGET /\r\n0\r\n\r\n" if chunked else b"GET /"
    with server.connect() as client:
        for _ in range(2):
            sent = {"at once": [head + body], "body later": [head, body]}.get(pieces)
            for piece in sent or [bytes([byte]) for byte in head + body]:
                client.sendall(piece)
            assert answered(client).endswith(b" 5 bytes")


def test_offers_in_a_pipeline_are_ignored_one_by_one(server: Running) -> None:
    request = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n" + OFFERS["curl"] + b"\r\nzz"
    last = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    with server.connect() as client:
        client.sendall(request * 3 + last)
        answer = everything(client)
    assert answer.count(b"2 headers, 2 bytes") == 3
    assert answer.endswith(b"2 headers, 0 bytes")


def test_a_head_with_an_offer_counts_like_any_other(server: Running) -> None:
    with server.connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\n" + OFFERS["curl"] + b"a: b\r\n" * (OVER // 6 + 10) + b"\r\n")
        refused(everything(client), "64 KiB")


def test_a_connection_that_is_old_enough_ends_with_its_next_answer() -> None:
    kind = protocol.protocol(max_age=-1.0)
    assert isinstance(kind, type)
    app = Running(kind)
    app._thread.start()
    try:
        with app.connect() as client:
            client.sendall(READY)
            answer = everything(client)  # the server closes after it
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.count(b"\r\nconnection: close\r\n") == 1
    finally:
        app._server.should_exit = True
        app._thread.join()


def test_what_is_overridden_of_uvicorn_is_there() -> None:
    """Private parts that this module relies on: a uvicorn without them needs another version of it."""
    for name in (
        "_unset_keepalive_if_required",
        "on_headers_complete",
        "send_400_response",
        "connection_lost",
    ):
        assert callable(getattr(protocol.HttpToolsProtocol, name))
    config = uvicorn.Config(Application())
    made = protocol.Protocol(config, uvicorn.server.ServerState(), {}, asyncio.new_event_loop())
    made.loop.close()
    assert {"cycle", "pipeline", "parser", "flow", "timeout_keep_alive"} <= vars(made).keys()
