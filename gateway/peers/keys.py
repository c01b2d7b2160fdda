"""The secret that the gateways of one installation share, and the signatures that it makes.

The file holds one secret, or two on two lines while they are changed: the first one signs, both are accepted.
It is read again when it changes. Knows bytes; must not know what a message says.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import logging
import stat
from pathlib import Path
from typing import Final

MAX_FILE: Final = 64 << 10
#: A shorter secret could be guessed, in bytes.
SHORTEST: Final = 16

log = logging.getLogger("gateway.peers")


class InvalidKeys(ValueError):
    """The file does not hold one or two secrets. The message does not repeat its content."""


def parse(text: bytes) -> tuple[bytes, ...]:
    """The secrets in the file. Raises InvalidKeys."""
    lines = [line.strip() for line in text.splitlines()]
    found = tuple(line for line in lines if line)
    if not 1 <= len(found) <= 2:
        raise InvalidKeys(f"it has {len(found)} lines; it needs one secret, or two while they are changed")
    if any(len(line) < SHORTEST for line in found):
        raise InvalidKeys(f"each secret needs at least {SHORTEST} characters")
    return found


class KeyFile:
    """The secrets in `file`. Without a valid file there is none: nothing is signed and nothing is accepted.
    `look` blocks; the other methods do not. Raises OSError and InvalidKeys at the start."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stamp: tuple[int, int, int] | None = self._stamped()
        self._secrets = parse(file.read_bytes())

    def look(self) -> None:
        """Reads the file again if it has changed. Logs what is wrong with it, once for each change."""
        stamp = None
        try:
            stamp = self._stamped()
            if stamp == self._stamp:
                return
            self._secrets = parse(self._file.read_bytes())
            log.info("read the key of the peers again: %d accepted", len(self._secrets))
        except (OSError, InvalidKeys) as error:
            if self._secrets or stamp != self._stamp:
                reason = error.strerror if isinstance(error, OSError) else error
                log.error("no peer is believed or told anything: peers_key_file: %s", reason)
            self._secrets = ()
        self._stamp = stamp

    def sign(self, content: bytes) -> str | None:
        """The signature of `content`; None without a secret."""
        return _signature(self._secrets[0], content) if self._secrets else None

    def verify(self, content: bytes, signature: str) -> bool:
        """Returns whether a secret has made the signature, in constant time."""
        given = signature.encode("ascii", "replace")
        # All are compared, so that the time does not tell which one fits.
        fits = [hmac.compare_digest(_signature(one, content).encode(), given) for one in self._secrets]
        return any(fits)

    def _stamped(self) -> tuple[int, int, int]:
        status = self._file.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE:
            raise OSError(errno.EINVAL, f"it is not a file of at most {MAX_FILE >> 10} KiB")
        return status.st_mtime_ns, status.st_size, status.st_ino


def _signature(secret: bytes, content: bytes) -> str:
    return hmac.digest(secret, content, hashlib.sha256).hex()
