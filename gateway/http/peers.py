"""`POST /peers`: a question of another gateway. Only the key of the peers opens it: no admin key, token or
address replaces the signature.

Knows bytes and limits; what is said is the affair of `gateway.peers`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from starlette.types import Receive, Scope, Send

from gateway.errors import Problem
from gateway.http import bodies, problems
from gateway.peers import Refused
from gateway.peers.messages import HEADER, LARGEST

if TYPE_CHECKING:
    from gateway.http.callers import Callers
    from gateway.peers import Peers
    from gateway.record import RequestRecord

PATH: Final = b"/peers"
#: The most bytes of questions that are read at once, and how long one may take, in seconds.
MOST_HELD: Final = 16 * LARGEST
SLOWEST: Final = 5.0


class PeerQuestions:
    """Answers the questions of other gateways."""

    def __init__(self, peers: Peers, access: Callers) -> None:
        self._peers = peers
        self._access = access
        self._bodies = bodies.BodyReader(LARGEST, MOST_HELD, idle_seconds=SLOWEST)

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        record: RequestRecord = scope[problems.RECORD]
        try:
            problems.check_headers(record)
            self._access.check_listener(record)
            if scope["method"] != "POST":
                await problems.respond_not_allowed(send, record, scope["method"], "POST")
                return
            header, body = await self._answer(scope, receive)
        except bodies.ClientLeft:
            record.code = "CLIENT_LEFT"
            return
        except Refused as refused:
            problem = Problem("UNAUTHENTICATED", f"refused: {refused}", hint="peers share one peers_key_file")
            await problems.respond_problem(send, problem, record)
            return
        except TimeoutError:
            problem = Problem("MALFORMED_BODY", f"the body did not come within {SLOWEST:g} s")
            await problems.respond_problem(send, problem, record)
            return
        except Problem as problem:
            await problems.respond_problem(send, problem, record)
            return
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (HEADER.encode(), header.encode()),
            (b"x-request-id", record.id),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope, receive: Receive) -> tuple[str, bytes]:
        headers = dict(scope["headers"])
        client = scope.get("client")
        sender = "an unknown address" if client is None else str(client[0])
        head = self._peers.checked(headers.get(HEADER.encode(), b"").decode("latin-1"), sender)
        async with asyncio.timeout(SLOWEST):
            body = await self._bodies.read(receive, headers)
        try:
            return self._peers.answer(head, body, sender)
        finally:
            self._bodies.release(len(body))
