"""`POST /peers`: a question from another gateway. It must be signed with the key of the peers; an admin key,
a token or an address does not replace the signature.

Knows bytes and limits; `gateway.peers` knows the meaning of the messages.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from starlette.types import Receive, Scope, Send

from gateway.errors import Problem
from gateway.http import bodies, problems
from gateway.peers import RefusalKind, Refused
from gateway.peers.messages import HEADER, LARGEST

if TYPE_CHECKING:
    from gateway.http.callers import Callers
    from gateway.peers import Peers
    from gateway.record import RequestRecord

PATH: Final = b"/peers"
#: The most bytes of questions that are read at once, of peers and of other senders: a signature can only be
#: checked with the whole body. And how long one may take, in seconds.
MOST_HELD: Final = 16 * LARGEST
MOST_OF_OTHERS: Final = 4 * LARGEST
SLOWEST: Final = 5.0
#: When one gateway too many may ask again, in seconds.
CROWD_SECONDS: Final = 10.0

#: The code and the hint for each reason to refuse a question.
_REFUSALS: Final[dict[RefusalKind, tuple[str, str]]] = {
    "signature": ("UNAUTHENTICATED", "peers share one peers_key_file"),
    "header": ("MALFORMED_BODY", "run the same release in all gateways"),
    "malformed": ("MALFORMED_BODY", "run the same release in all gateways"),
    "stale": ("FORBIDDEN", "set the clocks of both machines"),
    "replayed": ("PRECONDITION_FAILED", "sign each question once, with a later time"),
    "crowd": (
        "OVERLOADED",
        "remove gateways that are not needed; those that ended are forgotten after a minute",
    ),
}


class PeerQuestions:
    """Answers the questions of other gateways."""

    def __init__(self, peers: Peers, access: Callers) -> None:
        self._peers = peers
        self._access = access
        self._bodies = bodies.BodyReader(LARGEST, MOST_HELD, idle_seconds=SLOWEST)
        #: Of addresses that the name of the peers does not lead to: a new gateway, or a stranger.
        self._others = bodies.BodyReader(LARGEST, MOST_OF_OTHERS, idle_seconds=SLOWEST)

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
            code, hint = _REFUSALS[refused.kind]
            wait = CROWD_SECONDS if refused.kind == "crowd" else None
            problem = Problem(code, f"refused: {refused}", hint=hint, retry_after=wait)
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
        reader = self._bodies if self._peers.lists(sender) else self._others
        async with asyncio.timeout(SLOWEST):
            body = await reader.read(receive, headers)
        try:
            return self._peers.answer(head, body, sender)
        finally:
            reader.release(len(body))
