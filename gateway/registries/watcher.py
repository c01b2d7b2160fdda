"""The registry, looked at again and again: what it says goes to the aliases, what it fails to say does not.

A registry that cannot be read, or that is not valid, changes nothing: the last valid snapshot stays.
Knows no member of the registry family and nothing of what the snapshot is used for.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import copy_context
from typing import Any, TypeVar

from cachetools import TTLCache

from gateway.errors import Problem, pathless
from gateway.events import Emit, RegistryFailed, RegistryRead
from gateway.names import Reference
from gateway.registries.base import AskedByName, Registry, RegistryError, Snapshot, key

#: What was not there, or could not be asked for, is not asked for again for so many seconds.
FORGET_ABSENT = 2.0
log = logging.getLogger("gateway.watch")

#: A name that nobody has asked for in so many seconds, and of which nothing is loaded, is polled no more:
#: else a client that once asked for every model of a large server would cost a call for each at every poll.
#: An hour outlasts the pauses of most traffic; a later request asks once more, which a cold load hides.
FORGET_UNUSED = 3600.0

#: Questions for single names that are under way at once, and that may wait.
QUESTIONS = 4
QUESTIONS_WAITING = 256
#: A poll comes up to this share early, so that a fleet does not ask in step.
JITTER = 0.2
_UNASKED = object()
T = TypeVar("T")


class Watch:
    """`apply` is given every changed snapshot and who moved it; `remember` saves it for a restart.

    Of a registry that is asked by name, `in_use` says which names are used without being asked for, and
    `forget` is told those that were not for `FORGET_UNUSED`, before a snapshot comes without them.
    """

    def __init__(
        self,
        registry: Registry,
        io: Executor,
        *,
        interval: float,
        apply: Callable[[Snapshot, str], None],
        remember: Callable[[Snapshot], None],
        in_use: Callable[[], set[str]] = set,
        forget: Callable[[set[str]], None] = lambda names: None,
        emit: Emit = lambda event: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._io = io
        self._interval = interval
        self._apply = apply
        self._remember = remember
        self._in_use = in_use
        self._forget = forget
        self._used: dict[str, float] = {}
        self._emit = emit
        self._clock = clock
        self._stamp: str | None = None
        self._read_at: float | None = None
        self._error: str | None = None
        self._looking: asyncio.Task[None] | None = None
        self._writes = 0
        self._chance = random.Random()
        self._by_name = registry if isinstance(registry, AskedByName) else None
        self._asking: dict[Reference, asyncio.Task[None]] = {}
        self._turns = asyncio.Semaphore(QUESTIONS)
        self._absent: TTLCache[Reference | str, Problem | None] = TTLCache(10_000, FORGET_ABSENT, clock)

    @property
    def seen(self) -> bool:
        """Whether there is a snapshot to serve from, fresh or remembered."""
        return self._stamp is not None

    def age(self) -> float | None:
        """Seconds since the registry was last read with success."""
        return None if self._read_at is None else self._clock() - self._read_at

    def status(self) -> dict[str, Any]:
        age = self.age()
        return {
            "target": self._registry.target,
            "age_seconds": None if age is None else round(age, 3),
            "error": self._error,
        }

    def take(self, snapshot: Snapshot, moved_by: str, age: float | None = None) -> None:
        """A snapshot that came another way: from a write, or from what was remembered at the start. `age`: so
        many seconds ago all of the registry was read."""
        self._writes += 1
        if age is not None:
            self._read_at = self._clock() - age
        self._take(snapshot, moved_by)

    def _take(self, snapshot: Snapshot, moved_by: str) -> None:
        if snapshot.stamp != self._stamp:
            self._apply(snapshot, moved_by)
            self._stamp = snapshot.stamp
            self._remember(snapshot)

    async def look(self) -> None:
        """Reads the registry now; simultaneous callers share one read. Raises REGISTRY_UNAVAILABLE."""
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._look())
        await asyncio.wait({self._looking})
        if self._error is not None:
            raise Problem("REGISTRY_UNAVAILABLE", pathless(self._error), retry_after=self._interval)

    async def _look(self) -> None:
        try:
            while True:
                writes = self._writes
                snapshot = await self._blocking(self._registry.read)
                if self._by_name is not None:
                    self._forget_unused(self._by_name)
                    snapshot = self._by_name.known()  # with what was found meanwhile
                    break
                if writes == self._writes:
                    break
                # Something newer came while this was read: what was read may be older than that.
        except RegistryError as error:
            if str(error) != self._error:
                self._emit(RegistryFailed(str(error)))
            self._error = str(error)
        except Exception as error:
            # A bug in reading must be seen as what it is, and must not look like a registry without news.
            log.exception("the registry could not be read")
            self._error = f"the registry could not be read: {type(error).__name__}"
        else:
            self._read_at = self._clock()
            self._error = None
            self._emit(RegistryRead(len(snapshot.models), snapshot.stamp != self._stamp))
            self._take(snapshot, "registry")
        finally:
            self._looking = None

    def _forget_unused(self, registry: AskedByName) -> None:
        """In one turn of the loop with taking the snapshot: nobody can ask for a name in between."""
        now = self._clock()
        used = self._in_use()
        known = registry.known().models
        self._used = {name: now if name in used else self._used.get(name, now) for name in known}
        unused = {name for name, at in self._used.items() if now - at > FORGET_UNUSED}
        if unused:
            log.info("%d models are not followed any more: nobody has asked for them in a while", len(unused))
            registry.forget(unused)
            self._forget(unused)

    async def ask(self, reference: Reference) -> None:
        """What the registry says of one name now: before something is done with it, or because something has
        happened to it. Raises REGISTRY_UNAVAILABLE."""
        if self._by_name is None:
            await self.look()
        else:
            await self._ask(reference, self._by_name)

    async def find(self, reference: Reference) -> bool:
        """Asks for what the last snapshot lacks. Whether that was worth doing: a registry that is read whole
        has said it all, and what was not there a moment ago is not asked for again. (A version may have been
        registered just now: that is always asked for.) Raises REGISTRY_UNAVAILABLE."""
        if self._by_name is None:
            return False
        known = key(reference) in self._by_name.known().models
        what = reference if known else key(reference)
        remembered = self._absent.get(what, _UNASKED)
        if isinstance(remembered, Problem):
            raise remembered.again()
        if remembered is None and not (known and reference.version is not None):
            return False
        try:
            await self._ask(reference, self._by_name)
        except Problem as problem:
            self._absent[what] = problem
            raise
        # If it is there now, nobody asks for it this way again.
        self._absent[what] = None
        return True

    async def _ask(self, reference: Reference, registry: AskedByName) -> None:
        """Simultaneous callers with one question share the answer."""
        task = self._asking.get(reference)
        if task is None:
            if len(self._asking) >= QUESTIONS_WAITING:
                raise Problem("REGISTRY_UNAVAILABLE", "too many names are being asked for", retry_after=1)
            task = asyncio.get_running_loop().create_task(self._answered(reference, registry))
            self._asking[reference] = task
            task.add_done_callback(lambda _: self._asking.pop(reference, None))
        await asyncio.wait({task})
        error = task.exception()
        if error is not None:
            raise error.again() if isinstance(error, Problem) else error

    async def _answered(self, reference: Reference, registry: AskedByName) -> None:
        async with self._turns:
            try:
                await self._blocking(registry.find, reference)
            except RegistryError as error:
                # Anybody may ask for a name: where the registry lies is not for all to know.
                log.warning("the registry could not be asked for %s: %s", reference, error)
                message = "the registry cannot be asked now"
                raise Problem("REGISTRY_UNAVAILABLE", message, retry_after=1) from None
        self._used[key(reference)] = self._clock()
        self.take(registry.known(), "registry")

    async def _blocking(self, function: Callable[..., T], *args: object) -> T:
        """In a thread, for whom it is done here: what is asked because of a request carries its trace."""
        run = copy_context().run
        return await asyncio.get_running_loop().run_in_executor(self._io, run, function, *args)

    async def run(self) -> None:
        """Looks forever, a little early each time."""
        while True:
            await asyncio.sleep(self._interval * self._chance.uniform(1 - JITTER, 1.0))
            try:
                await self.look()
            except Problem:
                continue  # said by the event; the next look may do better
