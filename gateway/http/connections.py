"""Counts open connections, and decides which one to close when there are too many.

Each connection takes a file descriptor. Without descriptors nothing works: no prediction, no probe, no model
process. So at most `most` connections are served. A new one replaces the connection that is idle for the
longest time, or else one whose client sends its request too slowly. While all are busy, `SPARE` more are
accepted for probes and control calls only; a prediction on one of those is refused. Must not know a protocol.
"""

from __future__ import annotations

import itertools
import os
import resource
import time
from collections.abc import Callable
from typing import Final, Protocol

#: The bytes a second that a client must send of a body, or take of an answer, on top of the time in which it
#: may do nothing: otherwise a few bytes now and then would hold a body or an answer for ever.
SLOWEST: Final = 50_000
#: How long a body may come more slowly than that before its connection gives way to another one, in seconds.
SLOW_SECONDS: Final = 5.0
_LOOKED_AT: Final = 64
#: Connections above the limit that are kept for probes and control calls.
SPARE: Final = 32
#: Descriptors kept for other uses: models, their processes, the registry, open files.
_OTHERS: Final = 64
_LEAST: Final = 16


class Closable(Protocol):
    """An open connection."""

    def close(self) -> None:
        """Closes it; `Connections.closed` is called for it later."""


class Connections:
    """Counts connections and closes the one that is idle for the longest time. `most`: None derives it from
    the limit on descriptors. `stalled`: how many ended because the client took nothing of its answer, or too
    little. Only the event loop uses it."""

    def __init__(self, most: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most or default_most()
        self._clock = clock
        #: Those that wait for the rest of a body: since when, and the bytes that came.
        self._receiving: dict[Closable, tuple[float, int]] = {}
        self.open = 0
        self.stalled = 0
        self._idle: dict[Closable, None] = {}
        self._closing: set[Closable] = set()

    def __repr__(self) -> str:
        return f"<Connections {self.open}/{self.most} open, {len(self._idle)} idle>"

    @property
    def crowded(self) -> bool:
        """Returns whether more connections are open than are served."""
        return self.open > self.most

    def opened(self, connection: Closable) -> None:
        """Adds a connection, idle until its first request. Closes it when the limit is reached."""
        self.open += 1
        if self.open > self.most:
            if (other := next(iter(self._idle), None) or self._slow()) is not None:
                self._close(other)
            elif self.open > self.most + SPARE:
                self._close(connection)
                return
        self._idle[connection] = None

    def receiving(self, connection: Closable, size: int) -> None:
        """So many bytes of a body came, and more are to come."""
        since, before = self._receiving.get(connection) or (self._clock(), 0)
        self._receiving[connection] = (since, before + size)

    def received(self, connection: Closable) -> None:
        """The body is complete."""
        self._receiving.pop(connection, None)

    def _slow(self) -> Closable | None:
        """One of the connections that have waited longest for a body, if it comes more slowly than it may."""
        now = self._clock() - SLOW_SECONDS
        for connection, (since, size) in itertools.islice(self._receiving.items(), _LOOKED_AT):
            if size < SLOWEST * (now - since):
                return connection
        return None

    def _close(self, connection: Closable) -> None:
        # Count it as closed at once: others may connect before the loop has closed it.
        self._idle.pop(connection, None)
        self._receiving.pop(connection, None)
        self._closing.add(connection)
        self.open -= 1
        connection.close()

    def busy(self, connection: Closable) -> None:
        """A request has arrived on it."""
        self._idle.pop(connection, None)

    def idle(self, connection: Closable) -> None:
        """Its answer was sent, and no other request waits."""
        if connection not in self._closing:
            self._idle[connection] = None

    def closed(self, connection: Closable) -> None:
        """It has been closed."""
        self._receiving.pop(connection, None)
        if connection in self._closing:
            self._closing.remove(connection)
        else:
            self.open -= 1
            self._idle.pop(connection, None)


def default_most() -> int:
    """Three quarters of the descriptors that this process may have, minus those kept for other uses."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(_LEAST, soft * 3 // 4 - _OTHERS)


def descriptors() -> tuple[int, int]:
    """How many descriptors this process has open, and how many it may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        return len(os.listdir("/dev/fd")), soft
    except OSError:
        return 0, soft
