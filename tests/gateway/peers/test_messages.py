"""What peers say, as bytes: bounded, and read leniently, because a peer may be older, newer or confused."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from gateway.peers.messages import LARGEST, MOST, Head, decode, encode
from gateway.registries.base import Verdict
from gateway.rollouts.verdicts import Standing

VERDICT = Verdict("2", "rolled_back", "errors: 9 of 40", "2026-11-29T21:00:00Z")
FULL = Standing("iris", "champion", "2", "sha256:ab", "1", "1", VERDICT, 1.79e9, 1.78e9)


def test_what_is_said_is_heard() -> None:
    bare = Standing("odd @%+ñ 名", "champion", "1")
    message = decode(encode("host-1", [FULL, bare]))
    assert (message.host, message.standings) == ("host-1", (FULL, bare))


def test_a_message_has_a_bound_and_the_first_aliases_stay() -> None:
    long = [Standing(f"model-{number}-" + "x" * 400, "champion", "1") for number in range(5000)]
    body = encode("host", [FULL, *long])
    assert len(body) <= LARGEST
    assert decode(body).standings[0] == FULL
    assert len(decode(encode("host", [FULL] * (2 * MOST))).standings) == MOST


def test_an_older_peer_says_less_and_a_newer_one_more() -> None:
    older = {"aliases": [{"name": "iris", "alias": "champion", "version": "2"}]}
    newer = {
        "host": "h",
        "more": [1],
        "aliases": [{"name": "iris", "alias": "champion", "version": "2", "mood": {"is": "good"}}],
    }
    for content in (older, newer):
        assert decode(orjson.dumps(content)).standings == (Standing("iris", "champion", "2"),)
    assert decode(b"{}").standings == ()


def entry(**changed: Any) -> dict[str, Any]:
    verdict = {"version": "2", "outcome": "refused", "reason": "r", "time": 1.79e9}
    return {"name": "iris", "alias": "champion", "version": "2", "verdict": verdict, **changed}


@pytest.mark.parametrize(
    "changed",
    [
        {"verdict": {"version": "3", "outcome": "refused", "reason": "r", "time": 1.79e9}},
        {"verdict": {"version": "2", "outcome": "praised", "reason": "r", "time": 1.79e9}},
        {"verdict": {"version": "2", "outcome": "refused", "reason": "r"}},
        {"verdict": {"version": "2", "outcome": "refused", "reason": "r", "time": float("inf")}},
        {"verdict": {"version": "2", "outcome": "refused", "reason": "r", "time": True}},
        {"verdict": "refused"},
    ],
)
def test_a_verdict_that_does_not_name_its_version_outcome_and_time_is_none(changed: dict[str, Any]) -> None:
    [said] = decode(orjson.dumps({"aliases": [entry(**changed)]})).standings
    assert said.verdict is None


@pytest.mark.parametrize(
    "wrong",
    [{"name": 5}, {"name": ""}, {"name": "x" * 2000}, {"alias": None}, {"version": 2}, {"version": "02"}],
)
def test_an_alias_that_makes_no_sense_is_left_out(wrong: dict[str, Any]) -> None:
    body = orjson.dumps({"aliases": [entry(**wrong), 5, None, [], entry()]})
    assert [said.name for said in decode(body).standings] == ["iris"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no",
        b"[]",
        b"5",
        b"null",
        b'{"aliases": 5}',
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"aliases": {"a": 1}}',
    ],
)
def test_a_body_that_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the parser's words
        decode(body)


def test_a_header_is_read_or_not() -> None:
    head = Head("a" * 32, 5, "b" * 64)
    assert Head.parse(str(head)) == head
    for wrong in (
        "",
        "a;b;c",
        f"{head};",
        f" {head}",
        str(head).replace("5", "٥"),
        f"{'a' * 32};{'9' * 40};{'b' * 64}",
    ):
        assert Head.parse(wrong) is None
