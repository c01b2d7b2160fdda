"""Answers that grow with the number of models: made and sent in pieces, so that no step of them takes long.

Must not know what the pieces say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.http import answers, problems
from gateway.views import View
from loaders.batch import Value


class Pieces(Response):
    """An answer of known length whose pieces are sent one after the other."""

    def __init__(self, pieces: Sequence[bytes], content_type: str) -> None:
        super().__init__(headers={"content-type": content_type})
        self._pieces = list(pieces)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = [header for header in self.raw_headers if header[0] != b"content-length"]
        await problems.respond_in_parts(send, self.status_code, head, self._pieces)


def items(views: Sequence[View]) -> bytes:
    """Views as the items of a JSON list, without its brackets."""
    return answers.encode_now(Value([view.to_json() for view in views]))[1:-1]


def json_list(name: str, parts: Iterable[bytes], rest: Mapping[str, Any]) -> Pieces:
    """An object with one list, whose items come in parts, and with the rest."""
    pieces = [b'{"%s":[' % name.encode()]
    for part in filter(None, parts):
        pieces += [b",", part] if len(pieces) > 1 else [part]
    more = b"," + answers.encode_now(Value(dict(rest)))[1:] if rest else b"}"
    return Pieces([*pieces, b"]" + more + b"\n"], "application/json")
