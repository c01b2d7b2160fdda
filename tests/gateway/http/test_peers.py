"""`POST /peers`: open to whoever has the key of the peers, bounded, and at one listener."""

from __future__ import annotations

import json
import secrets
import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from gateway.http.peers import MOST_HELD
from gateway.peers.keys import KeyFile
from gateway.peers.messages import HEADER, LARGEST, QUESTION, Head, signed_content
from tests.support.served import Reply, Served, settings

SECRET = "a secret of the peers, 16 or more"


class Peer:
    """Another gateway, as far as it asks."""

    def __init__(self, key_file: Path) -> None:
        self._keys = KeyFile(key_file)
        self.name = secrets.token_hex(16)

    def head(self, body: bytes, sent: float | None = None) -> dict[str, str]:
        nanoseconds = int((time.time() if sent is None else sent) * 1e9)
        signature = self._keys.sign(signed_content(QUESTION, self.name, nanoseconds, body))
        assert signature is not None
        return {HEADER.replace("-", "_"): str(Head(self.name, nanoseconds, signature))}

    def believes(self, asked: dict[str, str], reply: Reply) -> bool:
        answer, question = Head.parse(reply.headers[HEADER]), Head.parse(next(iter(asked.values())))
        assert answer is not None
        assert question is not None
        content = signed_content(question.signature.encode(), answer.gateway, answer.sent, reply.body)
        return self._keys.verify(content, answer.signature)


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_text(SECRET)
    return file


def chosen(directory: Path, key_file: Path, **more: Any) -> Any:
    return settings(directory, peers="localhost:1", peers_key_file=key_file, **more)  # nobody listens there


