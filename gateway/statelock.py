"""Says who uses a state directory: gateways of one machine may share it, gateways of several may not.

SQLite's write-ahead log needs memory that all users share, so it works on one machine only, whatever disk
lies below. The file `state.lock` names the machine (the boot id of its kernel, which containers share) and is
locked while a gateway uses the directory. Knows files and locks; must not know the state.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Final

FILE: Final = "state.lock"
TRIES: Final = 20
PAUSE: Final = 0.05
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")

log = logging.getLogger("gateway.state")


def machine() -> str:
    """Returns an id that is the same for all processes of a kernel."""
    with contextlib.suppress(OSError):
        return _BOOT.read_text().strip()
    return socket.gethostname()


class StateLock:
    """The use of `directory` by this process. `holder`: who uses it on another machine; None: it may be used
    here. Does not raise: where files cannot be locked, the log says so."""

    def __init__(self, directory: Path, here: str | None = None) -> None:
        holder = None
        self._descriptor: int | None = None
        here = here or machine()
        try:
            self._descriptor = os.open(directory / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            holder = _taken(self._descriptor, here)
        except OSError as error:
            log.warning("cannot tell whether another machine uses %s: %s", directory, error.strerror)
            self.close()
        if holder is not None:
            self.close()
        self.holder = holder

    def close(self) -> None:
        """Ends the use."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _taken(descriptor: int, here: str) -> str | None:
    """Locks the file for this machine. Returns who holds it on another one. Raises OSError."""
    for _ in range(TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(PAUSE)  # another gateway writes its name now
                continue
            return _other(descriptor, here)
        about = {"machine": here, "host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(about).encode() + b"\n", 0)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        # Between the two locks another machine may have written its own name.
        return _other(descriptor, here)
    return "a gateway that does not name itself"


def _other(descriptor: int, here: str) -> str | None:
    """Returns the holder named in the file, if it is on another machine."""
    try:
        about = json.loads(os.pread(descriptor, 4096, 0))
        if about["machine"] == here:
            return None
        return f"the gateway on host {about['host']} (process {about['pid']})"
    except (ValueError, KeyError, TypeError):
        return "a gateway that does not name itself"
