"""The last line of defence for memory: a model that grows without end is stopped before the kernel would
stop whatever it likes, which in a container may be everything.

The ledger plans; this watches what really is used, and decides from that alone whom to stop. The decision
is pure. Reading and stopping are given as functions; knows nothing of models but their bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from gateway.cgroup import Usage


@dataclass(frozen=True, slots=True)
class Reading:
    """One model: what it takes now, and what it was granted (bytes)."""

    key: Hashable
    bytes: int
    granted: int


@dataclass(frozen=True, slots=True)
class Rule:
    """Above `high` of the limit the model that outgrew its grant the most is stopped, if it did by more
    than `tolerance` of it; above `critical` the largest, whatever it was granted. Seconds: `calm` between
    two looks, `alert` from `watch` of the limit on, `settle` after a stop, while the kernel takes back."""

    watch: float = 0.6
    high: float = 0.9
    critical: float = 0.96
    tolerance: float = 0.1
    calm: float = 0.25
    alert: float = 0.03
    settle: float = 0.5


def victim(usage: Usage, models: Sequence[Reading], rule: Rule) -> Reading | None:
    """Whom to stop now; None: nobody."""
    if usage.share < rule.high or not models:
        return None
    grown = [m for m in models if m.bytes - m.granted > rule.tolerance * m.granted]
    if grown:
        return max(grown, key=lambda m: m.bytes - m.granted)
    if usage.share >= rule.critical:
        return max(models, key=lambda m: m.bytes)
    return None


class Governor:
    """Looks again and again. `readings` is asked only when memory is short; `stop` must not block."""

    def __init__(
        self,
        usage: Callable[[], Usage],
        readings: Callable[[], Sequence[Reading]],
        stop: Callable[[Hashable, str], None],
        rule: Rule | None = None,
    ) -> None:
        self._usage = usage
        self._readings = readings
        self._stop = stop
        self._rule = rule or Rule()
        self._settled_at = 0.0

    def look(self, now: float) -> float:
        """Looks once, stops one model at most, and returns after how many seconds to look again."""
        usage = self._usage()
        if usage.share >= self._rule.high and now >= self._settled_at:
            chosen = victim(usage, self._readings(), self._rule)
            if chosen is not None:
                self._settled_at = now + self._rule.settle
                self._stop(
                    chosen.key,
                    f"stopped because memory ran short: {usage.used} of {usage.limit} bytes were in use, "
                    f"{chosen.bytes} of them its own, {chosen.granted} had been granted",
                )
        return self._rule.calm if usage.share < self._rule.watch else self._rule.alert

    async def run(self) -> None:
        """Until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:  # noqa: ASYNC110  (what is waited for is outside this process)
            await asyncio.sleep(self.look(loop.time()))
