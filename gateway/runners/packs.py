"""Packs: processes that hold many small models each, one process for all models with equal conditions.

A pack is made when a model first needs it, and ended when it has been empty for a while. Its process does one
thing at a time, in order. When the process ends, only its current call fails; the others are `NotReached`,
and their models take places in the next process. If the current call takes too long, the process is let go in
the same way, without a failed call. If that call is a load, it is ended, and its model runs alone. The memory
that unloading does not free is measured: above a bound the models in use move one by one to a new process,
and the old one ends. `places` holds a process and its places; `packed` is the runner of a model in a pack.
Everything runs on the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shutil
import tempfile
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from gateway.runners.base import RunnerCrashed, RunnerTimeout
from gateway.runners.pending import NotReached
from gateway.runners.places import Conditions, Member, Place, Process
from loaders.worker import temporary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.runners.zygote import Zygotes

_LOG: Final = logging.getLogger("gateway.models")

#: A process whose call takes longer, in seconds, while others wait, is let go. Checked once a second.
HOLD: Final = 1.0
#: The same for a load while only other loads wait: the first load of a pack imports the libraries for all.
LOAD_HOLD: Final = 30.0
#: A pack without models ends after this time, in seconds.
IDLE: Final = 60.0
#: After this many crashes of a pack's processes within this time, in seconds, its models run alone for the
#: same time.
ENDS, WITHIN = 4, 600.0
#: The memory that unloading may leave: this share of the process's private bytes, and at least this many
#: bytes.
WASTE, LEAST_WASTE = 0.10, 16 << 20
#: A model is hot if it takes this share of a pack's time while the pack is busy for this share of all time.
HOT_SHARE, BUSY_SHARE, HOT_TICKS = 0.6, 0.6, 5


class Pack:
    """The models with equal conditions: one process, or two while models move from one to the next."""

    def __init__(self, packs: Packs, conditions: Conditions) -> None:
        self.packs = packs
        self.conditions = conditions
        self.processes: list[Process] = []
        self._process: Process | None = None
        self._starting: asyncio.Task[Process] | None = None
        self._recycling: asyncio.Task[None] | None = None
        self._numbers = itertools.count(1)
        self._loading = asyncio.Lock()
        #: How many models are being loaded, or wait for the load of another one.
        self._taking_in = 0
        self._ends: deque[float] = deque()
        self._empty_since: float | None = None
        self._hot: tuple[Place | None, int] = (None, 0)
        self._tidying: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        return f"<Pack {self.conditions}: {self.processes}>"

    def sink(self, line: str) -> None:
        _LOG.info("%s", line, extra={"pack": str(self.conditions)})

    def refuses(self) -> str | None:
        """Why it takes no models now, or None."""
        now = self.packs.now()
        while self._ends and now - self._ends[0] > WITHIN:
            self._ends.popleft()
        if len(self._ends) >= ENDS:
            return f"the processes of its pack ended {len(self._ends)} times within {WITHIN / 60:.0f} minutes"
        return None

    async def take_in(self, runner: Member) -> Place:
        """Loads a model and returns its place. One load at a time; waiting calls run before the next load.
        Raises ModelError, RunnerCrashed, RunnerTimeout."""
        self._empty_since = None
        self._taking_in += 1
        try:
            while True:
                async with self._loading:
                    process = await self._ready()
                    try:
                        return await process.load(runner, next(self._numbers))
                    except NotReached:
                        if self.packs.closed:
                            raise RunnerCrashed("the gateway is closing") from None
        finally:
            self._taking_in -= 1

    async def _ready(self) -> Process:
        process = self._process
        if process is not None and not process.left and not process.worker.gone:
            return process
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
            self._starting.add_done_callback(self._started)
        return await asyncio.shield(self._starting)

    async def _start(self) -> Process:
        if self.packs.closed:
            raise RunnerCrashed("the gateway is closing")
        process = Process(
            self.packs.zygotes,
            self.conditions,
            self.packs.directory(),
            start_timeout=self.packs.start_timeout,
            sink=self.sink,
            ended=self.lost,
        )
        self.processes.append(process)
        try:
            await process.start()
        except BaseException:
            if process in self.processes:  # it may have ended, and `lost` has removed it
                self.processes.remove(process)
            raise
        self._process = process
        return process

    def _started(self, task: asyncio.Task[Process]) -> None:
        self._starting = None
        if not task.cancelled():
            task.exception()  # mark as retrieved, even if no caller waits

    def lost(self, process: Process, reason: str) -> None:
        """One of its processes has ended."""
        if process not in self.processes:
            return
        self.processes.remove(process)
        if self._process is process:
            self._process = None
        if process.worker.loaded and not process.retiring and not self.packs.closed and not process.expected:
            self._ends.append(self.packs.now())
            _LOG.warning(
                "a pack of %d models (%s) ended: %s; each is loaded again at its next request",
                len(process.places),
                self.conditions,
                reason,
            )
        self._tidy(process.linked.close())

    def _tidy(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tidying.add(task)
        task.add_done_callback(self._tidying.discard)

    # ---- once a second

    def tend(self) -> None:
        now = self.packs.now()
        for process in list(self.processes):
            worker = process.worker
            worker.look_at_files()
            if worker.gone or not worker.pid or not worker.loaded:
                continue
            if (why := worker.feel(now)) is not None:
                worker.kill(RunnerCrashed(why))
                continue
            if process.left:
                continue
            process.measure()
            process.linked.tend()
            held = now - worker.working_since
            if worker.waiting and held > HOLD:
                self._let_go(process, HOLD)
            elif process.loading and self._taking_in > 1 and held > LOAD_HOLD:
                self._let_go(process, LOAD_HOLD)
            elif process is self._process and self._recycling is None and self._wasteful(process):
                self._recycling = asyncio.ensure_future(self._recycle(process))
                self._recycling.add_done_callback(self._recycled)
        self._look_for_hot()
        self.end_if_empty(now, self.packs.idle)

    def _let_go(self, process: Process, hold: float) -> None:
        place, loading = process.worker.first, process.loading
        process.expected = True
        if self._process is process:
            self._process = None
        process.let_go()
        what = "its load" if loading else "one of its calls"
        why = f"{what} blocked the other models of its pack for over {hold:g} s"
        if isinstance(place, Place):
            place.runner.move_out(why)
        if loading:
            # All places are invalid now, and the next load can begin only when this one has ended.
            process.worker.kill(RunnerTimeout(why))

    def _wasteful(self, process: Process) -> bool:
        return process.waste > max(LEAST_WASTE, WASTE * process.private)

    async def _recycle(self, old: Process) -> None:
        """Fills another process with the models of this one, the last used first; calls go on meanwhile."""
        _LOG.info("a pack (%s) is made again: %d bytes were left behind", self.conditions, old.waste)
        async with self._loading:
            old.retiring = True
            self._process = None
        while old.places and not (old.left or old.worker.gone):
            place = max(old.places.values(), key=lambda one: one.runner.last_asked)
            await place.runner.take_place_again(place)
            old.places.pop(place.number, None)
        if old in self.processes:
            self.processes.remove(old)
        await old.end()

    def _recycled(self, task: asyncio.Task[None]) -> None:
        self._recycling = None
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.error("a pack could not be made again: %s", error)

    def _look_for_hot(self) -> None:
        """Moves out a model that takes most of a busy pack's time, if other models need the pack."""
        process = self._process
        if process is None:
            return
        used = [place for place in process.places.values() if place.calls]
        total = sum(place.seconds for place in used)
        most = max(used, key=lambda place: place.seconds, default=None)
        before, ticks = self._hot
        if (
            most is not None
            and len(used) > 1
            and total > BUSY_SHARE
            and most.seconds > HOT_SHARE * total
            and (before is None or before is most)
        ):
            self._hot = (most, ticks + 1)
            if ticks + 1 >= HOT_TICKS:
                self._hot = (None, 0)
                most.runner.move_out(
                    f"it is hot: it took {most.seconds / total:.0%} of its pack's time", back=60.0
                )
        else:
            self._hot = (None, 0)
        for place in used:
            place.seconds, place.calls = 0.0, 0

    def end_if_empty(self, now: float, idle: float) -> None:
        """Ends its process if it has been empty for `idle` seconds, or is empty and wasteful."""
        process = self._process
        if process is None or process.places or process.worker.busy or self._loading.locked():
            self._empty_since = None
            return
        if self._empty_since is None:
            self._empty_since = now
        if now - self._empty_since >= idle or self._wasteful(process):
            self._process = None
            self.processes.remove(process)
            process.left = True
            self._tidy(process.end())

    async def close(self) -> None:
        for task in (self._starting, self._recycling):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        processes, self.processes = self.processes, []
        await asyncio.gather(*(process.end() for process in processes))
        if self._tidying:
            await asyncio.wait(set(self._tidying))


