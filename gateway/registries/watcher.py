"""Reads the registry at intervals, and passes its content to the aliases.

A registry that cannot be read, or that is not valid, changes nothing: the last valid snapshot stays, and
reads become rarer until one succeeds. Only the watcher knows that some registries are queried name by name.
Must not know any kind of registry, or how the snapshot is used.
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

from gateway import backoff
from gateway.errors import Problem, pathless
from gateway.events import Emit, RegistryFailed, RegistryRead
from gateway.names import Reference
from gateway.registries.base import NotInRegistry, Registry, RegistryError, RegistryInvalid, Snapshot
from gateway.registries.resolution import key, resolve

#: Seconds before a name that was absent, or could not be queried, is queried again.
FORGET_ABSENT = 2.0
#: After this many failed reads in a row, requests trigger no query until the next read.
SILENT_AFTER = 3
log = logging.getLogger("gateway.watch")

#: Seconds without use after which a name is no longer polled if none of its versions is loaded. Otherwise a
#: client that once requested every model of a large server would cost one call per model at every poll.
#: An hour is longer than most pauses in traffic; a later request queries the name again.
FORGET_UNUSED = 3600.0

#: The most queries for single names that run at once, and that may wait.
QUESTIONS = 4
QUESTIONS_WAITING = 256
#: A poll comes up to this share early, so that many gateways do not ask in step.
JITTER = 0.2
_UNASKED = object()
T = TypeVar("T")


class Watch:
    """`apply` gets every changed snapshot, and who moved it. `remember` saves it for a restart.

    For a registry that is queried name by name, `in_use` returns the names in use without recent requests;
    `forget` gets the names that were unused for `FORGET_UNUSED`, before a snapshot without them.
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
        #: The content that was taken last; None before the first.
        self.content: Snapshot | None = None
        self._read_at: float | None = None
        self._error: str | None = None
        self._failure: RegistryError | None = None
        self._looking: asyncio.Task[None] | None = None
        self._writes = 0
        self._chance = random.Random()
        self._failures = 0
        #: Until when (on `clock`) a registry that failed is not polled, and until when it is not asked
        #: for what a request needs either.
        self._paused_until = self._silent_until = -float("inf")
        self._asking: dict[Reference, asyncio.Task[None]] = {}
        self._turns = asyncio.Semaphore(QUESTIONS)
        self._absent: TTLCache[Reference | str, Problem | None] = TTLCache(10_000, FORGET_ABSENT, clock)

    @property
    def seen(self) -> bool:
        """Returns whether there is a snapshot to serve from, fresh or remembered."""
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
        """Takes a snapshot from a write, or the remembered one at the start. `age`: the seconds since the
        whole registry was read."""
        self._writes += 1
        if age is not None:
            self._read_at = self._clock() - age
        self._take(snapshot, moved_by)

    def _take(self, snapshot: Snapshot, moved_by: str) -> None:
        if snapshot.stamp != self._stamp:
            self._apply(snapshot, moved_by)
            self.content = snapshot
            self._stamp = snapshot.stamp
            self._remember(snapshot)

    async def look(self) -> None:
        """Reads the registry now; simultaneous callers share one read. Raises REGISTRY_UNAVAILABLE."""
        await asyncio.wait({self.looking()})
        if self._error is not None:
            raise self._unavailable()

    def looking(self, *, quiet: bool = False) -> asyncio.Task[None]:
        """The current read; starts one if there is none. `quiet`: the caller reports failures."""
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._look(quiet))
        return self._looking

    @property
    def failure(self) -> RegistryError | None:
        """Why the last read failed; None if it succeeded, or there was none."""
        return self._failure

    def _unavailable(self) -> Problem:
        pause = max(self._interval, self._paused_until - self._clock())
        message, failure = pathless(self._error or "not read yet"), self._failure
        hint = failure.hint if isinstance(failure, RegistryInvalid) else None  # it does not pass by itself
        return Problem("REGISTRY_UNAVAILABLE", message, hint=hint, retry_after=pause)

    async def _look(self, quiet: bool) -> None:
        try:
            while True:
                writes = self._writes
                snapshot = await self._blocking(self._registry.read)
                if self._registry.partial:
                    self._forget_unused()
                    snapshot = self._registry.known() or snapshot  # with what was found meanwhile
                    break
                if writes == self._writes:
                    break
                # A newer snapshot came during this read: the read may be older.
        except RegistryError as error:
            self._failed(error, quiet=quiet)
            self._error, self._failure = str(error), error
        except Exception as error:
            # A bug must be visible, and must not look like an unchanged registry.
            log.exception("cannot read the registry")
            self._error = f"the registry could not be read: {type(error).__name__}"
            self._failed(RegistryError(self._error))
        else:
            self._read_at = self._clock()
            recovered = self._error is not None
            self._error = self._failure = None
            self._failures, self._paused_until, self._silent_until = 0, -float("inf"), -float("inf")
            changed = snapshot.stamp != self._stamp
            self._emit(RegistryRead(len(snapshot.models), changed, recovered))
            self._take(snapshot, "registry")
        finally:
            self._looking = None

    def _failed(self, error: RegistryError, *, quiet: bool = False) -> None:
        """Counts a failure, and decides how long to pause. A registry with invalid content answers, so it is
        read at its interval, and a correction takes effect soon."""
        self._failures += 1
        asked: float | None = getattr(error, "retry_after", None)
        if not isinstance(error, RegistryInvalid):
            pause = backoff.pause(
                self._failures,
                first=self._interval,
                longest=max(self._registry.longest_pause, self._interval),
                asked=asked,
                chance=self._chance,
            )
            self._paused_until = max(self._paused_until, self._clock() + pause)
        if asked is not None or self._failures >= SILENT_AFTER:
            self._silent_until = self._paused_until
        self._emit(RegistryFailed(str(error), repeated=quiet or str(error) == self._error))

    def _forget_unused(self) -> None:
        """Runs in the same turn of the loop as taking the snapshot, so that no name is requested in
        between."""
        now = self._clock()
        used = self._in_use()
        known = self._registry.known()
        names = () if known is None else known.models
        self._used = {name: now if name in used else self._used.get(name, now) for name in names}
        unused = {name for name, at in self._used.items() if now - at > FORGET_UNUSED}
        if unused:
            log.info("stopped following %d models: not used for %.0f s", len(unused), FORGET_UNUSED)
            self._registry.forget(unused)
            self._forget(unused)

    async def ask(self, reference: Reference) -> None:
        """Queries the registry for one name now: before an action on it, or because it has changed. Raises
        REGISTRY_UNAVAILABLE."""
        if self._registry.partial:
            await self._ask(reference)
        else:
            await self.look()

    async def ensure(self, reference: Reference, snapshot: Snapshot) -> None:
        """Queries what `snapshot` lacks. Raises REGISTRY_UNAVAILABLE."""
        try:
            resolve(snapshot, reference)
        except NotInRegistry:
            await self.find(reference)

    async def find(self, reference: Reference) -> bool:
        """Queries a reference that the last snapshot lacks. Returns whether it did: a registry that is read
        whole needs no query, and a name that was absent a moment ago is not queried again. (A version may
        have been registered just now, so a version is always queried.) Raises REGISTRY_UNAVAILABLE."""
        if not self._registry.partial:
            if not self.seen:
                raise self._unavailable()
            return False
        snapshot = self._registry.known()
        known = snapshot is not None and key(reference) in snapshot.models
        what = reference if known else key(reference)
        remembered = self._absent.get(what, _UNASKED)
        if isinstance(remembered, Problem):
            raise remembered.again()
        if remembered is None and not (known and reference.version is not None):
            return False
        if (pause := self._silent_until - self._clock()) > 0:
            # Its server wants a pause, or does not answer: more queries would make it worse.
            raise Problem("REGISTRY_UNAVAILABLE", "the registry cannot be queried now", retry_after=pause)
        try:
            await self._ask(reference)
        except Problem as problem:
            self._absent[what] = problem
            raise
        # Once the name exists, this code does not run again.
        self._absent[what] = None
        return True

    async def _ask(self, reference: Reference) -> None:
        """Simultaneous callers with the same query share the answer."""
        task = self._asking.get(reference)
        if task is None:
            if len(self._asking) >= QUESTIONS_WAITING:
                raise Problem(
                    "REGISTRY_UNAVAILABLE",
                    "too many names are being looked up in the registry",
                    retry_after=1,
                )
            task = asyncio.get_running_loop().create_task(self._answered(reference))
            self._asking[reference] = task
            task.add_done_callback(lambda _: self._asking.pop(reference, None))
        await asyncio.wait({task})
        error = task.exception()
        if error is not None:
            raise error.again() if isinstance(error, Problem) else error

    async def _answered(self, reference: Reference) -> None:
        async with self._turns:
            try:
                snapshot = await self._blocking(self._registry.find, reference)
            except Exception as error:
                if not isinstance(error, RegistryError):
                    log.exception("cannot read the registry's answer about %s", reference)
                self._emit(RegistryFailed(f"query for {reference}: {error}", repeated=True))
                asked = getattr(error, "retry_after", None)
                if asked is not None:
                    self._paused_until = max(
                        self._paused_until, self._clock() + backoff.pause(1, asked=asked)
                    )
                # Any client may request a name, and must not learn where the registry is.
                log.warning("the registry could not be queried for %s: %s", reference, error)
                message = "the registry cannot be queried now"
                raise Problem("REGISTRY_UNAVAILABLE", message, retry_after=asked or 1) from None
        self._used[key(reference)] = self._clock()
        self.take(snapshot, "registry")

    async def _blocking(self, function: Callable[..., T], *args: object) -> T:
        """Calls `function` in a thread with the caller's context, so that queries of a request carry its
        trace."""
        run = copy_context().run
        return await asyncio.get_running_loop().run_in_executor(self._io, run, function, *args)

    async def run(self) -> None:
        """Reads the registry repeatedly: a little early each time, the first time at a random moment of the
        interval (many gateways may have started at once), and with growing pauses while it fails."""
        share = self._chance.random()
        while True:
            due = self._clock() + self._interval * share
            # In steps: a read that succeeds for somebody else ends the pause.
            while (left := max(due, self._paused_until) - self._clock()) > 0:  # noqa: ASYNC110
                await asyncio.sleep(min(left, self._interval))
            share = self._chance.uniform(1 - JITTER, 1.0)
            try:
                await self.look()
            except Problem:
                continue  # the event has reported it; the next read may succeed
