"""Browsers that are signed in: one-time codes, and the sessions that begin with them. In memory alone, so
that a restart signs everybody out.

Knows principals and time; nothing of requests, but the form of a cookie. Only the event loop uses it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gateway.access.principal import Principal

#: How long a code and a session last, in seconds.
CODE_SECONDS: Final = 300.0
SESSION_SECONDS: Final = 12 * 3600.0
#: So many of each are kept; the oldest goes first.
MOST: Final = 1000
_BYTES: Final = 32


class Sessions:
    """`wall`: unix time. The cookie has a name of its own in each process, because the cookies of one host
    are shared by all its ports."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._codes: dict[str, tuple[Principal, float]] = {}
        self._sessions: dict[str, tuple[Principal, float]] = {}
        self.cookie = f"gateway_{secrets.token_hex(4)}"

    def code(self, principal: Principal) -> str:
        """A code that signs one browser in as this principal."""
        return _kept(self._codes, principal, self._wall() + CODE_SECONDS)

    def begin(self, code: str) -> str | None:
        """The secret of a new session. None: the code is unknown, used or too old."""
        principal, until = self._codes.pop(code, (None, 0.0))
        now = self._wall()
        if principal is None or now >= min(until, principal.until):
            return None
        return _kept(self._sessions, principal, now + SESSION_SECONDS)

    def find(self, cookies: bytes) -> Principal | None:
        """The principal of a request's Cookie header; None without a session."""
        secret = self._secret(cookies)
        principal, until = self._sessions.get(secret, (None, 0.0))
        if principal is None or self._wall() >= min(until, principal.until):
            self._sessions.pop(secret, None)
            return None
        return principal

    def end(self, cookies: bytes) -> None:
        """Signs the browser out."""
        self._sessions.pop(self._secret(cookies), None)

    def clear(self) -> None:
        """Signs everybody out: a credential has changed."""
        self._codes.clear()
        self._sessions.clear()

    def _secret(self, cookies: bytes) -> str:
        for pair in cookies.decode("latin-1").split(";"):
            name, _, value = pair.strip().partition("=")
            if name == self.cookie:
                return value
        return ""


def _kept(kept: dict[str, tuple[Principal, float]], principal: Principal, until: float) -> str:
    while len(kept) >= MOST:
        del kept[next(iter(kept))]
    secret = secrets.token_urlsafe(_BYTES)
    kept[secret] = principal, until
    return secret
