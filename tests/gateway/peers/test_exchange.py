"""Which questions of peers are believed, and how many peers and messages are kept."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.peers import Peers, Refused, exchange, messages
from gateway.peers.messages import QUESTION, Head, signed_content
from gateway.rollouts.verdicts import Standing
from gateway.settings import Settings, SettingsError
from tests.support.controlled import Clock

SECRET = "a secret of sixteen or more"
SAID = Standing("iris", "champion", "1", serving="1")


class One:
    """A gateway's half of the exchange. Its clock moves by hand."""

    def __init__(
        self, directory: Path, clock: Clock, secret: str = SECRET, says: Iterable[Standing] = (SAID,)
    ) -> None:
        directory.mkdir(exist_ok=True)
        file = directory / "key"
        file.write_text(secret)
        self.heard: list[Standing] = []
        settings = Settings(peers="peers.test", peers_key_file=file, cache_dir=directory, state_dir=directory)
        self.peers = Peers(
            settings, ThreadPoolExecutor(1), say=lambda: list(says), hear=self.heard.extend,
            resolve=lambda name: [], wall=lambda: 1.79e9 + clock.now, clock=clock,
        )  # fmt: skip

    def question(self, body: bytes | None = None) -> tuple[Head, bytes]:
        body = self.peers._statement() if body is None else body
        head = self.peers._signed(QUESTION, body)
        assert head is not None
        return head, body

    def gets(self, head: Head, body: bytes) -> tuple[str, bytes]:
        return self.peers.answer(self.peers.checked(str(head), "10.0.0.9"), body, "10.0.0.9")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def here(tmp_path: Path, clock: Clock) -> One:
    return One(tmp_path / "here", clock)


@pytest.fixture
def there(tmp_path: Path, clock: Clock) -> One:
    return One(tmp_path / "there", clock)


def test_a_question_is_heard_and_its_answer_fits_no_other(here: One, there: One) -> None:
    question, body = there.question()
    header, said = here.gets(question, body)
    assert here.heard == [SAID]
    answer = Head.parse(header)
    assert answer is not None
    fits = signed_content(question.signature.encode(), answer.gateway, answer.sent, said)
    assert there.peers._keys.verify(fits, answer.signature)
    another, _ = there.question()
    other = signed_content(another.signature.encode(), answer.gateway, answer.sent, said)
    assert not there.peers._keys.verify(other, answer.signature)
    assert here.peers.versions_of("iris", "champion") == {"1": 1}


