"""What peers say to each other, as bytes: a JSON body and a header that signs it.

    X-Gateway-Peer: GATEWAY;TIME;SIGNATURE

`GATEWAY` is a random name that a gateway gives itself when it starts. `TIME` is in nanoseconds since 1970,
and grows with each message of a gateway. The signature covers both, the body and the kind of the message: for
an answer that is the signature of its question, so it fits no other.

A member that is not known is ignored, one that is missing has its default, and an alias that makes no sense
is left out: a gateway of another version may say more, or less.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from gateway.registries.base import Verdict
from gateway.rollouts.verdicts import Standing

HEADER: Final = "x-gateway-peer"
#: The largest body, in bytes. An alias takes about 150.
LARGEST: Final = 256 << 10
#: The most aliases in a body.
MOST: Final = 1000
#: The longest name, number, digest or reason that is read, in characters.
LONGEST: Final = 1000
QUESTION: Final = b"question"

_HEADER = re.compile(r"([0-9a-f]{16,64});(\d{1,20});([0-9a-f]{64})", re.ASCII)
_NUMBER = re.compile(r"[1-9]\d{0,18}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Head:
    """The header of a message. `sent` is in nanoseconds."""

    gateway: str
    sent: int
    signature: str

    def __str__(self) -> str:
        return f"{self.gateway};{self.sent};{self.signature}"

    @classmethod
    def parse(cls, text: str) -> Head | None:
        found = _HEADER.fullmatch(text)
        return None if found is None else cls(found[1], int(found[2]), found[3])


@dataclass(frozen=True, slots=True)
class Message:
    """What a gateway says. `host`: the name of its machine, for people."""

    host: str
    standings: tuple[Standing, ...]


def signed_content(kind: bytes, gateway: str, sent: int, body: bytes) -> bytes:
    """What a signature covers. `kind`: `QUESTION`, or the signature of the question that is answered."""
    return b"\n".join((kind, gateway.encode(), str(sent).encode(), body))


def encode(host: str, standings: Iterable[Standing]) -> bytes:
    """The body of a message. What is too much is left out, from the end."""
    head = orjson.dumps({"host": host})[:-1] + b',"aliases":['
    parts: list[bytes] = []
    size = len(head) + 2
    for standing in standings:
        part = orjson.dumps(_to_json(standing))
        size += len(part) + 1
        if size > LARGEST or len(parts) >= MOST:
            break
        parts.append(part)
    return head + b",".join(parts) + b"]}"


def decode(body: bytes) -> Message:
    """The inverse of `encode`. Raises ValueError for a body that is not a message."""
    content = orjson.loads(body)
    if not isinstance(content, dict):
        raise ValueError("it is not an object")
    aliases = content.get("aliases", [])
    if not isinstance(aliases, list):
        raise ValueError("aliases is not a list")
    found = (_of_json(one) for one in aliases[:MOST])
    return Message(_text(content.get("host")) or "", tuple(one for one in found if one is not None))


def _to_json(said: Standing) -> dict[str, Any]:
    value = {
        "name": said.name,
        "alias": said.alias,
        "version": said.version,
        "digest": said.digest,
        "serving": said.serving,
        "last_good": said.last_good,
        "void_until": said.void_until,
        "verdict": None if said.verdict is None else {**said.verdict.to_json(), "time": said.at},
    }
    return {key: one for key, one in value.items() if one is not None}


def _of_json(value: Any) -> Standing | None:
    if not isinstance(value, Mapping):
        return None
    name, alias = _text(value.get("name")), _text(value.get("alias"))
    version = _number(value.get("version"))
    if name is None or alias is None or version is None:
        return None
    told = value.get("verdict")
    verdict, at = Verdict.from_json(told), 0.0
    if verdict is not None:
        time = _time(told.get("time")) if isinstance(told, Mapping) else None
        # It names the version by itself: one on another version says nothing.
        if time is None or verdict.version != version:
            verdict = None
        else:
            verdict, at = Verdict(version, verdict.outcome, verdict.reason[:LONGEST], verdict.at), time
    return Standing(
        name,
        alias,
        version,
        _text(value.get("digest")),
        _number(value.get("serving")),
        _number(value.get("last_good")),
        verdict,
        at,
        _time(value.get("void_until")),
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= LONGEST else None


def _number(value: Any) -> str | None:
    return value if isinstance(value, str) and _NUMBER.fullmatch(value) else None


def _time(value: Any) -> float | None:
    """Unix seconds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e11:
        return None
    return float(value)
