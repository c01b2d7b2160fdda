"""Control access: who may use the control verbs.

Only the admin key gives access. No address and no other header replaces it, because a proxy on the same
machine looks like a local client. If the operator configured no key, `control_key` makes one. Knows ASGI
scopes and the key's file; must not know verbs.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import logging
import os
import secrets
import stat
from pathlib import Path
from typing import Final

from starlette.types import Scope

from gateway.errors import Problem

KEY_FILE: Final = "control.key"
KEY_BYTES: Final = 32
#: Bytes of a file with a key. A pipe or a device in its place would stop the event loop.
MAX_KEY_FILE: Final = 64 << 10

_log = logging.getLogger("gateway.http")


class Access:
    """Admits requests with the key in `key_file`, without surrounding whitespace. Reads the file again when
    it changes; a missing or empty file admits no request. `key_file` None: control is closed."""

    def __init__(self, key_file: Path | None) -> None:
        self._file = key_file
        self._stamp: tuple[int, int, int] | None = None
        self._key = b""

    def check(self, scope: Scope) -> None:
        """Raises UNAUTHENTICATED if the request has not the key, FORBIDDEN if control is closed."""
        if self._file is None:
            raise Problem(
                "FORBIDDEN",
                "control calls are closed: there is no admin key, and the gateway could not write one",
                hint="set admin_key_file or make state_dir writable, then restart the gateway",
            )
        if not self.admits(scope):
            place = f"{KEY_FILE} in its state_dir" if self._file.name == KEY_FILE else "its admin_key_file"
            raise Problem(
                "UNAUTHENTICATED",
                "this call needs the gateway's admin key",
                hint=f"send Authorization: Bearer KEY; the key is in the file {place}, and the command line "
                "reads it if it runs as the gateway's user",
            )

    def admits(self, scope: Scope) -> bool:
        """Returns whether the request has the key."""
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
                if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_KEY_FILE:
                    raise OSError(errno.EINVAL, f"it is no file of at most {MAX_KEY_FILE} bytes")
                self._key = self._file.read_bytes().strip()
                self._stamp = stamp
        except OSError as error:
            _log.error("cannot read the admin key: %s", error)
            self._key, self._stamp = b"", None
        return self._key


def control_key(state_dir: Path) -> Path | None:
    """Returns the file with the key for control calls; creates it if it does not exist. Returns None if that
    fails, and logs the reason.

    An existing key stays, because several gateways may share `state_dir` and clients may hold the key. A key
    that other users can read, or that belongs to another user, is replaced; if that fails it is not used.
    """
    file = state_dir / KEY_FILE
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        if not _private(file):
            fresh = state_dir / f".{KEY_FILE}.{secrets.token_hex(8)}"
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "w") as written:
                    written.write(secrets.token_urlsafe(KEY_BYTES) + "\n")
                if file.is_symlink() or file.exists():
                    os.replace(fresh, file)
                else:
                    # If several gateways start at once, the key of the first one counts.
                    with contextlib.suppress(FileExistsError):
                        os.link(fresh, file)
            finally:
                fresh.unlink(missing_ok=True)
    except OSError as error:
        _log.error("control calls are closed: cannot write the key %s: %s", file, error.strerror)
        return None
    return file


def _private(file: Path) -> bool:
    """Returns whether the file holds a key that only this user can read."""
    try:
        status = file.lstat()
    except FileNotFoundError:
        return False
    mine = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
    return mine and status.st_mode & 0o077 == 0 and bool(file.read_bytes().strip())