@pytest.fixture(scope="module")
def with_peers(
    registry_file: str, key_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with Served(chosen(tmp_path_factory.mktemp("peers"), key_file), registry_file) as served:
        yield served


@pytest.fixture
def peer(key_file: Path) -> Peer:
    return Peer(key_file)


def test_a_signed_question_is_answered_once_and_the_answer_is_signed(with_peers: Served, peer: Peer) -> None:
    body = json.dumps({"aliases": [{"name": "iris", "alias": "champion", "version": "1", "serving": "9"}]})
    head = peer.head(body.encode())
    reply = with_peers.post("/peers", body, **head)
    assert (reply.status, peer.believes(head, reply)) == (200, True)
    assert reply.headers["x-request-id"]
    assert reply.json["aliases"] == []  # no alias was used here
    assert with_peers.get("/rollouts/iris@champion").json["peers"] == {"9": 1}
    again = with_peers.post("/peers", body, **head)
    assert (again.status, again.code) == (412, "PRECONDITION_FAILED")
    assert "before the last question" in again.json["message"]
    metrics = with_peers.get("/metrics").body.decode()
    assert 'gateway_peer_messages_total{result="accepted"} 1.0' in metrics
    assert SECRET not in metrics + again.body.decode() + with_peers.get("/rollouts").body.decode()


def test_nothing_but_the_key_of_the_peers_opens_it(with_peers: Served, peer: Peer, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("another secret of a liar")
    liar = Peer(tmp_path / "other")
    for head in (
        {},
        {"authorization": f"Bearer {with_peers.key}"},
        {"authorization": f"Bearer {SECRET}"},
        liar.head(b"{}"),
        peer.head(b"{} "),  # the signature of another body
    ):
        reply = with_peers.request("POST", "/peers", "{}", **head)
        assert (reply.status, reply.code) == (401, "UNAUTHENTICATED"), head
    assert with_peers.get("/peers").status == 405


def test_what_cannot_be_heard_says_why_and_makes_no_peer(with_peers: Served, key_file: Path) -> None:
    """401 is for the signature alone. The other refusals have a status and a sentence of their own."""
    before = with_peers.get("/metrics").body.decode()
    refused = [
        (b"[" * 1000, 0, (400, "MALFORMED_BODY"), "signed, but it is not a message of a peer"),
        (b"\xff", 0, (400, "MALFORMED_BODY"), "signed, but it is not a message of a peer"),
        (b'{"aliases": 5}', 0, (400, "MALFORMED_BODY"), "aliases is not a list"),
        (b"{}", -60, (403, "FORBIDDEN"), "differs by more than 30 s"),
        (b"{}", 60, (403, "FORBIDDEN"), "differs by more than 30 s"),
        (b" " * (LARGEST + 1), 0, (413, "BODY_TOO_LARGE"), "larger"),
    ]
    for body, late, said, why in refused:
        head = Peer(key_file).head(body, sent=time.time() + late)
        reply = with_peers.post("/peers", body, **head)
        assert (reply.status, reply.code) == said, body[:20]
        assert why in reply.json["message"], reply.json
    for header in ("é" * 300, "2;" + next(iter(Peer(key_file).head(b"{}").values()))):
        reply = with_peers.post("/peers", "{}", **{HEADER.replace("-", "_"): header})
        assert (reply.status, reply.code) == (400, "MALFORMED_BODY")
        assert "is not GATEWAY;TIME;SIGNATURE" in reply.json["message"]
    after = with_peers.get("/metrics").body.decode()
    heard = 'gateway_peer_messages_total{result="accepted"}'
    assert [line for line in after.splitlines() if line.startswith(heard)] == [
        line for line in before.splitlines() if line.startswith(heard)
    ]


def test_slow_bodies_of_strangers_hold_up_no_peer(
    registry_file: str, tmp_path: Path, peer: Peer, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of the peers leads to 127.0.0.1 here. At 127.0.0.9 are many that keep their last byte."""
    monkeypatch.setattr("gateway.http.peers.SLOWEST", 600.0)  # they hold their room until the end
    head = "".join(f"{HEADER}: {value}\r\n" for value in peer.head(b"").values())
    head = f"POST /peers HTTP/1.1\r\nHost: x\r\n{head}Content-Length: {LARGEST}\r\n\r\n"
    body = json.dumps({"aliases": [], "x": "y" * (LARGEST // 2)}).encode()
    with ExitStack() as stack:
        served = stack.enter_context(Served(chosen(tmp_path, key_file), registry_file))
        strangers = []
        for _ in range(2 * MOST_HELD // LARGEST):
            one = socket.create_connection(("127.0.0.1", served.port), 60, source_address=("127.0.0.9", 0))
            strangers.append(stack.enter_context(one))
            one.sendall(head.encode() + b" " * (LARGEST - 1))
        assert select.select(strangers, [], [], 60)[0], "more came than strangers may send"
        mine = Peer(key_file)
        assert served.post("/peers", body, **mine.head(body)).status == 200


def test_who_shares_verdicts_is_said(with_peers: Served, server: Served, key_file: Path) -> None:
    shown = with_peers.get("/rollouts").json
    assert shown["verdicts_shared_by"].startswith("the registry")
    assert shown["peers"]["name"] == "localhost"
    assert "addresses" not in shown["peers"]
    with_key = with_peers.get("/rollouts", authorization=f"Bearer {with_peers.key}").json
    assert {peer["address"] for peer in with_key["peers"]["addresses"]} >= {"127.0.0.1"}
    assert "peers" not in server.get("/rollouts").json
    assert server.post("/peers", "{}").status == 404


def test_with_a_listener_for_control_calls_peers_speak_there(
    registry_file: str, key_file: Path, tmp_path: Path, peer: Peer
) -> None:
    with Served(chosen(tmp_path, key_file, admin_listen="127.0.0.1:0"), registry_file) as served:
        reply = served.post("/peers", "{}", **peer.head(b"{}"))
        assert (reply.status, reply.code) == (404, "NOT_FOUND")


def test_a_registry_that_cannot_be_written_without_peers_is_said(registry_file: str, tmp_path: Path) -> None:
    document = tmp_path / "registry.yaml"
    document.write_text(
        Path(registry_file).read_text().replace("models/", f"{Path(registry_file).parent}/models/")
    )
    document.chmod(0o444)
    with Served(settings(tmp_path), str(document)) as served:
        shared = served.get("/rollouts").json["verdicts_shared_by"]
        assert "each gateway decides by itself" in shared
