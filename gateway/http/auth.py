"""Who may use the control verbs (CONTRACT §8).

With an admin key: who presents it. Without one: a client on this machine that reached the gateway directly
and was not sent by a web page of another origin. Knows ASGI scopes and the key's file; nothing of verbs.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
from pathlib import Path
from typing import Final

from starlette.types import Scope

from gateway.errors import Problem

_PROXY_HEADERS: Final = frozenset({b"forwarded", b"x-real-ip"})

_log = logging.getLogger("gateway.http")


class Access:
    """The rule. `key_file` holds the admin key (surrounding whitespace does not count); it is read again
    when it changes. A file that is missing or empty admits nobody."""

    def __init__(self, key_file: Path | None) -> None:
        self._file = key_file
        self._stamp: tuple[int, int, int] | None = None
        self._key = b""

    def check(self, scope: Scope) -> None:
        """Raises UNAUTHENTICATED where a key is configured and not presented, FORBIDDEN where none is
        configured and the request may come from elsewhere."""
        if self._file is not None:
            if not self.holds_key(scope):
                raise Problem(
                    "UNAUTHENTICATED",
                    "this needs the admin key",
                    hint="send Authorization: Bearer KEY, with the key of the setting admin_key_file",
                )
            return
        reason = _not_local(scope)
        if reason is not None:
            raise Problem(
                "FORBIDDEN",
                f"without an admin key, control is for clients on the gateway's machine: {reason}",
                hint="set admin_key_file and send Authorization: Bearer KEY",
            )

    def admits(self, scope: Scope) -> bool:
        """Whether `check` would let it pass."""
        try:
            self.check(scope)
        except Problem:
            return False
        return True

    def holds_key(self, scope: Scope) -> bool:
        """Whether the request presents the admin key; False where none is configured."""
        if self._file is None:
            return False
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, token = given[0].partition(b" ")
        key = self._current()
        return bool(key) and scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), key)

    def _current(self) -> bytes:
        assert self._file is not None
        try:
            status = self._file.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp != self._stamp:
                self._key = self._file.read_bytes().strip()
                self._stamp = stamp
        except OSError as error:
            _log.error("the admin key cannot be read: %s", error)
            self._key, self._stamp = b"", None
        return self._key


def _not_local(scope: Scope) -> str | None:
    """Why the request cannot be taken for one from this machine; None if it can."""
    client = scope.get("client")
    if not client or not _loopback(client[0]):
        return "the connection does not come from a loopback address"
    hosts: list[bytes] = []
    origins: list[bytes] = []
    for name, value in scope["headers"]:
        if name in _PROXY_HEADERS or name.startswith(b"x-forwarded-"):
            return f"the header {name.decode('latin-1')} says that a proxy sent it"
        if name == b"host":
            hosts.append(value)
        elif name == b"origin":
            origins.append(value)
    if len(hosts) != 1 or not _loopback_host(hosts[0].decode("latin-1")):
        return "the Host header is not a loopback name (localhost, 127.0.0.1, [::1])"
    own = b"%s://%s" % (scope.get("scheme", "http").encode(), hosts[0])
    if any(origin.lower() != own.lower() for origin in origins):
        return "a web page of another origin sent it"
    return None


def _loopback_host(host: str) -> bool:
    if host.startswith("["):
        name, bracket, port = host[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            return False
        port = port.removeprefix(":")
    else:
        name, _, port = host.partition(":")
    if port and not (port.isascii() and port.isdigit()):
        return False
    return name.lower() == "localhost" or _loopback(name)


def _loopback(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return parsed.is_loopback or (mapped is not None and mapped.is_loopback)
