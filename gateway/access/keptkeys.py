"""The last keys of an issuer, in a file of `state_dir`: a gateway that restarts while the issuer is away
still verifies tokens.

The keys are public, but a user who replaces them can sign in as any caller: only a file that belongs to this
user, and that no other can write or read, is used. Its time is when the keys were last read. Must not know
JWTs.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import stat
import time
from pathlib import Path
from typing import Final

#: Older keys are not used at a start, in seconds: the issuer may have withdrawn them long ago.
OLDEST: Final = 24 * 3600.0

_log = logging.getLogger("gateway.credentials")


class KeptKeys:
    """`source`: the issuer and the place of its keys, which name the file. `most`: the bytes of a document.
    Every method blocks for the disk."""

    def __init__(self, directory: Path, source: tuple[str, str], most: int) -> None:
        digest = hashlib.sha256("\0".join(source).encode()).hexdigest()[:16]
        self._file = directory / f"jwks-{digest}.json"
        self._most = most
        self._written: bytes | None = None
        self._told = False

    def read(self) -> bytes | None:
        """The document, if it may be used."""
        try:
            with open(self._file, "rb", opener=_unlinked) as kept:
                status = os.fstat(kept.fileno())
                mine = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
                if not mine or status.st_mode & 0o077 or status.st_size > self._most:
                    _log.warning("the kept keys %s are not used: others may have changed them", self._file)
                    return None
                if not 0 <= time.time() - status.st_mtime <= OLDEST:
                    return None
                return kept.read(self._most)
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("cannot read the kept keys %s: %s", self._file, error.strerror)
            return None

    def write(self, document: bytes) -> None:
        """Keeps a document that was read now."""
        fresh = self._file.with_name(f".{self._file.name}.{secrets.token_hex(8)}")
        try:
            if document == self._written and self._file.exists():
                os.utime(self._file)
                return
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as written:
                    written.write(document)
                os.replace(fresh, self._file)
            finally:
                fresh.unlink(missing_ok=True)
            self._written = document
        except OSError as error:
            if not self._told:
                _log.warning("cannot keep the issuer's keys in %s: %s", self._file, error.strerror)
            self._told = True


def _unlinked(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
