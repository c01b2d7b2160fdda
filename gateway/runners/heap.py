"""Decides when to collect and freeze the gateway's own heap after a load. Must not know models."""

from __future__ import annotations

import asyncio
import time

from gateway.runners.inline import freeze_heap

#: Seconds between a load and the collection, and between two collections.
FREEZE_AFTER, FREEZE_INTERVAL = 1.0, 60.0
#: Seconds between two collections of the whole heap. The others look at what was made since the last one.
WHOLE_INTERVAL = 3600.0


class Heap:
    """The objects of a loaded model stay until it is unloaded, so the collector need not walk them while
    requests wait. Freezing them needs a collection first, which runs shortly after a load, and rarely."""

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None
        self._frozen_at = -FREEZE_INTERVAL
        self._whole_at = time.monotonic()  # the server does it when it starts

    def freeze_soon(self) -> None:
        if self._timer is None:
            wait = max(FREEZE_AFTER, self._frozen_at + FREEZE_INTERVAL - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(wait, self._freeze)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _freeze(self) -> None:
        self._timer = None
        self._frozen_at = now = time.monotonic()
        whole = now - self._whole_at >= WHOLE_INTERVAL
        if whole:
            self._whole_at = now
        asyncio.get_running_loop().run_in_executor(None, freeze_heap, whole)
