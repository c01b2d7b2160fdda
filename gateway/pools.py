"""Thread pools for blocking work. Each kind of work has its own pool, so that slow work of one kind does not
delay the others. Must not know the work.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Final

#: The names of all these threads. A thread that never ends does not keep the server process alive.
IO_THREAD: Final = "io"
LARGE_THREAD: Final = "large"


class Pools:
    """The pools. `registry`: reads and writes of the registry. `fetches`: downloads, which may be slow or
    hang. `disk`: local files. `builds`: builds of environments."""

    def __init__(self) -> None:
        self.registry = ThreadPoolExecutor(8, thread_name_prefix=IO_THREAD)
        self.fetches = ThreadPoolExecutor(4, thread_name_prefix=IO_THREAD)
        self.disk = ThreadPoolExecutor(4, thread_name_prefix=IO_THREAD)
        self.builds = ThreadPoolExecutor(4, thread_name_prefix=IO_THREAD)

    def close(self) -> None:
        """Closes the pools without waiting, because running work may hang."""
        for pool in (self.registry, self.fetches, self.disk, self.builds):
            pool.shutdown(wait=False, cancel_futures=True)


def large() -> ThreadPoolExecutor:
    """Returns the pool that parses, enforces and encodes large bodies, one at a time. Each holds the
    interpreter's lock for long, and several together would block the event loop."""
    return ThreadPoolExecutor(1, thread_name_prefix=LARGE_THREAD)
