"""Thread pools for blocking work. Each kind of work has its own pool, so that slow work of one kind does not
delay the others. Must not know the work.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

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
        _LARGE.close()


class _Large:
    """One thread for large bodies and answers, which starts when it is needed. Any thread may submit and
    close. After a close, what was submitted still runs to its end, and the next work starts another thread:
    so a gateway that ends takes nothing from another one in this process."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def submit(self, work: Callable[[], T]) -> asyncio.Future[T]:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix=LARGE_THREAD)
            return asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False)


#: One for the process, because gateways in one process share the interpreter's lock, which is why large work
#: takes turns.
_LARGE: Final = _Large()


async def in_large_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Parses, enforces or encodes a large body or answer: as `asyncio.to_thread`, but one at a time. Each
    holds the interpreter's lock for long, and several together would block the event loop. Use
    `asyncio.to_thread` for all other work: here it would wait for the bodies."""
    return await _LARGE.submit(partial(copy_context().run, function, *args, **kwargs))
