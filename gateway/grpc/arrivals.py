"""Messages that are still arriving: how many calls may wait for one.

gRPC keeps the received part of a message in memory, and shows a message only once it is complete. So this
module bounds the calls that wait for a message instead of the bytes. Must not know methods or what a message
holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final, TypeVar

from gateway.errors import Problem, overloaded

#: A call that has waited for its message for this many seconds is slow.
SLOW_AFTER: Final = 2.0

T = TypeVar("T")


class Arrivals:
    """At most `most` calls receive a message at a time; others wait for their turn, and gRPC accepts 64 KiB
    of each of them. At most half of the receiving calls may be slow: one more ends the slowest, so that a
    client that never completes its messages does not keep others from sending. `seconds`: how long a message
    may take; None: without a limit, as on a stream, which may be idle."""

    def __init__(self, most: int, seconds: float | None = None, slow_after: float = SLOW_AFTER) -> None:
        self._turns = asyncio.Semaphore(most)
        self._most_slow = max(1, most // 2)
        self._seconds = seconds
        self._slow_after = slow_after
        self._slow: dict[asyncio.Timeout, None] = {}

    async def next(self, messages: AsyncIterator[T]) -> T | None:
        """The next message; None after the last one. Raises OVERLOADED for a call that gives way to others,
        and DEADLINE_EXCEEDED for a message that takes too long."""
        async with self._turns:
            patience = asyncio.timeout(self._seconds)
            loop, timers = asyncio.get_running_loop(), list[asyncio.TimerHandle]()

            def half() -> None:
                timers.append(loop.call_later(self._slow_after / 2, self._late, patience))

            # In two steps: after a pause of the loop, what came meanwhile is seen before the second one.
            timers.append(loop.call_later(self._slow_after / 2, half))
            try:
                async with patience:
                    return await anext(messages, None)
            except TimeoutError:
                if patience in self._slow:
                    what = f"the message was not complete after {self._seconds:.0f} s"
                    raise Problem("DEADLINE_EXCEEDED", what) from None
                why = "too many calls wait for a message or the rest of one, and this one has waited longest"
                raise overloaded("the gateway", why, 1.0, "call again, and send the whole message") from None
            finally:
                self._slow.pop(patience, None)
                for timer in timers:
                    timer.cancel()

    def _late(self, patience: asyncio.Timeout) -> None:
        self._slow[patience] = None
        if len(self._slow) > self._most_slow:
            slowest = next(iter(self._slow))
            del self._slow[slowest]
            slowest.reschedule(asyncio.get_running_loop().time())
