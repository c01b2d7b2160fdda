"""Room for loads: who waits, who goes, and what is said of both."""

from __future__ import annotations

import asyncio

import pytest

from gateway.errors import Problem
from gateway.registries.base import Version
from gateway.serving.ledger import Ledger
from gateway.serving.room import EVICTIONS_KEPT, Room
from gateway.serving.servable import Options, Servable
from tests.support.controlled import MB, Clock, version

pytestmark = pytest.mark.anyio


class Bench:
    """A ledger of 100 MB and its room; what must go is closed a moment later."""

    def __init__(self, *, spares: bool = False, capacity_wait: float = 10.0) -> None:
        self.clock = Clock()
        self.ledger: Ledger[Servable] = Ledger(100 * MB)
        self.evicted: list[str] = []
        self.drained: list[Version] = []
        self.ended: list[Servable] = []
        self.spares = spares
        self.room = Room(
            self.ledger,
            clock=self.clock,
            capacity_wait=capacity_wait,
            evict=self.evict,
            drain=self.drained.append,
            end=self.ended.append,
            give_up_spares=self.give_up,
        )

    def give_up(self) -> bool:
        had, self.spares = self.spares, False
        return had

    def evict(self, servable: Servable, why: str) -> None:
        self.evicted.append(f"{servable.version} {why}")
        self.ledger.begin_close(servable)
        asyncio.get_running_loop().call_soon(self.closed, servable)

    def closed(self, servable: Servable) -> None:
        self.ledger.closed(servable)
        self.room.carry_out_plan()

    async def load(self, number: int, size: int) -> Servable:
        made = Servable(version(number), Options())
        self.ledger.open(made, self.clock())
        await self.room.reserve(made, size)
        self.ledger.loaded(made, self.clock(), size, 1.0)
        return made


async def test_what_fits_is_granted_at_once() -> None:
    bench = Bench()
    for number in (1, 2):
        await bench.load(number, 50 * MB)
    assert bench.evicted == []
    bench.ledger.check()


async def test_the_one_that_goes_and_why_are_remembered() -> None:
    bench = Bench()
    await bench.load(1, 80 * MB)
    bench.clock.now += 60
    await bench.load(2, 50 * MB)
    assert [line.partition(" for ")[0] for line in bench.evicted] == ["iris/1"]
    gone = bench.room.eviction(version(1))
    assert gone is not None
    assert (gone.asking, gone.at) == ("iris/2", bench.clock.now)
    assert bench.room.eviction(version(2)) is None
    bench.ledger.check()


async def test_spares_go_before_a_model() -> None:
    bench = Bench(spares=True, capacity_wait=0.0)
    await bench.load(1, 80 * MB)
    bench.clock.now += 60
    with pytest.raises(Problem, match="everything loaded is in use"):
        await bench.load(2, 50 * MB)  # it waits for what the spares hold
    assert (bench.spares, bench.evicted) == (False, [])


async def test_more_than_the_limit_is_refused_without_waiting() -> None:
    bench = Bench()
    with pytest.raises(Problem, match="the limit of all models is 100 MB") as caught:
        await bench.load(1, 101 * MB)
    assert (caught.value.code, caught.value.retry_after) == ("CAPACITY_EXCEEDED", 60)
    assert bench.ledger.accounted == 0


async def test_what_does_not_fit_next_to_shared_processes_is_refused_and_has_unused_ones_ended() -> None:
    bench = Bench()
    bench.ledger.share(80 * MB)
    with pytest.raises(Problem, match="20 MB of the limit of 100 MB are left for models") as caught:
        await bench.load(1, 30 * MB)
    assert (caught.value.code, caught.value.hint) == ("CAPACITY_EXCEEDED", "raise memory_limit")
    assert [bench.room.was_crowded() for _ in range(2)] == [True, False]
    bench.ledger.share(10 * MB)  # those have ended
    await bench.load(1, 30 * MB)
    bench.ledger.check()


async def test_a_load_that_waits_is_known_and_leaves_no_trace() -> None:
    bench = Bench()
    held = await bench.load(1, 80 * MB)
    bench.ledger.lease(held)
    waiting = asyncio.create_task(bench.load(2, 50 * MB))
    await asyncio.sleep(0)
    (other,) = (account.key for account in bench.ledger if account.key is not held)
    assert bench.room.waits(other)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not bench.ledger.waiting
    bench.room.close()


async def test_a_load_that_no_request_waits_for_ends_when_others_need_the_memory() -> None:
    bench = Bench(capacity_wait=0.0)
    bench.ledger[await bench.load(1, 80 * MB)].serving = True
    with pytest.raises(Problem, match="everything loaded is in use"):
        await bench.load(2, 50 * MB)
    assert [str(servable.version) for servable in bench.ended] == ["iris/2"]
    assert (bench.evicted, bench.ledger.waiting) == ([], False)
    bench.ledger.check()


async def test_only_so_many_evictions_are_remembered() -> None:
    bench = Bench()
    for number in range(1, EVICTIONS_KEPT + 3):
        await bench.load(number, 80 * MB)
        bench.clock.now += 60
    assert bench.room.eviction(version(1)) is None
    assert bench.room.eviction(version(EVICTIONS_KEPT + 1)) is not None
