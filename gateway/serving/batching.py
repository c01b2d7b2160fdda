"""One servable's queue: merges requests that arrive together, and gives every caller the answer to its own
rows.

*Batch while busy, and per tick.* An idle model runs at once. Requests that arrived in the same turn of the
loop, or while the model was busy, share the next call. There is no timer, so batching never adds latency.
Requests merge only if their layouts and params are equal and the model allows it. A merged call that fails
runs again request by request, so that a poisoned member fails alone. A call whose process ended runs again
too; `Suspects` finds out whether its input was the cause.

Knows batches and futures; must not know models, processes or protocols.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Final, Literal, NamedTuple, TypeAlias, cast

import numpy as np

from gateway import tracing
from gateway.runners.base import Begin, RunnerCrashed
from gateway.runners.suspects import Poisoned, Suspects, digest
from gateway.serving.admission import Admission
from loaders.batch import Batch, Columns, Tensors, concat, layout, split
from loaders.worker.wire import Framed

#: The input of a request; a framed one is never merged.
Asked: TypeAlias = "Batch | Framed"
Run = Callable[[Asked, Mapping[str, Any]], Awaitable[Batch]]
DEFAULT_MAX_ROWS = 1024
_UNKNOWN: Final = object()


class Outcome(NamedTuple):
    """The answer to one request's rows, and how long it waited for its turn and for the model, in seconds.
    `work`: the call, where it is traced."""

    result: Batch
    queue_seconds: float
    predict_seconds: float
    work: tracing.Work | None = None


@dataclass(slots=True, eq=False)
class Member:
    """A request in the queue or in a call. `arrived`, `started` (its call; 0 before): times of
    `perf_counter`. `deadline`: in the loop's time. Members with the same `key` may share a call; None: it
    shares none. A request that is alone in the queue needs no key."""

    batch: Asked
    params: Mapping[str, Any]
    rows: int
    arrived: float
    deadline: float | None
    future: asyncio.Future[Outcome]
    started: float = 0.0
    _key: Hashable | None = _UNKNOWN

    @property
    def key(self) -> Hashable | None:
        if self._key is _UNKNOWN:
            self._key = _merge_key(self.batch, self.params)
        return self._key


class Batcher:
    """Calls `run` at most `slots` times at once, or `begin`, which begins the same call without a task (see
    `Runner`). `dispatched(rows)` is called for each. `traced`: each answer says which call it comes from."""

    def __init__(
        self,
        run: Run,
        begin: Begin | None = None,
        *,
        merges: bool,
        slots: int = 1,
        max_rows: int = DEFAULT_MAX_ROWS,
        admission: Admission | None = None,
        dispatched: Callable[[int], None] = lambda rows: None,
        traced: bool = False,
    ) -> None:
        self.merges = merges
        self._traced = traced
        self._run = run
        self._begin = begin
        self._slots = slots
        self._max_rows = max_rows
        self._admission = admission or Admission(1000, slots)
        self._dispatched = dispatched
        self._suspects = Suspects()
        self._queue: deque[Member] = deque()
        #: The members of each running call, by what runs it.
        self._calls: dict[asyncio.Task[None] | _Started, list[Member]] = {}
        self._scheduled = False
        self._running = 0
        self._loop = asyncio.get_running_loop()

    def __repr__(self) -> str:
        return f"<Batcher {len(self._queue)} queued, {len(self._calls)}/{self._slots} running>"

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def inflight(self) -> int:
        """The requests that wait or are being answered."""
        return len(self._queue) + self._running

    def stalled(self, future: asyncio.Future[Outcome]) -> float:
        """The seconds for which a request has got no further: since its call began, or, while it waits for
        its turn, since the newest of the running calls began; 0 if a call may begin now."""
        calls = [members for members in self._calls.values() if members]
        mine = [member for members in calls for member in members if member.future is future]
        if not mine and len(calls) < self._slots:
            return 0.0
        newest = max(member.started for members in ([mine] if mine else calls) for member in members)
        return perf_counter() - newest if newest else 0.0

    def submit(
        self, batch: Asked, params: Mapping[str, Any], deadline: float | None = None
    ) -> asyncio.Future[Outcome]:
        """Queues a request; the future has its answer. `deadline` is in the loop's time. Cancelling the
        future takes a request that was not dispatched out of the queue. Raises NotAdmitted."""
        if self._queue:
            full = len(self._queue) >= self._admission.max_queue
            # Requests that were given up take no turn, so no request waits for them.
            if full or (deadline is not None and self._queue[0].future.done()):
                self._drop_dead()
            if full or deadline is not None:
                self._admission.check(len(self._queue), self._loop.time(), deadline)
        future: asyncio.Future[Outcome] = self._loop.create_future()
        rows = 1 if batch.rows is None else batch.rows
        self._queue.append(Member(batch, params, rows, perf_counter(), deadline, future))
        if not self._scheduled and len(self._calls) < self._slots:
            # Not at once: other requests of this turn of the loop share the call.
            self._scheduled = True
            self._loop.call_soon(self._pump)
        return future

    def _drop_dead(self) -> None:
        now = self._loop.time()
        alive = [m for m in self._queue if not self._is_dead(m, now)]
        self._queue.clear()
        self._queue.extend(alive)

    def _is_dead(self, member: Member, now: float) -> bool:
        if member.future.done():
            return True
        if member.deadline is not None and now >= member.deadline:
            member.future.set_exception(TimeoutError())
            return True
        return False

    def _pump(self) -> None:
        self._scheduled = False
        while self._queue and len(self._calls) < self._slots:
            members = self._take()
            if members and not self._start(members):
                self._start_task(self._work(members), members)

    def _start(self, members: list[Member]) -> bool:
        """Starts a call without a task. Returns False if it needs one: the runner cannot begin it now, or it
        fails."""
        if self._begin is None or self._suspects:
            return False
        started, first = _Started(members), members[0]
        try:
            asked = first.batch if len(members) == 1 else _joined(members)
            if not self._begin(asked, first.params, partial(self._ended, started)):
                return False
        except Exception:  # noqa: BLE001 - it fails in the task again, which handles that
            return False
        self._calls[started] = members
        self._running += len(members)
        self._dispatched(started.rows)
        return True

    def _ended(self, call: _Started, result: Batch | None, error: Exception | None) -> None:
        members = self._calls.pop(call)
        self._running -= len(members)
        if result is None or not self._answer(members, result, call.began, call.rows):
            self._start_task(self._work(members, error or _Unequal()), members)
        elif self._queue and not self._scheduled:
            if self.merges:
                # The next turn of the loop sends the answers. After it the loop looks for requests once more:
                # the more of them share a call, the less each costs.
                self._scheduled = True
                self._loop.call_soon(self._loop.call_soon, self._pump)
            else:
                self._pump()

    def _start_task(self, work: Coroutine[Any, Any, None], members: list[Member]) -> None:
        task = self._loop.create_task(work)
        self._calls[task] = members
        task.add_done_callback(self._finished)

    async def _work(self, members: list[Member], failure: Exception | None = None) -> None:
        """Runs the calls of one slot. Without merging, the next call follows at once: waiting for more
        requests gains nothing, and under overload each turn of the loop is long. After a failure the loop
        gets a turn first: a failure may come without any wait, and a long queue would then block the loop.
        `failure`: the first call has failed already."""
        while members:
            self._running += len(members)
            try:
                together = await (self._call(members) if failure is None else self._fail(members, failure))
            finally:
                self._running -= len(members)
            if not together or self.merges:
                return
            members[:] = self._take()

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._calls.pop(task, None)
        if self._queue:
            self._pump()
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error

    def _take(self) -> list[Member]:
        """The first waiting request and all that may share its call, in order of arrival."""
        now = self._loop.time()
        queue = self._queue
        while queue:
            first = queue.popleft()
            if (first.deadline is None and not first.future.done()) or not self._is_dead(first, now):
                break
        else:
            return []
        members = [first]
        if not queue or not self.merges or (key := first.key) is None:
            return members
        rows = first.rows
        stay: list[Member] = []
        while queue:
            member = queue.popleft()
            if (member.deadline is not None or member.future.done()) and self._is_dead(member, now):
                continue
            if member.key == key and rows + member.rows <= self._max_rows:
                members.append(member)
                rows += member.rows
            else:
                stay.append(member)
                if rows >= self._max_rows:
                    break
        queue.extendleft(reversed(stay))
        return members

    async def _call(self, members: list[Member]) -> bool:
        """Calls the model. Returns True if it answered all members together."""
        digests: list[bytes] = []
        if self._suspects:
            members, digests = self._without_poison(members)
            if not members:
                return False
        call = _Started(members)
        try:
            self._dispatched(call.rows)
            result = await self._run(_joined(members), members[0].params)
        except Exception as error:  # noqa: BLE001 - whatever the model or its runner raised is the callers' to see
            return await self._fail(members, error, digests)
        if not self._answer(members, result, call.began, call.rows):
            return await self._fail(members, _Unequal(), digests)
        if digests:
            self._suspects.answered(digests)
        return True

    def _answer(self, members: list[Member], result: Batch, began: float, rows: int) -> bool:
        """Gives each member its part of the answer. Returns False if it has not one row for each of
        theirs."""
        parts: list[Batch] | None = [result]
        if len(members) > 1:
            with suppress(Exception):  # a hostile process may send anything
                parts = split(result, [member.rows for member in members])
        if parts is None or len(parts) < len(members):
            return False
        seconds = perf_counter() - began
        self._admission.finished(len(members), seconds)
        work = tracing.work(len(members), rows, seconds) if self._traced else None
        for member, part in zip(members, parts, strict=True):
            if not member.future.done():
                member.future.set_result(Outcome(part, began - member.arrived, seconds, work))
        return True

    async def _fail(
        self, members: list[Member], error: Exception, digests: Sequence[bytes] = ()
    ) -> Literal[False]:
        """Each member runs once more by itself, so that no caller pays for another: one of them made the call
        fail, or, if its process ended, none of them is known to be guilty. A request that failed alone gets
        the error, unless its process ended."""
        if isinstance(error, RunnerCrashed):
            told = digests or [digest(member.batch, member.params) for member in members]
            self._suspects.ended(told, self._loop.time(), outside=error.outside)
        elif len(members) == 1:
            _refuse(members[0], error)
            return False
        for member in members:
            if not member.future.done():
                await self._call([member])
        return False

    def _without_poison(self, members: list[Member]) -> tuple[list[Member], list[bytes]]:
        """The members that may run, with their digests; refuses the others with the reason."""
        now = self._loop.time()
        healthy: list[Member] = []
        digests: list[bytes] = []
        for member in members:
            told = digest(member.batch, member.params)
            if self._suspects.is_poison(told, now):
                if self._suspects.was_killed(told):
                    _refuse(member, RunnerCrashed("its process was killed each time it ran", outside=True))
                else:
                    _refuse(member, Poisoned("the same input ended its process each time it ran"))
            else:
                healthy.append(member)
                digests.append(told)
        return healthy, digests


class _Started:
    """A call that begins now, with so many rows."""

    __slots__ = ("began", "rows")

    def __init__(self, members: list[Member]) -> None:
        self.began = began = perf_counter()
        self.rows = 0
        for member in members:
            member.started = began
            self.rows += member.rows


class _Unequal(Exception):
    """The answer of a merged call has not one row for each of its rows."""


def _merge_key(batch: Asked, params: Mapping[str, Any]) -> Hashable | None:
    shape = None if isinstance(batch, Framed) else layout(batch)
    if shape is None or not params:
        return shape
    key = (shape, tuple(params.items()))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _joined(members: list[Member]) -> Asked:
    if len(members) == 1:
        return members[0].batch
    return concat([cast("Batch", member.batch) for member in members])


def _refuse(member: Member, error: Exception) -> None:
    if not member.future.done():
        member.future.set_exception(error)


def repeated(batch: Batch, times: int) -> Batch | None:
    """The first row of a batch, repeated `times` times; None if it has no rows."""
    if layout(batch) is None or not batch.rows:
        return None
    parts = split(batch, [1, batch.rows - 1])
    return None if parts is None else concat([parts[0]] * times)


def agree(single: Batch, many: Batch, times: int) -> bool:
    """Whether `many` is the answer `single`, repeated `times` times, within the tolerance of its dtypes."""
    if single.rows != 1 or many.rows != times or type(single) is not type(many):
        return False
    if isinstance(single, Columns | Tensors) and isinstance(many, Columns | Tensors):
        one: Mapping[Any, Any] = single.arrays
        all_: Mapping[Any, Any] = many.arrays
        if one.keys() != all_.keys():
            return False
        return all(_close(array, all_[name], times) for name, array in one.items())
    return bool(many.value == single.value * times)  # type: ignore[union-attr]


def _close(one: Any, many: Any, times: int) -> bool:
    expected = np.repeat(one, times, axis=0)
    if expected.shape != many.shape:
        return False
    if expected.dtype.kind in "fc":
        tolerance = 1e-9 if expected.dtype.itemsize >= 8 else 1e-4
        return bool(np.allclose(expected, many, rtol=tolerance, atol=tolerance, equal_nan=True))
    return bool(np.array_equal(expected, many))
