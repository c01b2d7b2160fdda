"""A model process by its id, and what ends it and all that it started.

For each model process the gateway holds a pipe of which each end has the kernel send SIGKILL to the model's
process group when the other end is closed. The gateway alone holds both: the kernel closes them, in whatever
order, when the gateway ends in whatever way, and no model can reach, reopen or change them. Knows process
ids, and nothing of models.
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
    """A model process, which leads a process group. `temporary`: its directory. `ended` gets its exit code
    (negative: the signal), None if it cannot be known. Raises OSError where it has ended already."""

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
        if self.handle >= 0:  # by its id too: the other way needs the right to signal its user
            with suppress(ProcessLookupError, OSError):
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)

    def close(self) -> None:
        """Ends what is left of its process group."""
        self._cut()
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1

    def _cut(self) -> None:
        for descriptor in self._lifeline:
            os.close(descriptor)
        self._lifeline = ()


def _lifeline(group: int) -> tuple[int, ...]:
    """Both ends."""
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
