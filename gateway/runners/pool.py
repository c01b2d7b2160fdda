"""The idle processes of one model, and the calls that wait for one.

Knows only whether a worker is free or gone; `process` starts and ends them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from gateway.runners.base import NoProcess

if TYPE_CHECKING:
    from gateway.runners.worker import Worker

#: How long a call waits for a process, in seconds, before its caller is told to try again.
PATIENCE: Final = 30.0


class Pool:
    """`refuses`: why a call must not wait, or None. `absent`: in how many seconds a process may be ready if
    no busy one is left, None while there is one. `release` gets a worker that its caller no longer needs."""

    def __init__(
        self,
        refuses: Callable[[], str | None],
        absent: Callable[[], float | None],
        release: Callable[[Worker], None],
    ) -> None:
        self._refuses = refuses
        self._absent = absent
        self._release = release
        self._idle: deque[Worker] = deque()
        self._waiting: deque[asyncio.Future[Worker]] = deque()

    def take(self) -> Worker | None:
        """An idle worker, or None."""
        while self._idle and self._idle[0].gone:
            self._idle.popleft()  # it has ended but is not reaped yet
        return self._idle.popleft() if self._idle else None

    async def wait(self) -> Worker:
        """The next worker that becomes free. Raises NoProcess."""
        if (reason := self._refuses()) is not None:
            raise NoProcess(reason)
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Worker] = loop.create_future()
        self._waiting.append(waiter)
        patience = loop.call_later(PATIENCE, self._lose_patience, waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._release(waiter.result())  # it got one at the same moment
            raise
        finally:
            patience.cancel()

    def _lose_patience(self, waiter: asyncio.Future[Worker]) -> None:
        """Ends the wait, unless a busy process may become free: calls are limited by the operator's
        timeout."""
        if not waiter.done() and (seconds := self._absent()) is not None:
            problem = "its process ended and is restarting"
            waiter.set_exception(NoProcess(problem, retry_after=max(1.0, seconds)))

    def give(self, worker: Worker) -> None:
        """Gives a free worker to the call that has waited longest."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(worker)
                return
        self._idle.append(worker)

    def drop(self, worker: Worker) -> None:
        """Removes a worker, so that no call gets it."""
        if worker in self._idle:
            self._idle.remove(worker)

    def refuse(self, reason: str) -> None:
        """Ends the wait of all calls."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_exception(NoProcess(reason))

    def clear(self) -> None:
        self._idle.clear()
