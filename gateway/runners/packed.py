"""The runner of a small model that shares a process with others: it has a place in a pack, or for a reason
its own process.

It moves out if its call ended the pack's process, if its calls are slow, if it is hot, or if its load there
failed. A suspect returns when it has proved itself. While it moves, its old place answers calls.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Hashable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from gateway.runners import calls
from gateway.runners.base import (
    FAILURES,
    ModelError,
    NoProcess,
    RunnerCrashed,
    RunnerTimeout,
    Then,
    signature_of,
)
from gateway.runners.packs import Pack, Packs
from gateway.runners.pending import Direct, NotReached, Reply
from gateway.runners.places import Conditions, Place
from loaders.worker import wire
from loaders.worker.process import LOADED_AGAIN

if TYPE_CHECKING:
    from gateway.runners.process import Observe, ProcessRunner
    from loaders.batch import Batch
    from loaders.package import Package
    from loaders.signature import Signature

_LOG: Final = logging.getLogger("gateway.models")

#: A longer call, in seconds, is slow; a model with this many slow calls in a row moves out permanently.
SLOW, SLOW_CALLS = 0.25, 3
#: A suspect has proved itself after this many answers alone, over this many seconds, without a crash.
PROOF_ANSWERS, PROOF_SECONDS = 20, 60.0
#: A model that ended or blocked a pack this many times stays alone.
CONVICTED: Final = 2


class Record:
    """The facts about a package's files that are kept while the gateway runs, loaded or not: why they may not
    share a process, and how often they were suspects."""

    __slots__ = ("suspected", "verdict")

    def __init__(self) -> None:
        self.suspected = 0
        self.verdict: str | None = None


class PackedRunner:
    """One version with a place in a pack. `alone` makes the runner with its own process, and takes the
    reason. `record` outlives it. `timeout`, `load_timeout`: the seconds that a call or a load may take, None
    for no limit."""

    slots = 1
    spare: bool | None = None

    def __init__(
        self,
        package: Package,
        config: Mapping[str, Any],
        *,
        packs: Packs,
        conditions: Conditions,
        alone: Callable[[str], ProcessRunner],
        record: Record,
        timeout: float | None = None,
        load_timeout: float | None = 600.0,
        observe: Observe = lambda what, reason: None,
        placement: str = "",
    ) -> None:
        self.package_path = str(package.path)
        self.package_json = package.to_json()
        self.config = dict(config)
        self.load_timeout = load_timeout
        self.last_asked = 0.0
        self._pack: Pack = packs.of(conditions)
        self._alone = alone
        self._record = record
        self._timeout = timeout
        self._observe = observe
        self._in_pack = placement
        self._place: Place | None = None
        self.busy_seconds = 0.0
        self._own: ProcessRunner | None = None
        self._own_calls = 0
        self._own_idle = asyncio.Event()
        self._moved_why = ""
        #: When it may return to the pack, in the loop's time; None: it stays alone.
        self._back_at: float | None = None
        self._back_after = 0
        self._answers = 0
        self._slow = 0
        self._moving: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._closed = False
        self._merges = False
        self._known: Mapping[str, Any] = {}
        self._accepted: Signature | None = None
        self._prewarms = ""
        self._prewarmed = False
        self._confined: dict[str, str] = {}
        self._loop = asyncio.get_running_loop()

    def __repr__(self) -> str:
        return f"<PackedRunner {self.isolation}: {self.placement}>"

    # ---- State

    @property
    def merges(self) -> bool:
        return self._merges if self._own is None else self._own.merges

    @property
    def known(self) -> Mapping[str, Any]:
        return self._known if self._own is None else self._own.known

    @property
    def accepted(self) -> Signature | None:
        return self._accepted if self._own is None else self._own.accepted

    @property
    def load_peak(self) -> int:
        return 0 if self._own is None else self._own.load_peak

    @property
    def measured_bytes(self) -> int | None:
        if self._own is not None:
            return self._own.measured_bytes
        return None if self._place is None else self._place.bytes

    def recent_bytes(self) -> int | None:
        """Its bytes. The growth of the pack since its last measurement counts for the last called model."""
        if self._own is not None:
            return self._own.recent_bytes()
        place = self._place
        if place is None:
            return None
        process = place.process
        if process.last is not place or process.worker.gone:
            return place.bytes
        return place.bytes + max(0, process.worker.recent_memory().private - process.private)

    @property
    def alike(self) -> Hashable | None:
        return (self._pack.conditions, repr(self.config)) if self._own is None else None

    @property
    def isolation(self) -> str:
        return "pack" if self._own is None else "process"

    @property
    def placement(self) -> str:
        return self._in_pack if self._own is None else self._moved_why

    @property
    def stuck(self) -> str | None:
        if self._own is not None:
            return self._own.stuck
        return None if self._place is None else self._place.process.worker.pulse.stuck

    def status(self) -> dict[str, Any]:
        if self._own is not None:
            return {**self._own.status(), "isolation": self.isolation, "placement": self.placement}
        places = [] if self._place is None else [self._place]
        return {
            "isolation": self.isolation,
            "placement": self.placement,
            "processes": [
                {
                    "pid": place.process.worker.pid,
                    "busy": place.process.worker.busy,
                    "bytes": place.bytes,
                    "spare": False,
                    "stuck": self.stuck,
                }
                for place in places
            ],
            "stuck": self.stuck,
            "start": self._pack.conditions.environment.start,
            "crashes": self._record.suspected,
            "quarantined": None,
            "load_peak_bytes": self.load_peak,
            "confinement": dict(self._confined),
            "warm_up": self._prewarms,
        }

    def start_spare(self) -> None:
        """Does nothing: another process for the pack starts in milliseconds."""

    async def drop_spare(self) -> None: ...

    def stop(self, reason: str) -> None:
        if self._own is not None:
            self._own.stop(reason)
        elif self._place is not None:
            self._suspect(reason)
            self._place.process.expected = True
            self._place.process.worker.kill(RunnerCrashed(reason))

    def tend(self) -> None:
        if self._own is None:
            return
        self._own.tend()
        if (
            self._back_at is not None
            and self._loop.time() >= self._back_at
            and self._answers >= self._back_after
            and self._own.quarantine is None
            and self._moving is None
        ):
            self._begin(self._come_back())

    # ---- its life

    async def start(self) -> None:
        await self._placed()

    async def finish_prewarm(self) -> None:
        prewarmed, self._prewarmed = self._prewarmed, False
        if self._own is not None:
            await self._own.finish_prewarm()
        elif prewarmed and self._prewarms == LOADED_AGAIN and self._place is not None:
            await self.take_place_again(self._place)

    def predict(self, batch: Batch | wire.Framed, params: Mapping[str, Any]) -> Coroutine[Any, Any, Batch]:
        return self._asked("predict", batch, params)

    def prewarm(self, batch: Batch, params: Mapping[str, Any]) -> Coroutine[Any, Any, Batch]:
        self._prewarmed = True
        return self._asked("prewarm", batch, params)

    async def _asked(self, op: str, batch: Batch | wire.Framed, params: Mapping[str, Any]) -> Batch:
        while True:
            place = self._place
            if self._own is not None:
                return await self._ask_own(op, batch, params)
            if place is None or place.process.left or place.process.worker.gone:
                await self._placed()
                continue
            pieces = calls.pieces(op, batch, params) or await calls.pieces_apart(op, batch, params)
            if place is not self._place:
                continue  # it has moved meanwhile
            try:
                reply = await place.ask(pieces, self._timeout)
            except NotReached:
                continue
            except (RunnerTimeout, RunnerCrashed) as error:
                raise self._ended_in(error) from None
            return self._answer_of(place, reply)

    def begin(self, batch: Batch | wire.Framed, params: Mapping[str, Any], then: Then) -> bool:
        if self._own is not None:
            return self._begin_own(self._own, batch, params, then)
        place = self._place
        pieces = None if place is None else calls.pieces("predict", batch, params)
        if place is None or pieces is None:
            return False

        def failed(error: Exception) -> None:
            if isinstance(error, NotReached):
                self._later(self._elsewhere(batch, params, then))
            elif isinstance(error, RunnerTimeout | RunnerCrashed):
                then(None, self._ended_in(error))
            else:
                then(None, error)

        answer = Direct(partial(self._answer_of, place), then, failed)
        try:
            place.send(pieces, self._timeout, answer)
        except NotReached:
            return False
        return True

    async def _elsewhere(self, batch: Batch | wire.Framed, params: Mapping[str, Any], then: Then) -> None:
        """Calls the model again after a process that did not begin the call."""
        try:
            answer = await self._asked("predict", batch, params)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller waits for it
            then(None, error)
        else:
            then(answer, None)

    def _answer_of(self, place: Place, reply: Reply) -> Batch:
        try:
            return calls.answer_of(reply, place.directory)
        except RunnerCrashed as broken:
            place.process.worker.kill(broken)
            raise

    def _ended_in(self, error: RunnerTimeout | RunnerCrashed) -> Exception:
        """Moves the model out after a call that ended its process or blocked it. Returns its exception."""
        if isinstance(error, RunnerTimeout):
            self._suspect(f"a call of it did not end within {self._timeout:g} s")
            self._observe("timeout", "its call in a pack took too long")
        elif self._closed:
            return NoProcess("the model was unloaded")
        else:
            self._suspect(f"{error} while it worked on a call of this model")
            self._observe("crashed", str(error))
        return error

    def _begin_own(
        self, own: ProcessRunner, batch: Batch | wire.Framed, params: Mapping[str, Any], then: Then
    ) -> bool:
        def ended(answer: Batch | None, error: Exception | None) -> None:
            self._own_ended(error)
            then(answer, error)

        if not own.begin(batch, params, ended):
            return False
        self._own_calls += 1
        self._own_idle.clear()
        return True

    async def _ask_own(self, op: str, batch: Batch | wire.Framed, params: Mapping[str, Any]) -> Batch:
        own = self._own
        assert own is not None
        self._own_calls += 1
        self._own_idle.clear()
        failure: BaseException | None = None
        try:
            return await (own.prewarm(batch, params) if op == "prewarm" else own.predict(batch, params))  # type: ignore[arg-type]
        except BaseException as error:
            failure = error
            raise
        finally:
            self._own_ended(failure)

    def _own_ended(self, failure: BaseException | None) -> None:
        """A call of its own process has ended."""
        self._own_calls -= 1
        if not self._own_calls:
            self._own_idle.set()
        if failure is None:
            self._answers += 1
        elif isinstance(failure, RunnerCrashed | RunnerTimeout):
            self._answers = 0
            if self._back_at is not None:
                self._back_at = self._loop.time() + PROOF_SECONDS

    async def close(self) -> None:
        self._closed = True
        if self._moving is not None:
            self._moving.cancel()
            await asyncio.wait({self._moving})
        if self._background:
            await asyncio.wait(set(self._background))
        place, self._place = self._place, None
        own, self._own = self._own, None
        if own is not None:
            await own.close()
        if place is not None:
            await place.process.unload(place)

    # ---- moving

    @property
    def pids(self) -> list[int]:
        own = [] if self._own is None else self._own.pids
        return own if self._place is None else [*own, self._place.process.worker.pid]

    def worked(self, seconds: float) -> None:
        """Its pack has answered a call of it, which took `seconds`."""
        self.busy_seconds += seconds
        self.last_asked = self._loop.time()
        self._slow = self._slow + 1 if seconds > SLOW else 0
        if self._slow >= SLOW_CALLS and self._own is None:
            self._slow = 0
            self.move_out(f"its calls are slow: {SLOW_CALLS} in a row took over {SLOW:g} s")

    def move_out(self, reason: str, *, back: float | None = None) -> None:
        """Begins to move to its own process; until then its old place answers. `back`: the seconds after
        which it may return; None: these files stay alone."""
        if back is None:
            self._record.verdict = self._record.verdict or reason
        if self._own is None and self._moving is None and not self._closed:
            self._begin(self._go_alone(reason, back))

    def _suspect(self, reason: str) -> None:
        self._record.suspected += 1
        if self._record.suspected >= CONVICTED:
            self._record.verdict = self._record.verdict or f"{reason}, and not for the first time"
        self._moved_why = reason
        place, self._place = self._place, None
        if place is not None:
            place.process.places.pop(place.number, None)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._moving = asyncio.ensure_future(work)
        task.add_done_callback(self._moved)

    def _moved(self, task: asyncio.Task[None]) -> None:
        if self._moving is task:
            self._moving = None
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.debug("a model did not move: %s", error)

    async def _placed(self) -> None:
        """Returns when it has a place or a process. Raises what loading raises."""
        if self._closed:
            raise NoProcess("the model was unloaded")
        if self._moving is None:
            self._begin(self._take_place())
        assert self._moving is not None
        await asyncio.shield(self._moving)

    async def _take_place(self) -> None:
        self._place = None
        back: float | None = PROOF_SECONDS
        reason = self._record.verdict
        if reason is not None:
            back = None
        elif self._moved_why:
            reason = self._moved_why
        else:
            reason = self._pack.refuses()
        if reason is None:
            try:
                await self._sit_down()
                return
            except (ModelError, RunnerTimeout) as error:
                # Alone it reports the reason, as any model does; or it needs something that a pack lacks.
                _LOG.debug("a load in a pack failed: %s", error)
                reason, back = f"it could not be loaded in a pack: {error}", None
            except (RunnerCrashed, OSError) as error:
                self._record.suspected += 1
                reason = f"it could not be loaded in a pack: {error}"
        await self._go_alone(reason, back)

    async def _sit_down(self) -> None:
        """Takes another place. The caller gives up the current one."""
        before = self._place
        place = await self._pack.take_in(self)
        if self._closed or self._place is not before:
            await place.process.unload(place)  # it left, or moved elsewhere meanwhile
            raise NoProcess("the model was unloaded")
        self._place = place
        self._merges = bool(place.loaded["merges"])
        self._known = place.loaded["known"]
        self._accepted = signature_of(place.loaded)
        self._prewarms = str(place.loaded["prewarms"])
        self._confined = place.process.worker.loaded["confinement"]

    async def take_place_again(self, old: Place) -> None:
        """Moves to the pack's new process; if this fails, the next call takes a place. Raises nothing."""
        if self._place is old and not self._closed:
            with suppress(*FAILURES, OSError):
                await self._sit_down()
        if self._place is old:
            self._place = None
        await old.process.unload(old)

    async def _go_alone(self, reason: str, back: float | None) -> None:
        own = self._alone(reason)
        try:
            await own.start()
        except BaseException:
            await own.close()
            raise
        self._own, self._moved_why = own, reason
        self._own_idle.set()
        self._answers, self._back_after = 0, PROOF_ANSWERS
        self._back_at = None if back is None else self._loop.time() + back
        place, self._place = self._place, None
        if place is not None:
            self._observe("moved", reason)
            self._later(place.process.unload(place))

    async def _come_back(self) -> None:
        if self._record.verdict is not None or self._pack.refuses() is not None:
            self._back_at = self._loop.time() + PROOF_SECONDS
            return
        try:
            await self._sit_down()
        except (*FAILURES, OSError):
            self._back_at = None
            raise
        own, self._own, self._moved_why = self._own, None, ""
        assert own is not None
        self._later(self._close_when_idle(own))

    async def _close_when_idle(self, own: ProcessRunner) -> None:
        await self._own_idle.wait()
        await own.close()

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
