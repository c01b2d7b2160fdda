"""A model process by its id: ends it and all its children, and reports its exit code.

For each model process the gateway holds a pipe. When one end of it is closed, the kernel sends SIGKILL to the
model's process group. Only the gateway holds both ends: the kernel closes them when the gateway ends, however
it ends, and no model can reach, reopen or change them. Knows process ids; must not know models.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
from contextlib import suppress
from typing import Final

_F_SETSIG: Final = 10


class Child:
    """A model process, which leads a process group. `temporary`: its directory. `ended`: gets its exit code
    (negative: the signal), None if unknown. Raises OSError if it has already ended."""

    def __init__(self, pid: int, temporary: str = "") -> None:
        self.pid = pid
        self.temporary = temporary
        self.ended: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self.handle = os.pidfd_open(pid)
        try:
            self._lifeline: tuple[int, ...] = _lifeline(pid)
        except OSError:
            os.close(self.handle)
            raise

    def kill(self) -> None:
        """Ends it and its process group."""
        self._cut()
        if self.handle >= 0:  # by its id too: the other way needs the permission to signal its user
            with suppress(ProcessLookupError, OSError):
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)

    def close(self) -> None:
        """Ends the rest of its process group."""
        self._cut()
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1

    async def exit_code(self, wait: float) -> int | None:
        """Returns the exit code; None if it is not known within `wait` seconds."""
        with suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(self.ended), wait)
        return None

    def _cut(self) -> None:
        for descriptor in self._lifeline:
            os.close(descriptor)
        self._lifeline = ()


def described(code: int) -> str:
    """Returns an exit code as text, for example "was killed by SIGSEGV"."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


def _lifeline(group: int) -> tuple[int, ...]:
    """Returns both ends of the pipe."""
    ends = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        for end in ends:
            fcntl.fcntl(end, fcntl.F_SETOWN, -group)
            fcntl.fcntl(end, _F_SETSIG, signal.SIGKILL)
            fcntl.fcntl(end, fcntl.F_SETFL, fcntl.fcntl(end, fcntl.F_GETFL) | os.O_ASYNC)
    except OSError:
        for end in ends:
            os.close(end)
        raise
    return ends
