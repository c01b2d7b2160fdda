"""The admin key: one secret that gives access to everything.

If the operator configured no key, `control_key` makes one. No address and no header replaces the key, because
a proxy on the same machine looks like a local client. Knows the key's file; must not know requests.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import logging
import os
import secrets
import stat
import threading
from pathlib import Path
from typing import Final

KEY_FILE: Final = "control.key"
KEY_BYTES: Final = 32
#: Bytes of a file with a key. A pipe or a device in its place would stop the event loop.
MAX_KEY_FILE: Final = 64 << 10

_log = logging.getLogger("gateway.credentials")


class AdminKey:
    """The key in `file`, without surrounding whitespace. The file is read again when it changes; a missing or
    empty file matches nothing. `file` None: there is no key, and control is closed."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self._stamp: tuple[int, int, int] | None = None
        self._key = b""
        self._told = False
        self._looking = threading.Lock()

    @property
    def key(self) -> bytes:
        """The key when the file was last looked at; empty: there is none."""
        return self._key

    def matches(self, secret: bytes) -> bool:
        """Returns True if this is the key, in constant time."""
        if self.file is None:
            return False
        self.look()
        return bool(self._key) and hmac.compare_digest(secret, self._key)

    def look(self) -> bool:
        """Reads the file if it has changed, and returns whether the key is another one now. More than one
        thread may look, and only one of them sees a change: compare `key` to be sure."""
        with self._looking:
            return self._look()

    def _look(self) -> bool:
        before = self._key
        assert self.file is not None
        try:
            status = self.file.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp != self._stamp:
                if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_KEY_FILE:
                    raise OSError(errno.EINVAL, f"it is not a file of at most {MAX_KEY_FILE} bytes")
                self._key = self.file.read_bytes().strip()
                self._stamp = stamp
        except OSError as error:
            if self._key or self._stamp is not None or not self._told:
                _log.error("cannot read the admin key: %s", error)
            self._key, self._stamp, self._told = b"", None, True
        else:
            self._told = False
        return self._key != before


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
