"""One-time codes and sessions: used once, for a time, and as long as the credential behind them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway.access.principal import ADMIN
from gateway.access.sessions import CODE_SECONDS, MOST, SESSION_SECONDS, Sessions


class Wall:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def wall() -> Wall:
    return Wall()


def cookies(sessions: Sessions, secret: str | None) -> bytes:
    return f"other=1; {sessions.cookie}={secret}; last=2".encode()


def test_a_code_begins_one_session(wall: Wall) -> None:
    sessions = Sessions(wall)
    code = sessions.code(ADMIN)
    secret = sessions.begin(code)
    assert secret is not None
    assert secret != code
    assert sessions.begin(code) is None
    assert sessions.find(cookies(sessions, secret)) is ADMIN
    assert sessions.find(cookies(sessions, code)) is None
    assert sessions.find(b"") is None
    assert sessions.find(b"\xff=\xff;;=;" + sessions.cookie.encode()) is None
    sessions.end(cookies(sessions, secret))
    assert sessions.find(cookies(sessions, secret)) is None


def test_a_code_and_a_session_end(wall: Wall) -> None:
    sessions = Sessions(wall)
    late = sessions.code(ADMIN)
    secret = sessions.begin(sessions.code(ADMIN))
    wall.now += CODE_SECONDS
    assert sessions.begin(late) is None
    wall.now += SESSION_SECONDS - CODE_SECONDS - 1
    assert sessions.find(cookies(sessions, secret)) is ADMIN
    wall.now += 1
    assert sessions.find(cookies(sessions, secret)) is None


def test_a_session_ends_with_its_credential(wall: Wall) -> None:
    sessions = Sessions(wall)
    brief = replace(ADMIN, until=wall.now + 10)
    secret = sessions.begin(sessions.code(brief))
    assert sessions.find(cookies(sessions, secret)) is brief
    wall.now += 10
    assert sessions.find(cookies(sessions, secret)) is None


def test_so_many_are_kept_and_all_end_together(wall: Wall) -> None:
    sessions = Sessions(wall)
    codes = [sessions.code(ADMIN) for _ in range(MOST + 5)]
    assert sessions.begin(codes[0]) is None
    secret = sessions.begin(codes[-1])
    sessions.clear()
    assert sessions.find(cookies(sessions, secret)) is None
    assert sessions.begin(codes[-2]) is None


def test_each_process_has_its_own_cookie() -> None:
    assert Sessions().cookie != Sessions().cookie
