"""The recorder: takes a share of the answered requests from the event loop, and writes them from a thread.

Taking one costs a few microseconds: no copy, no encoding, no wait. A short queue holds what was taken until
the next write; when it is full, requests are dropped and counted. A disk that is full, slow or read-only
stops nothing but the capture. Must not know how a request came, or what a rollout does with it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import shutil
import sqlite3
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from gateway.capture.records import Record, Taken, Unnamed, recorded
from gateway.capture.store import CaptureStore, Limits
from loaders.batch import Batch, weight
from loaders.worker.wire import Framed, WireError

if TYPE_CHECKING:
    from gateway.rollout_settings import Capture

T = TypeVar("T")
log = logging.getLogger("gateway.capture")

#: The most requests, and about the most bytes, that wait for the disk.
MAX_WAITING: Final = 256
MAX_WAITING_BYTES: Final = 64 << 20
#: The largest request that is kept, with its answer, in bytes.
MAX_RECORD: Final = 4 << 20
#: Requests are written together after this time, in seconds; so the answer has left before they are encoded.
WRITE_EVERY: Final = 0.25
#: How often old requests are looked for, in seconds.
SWEEP_EVERY: Final = 60.0
#: Nothing is captured while the disk has less room than this share of it, or than these bytes.
_FREE_SHARE: Final = 0.02
_FREE_BYTES: Final = 1 << 30
_NO_LIMIT: Final = 1 << 62


class Recorder:
    """`capture` gives the settings of a model. `counted` is called with the model, a result (`kept`, `full`,
    `large`, `unnamed`, `failed`) and a number. Only the event loop calls the methods, except `_write` and
    `_expire`."""

    def __init__(
        self,
        store: CaptureStore,
        directory: Path,
        io: Executor,
        *,
        capture: Callable[[str], Capture],
        counted: Callable[[str, str, int], None] = lambda model, result, number: None,
        chance: random.Random | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self._directory = directory
        self.io = io
        self._capture = capture
        self._counted = counted
        self._chance = chance or random.Random()
        self._wall = wall
        self._waiting: deque[Taken] = deque()
        self._bytes = 0
        self._some = asyncio.Event()
        self._changing = asyncio.Lock()
        self._failing = False
        self._unnamed: set[tuple[str, str]] = set()

    def take(
        self, model: str, version: str, digest: str, request: Batch | Framed, params: dict[str, object],
        answer: Batch, seconds: float, share: float,
    ) -> None:  # fmt: skip
        """Keeps an answered request with the probability `share`. The batches must not change afterwards.
        `seconds`: the duration of the model's call."""
        if self._chance.random() >= share:
            return
        size = _size(request) + _size(answer)
        if size > MAX_RECORD:
            self._counted(model, "large", 1)
            return
        if len(self._waiting) >= MAX_WAITING or self._bytes + size > MAX_WAITING_BYTES:
            self._counted(model, "full", 1)
            return
        self._bytes += size
        self._waiting.append(Taken(model, version, digest, self._wall(), seconds, request, params, answer))
        self._some.set()

    async def run(self) -> None:
        """Writes what was taken, and deletes what is old, until it is cancelled."""
        await self._alone(self._expire)
        swept = time.monotonic()
        while True:
            try:
                async with asyncio.timeout(SWEEP_EVERY):
                    await self._some.wait()
                await asyncio.sleep(WRITE_EVERY)
                await self.flush()
            except TimeoutError:
                pass
            if time.monotonic() - swept >= SWEEP_EVERY:
                await self._alone(self._expire)
                swept = time.monotonic()

    async def flush(self) -> None:
        """Writes what was taken so far. Afterwards all of it is in the store or dropped, also what another
        call had begun to write."""
        await self._alone(lambda: None)

    async def drop(self, name: str | None, version: str | None) -> int:
        """Deletes captured requests, also those that were taken and not written yet. Returns how many. Raises
        OSError and sqlite3.Error."""
        return await self._alone(lambda: self.store.drop(name, version))

    async def _alone(self, work: Callable[[], T]) -> T:
        """Writes what was taken so far, then runs `work` in a thread, while nothing else changes the store.
        Both go on if the caller is cancelled, because a thread cannot be stopped."""
        return await asyncio.shield(asyncio.ensure_future(self._locked(work)))

    async def _locked(self, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        async with self._changing:
            taken, size = list(self._waiting), self._bytes
            self._waiting.clear()
            self._some.clear()
            if taken:
                try:
                    counts = await loop.run_in_executor(self.io, self._write, taken)
                finally:
                    self._bytes -= size  # until now they were in memory
                for (model, result), number in counts.items():
                    self._counted(model, result, number)
            return await loop.run_in_executor(self.io, work)

    # In the thread.

    def _write(self, taken: Iterable[Taken]) -> Counter[tuple[str, str]]:
        counts: Counter[tuple[str, str]] = Counter()
        ordered = sorted(taken, key=lambda one: one.model)
        for model, requests in groupby(ordered, key=lambda one: one.model):
            settings = self._capture(model)
            records = list(self._encoded(requests, settings, counts))
            try:
                self._check_room(sum(record.size for record in records))
                if records:
                    self.store.add(records, limits_of(settings))
            except (OSError, sqlite3.Error) as error:
                counts[model, "failed"] += max(1, len(records))
                if not self._failing:
                    log.warning("cannot keep captured requests, and drops them: %s", error)
                self._failing = True
            else:
                if not records:
                    continue
                counts[model, "kept"] += len(records)
                if self._failing:
                    log.info("captured requests are kept again")
                    self._failing = False
        return counts

    def _encoded(
        self, requests: Iterable[Taken], settings: Capture, counts: Counter[tuple[str, str]]
    ) -> Iterable[Record]:
        most = min(MAX_RECORD, settings.max_bytes)
        for one in requests:
            try:
                yield recorded(one, settings.redact, most)
            except Unnamed:
                counts[one.model, "unnamed"] += 1
                if (one.model, one.version) not in self._unnamed:
                    self._unnamed.add((one.model, one.version))
                    log.warning(
                        "requests of %s/%s are not captured: capture.redact names columns, and the input has "
                        "values without names", one.model, one.version,
                    )  # fmt: skip
            except WireError:
                counts[one.model, "large"] += 1
            except Exception:
                counts[one.model, "failed"] += 1
                log.exception("a request of %s/%s cannot be captured", one.model, one.version)

    def _check_room(self, size: int) -> None:
        """Raises OSError where requests of this size would leave too little. They are written twice: the file
        has a journal."""
        room = shutil.disk_usage(self._directory)
        if room.free - 2 * size < min(_FREE_BYTES, _FREE_SHARE * room.total):
            raise OSError("the disk of state_dir is nearly full")

    def _expire(self) -> None:
        try:
            deleted = self.store.expire(lambda model: limits_of(self._capture(model)))
        except (OSError, sqlite3.Error) as error:
            log.warning("cannot delete old captured requests: %s", error)
        else:
            if deleted:
                log.info(
                    "deleted %d captured requests: beyond their limits, or with a redacted column", deleted
                )

    async def close(self) -> None:
        await self._alone(self.store.close)


def limits_of(settings: Capture) -> Limits:
    """Where nothing is captured any more, what was captured keeps the limits of that time."""
    redact = frozenset(settings.redact)
    if not settings.share:
        return Limits(math.inf, _NO_LIMIT, redact)
    return Limits(settings.keep, settings.max_bytes, redact)


def _size(batch: Batch | Framed) -> int:
    """About how many bytes a batch takes; more than `MAX_RECORD` where it would take long to count them."""
    return len(batch.frame) if isinstance(batch, Framed) else weight(batch, MAX_RECORD + 1)