class Packs:
    """All packs. `idle`: how long an empty one stays, in seconds. `start_timeout`: how long its process may
    take to start."""

    def __init__(
        self,
        zygotes: Zygotes,
        *,
        idle: float = IDLE,
        start_timeout: float = 60.0,
    ) -> None:
        self.zygotes = zygotes
        self.idle = idle
        self.start_timeout = start_timeout
        self.closed = False
        self._root = os.path.join(zygotes.scratch, temporary.PACKS)
        self._packs: dict[Conditions, Pack] = {}

    def __repr__(self) -> str:
        return f"<Packs {list(self._packs.values())}>"

    def __iter__(self) -> Iterator[Pack]:
        return iter(self._packs.values())

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def of(self, conditions: Conditions) -> Pack:
        pack = self._packs.get(conditions)
        if pack is None:
            pack = self._packs[conditions] = Pack(self, conditions)
        return pack

    def directory(self) -> str:
        """Makes a directory for a process's files. Only its user, and processes that know its name, can read
        it."""
        with suppress(FileExistsError):
            os.mkdir(self._root, 0o711)
            os.chmod(self._root, 0o711)
        made = tempfile.mkdtemp(dir=self._root)
        os.chmod(made, 0o755)
        return made

    @property
    def overhead(self) -> int:
        """The bytes of all packs in addition to the counted bytes of their models, as of the last
        measurement."""
        return sum(max(0, p.private - p.models) for pack in self for p in pack.processes)

    def tend(self) -> None:
        """Checks all packs. Call it about once a second."""
        for pack in list(self._packs.values()):
            pack.tend()

    def end_empty(self) -> None:
        """Ends all processes without models now, because others need the memory."""
        for pack in list(self._packs.values()):
            pack.end_if_empty(self.now(), 0.0)

    async def close(self) -> None:
        self.closed = True
        await asyncio.gather(*(pack.close() for pack in self))
        shutil.rmtree(self._root, ignore_errors=True)
