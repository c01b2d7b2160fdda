"""The threads in which blocking work runs. Each kind of work has its own, so that slow work of one kind does
not hold up the others. Knows no work.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Final

#: The name of all these threads. One that never ends does not keep the server process alive.
IO_THREAD: Final = "io"


class Pools:
    """`registry`: reads and writes of the registry. `fetches`: downloads, which may be slow or hang. `disk`:
    files that are here. `builds`: environments."""

    def __init__(self) -> None:
        self.registry = ThreadPoolExecutor(8, thread_name_prefix=IO_THREAD)
        self.fetches = ThreadPoolExecutor(4, thread_name_prefix=IO_THREAD)
        self.disk = ThreadPoolExecutor(4, thread_name_prefix=IO_THREAD)
        self.builds = ThreadPoolExecutor(4, thread_name_prefix=IO_THREAD)

    def close(self) -> None:
        """Waits for nothing: work under way may hang."""
        for pool in (self.registry, self.fetches, self.disk, self.builds):
            pool.shutdown(wait=False, cancel_futures=True)


def large() -> ThreadPoolExecutor:
    """The pool in which large bodies are parsed, enforced and encoded, one at a time: each holds the
    interpreter for long, and several together would leave the loop no turn."""
    return ThreadPoolExecutor(1, thread_name_prefix="large")
