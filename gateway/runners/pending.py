"""A call that a model's process has not answered yet, and how its caller gets the answer.

Most callers wait for a future. On the hot path a `Direct` replaces it: it passes the answer on at
once, which saves a task and two turns of the event loop. Must not know where the process is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from gateway.runners.base import Then
    from loaders.batch import Batch

Reply: TypeAlias = dict[str, Any]


class NotReached(Exception):
    """The process ended before it began the call, so the call may run elsewhere."""


class Direct:
    """Passes what `read` makes of a reply on to `then`, in the turn of the loop in which the reply came. An
    exception in its place goes to `failed`, one turn later, as a future does: the end of a process is handled
    first."""

    __slots__ = ("_failed", "_is_done", "_read", "_then")

    def __init__(
        self, read: Callable[[Reply], Batch], then: Then, failed: Callable[[Exception], None]
    ) -> None:
        self._read = read
        self._then = then
        self._failed = failed
        self._is_done = False

    def done(self) -> bool:
        return self._is_done

    def set_result(self, reply: Reply) -> None:
        self._is_done = True
        try:
            answer = self._read(reply)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller waits for it
            self._then(None, error)
        else:
            self._then(answer, None)

    def set_exception(self, error: Exception) -> None:
        self._is_done = True
        asyncio.get_running_loop().call_soon(self._failed, error)

    def exception(self) -> None:
        """Marks the exception of a future as retrieved; here there is nothing to mark."""


class Call:
    """A pending call: what gets its answer, its timeout in seconds after its turn has come, and its
    caller."""

    __slots__ = ("answer", "asker", "timeout")

    def __init__(self, answer: asyncio.Future[Reply] | Direct, timeout: float | None, asker: object) -> None:
        self.answer = answer
        self.timeout = timeout
        self.asker = asker
