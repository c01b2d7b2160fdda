"""Replaced versions: each stays loaded for a while, so that a rollback is one assignment.

Knows the manager and a clock; must not know rollouts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.registries.base import Version
    from gateway.serving.manager import Manager

#: How long a replaced version stays loaded, in seconds.
LINGER = 60.0


class Lingering:
    """`in_use`: whether an alias serves or wants a version."""

    def __init__(self, manager: Manager, in_use: Callable[[Version], bool]) -> None:
        self._manager = manager
        self._in_use = in_use
        self._timers: dict[Version, asyncio.TimerHandle] = {}
        self._closed = False

    def begin(self, version: Version) -> None:
        """Keeps a version loaded for `LINGER`, unless an alias uses it. When memory is short, it is evicted
        first."""
        if self._in_use(version):
            return
        self._manager.linger(version, True)
        if version not in self._timers and not self._closed:
            loop = asyncio.get_running_loop()
            self._timers[version] = loop.call_later(LINGER, self._over, version)

    def end(self, version: Version) -> None:
        """The version serves (again)."""
        timer = self._timers.pop(version, None)
        if timer is not None:
            timer.cancel()
        self._manager.linger(version, False)

    def _over(self, version: Version) -> None:
        del self._timers[version]
        if not self._in_use(version):
            self._manager.retire(version, "replaced")

    def close(self) -> None:
        self._closed = True
        for timer in self._timers.values():
            timer.cancel()
