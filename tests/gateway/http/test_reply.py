"""Answers leave as uvicorn would send them; a whole one is one write."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import uvicorn
from starlette.types import Message, Receive, Scope, Send
from uvicorn.server import ServerState

from gateway.http import protocol, reply

pytest.importorskip("httptools")

LENGTH = (b"content-length", b"4")
PLAIN = [(b"content-type", b"application/json"), (b"x-model-name", b"iris\tt\xc3\xa9"), LENGTH]
BODY = {"type": "http.response.body", "body": b"body"}
Answer = list[Message]


def answer(headers: Any, *bodies: Message, status: int = 200) -> Answer:
    return [{"type": "http.response.start", "status": status, "headers": headers}, *bodies]


LARGE = b"l" * (reply.MOST_JOINED + 1)
WHOLE: dict[str, Answer] = {
    "a body": answer(PLAIN, BODY),
    "an error": answer(PLAIN, BODY, status=503),
    "no body": answer([(b"content-length", b"0")], {"type": "http.response.body"}),
}
OTHERS: dict[str, Answer] = {
    "parts": answer(PLAIN, {**BODY, "body": b"bo", "more_body": True}, {**BODY, "body": b"dy"}),
    "no length": answer(PLAIN[:-1], BODY),
    "no headers": answer([], BODY),
    "a length in front": answer([LENGTH, *PLAIN[:-1]], BODY),
    "a body that is too short": answer(PLAIN, {**BODY, "body": b"bod"}),
    "a body that is too long": answer(PLAIN, {**BODY, "body": b"bodies"}),
    "a large body": answer([(b"content-length", b"%d" % len(LARGE))], {**BODY, "body": LARGE}),
    "the end of the connection": answer([(b"connection", b"close"), *PLAIN], BODY),
    "chunks": answer([(b"transfer-encoding", b"chunked"), LENGTH], BODY),
    "capitals": answer([(b"Connection", b"close"), *PLAIN], BODY),
    "a line in a value": answer([(b"x-model-name", b"a\r\nx-evil: 1"), *PLAIN], BODY),
    "a return in a value": answer([(b"x-model-name", b"a\rb"), *PLAIN], BODY),
    "a zero in a value": answer([(b"x-model-name", b"a\0b"), *PLAIN], BODY),
    "a line in a name": answer([(b"x-a: b\r\nx-c", b"d"), *PLAIN], BODY),
    "a blank in a name": answer([(b"x a", b"d"), *PLAIN], BODY),
    "only a head": answer(PLAIN),
    "no head": [BODY],
    "two heads": answer(PLAIN, *answer(PLAIN, BODY)),
    "more than one body": answer(PLAIN, BODY, BODY),
    "nothing": [],
}


class Wire(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


async def sent(answer: Answer, request: bytes) -> tuple[list[bytes], bool]:
    """What is written for it, and whether the connection is closed."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in answer:
            await send(message)

    config = uvicorn.Config(app, http=protocol.Protocol, log_config=None)
    config.load()
    state = ServerState()
    state.default_headers = [(b"date", b"today")]
    one = protocol.Protocol(config=config, server_state=state, app_state={})
    one.access_log = False
    wire = Wire()
    one.connection_made(wire)
    one.data_received(request)
    await asyncio.gather(*one.tasks)
    return wire.written, wire.closed


@pytest.mark.anyio
@pytest.mark.parametrize("case", [*WHOLE, *OTHERS])
@pytest.mark.parametrize(
    "request_line", [b"GET / HTTP/1.1", b"HEAD / HTTP/1.1", b"GET / HTTP/1.0"], ids=["GET", "HEAD", "1.0"]
)
async def test_an_answer_is_sent_as_uvicorn_sends_it(
    case: str, request_line: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_line + b"\r\nhost: x\r\n\r\n"
    messages = {**WHOLE, **OTHERS}[case]
    written, closed = await sent(messages, request)
    with monkeypatch.context() as patch:
        patch.setattr(protocol, "Cycle", reply.RequestResponseCycle)
        plain, plainly_closed = await sent(messages, request)
    if case in ("only a head", "two heads"):  # the mistake is found while an error can still be told
        assert b"".join(written).startswith(b"HTTP/1.1 500" if case == "only a head" else b"HTTP/1.1 200")
    else:
        assert (b"".join(written), closed) == (b"".join(plain), plainly_closed)


@pytest.mark.anyio
@pytest.mark.parametrize("case", WHOLE)
async def test_a_whole_answer_is_one_write(case: str) -> None:
    written, closed = await sent(WHOLE[case], b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    assert len(written) == 1
    assert not closed


@pytest.mark.anyio
async def test_nothing_is_written_for_a_client_that_has_left() -> None:
    class Left(protocol.Protocol):
        def on_message_complete(self) -> None:
            super().on_message_complete()
            self.cycle.disconnected = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "Protocol", Left)
        written, _ = await sent(WHOLE["a body"], b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    assert written == []


@pytest.mark.anyio
async def test_an_answer_waits_for_a_client_that_is_slow() -> None:
    class Slow(protocol.Protocol):
        def on_message_complete(self) -> None:
            super().on_message_complete()
            self.flow.pause_writing()
            self.loop.call_soon(self.loop.call_soon, self.flow.resume_writing)
            self.loop.call_soon(self.loop.call_soon, lambda: seen.append(list(self.transport.written)))  # type: ignore[attr-defined]

    seen: list[list[bytes]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "Protocol", Slow)
        written, _ = await sent(WHOLE["a body"], b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    assert seen == [[]]
    assert len(written) == 1
