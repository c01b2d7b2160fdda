"""The transport that joins the head of an answer with its body, over real sockets."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from gateway.http.transport import MOST_JOINED, JoiningTransport

LARGE = b"l" * (MOST_JOINED + 1)


class Counted:
    """A transport whose writes are counted."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.sizes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self.sizes.append(len(data))
        self._transport.write(data)


class Connection:
    def __init__(self) -> None:
        self.client, self._server = socket.socketpair()
        self.client.settimeout(60)

    async def __aenter__(self) -> Connection:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=self._server)
        self.counted = Counted(transport)
        self.joining = JoiningTransport(self.counted, loop)  # type: ignore[arg-type]
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.joining.abort()
        await asyncio.sleep(0)
        self.client.close()

    async def read(self, size: int) -> bytes:
        found = b""
        while len(found) < size and (more := await asyncio.to_thread(self.client.recv, size)):
            found += more
        return found


@pytest.mark.anyio
async def test_two_writes_of_one_turn_are_one() -> None:
    async with Connection() as one:
        one.joining.write(b"head")
        assert one.joining.get_write_buffer_size() == 4
        one.joining.write(b"body")
        assert one.counted.sizes == [8]
        assert await one.read(8) == b"headbody"
        one.joining.write(b"next")
        one.joining.write(b"one")
        assert one.counted.sizes == [8, 7]


@pytest.mark.anyio
async def test_a_write_alone_is_sent_in_the_next_turn() -> None:
    async with Connection() as one:
        for text in (b"first", b"later"):
            one.joining.write(text)
            assert await one.read(5) == text


@pytest.mark.anyio
async def test_large_writes_are_not_copied_and_the_order_is_kept() -> None:
    async with Connection() as one:
        one.joining.write(b"head")
        one.joining.write(LARGE)
        one.joining.write(LARGE)
        one.joining.write(b"end")
        assert one.counted.sizes == [4, len(LARGE), len(LARGE)]
        size = 7 + 2 * len(LARGE)
        assert await one.read(size) == b"head" + LARGE + LARGE + b"end"


@pytest.mark.anyio
async def test_what_waits_is_sent_before_the_end_and_dropped_at_an_abort() -> None:
    async with Connection() as one:
        one.joining.write(b"last")
        one.joining.write_eof()
        assert await one.read(9) == b"last"
    async with Connection() as one:
        one.joining.write(b"last")
        one.joining.close()
        assert await one.read(9) == b"last"
    async with Connection() as one:
        one.joining.write(b"last")
        one.joining.abort()
        assert await one.read(9) == b""
        assert one.counted.sizes == []
