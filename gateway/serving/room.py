"""Room for loads: memory, as `Ledger.plan` decides, and a place among those that run at once.

Grants wake the waiting loads; the manager closes or drains servables. Runs on the event loop. Must not know
aliases or processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.errors import Problem
from gateway.serving.ledger import Ledger
from gateway.serving.servable import Servable

if TYPE_CHECKING:
    from gateway.registries.base import Version

#: How long, in seconds, a load counts among those that may run at once.
LONGEST_SLOT = 10.0
#: The seconds until the processes that no model uses have ended, and a load that they kept out may fit.
CROWDED_WAIT = 10.0
#: How many evictions are kept for `status`.
EVICTIONS_KEPT = 50


@dataclass(frozen=True, slots=True)
class Eviction:
    """An eviction: the version that needed the memory, and why this one was chosen. `at`: the manager's time,
    in seconds. `model`: the name of the model that needed the memory, empty if it was none."""

    at: float
    version: Version
    asking: str
    why: str
    model: str


class Room:
    """`capacity_wait`: the seconds that a load waits for memory before it is refused. `evict` closes an idle
    servable, and receives the reason. `drain` closes a busy one when its leases have ended. `end` ends a load
    that nothing needs. `give_up_spares` ends spare processes, and returns whether there were any."""

    def __init__(
        self,
        ledger: Ledger[Servable],
        *,
        clock: Callable[[], float],
        capacity_wait: float,
        evict: Callable[[Servable, str], None],
        drain: Callable[[Version], object],
        end: Callable[[Servable], object],
        give_up_spares: Callable[[], bool],
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._capacity_wait = capacity_wait
        self._evict = evict
        self._drain = drain
        self._end = end
        self._give_up_spares = give_up_spares
        self._grants: dict[Servable, asyncio.Future[None]] = {}
        self._evictions: dict[Version, Eviction] = {}
        self._replan_timer: asyncio.TimerHandle | None = None
        self._crowded = False

    def eviction(self, version: Version) -> Eviction | None:
        """The last eviction of a version, or None."""
        return self._evictions.get(version)

    def waits(self, servable: Servable) -> bool:
        """Returns True if a load waits for memory."""
        return servable in self._grants

    async def reserve(self, servable: Servable, wanted: int) -> None:
        if self._ledger.ask(servable, wanted):
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._grants[servable] = granted
        self.carry_out_plan()
        try:
            await asyncio.wait({granted}, timeout=self._capacity_wait)
            if not granted.done():
                raise Problem(
                    "CAPACITY_EXCEEDED",
                    f"{servable.version} needs {_mega(wanted)} MB of memory, and everything loaded is in use",
                    retry_after=self._capacity_wait,
                )
            granted.result()
        finally:
            self._grants.pop(servable, None)
            if not granted.done() or granted.cancelled() or granted.exception() is not None:
                self._ledger.withdraw(servable)

    def was_crowded(self) -> bool:
        """Returns True if a load was refused since the last call because of memory that belongs to no
        model."""
        crowded, self._crowded = self._crowded, False
        return crowded

    def carry_out_plan(self) -> None:
        """Carries out the ledger's plans until there is nothing left to do."""
        while self._ledger.waiting:
            plan = self._ledger.plan(self._clock())
            for key in plan.grant:
                self._ledger.grant(key)
                self._answer_grant(key, None)
            for key in plan.refuse:
                wanted = self._ledger[key].wanted
                self._ledger.withdraw(key)
                self._answer_grant(key, self._refusal(key, wanted))
            for key in plan.end:
                self._ledger.withdraw(key)
                self._end(key)
            if (plan.evict or plan.drain) and self._give_up_spares():
                return  # spare processes end first; plan again when they are gone
            leaving = plan.evict + plan.drain
            asking = (
                "the processes that models are forked from" if plan.asking is None else plan.asking.version
            )
            model = "" if plan.asking is None else plan.asking.version.name
            for key, why in zip(leaving, plan.why, strict=True):
                self._evictions.pop(key.version, None)
                self._evictions[key.version] = Eviction(self._clock(), key.version, str(asking), why, model)
            while len(self._evictions) > EVICTIONS_KEPT:
                del self._evictions[next(iter(self._evictions))]
            for key, why in zip(plan.evict, plan.why, strict=False):
                self._evict(key, f"for {asking}: {why}")
            for key in plan.drain:
                self._drain(key.version)
            if plan.retry_at is not None:
                self._plan_again(plan.retry_at)
            if not (plan.grant or plan.refuse or plan.end):
                return

    def _refusal(self, servable: Servable, wanted: int) -> Problem:
        limit = self._ledger.limit
        message = f"{servable.version} needs {_mega(wanted)} MB of memory; "
        if wanted > limit:
            message += f"the limit of all models is {_mega(limit)} MB"
            return Problem("CAPACITY_EXCEEDED", message, retry_after=60)
        self._crowded = True
        message += (
            f"{_mega(self._ledger.room)} MB of the limit of {_mega(limit)} MB are left for models, next to "
            "the processes that models are forked from or share"
        )
        return Problem("CAPACITY_EXCEEDED", message, hint="raise memory_limit", retry_after=CROWDED_WAIT)

    def _answer_grant(self, servable: Servable, problem: Problem | None) -> None:
        granted = self._grants.get(servable)
        if granted is None or granted.done():
            return
        if problem is None:
            granted.set_result(None)
        else:
            granted.set_exception(problem)

    def _plan_again(self, at: float) -> None:
        if self._replan_timer is not None:
            self._replan_timer.cancel()
        delay = max(0.0, at - self._clock())
        self._replan_timer = asyncio.get_running_loop().call_later(delay, self.carry_out_plan)

    def close(self) -> None:
        if self._replan_timer is not None:
            self._replan_timer.cancel()


class Slot:
    """A place among the loads that run at once, given back after `LONGEST_SLOT` although the load goes on:
    one that hangs must not keep the others out."""

    def __init__(self, slots: asyncio.Semaphore) -> None:
        self._slots = slots
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> None:
        await self._slots.acquire()
        self._timer = asyncio.get_running_loop().call_later(LONGEST_SLOT, self._give_back)

    async def __aexit__(self, *exc: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._give_back()

    def _give_back(self) -> None:
        self._timer = None
        self._slots.release()


def _mega(size: int) -> int:
    return -(-size // 1_000_000)
