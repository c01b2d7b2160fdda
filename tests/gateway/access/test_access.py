"""What the gateway remembers of its callers, and when it forgets them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from gateway.access import ADMIN, Access
from gateway.credentials import AccessSettings
from gateway.errors import Problem
from gateway.http.callers import Callers
from gateway.record import RequestRecord
from gateway.settings import Settings
from tests.support.guarded import entries, token


def bearer(secret: str) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + secret.encode()}


def replace(file: Path, text: str) -> None:
    fresh = file.with_name("fresh")
    fresh.write_text(text)
    os.replace(fresh, file)


@pytest.fixture
def access(tmp_path: Path) -> Access:
    """A gateway with the admin key `first` and two tokens."""
    (tmp_path / "key").write_text("first")
    (tmp_path / "tokens.json").write_text(entries("alice", "op"))
    known = AccessSettings(tokens_file=tmp_path / "tokens.json")
    return Access(Settings(state_dir=tmp_path / "state", admin_key_file=tmp_path / "key", access=known))


async def looked(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the gateway look at its files, until it has taken what it found."""
    monkeypatch.setattr("gateway.access.LOOK_EVERY", 0)
    loop, look, starts, again = asyncio.get_running_loop(), access._look, [0], asyncio.Event()

    def counted() -> bool:
        starts[0] += 1
        if starts[0] == 2:  # the loop is done with the first look
            loop.call_soon_threadsafe(again.set)
        return look()

    monkeypatch.setattr(access, "_look", counted)
    following = loop.create_task(access.run())
    await again.wait()
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    monkeypatch.undo()


@pytest.mark.anyio
@pytest.mark.parametrize("between", ["unknown", "new", None])
async def test_a_key_that_was_replaced_is_forgotten_whoever_noticed_it(
    access: Access, tmp_path: Path, between: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await access.identify(bearer("first")) is not None
    assert str(access.recall(bearer("first"))) == "admin"
    replace(tmp_path / "key", "new")
    if between is not None:
        assert (await access.identify(bearer(between))).known == (between == "new")
    await looked(access, monkeypatch)
    assert access.recall(bearer("first")) is None
    assert not (await access.identify(bearer("first"))).known
    assert (await access.identify(bearer("new"))).kind == "admin"


@pytest.mark.anyio
async def test_a_key_that_a_thread_replaces_right_after_it_matched_is_not_remembered(
    access: Access, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matches = access._admin.matches

    def matched(secret: bytes) -> bool:
        found = matches(secret)
        replace(tmp_path / "key", "new")
        access._look()  # in its thread
        return found

    monkeypatch.setattr(access._admin, "matches", matched)
    await access.identify(bearer("first"))
    assert access.recall(bearer("first")) is None


@pytest.mark.anyio
async def test_browsers_are_signed_out_by_another_key_and_by_another_tokens_file(
    access: Access, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signed_in() -> bytes:
        secret = access.sessions.begin(access.sessions.code(ADMIN))
        return f"{access.sessions.cookie}={secret}".encode()

    await access.identify(bearer("first"))
    cookie = signed_in()
    assert access.signed_in(cookie) is ADMIN
    replace(tmp_path / "key", "new")
    await access.identify(bearer("unknown"))
    assert access.signed_in(cookie) is None
    await access.identify(bearer("new"))
    cookie = signed_in()
    assert access.signed_in(cookie) is ADMIN
    replace(tmp_path / "tokens.json", entries("alice"))
    await looked(access, monkeypatch)
    assert access.signed_in(cookie) is None


@pytest.mark.anyio
async def test_a_caller_operates_as_long_as_its_credential_counts(
    access: Access, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers, record = Callers(access), RequestRecord(headers=bearer("first"))
    await callers.identify(record)
    callers.operate(record)
    replace(tmp_path / "tokens.json", entries("alice"))
    await looked(access, monkeypatch)
    assert callers.still_operates(record), "it was forgotten, and is valid"
    replace(tmp_path / "key", "new")
    await looked(access, monkeypatch)
    assert not callers.still_operates(record)


@pytest.mark.anyio
async def test_a_known_caller_is_one_with_a_credential(access: Access) -> None:
    callers = Callers(access)
    for secret, code in ((token("op"), None), ("wrong", "UNAUTHENTICATED")):
        record = RequestRecord(headers=bearer(secret))
        await callers.identify(record)
        if code is None:
            callers.known(record)  # it may control, and predict nothing
            continue
        with pytest.raises(Problem) as caught:
            callers.known(record)
        assert caught.value.code == code
