"""Spare processes of hot models: made in advance if memory is free, ended as soon as a load needs the memory.

Without a spare, the callers of a hot model wait for a fork and a load when its process ends. A spare has
already loaded and takes over at once. It never takes memory from another model. Must not know aliases.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING
from weakref import WeakSet

from gateway.serving.servable import Servable, Status

if TYPE_CHECKING:
    from gateway.runners.base import Runner
    from gateway.serving.ledger import Ledger

#: A model with this many requests per second is hot.
HOT = 10.0


class Spares:
    """`freed` is called when memory of a spare has become free."""

    def __init__(self, ledger: Ledger[Servable], freed: Callable[[], None]) -> None:
        self._ledger = ledger
        self._freed = freed
        #: Those that got a spare since the last `give_up`.
        self._with: WeakSet[Servable] = WeakSet()
        self._going: dict[Servable, asyncio.Task[None]] = {}

    def tend(self, servables: Iterable[Servable]) -> None:
        """Makes and ends spares by the models' request rates. Call it about once a second."""
        for servable in servables:
            runner = servable.runner
            if servable.status is not Status.READY or runner is None or runner.spare is None:
                continue
            hot = servable.recent.rate() >= HOT
            if hot and not runner.spare and self._has_room(servable, runner):
                runner.start_spare()
                self._with.add(servable)
            elif runner.spare and not hot:
                self._drop(servable, runner)

    def give_up(self) -> bool:
        """Ends every spare, because a load needs the memory. Returns False if there is none, and none is
        ending.
        """
        for servable in self._with:
            runner = servable.runner
            if servable.status is Status.READY and runner is not None and runner.spare:
                self._drop(servable, runner)
        self._with.clear()
        return bool(self._going)

    async def close(self) -> None:
        """Returns when all spares have ended."""
        if self._going:
            await asyncio.wait(set(self._going.values()))

    def _has_room(self, servable: Servable, runner: Runner) -> bool:
        """Reserves the memory of one more process if twice as much is free and no load waits."""
        ledger, account = self._ledger, self._ledger[servable]
        more = account.bytes // runner.slots
        if ledger.waiting or servable in self._going or ledger.limit - ledger.accounted < 2 * more:
            return False
        if not ledger.ask(servable, account.bytes + more):
            ledger.grant(servable)
        return True

    def _drop(self, servable: Servable, runner: Runner) -> None:
        if servable not in self._going:
            self._going[servable] = asyncio.get_running_loop().create_task(self._dropped(servable, runner))

    async def _dropped(self, servable: Servable, runner: Runner) -> None:
        try:
            await runner.drop_spare()
        finally:
            del self._going[servable]
            measured = runner.measured_bytes
            if servable in self._ledger and measured is not None:
                self._ledger.shrink(servable, measured)
            self._freed()
