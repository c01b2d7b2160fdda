"""The stream of `GET /events`: server-sent events about aliases, for dashboards and deployment tools.

A slow subscriber loses the oldest events, so that it cannot fill the gateway's memory. Knows events and the
format of the stream; must not know who emits them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from typing import Final

import orjson

from gateway.errors import overloaded
from gateway.events import AliasDeleted, Event, RolloutChanged, Swapped, SwapRefused

#: The name of each kind of event in the stream.
KINDS: Final = {
    RolloutChanged: "rollout",
    Swapped: "swapped",
    SwapRefused: "refused",
    AliasDeleted: "deleted",
}
#: The most events that wait for one subscriber.
KEPT: Final = 256
MAX_SUBSCRIBERS: Final = 32
#: The seconds between two comments, which make proxies keep the stream open.
HEARTBEAT: Final = 15.0
#: A stream notices after this time, in seconds, that the gateway stops or its credential has ended.
LOOK_EVERY: Final = 1.0


class Feed:
    """Passes events to all subscribers. Only the event loop uses it."""

    def __init__(self) -> None:
        self._number = 0
        self._subscribers: set[_Subscriber] = set()

    def publish(self, event: Event) -> None:
        kind = KINDS.get(type(event))
        if kind is None:
            return
        self._number += 1
        if self._subscribers:
            data = orjson.dumps(asdict(event))
            text = b"id: %d\nevent: %s\ndata: %s\n\n" % (self._number, kind.encode(), data)
            for subscriber in self._subscribers:
                subscriber.put(text)

    def subscribe(self, ended: Callable[[], bool]) -> AsyncIterator[bytes]:
        """The stream from now on, until `ended`. Raises OVERLOADED beyond `MAX_SUBSCRIBERS`."""
        if len(self._subscribers) >= MAX_SUBSCRIBERS:
            raise overloaded("/events", f"it has {MAX_SUBSCRIBERS} subscribers already", 60.0)
        subscriber = _Subscriber()
        self._subscribers.add(subscriber)
        return self._stream(subscriber, ended)

    async def _stream(self, subscriber: _Subscriber, ended: Callable[[], bool]) -> AsyncIterator[bytes]:
        try:
            yield b": the events of this gateway\n\n"
            quiet = 0.0
            while not ended():
                texts = await subscriber.take(LOOK_EVERY)
                quiet = 0.0 if texts else quiet + LOOK_EVERY
                if quiet >= HEARTBEAT:
                    quiet, texts = 0.0, [b": still here\n\n"]
                for text in texts:
                    yield text
        finally:
            self._subscribers.discard(subscriber)


class _Subscriber:
    """The events that wait for one subscriber."""

    def __init__(self) -> None:
        self._texts: deque[bytes] = deque(maxlen=KEPT)
        self._some = asyncio.Event()

    def put(self, text: bytes) -> None:
        self._texts.append(text)
        self._some.set()

    async def take(self, timeout: float) -> list[bytes]:
        """The events that have arrived, oldest first; an empty list after `timeout` seconds without one."""
        try:
            async with asyncio.timeout(timeout):
                await self._some.wait()
        except TimeoutError:
            return []
        texts = list(self._texts)
        self._texts.clear()
        self._some.clear()
        return texts
