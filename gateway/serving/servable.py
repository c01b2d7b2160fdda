"""One version's life, top to bottom: fetch → build → reserve → load → warm up → serve → drain → close.

A servable knows its own version; it must not know aliases, caches or other servables. The manager decides
about memory and about the order of loads; the code here is a straight line.

Theory of operation. A servable is always in one `Phase`. Only `move` changes it, and only along
`TRANSITIONS`: any other step raises `IllegalTransition`, because it is a bug of the caller. `status`, which
`/models` shows, follows from the phase. This is the whole table, as `diagram()` prints it:

    fetching ──fetched──► building
    fetching ──fail──► failed
    building ──built──► queued
    building ──fail──► failed
    queued ──begin──► waiting for memory
    queued ──fail──► failed
    waiting for memory ──granted──► loading
    waiting for memory ──fail──► failed
    loading ──loaded──► warming up
    loading ──fail──► failed
    warming up ──ready──► serving
    warming up ──fail──► failed
    serving ──retire──► draining
    serving ──close──► closing
    draining ──close──► closing
    closing ──closed──► closed
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from gateway.runners.priority import Background
from gateway.serving.admission import Admission
from gateway.serving.batching import Batcher
from gateway.serving.recent import Recent
from gateway.serving.warmup import WarmUps

if TYPE_CHECKING:
    from gateway.artifacts.packages import Prepared
    from gateway.errors import Problem
    from gateway.registries.base import Version
    from gateway.runners.base import Runner
    from gateway.settings import Settings
    from loaders.enforcement import Mode, Rules

_NO_RULES: Final[tuple[None, Rules]] = (None, (None, "strict", False, False))
WithRuntime = Callable[["Prepared", Callable[[str], None]], Awaitable["Prepared"]]


class Status(enum.Enum):
    """What `/models` shows. A servable that does not exist is UNLOADED."""

    UNLOADED = "UNLOADED"
    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "DRAINING"
    FAILED = "FAILED"


class Phase(enum.Enum):
    """The phase of a servable; operators see the value."""

    FETCHING = "fetching"
    BUILDING = "building"
    QUEUED = "queued"
    RESERVING = "waiting for memory"
    LOADING = "loading"
    WARMING = "warming up"
    SERVING = "serving"
    DRAINING = "draining"
    CLOSING = "closing"
    CLOSED = "closed"
    FAILED = "failed"


class Step(enum.Enum):
    """The steps that a servable can take."""

    FETCHED = "fetched"
    BUILT = "built"
    BEGIN = "begin"
    GRANTED = "granted"
    LOADED = "loaded"
    READY = "ready"
    RETIRE = "retire"
    CLOSE = "close"
    CLOSED = "closed"
    FAIL = "fail"


TRANSITIONS: Final[dict[Phase, dict[Step, Phase]]] = {
    Phase.FETCHING: {Step.FETCHED: Phase.BUILDING, Step.FAIL: Phase.FAILED},
    Phase.BUILDING: {Step.BUILT: Phase.QUEUED, Step.FAIL: Phase.FAILED},
    Phase.QUEUED: {Step.BEGIN: Phase.RESERVING, Step.FAIL: Phase.FAILED},
    Phase.RESERVING: {Step.GRANTED: Phase.LOADING, Step.FAIL: Phase.FAILED},
    Phase.LOADING: {Step.LOADED: Phase.WARMING, Step.FAIL: Phase.FAILED},
    Phase.WARMING: {Step.READY: Phase.SERVING, Step.FAIL: Phase.FAILED},
    Phase.SERVING: {Step.RETIRE: Phase.DRAINING, Step.CLOSE: Phase.CLOSING},
    Phase.DRAINING: {Step.CLOSE: Phase.CLOSING},
    Phase.CLOSING: {Step.CLOSED: Phase.CLOSED},
    Phase.CLOSED: {},
    Phase.FAILED: {},
}

STATUS: Final[dict[Phase, Status]] = {
    Phase.FETCHING: Status.LOADING,
    Phase.BUILDING: Status.LOADING,
    Phase.QUEUED: Status.LOADING,
    Phase.RESERVING: Status.LOADING,
    Phase.LOADING: Status.LOADING,
    Phase.WARMING: Status.LOADING,
    Phase.SERVING: Status.READY,
    Phase.DRAINING: Status.DRAINING,
    Phase.CLOSING: Status.DRAINING,
    Phase.CLOSED: Status.UNLOADED,
    Phase.FAILED: Status.FAILED,
}


class IllegalTransition(RuntimeError):
    """The phase of a servable does not allow the step: a bug of the caller."""


def diagram() -> str:
    """`TRANSITIONS` as text, one line per step. The docstring of this module shows it."""
    return "\n".join(
        f"{phase.value} ──{step.value}──► {after.value}"
        for phase, steps in TRANSITIONS.items()
        for step, after in steps.items()
    )


@dataclass(frozen=True, slots=True)
class Options:
    """The operator's settings for one model. `enforcement`: None means each protocol's own. `positional`:
    rows without names are read by position. `pin`: the model is never evicted. `idle_ttl`: it is unloaded
    after this many seconds without a request. `check_output`: the share of answers compared with the output
    schema. `warm_up`: it answers its own example before it serves. `capture`: the share of the answered
    requests that is kept. `traced`: answers say which call they come from. `warm_ups`: gives
    it its example."""

    enforcement: Mode | None = None
    positional: bool = False
    max_queue: int = 1000
    max_rows: int = 1024
    batch: bool = True
    pin: bool = False
    idle_ttl: float | None = None
    check_output: float = 0.0
    warm_up: bool = True
    capture: float = 0.0
    traced: bool = False
    warm_ups: WarmUps = field(default_factory=WarmUps)

    @classmethod
    def of(
        cls,
        settings: Settings,
        name: str,
        *,
        traced: bool = False,
        warm_ups: WarmUps | None = None,
    ) -> Options:
        """The settings for the model `name`."""
        own = settings.for_model(name)
        return cls(
            enforcement=own.enforcement,
            positional=own.positional,
            max_queue=settings.max_queue,
            max_rows=own.batch.max_rows,
            batch=own.batch.enabled,
            pin=own.pin,
            idle_ttl=own.idle_ttl,
            check_output=own.check_output,
            warm_up=own.warm_up,
            capture=0.0 if own.capture is None else own.capture.share,
            traced=traced,
            warm_ups=warm_ups or WarmUps(),
        )


class Servable:
    """One version, loaded or loading. Only the event loop uses it; only `move` changes its phase."""

    def __init__(self, version: Version, options: Options) -> None:
        self.version = version
        self.options = options
        self.phase = Phase.FETCHING
        self.status = STATUS[self.phase]
        #: Its phases so far, and when each began, in nanoseconds since the epoch.
        self.phases = [(self.phase, time.time_ns())]
        #: When its load began, in the manager's time, without the time of the fetch.
        self.began: float | None = None
        self.problem: Problem | None = None
        self.prepared: Prepared | None = None
        self.warnings: tuple[str, ...] = ()
        #: The current step of a build.
        self.building: str | None = None
        #: Why it runs in another environment than its own, which each answer must say; None if it does not.
        self.mismatch: tuple[str, ...] | None = None
        #: How the answer to its example differs from its output schema; None if it has not answered one.
        self.misfits: tuple[str, ...] | None = None
        #: Why it is unloaded, from `Manager.retire` on.
        self.retiring: str | None = None
        #: Loaded only for a dry run: its load is not recorded, unless `announce` is called later.
        self.dry_run = False
        self.announce: Callable[[], None] | None = None
        #: No alias needs its load any more: it ends as soon as no request waits for it.
        self.abandoned = False
        self.gone = asyncio.Event()
        self.recent = Recent()
        self._runner: Runner | None = None
        self._closing: asyncio.Future[None] | None = None
        self._batcher: Batcher | None = None
        self.background = Background()
        #: `rules` by its arguments, each for one value of `prepared`.
        self._rules: dict[tuple[bool, bool], tuple[Prepared | None, Rules]] = {}

    def __repr__(self) -> str:
        return f"<Servable {self.version} {self.status.value} ({self.phase.value})>"

    def move(self, step: Step) -> None:
        """Takes one step of `TRANSITIONS`. Raises IllegalTransition."""
        after = TRANSITIONS[self.phase].get(step)
        if after is None:
            raise IllegalTransition(f"{self!r} cannot {step.value}")
        self.phase, self.status = after, STATUS[after]
        self.phases.append((after, time.time_ns()))

    def fail(self, problem: Problem) -> None:
        """Ends a load. Callers that wait for it get `problem`."""
        self.move(Step.FAIL)
        self.problem = problem

    async def prepare(
        self,
        prepare: Callable[[Version], Awaitable[Prepared]],
        prepared: Prepared | None = None,
        with_runtime: WithRuntime | None = None,
    ) -> None:
        """Fetches, verifies and reads its files, or uses `prepared` if the caller already has them. Then
        `with_runtime` finds where it runs, and builds its environment if there is none yet."""
        self.prepared = await prepare(self.version) if prepared is None else prepared
        self.move(Step.FETCHED)
        if with_runtime is not None:
            self.prepared = await with_runtime(self.prepared, self._building)
            self.mismatch = _mismatch(self.prepared)
        self.move(Step.BUILT)

    def _building(self, step: str) -> None:
        """Called by the thread that builds."""
        self.building = step

    async def load(
        self,
        reserve: Callable[[int], Awaitable[None]],
        open_runner: Callable[[Prepared], Runner],
        dispatched: Callable[[int], None],
    ) -> int | None:
        """Makes it ready to answer, after `prepare`. Returns its measured bytes, None where they cannot be
        measured.

        `reserve` returns when that many bytes in all are this servable's. Raises what its steps raise,
        and leaves nothing running then.
        """
        self.move(Step.BEGIN)
        prepared = self.prepared
        assert prepared is not None
        await reserve(prepared.estimate)
        self.move(Step.GRANTED)
        # Known from here on: a model that grows without end while it loads must be stoppable.
        self._runner = runner = open_runner(prepared)
        try:
            await runner.start()
            self.move(Step.LOADED)
            if runner.accepted is not None:
                self.prepared = prepared = replace(prepared, accepted=runner.accepted)
            warmed = await self.options.warm_ups.run(
                runner, prepared, self.rules(), wanted=self.options.warm_up
            )
            self.warnings, self.misfits = warmed.warnings, warmed.misfits
            await runner.finish_prewarm()
            measured = runner.measured_bytes
            if measured is not None:
                await reserve(measured)
        except BaseException:
            self._runner = None
            await self._close_to_the_end(runner)
            raise
        self._batcher = Batcher(
            runner.predict,
            runner.begin,
            merges=warmed.merges and self.options.batch,
            slots=runner.slots,
            max_rows=self.options.max_rows,
            admission=Admission(self.options.max_queue, runner.slots),
            dispatched=dispatched,
            traced=self.options.traced,
        )
        self.move(Step.READY)
        return measured

    @property
    def batcher(self) -> Batcher:
        if self._batcher is None:
            raise RuntimeError(f"{self!r} was used before it was ready")
        return self._batcher

    @property
    def runner(self) -> Runner | None:
        return self._runner

    @property
    def queued(self) -> int:
        return 0 if self._batcher is None else self._batcher.queued

    @property
    def calls(self) -> tuple[int, int]:
        """The requests that wait or are being answered, and how many calls can run at the same time."""
        return (0, 0) if self._batcher is None else (self._batcher.inflight, self._batcher.slots)

    def give_way(self, wanted: bool) -> None:
        """Lowers the priority of its processes while no caller waits for their answers, or restores it.
        Leaves processes alone that it shares, and those that callers use. Cheap if nothing changes."""
        runner = self.runner if wanted else None
        alone = runner is not None and runner.isolation == "process"
        pids = runner.pids if runner is not None and alone else ()
        self.background.give_way(pids, used=self.calls[0] > 0)

    def rules(self, lenient: bool = False, positional: bool = False) -> Rules:
        """The rules for enforcing requests: signature, mode, whether the signature was made from type hints,
        whether rows without names are read by position. `lenient` and `positional`: the defaults of the
        request's protocol, used where the settings say nothing."""
        if self.prepared is None:
            raise RuntimeError(f"{self!r} was used before it was ready")
        prepared = self.prepared
        of, rules = self._rules.get((lenient, positional), _NO_RULES)
        if of is not prepared:
            mode = self.options.enforcement or ("mlflow" if lenient else "strict")
            by_position = positional or self.options.positional
            rules = (prepared.signature, mode, prepared.package.type_hints, by_position)
            self._rules[lenient, positional] = prepared, rules
        return rules

    async def close(self) -> None:
        """Frees the model. When this returns its memory is free."""
        if self.phase is not Phase.CLOSING:
            self.move(Step.CLOSE)
        runner, self._runner, self._batcher = self._runner, None, None
        try:
            if runner is not None:
                await self._close_to_the_end(runner)
        finally:
            self.move(Step.CLOSED)

    async def _close_to_the_end(self, runner: Runner) -> None:
        """Closes a runner. A caller that is cancelled meanwhile does not wait, and leaves no half of it
        behind."""
        self._closing = asyncio.ensure_future(runner.close())
        await asyncio.shield(self._closing)


def _mismatch(prepared: Prepared) -> tuple[str, ...] | None:
    warning = None if prepared.runtime is None else prepared.runtime.warning
    return None if warning is None else (warning,)
