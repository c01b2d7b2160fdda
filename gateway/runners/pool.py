"""The idle processes of one model, and the calls that wait for one.

Knows workers only as things that are free or gone; which processes there are is `process`'s affair.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from gateway.runners.base import NoProcess

if TYPE_CHECKING:
    from gateway.runners.worker import Worker

#: How long a call waits for a process, in seconds, before its caller is told to come back.
PATIENCE: Final = 30.0


class Pool:
    """`refuses` says why a call need not wait, None where it may. `absent` says in how many seconds a process
    may come where none is left that could come back from a call, None while one is. `release` gets a worker
    that its caller did not want any more."""

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
        """An idle worker, if there is one."""
        while self._idle and self._idle[0].gone:
            self._idle.popleft()  # it ended a moment ago and is not reaped yet
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
                self._release(waiter.result())  # it was given one in the same moment
            raise
        finally:
            patience.cancel()

    def _lose_patience(self, waiter: asyncio.Future[Worker]) -> None:
        """Not where a process may come back from a call: calls are under the operator's timeout."""
        if not waiter.done() and (seconds := self._absent()) is not None:
            problem = "its process ended and is being started again"
            waiter.set_exception(NoProcess(problem, retry_after=max(1.0, seconds)))

    def give(self, worker: Worker) -> None:
        """A worker is free: the call that waits longest gets it."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(worker)
                return
        self._idle.append(worker)

    def drop(self, worker: Worker) -> None:
        """A worker that no call may get any more."""
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
