"""The governor, the last defence against a lack of memory: it stops a growing model before the kernel stops a
process, which in a container may be every process.

The ledger plans; the governor watches the real usage, and decides only from that. It stops only a model that
grew: one that took more than it was granted, or that grew while memory became short. If no model grew, the
pressure comes from outside (a neighbour, another container): the governor reports it and stops nothing. The
decision is pure; reading, stopping and reporting are arguments. Reading the memory of all models takes
milliseconds, so a thread does it. Must not know anything about models but their bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from gateway.cgroup import Usage


@dataclass(frozen=True, slots=True)
class Reading:
    """One model: the bytes that it takes now, and the bytes that it was granted."""

    key: Hashable
    bytes: int
    granted: int


@dataclass(frozen=True, slots=True)
class Rule:
    """Above `high` of the limit, the model that grew the most is stopped, if it grew by more than `tolerance`
    of its size and by more than `matters` of the limit (stopping a small one would not help). `pressed`: from
    this share of the limit on, if there is no model to stop, pressure is reported, once in `quiet` seconds.
    The others are seconds: `calm` between two checks, `alert` between two checks from `watch` of the limit
    on, `recovery` after a stop, while the kernel reclaims memory, `sample` between two readings of the
    models' bytes while memory is watched."""

    watch: float = 0.6
    high: float = 0.9
    pressed: float = 0.96
    tolerance: float = 0.1
    matters: float = 0.01
    calm: float = 0.25
    alert: float = 0.03
    recovery: float = 0.5
    sample: float = 0.25
    quiet: float = 60.0


def victim(
    usage: Usage, models: Sequence[Reading], rule: Rule, before: Mapping[Hashable, int]
) -> Reading | None:
    """The model to stop now, or None. `before`: the fewest bytes that each model took since memory is
    watched; a model that is not in it is compared only with its grant."""
    if usage.share < rule.high:
        return None

    def growth(model: Reading) -> int:
        base = min(model.granted, before.get(model.key, model.granted))
        grown = model.bytes - base
        enough = grown > rule.tolerance * base and grown > rule.matters * usage.limit
        return grown if enough else 0

    grown = [model for model in models if growth(model)]
    return max(grown, key=growth, default=None)


class Governor:
    """Checks memory repeatedly. Only when memory is short, `read` measures all models without blocking the
    event loop, and `readings` then gives what it found. `stop` must not block; `report` is called for
    pressure that no model causes."""

    def __init__(
        self,
        usage: Callable[[], Usage],
        read: Callable[[], Awaitable[None]],
        readings: Callable[[], Sequence[Reading]],
        stop: Callable[[Hashable, str], None],
        rule: Rule | None = None,
        report: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._usage = usage
        self._read = read
        self._readings = readings
        self._stop = stop
        self._report = report
        self._rule = rule or Rule()
        self._recovered_at = 0.0
        self._sampled_at = float("-inf")
        self._reported_at = float("-inf")
        self._before: dict[Hashable, int] = {}

    async def look(self, now: float) -> float:
        """Checks once, stops at most one model, and returns the seconds until the next check."""
        rule = self._rule
        usage = self._usage()
        if usage.share < rule.watch:
            self._before.clear()
            return rule.calm
        short = usage.share >= rule.high and now >= self._recovered_at
        if short or now - self._sampled_at >= rule.sample:
            await self._read()
            models = self._readings()
            if short:
                self._relieve(self._usage(), models, now)  # it may have come back meanwhile
            self._sample(models, now)
        return rule.alert

    def _relieve(self, usage: Usage, models: Sequence[Reading], now: float) -> None:
        rule = self._rule
        chosen = victim(usage, models, rule, self._before)
        if chosen is not None:
            self._recovered_at = now + rule.recovery
            self._before.pop(chosen.key, None)
            self._stop(
                chosen.key,
                f"stopped because memory ran short and it grew: {usage.used} of {usage.limit} bytes were in "
                f"use, {chosen.bytes} of them its own, {chosen.granted} had been granted",
            )
        elif usage.share >= rule.pressed and now - self._reported_at >= rule.quiet:
            self._reported_at = now
            self._report(
                f"memory is short, and no model grew: {usage.used} of {usage.limit} bytes are in use, "
                f"{sum(model.bytes for model in models)} by models; something else on this machine or in "
                "this container takes the rest"
            )

    def _sample(self, models: Sequence[Reading], now: float) -> None:
        self._sampled_at = now
        self._before = {m.key: min(m.bytes, self._before.get(m.key, m.bytes)) for m in models}

    async def run(self) -> None:
        """Until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:  # noqa: ASYNC110  (what is waited for is outside this process)
            await asyncio.sleep(await self.look(loop.time()))