def test_what_is_not_believed_changes_nothing_and_is_logged_once_without_the_secret(
    here: One, there: One, tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    question, body = there.question()
    liar, lie = One(tmp_path / "liar", clock, "another secret of his own").question()
    refused = [
        (liar, lie, "not signed"),
        (question, body.replace(b'"1"', b'"2"'), "not signed"),
        (Head(question.gateway, question.sent + 1, question.signature), body, "not signed"),
        (there.question(b"[]"), None, "not a message"),
    ]
    for head, sent, why in refused:
        head, sent = head if sent is None else (head, sent)
        with pytest.raises(Refused, match=why):
            here.gets(head, sent)
    with pytest.raises(Refused, match="is missing"):
        here.peers.checked("", "10.0.0.9")
    assert here.heard == []
    assert here.peers.counts["refused"] == 5
    assert len([line for line in caplog.messages if "refused a message" in line]) == 2  # one of each kind
    assert SECRET not in caplog.text
    here.gets(question, body)  # the true one


@pytest.mark.anyio
@pytest.mark.parametrize("said", [b"[]", b"no", b"\xff"])
async def test_a_peer_whose_signed_answer_is_not_a_message_is_not_reached(
    here: One, there: One, said: bytes
) -> None:
    def answered(request: httpx.Request) -> httpx.Response:
        asked = Head.parse(request.headers[messages.HEADER])
        assert asked is not None
        head = there.peers._signed(asked.signature.encode(), said)
        return httpx.Response(200, headers={messages.HEADER: str(head)}, stream=httpx.ByteStream(said))

    one = exchange.Address("10.0.0.9", "http://10.0.0.9:8080/peers")
    here.peers.addresses[one.address] = one
    async with httpx.AsyncClient(transport=httpx.MockTransport(answered)) as client:
        problem = await here.peers._ask(client, one)
    assert problem is not None
    assert "its answer was refused: it is signed, but it is not a message" in problem
    assert here.peers.reached() == []
    assert here.peers.last_contact() is None


def test_a_message_is_believed_once_and_not_late(here: One, there: One, clock: Clock) -> None:
    first, second = there.question(), there.question()
    here.gets(*first)
    here.gets(*second)
    for again in (first, second):
        with pytest.raises(Refused, match="before the last question"):
            here.gets(*again)
    late = there.question()
    clock.now += exchange.WINDOW + 1
    with pytest.raises(Refused, match="differs by more than 30 s"):
        here.gets(*late)
    here.gets(*there.question())
    assert here.peers.counts == {"accepted": 3, "refused": 3, "failed": 0}


def test_what_a_peer_repeats_is_read_rarely(here: One, there: One, clock: Clock) -> None:
    for _ in range(3):
        here.gets(*there.question())
    assert here.heard == [SAID]
    clock.now += exchange.READ_AGAIN
    here.gets(*there.question())
    assert here.heard == [SAID, SAID]
    here.gets(*there.question(messages.encode("there", [])))  # something new
    assert here.peers.versions() == {}


def test_this_gateway_is_no_peer_of_its_own(here: One) -> None:
    here.gets(*here.question())
    assert here.heard == []
    assert here.peers.versions() == {}


def test_what_a_peer_said_counts_for_a_while_and_few_peers_are_remembered(
    here: One, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "MOST_KNOWN", 3)
    others = [One(tmp_path / str(number), clock) for number in range(4)]
    for other in others[:3]:
        here.gets(*other.question())
    assert here.peers.versions() == {("iris", "champion"): {"1": 3}}
    with pytest.raises(Refused, match="3 other gateways are known"):
        here.gets(*others[3].question())
    clock.now += exchange.FRESH + 1
    assert here.peers.versions() == {}
    assert here.peers.last_contact() == exchange.FRESH + 1
    clock.now += 2 * exchange.WINDOW
    here.gets(*others[3].question())
    assert here.peers.versions() == {("iris", "champion"): {"1": 1}}
    assert len(here.peers._known) == 1


def test_a_peer_whose_words_cannot_be_taken_gets_its_answer(
    tmp_path: Path, clock: Clock, there: One, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(said: Iterable[Standing]) -> None:
        raise RuntimeError("a bug")

    here = One(tmp_path / "broken", clock)
    here.peers._hear = broken
    _, said = here.gets(*there.question())
    assert messages.decode(said).standings == (SAID,)
    assert "a bug" in caplog.text


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peers": "gateway-peers"}, "peers needs peers_key_file"),
        ({"peers_key_file": "/key"}, "peers_key_file needs peers"),
        ({"peers": "gateway-peers", "peers_key_file": "/key", "port": 0}, "name the port"),
        ({"peers": "http://peers", "peers_key_file": "/key"}, "write"),
        ({"peers": "two words", "peers_key_file": "/key"}, "DNS name"),
        ({"peers": "peers:0", "peers_key_file": "/key"}, "DNS name"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Settings(**values)


def test_peers_listen_where_control_calls_do() -> None:
    def place(**values: Any) -> tuple[str, int]:
        return Settings(peers_key_file=Path("/key"), **values).peers_place

    assert place(peers="p") == ("p", 8080)
    assert place(peers="p", port=80) == ("p", 80)
    assert place(peers="p", admin_listen="0.0.0.0:9090") == ("p", 9090)
    assert place(peers="p:7", admin_listen="0.0.0.0:9090") == ("p", 7)
    assert place(peers="[::1]:7") == ("::1", 7)


def test_a_key_file_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    file = tmp_path / "key"
    for text, said in ((None, "No such file"), ("short", "16 characters")):
        if text is not None:
            file.write_text(text)
        with pytest.raises(SettingsError, match=f"peers_key_file: .*{said}") as raised:
            exchange.opened(file)
        assert text is None or text not in str(raised.value)


def test_a_mapped_address_is_a_peers(here: One) -> None:
    here.peers.addresses["10.0.0.1"] = exchange.Address("10.0.0.1", "http://10.0.0.1")
    assert here.peers.lists("10.0.0.1")
    assert here.peers.lists("::ffff:10.0.0.1")
    assert not here.peers.lists("::ffff:10.0.0.2")
    assert not here.peers.lists("")
