"""One version's life, top to bottom: fetch → build → reserve → load → warm up → serve → drain → close.

A servable knows its own version and nothing of aliases, caches or other servables. The manager decides about
room and about who may start; what happens here is in a straight line.

Theory of operation. A servable is always in one `Phase`. Only `move` changes it, and only along
`TRANSITIONS`: any other step raises `IllegalTransition`, because it would be a bug of the caller. `status`,
what `/models` shows, follows from the phase. This is the whole table, as `diagram()` prints it:

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
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from gateway.runners.base import ModelError
from gateway.serving.admission import Admission
from gateway.serving.batching import Batcher, agree, repeated
from gateway.serving.recent import Recent
from loaders import madeup
from loaders.enforcement import Enforced, InvalidInput, RawInput, enforce
from loaders.package import PackageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.artifacts.packages import Prepared
    from gateway.errors import Problem
    from gateway.registries.base import Version
    from gateway.runners.base import Runner
    from gateway.settings import Settings
    from loaders.batch import Batch
    from loaders.signature import Signature

Mode = Literal["strict", "warn", "mlflow"]
Settle = Callable[["Prepared", Callable[[str], None]], Awaitable["Prepared"]]

#: What `status` says of a version, until its owner or the operator changes it.
NO_SIGNATURE: Final = "it has no signature: the model is given whatever comes"
NO_WARM_UP: Final = "warm_up is off: the model serves without having answered its own example"


class Status(enum.Enum):
    """What `/models` shows. A servable that does not exist is UNLOADED."""

    UNLOADED = "UNLOADED"
    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "DRAINING"
    FAILED = "FAILED"


class Phase(enum.Enum):
    """Where a servable stands; the value is what an operator reads."""

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
    """What can happen to a servable."""

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


#: Of a framework that does not fit the model, whatever the row.
_NEVER: Final = ("AttributeError", "ImportError", "ModuleNotFoundError")


class IllegalTransition(RuntimeError):
    """A servable was told to do what its phase does not allow: a bug of the caller."""


def diagram() -> str:
    """`TRANSITIONS` as text, one line for each step. The docstring of this module shows it."""
    return "\n".join(
        f"{phase.value} ──{step.value}──► {after.value}"
        for phase, steps in TRANSITIONS.items()
        for step, after in steps.items()
    )


@dataclass(frozen=True, slots=True)
class Options:
    """The operator's settings for one model, as the core needs them. `enforcement`: None where each protocol
    has its own; `positional`: rows without names are taken by position; `pin`: never evicted; `idle_ttl`:
    after so many seconds without a request it is unloaded; `check_output`: the share of answers that are
    compared with the output schema; `warm_up`: it answers its own example before it serves."""

    enforcement: Mode | None = None
    positional: bool = False
    max_queue: int = 1000
    max_rows: int = 1024
    batch: bool = True
    pin: bool = False
    idle_ttl: float | None = None
    check_output: float = 0.0
    warm_up: bool = True

    @classmethod
    def of(cls, settings: Settings, name: str) -> Options:
        """What the settings say of the model `name`."""
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
        )


class Servable:
    """One version, loaded or on its way. Only the event loop touches it; only `move` changes its phase."""

    def __init__(self, version: Version, options: Options) -> None:
        self.version = version
        self.options = options
        self.phase = Phase.FETCHING
        self.status = STATUS[self.phase]
        #: When its load got its turn, in the manager's time; the time of the fetch does not count.
        self.began: float | None = None
        self.problem: Problem | None = None
        self.prepared: Prepared | None = None
        self.warnings: tuple[str, ...] = ()
        #: The step of a build that is under way.
        self.building: str | None = None
        #: Why it runs in another environment than its own: what each answer must say, None where it does not.
        self.mismatch: tuple[str, ...] | None = None
        #: Why it leaves, from `Manager.retire` on.
        self.retiring: str | None = None
        #: Loaded for a dry run alone: nothing is recorded of it. `announce` records its load after all.
        self.on_trial = False
        self.announce: Callable[[], None] | None = None
        #: No alias wants its load any more: it ends as soon as no request waits for it.
        self.abandoned = False
        self.gone = asyncio.Event()
        self.recent = Recent()
        self._runner: Runner | None = None
        self._batcher: Batcher | None = None

    def __repr__(self) -> str:
        return f"<Servable {self.version} {self.status.value} ({self.phase.value})>"

    def move(self, step: Step) -> None:
        """Takes one step of `TRANSITIONS`. Raises IllegalTransition."""
        after = TRANSITIONS[self.phase].get(step)
        if after is None:
            raise IllegalTransition(f"{self!r} cannot {step.value}")
        self.phase, self.status = after, STATUS[after]

    def fail(self, problem: Problem) -> None:
        """Ends a load. Callers that wait for it get `problem`."""
        self.move(Step.FAIL)
        self.problem = problem

    async def prepare(
        self,
        prepare: Callable[[Version], Awaitable[Prepared]],
        prepared: Prepared | None = None,
        settle: Settle | None = None,
    ) -> None:
        """Fetches, verifies and reads its files; takes `prepared` where the caller has them already. Then
        `settle` finds where it runs, and builds its environment where there is none yet."""
        self.prepared = await prepare(self.version) if prepared is None else prepared
        self.move(Step.FETCHED)
        if settle is not None:
            self.prepared = await settle(self.prepared, self._building)
            self.mismatch = _mismatch(self.prepared)
        self.move(Step.BUILT)

    def _building(self, step: str) -> None:
        """The thread that builds calls it."""
        self.building = step

    async def load(
        self,
        reserve: Callable[[int], Awaitable[None]],
        open_runner: Callable[[Prepared], Runner],
        dispatched: Callable[[int, int], None],
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
            merges, self.warnings = await self._warm_up(runner, prepared)
            await runner.settle()
            measured = runner.measured_bytes
            if measured is not None:
                await reserve(measured)
        except BaseException:
            self._runner = None
            await runner.close()
            raise
        self._batcher = Batcher(
            runner.predict,
            merges=merges and self.options.batch,
            slots=runner.slots,
            max_rows=self.options.max_rows,
            admission=Admission(self.options.max_queue, runner.slots),
            dispatched=dispatched,
        )
        self.move(Step.READY)
        return measured

    @property
    def batcher(self) -> Batcher:
        if self._batcher is None:
            raise RuntimeError(f"{self!r} was asked before it was ready")
        return self._batcher

    @property
    def runner(self) -> Runner | None:
        return self._runner

    @property
    def queued(self) -> int:
        return 0 if self._batcher is None else self._batcher.queued

    def rules(
        self, lenient: bool = False, positional: bool = False
    ) -> tuple[Signature | None, Mode, bool, bool]:
        """What requests are enforced with: signature, mode, whether the signature stands for type hints,
        whether rows without names are taken by position. `lenient` and `positional`: what the request's
        protocol does where the settings do not say."""
        if self.prepared is None:
            raise RuntimeError(f"{self!r} was asked before it was ready")
        package = self.prepared.package
        mode = self.options.enforcement or ("mlflow" if lenient else "strict")
        return package.signature, mode, package.type_hints, positional or self.options.positional

    async def close(self) -> None:
        """Frees the model. When this returns its memory is free."""
        if self.phase is not Phase.CLOSING:
            self.move(Step.CLOSE)
        runner, self._runner, self._batcher = self._runner, None, None
        try:
            if runner is not None:
                await runner.close()
        finally:
            self.move(Step.CLOSED)

    async def _warm_up(self, runner: Runner, prepared: Prepared) -> tuple[bool, tuple[str, ...]]:
        """Asks the model its own saved example: whether requests may be merged, and what to warn of.

        A model that raises on its example is refused (ModelError). An example that does not fit the
        model's own signature says nothing of the model: it is passed over with a warning.
        """
        warnings = list(prepared.findings)
        if prepared.package.signature is None:
            warnings.append(NO_SIGNATURE)
        if not self.options.warm_up:
            warnings.append(NO_WARM_UP)
            return runner.merges, tuple(warnings)
        try:
            example, example_params = prepared.package.example_input()
        except PackageError as error:
            warnings.append(f"the saved input example cannot be read: {error}")
            example, example_params = None, None
        if example is None:
            return runner.merges, (*warnings, *await self._asked_made_up(runner, prepared))
        enforced = self._enforced_example(example, example_params)
        if enforced is None:
            warnings.append("the saved input example does not fit the model's signature: no warm-up")
            return runner.merges, tuple(warnings)
        try:
            answer = await runner.rehearse(enforced.batch, enforced.params)
        except ModelError as error:
            if not error.unsuitable:
                raise
            warnings.append(f"the saved input example does not suit the model: no warm-up ({error.shown})")
            return runner.merges, tuple(warnings)
        differing = prepared.check_answer(answer)
        if differing and self.mismatch is not None:
            raise ModelError(f"in this environment, which is not its own, {differing[0]}")
        warnings += prepared.check_output(answer) + differing
        merges = runner.merges and await self._merging_is_safe(runner, enforced.batch, enforced.params)
        if runner.merges and not merges:
            warnings.append("answers change when rows are merged: requests are run one by one")
        return merges, tuple(warnings)

    async def _asked_made_up(self, runner: Runner, prepared: Prepared) -> list[str]:
        """Without an example a load shows little: a made-up row shows whether the framework can answer.
        It may not suit the model, so a failure is a warning; but where the framework itself does not fit
        (AttributeError, ImportError), no row can work: ModelError. Only frameworks are asked: code of the
        package's own may do anything with a row that nobody sent."""
        if prepared.needs is None or prepared.needs.facts.custom:
            return []
        made = madeup.row(prepared.package.signature, runner.known)
        enforced = None if made is None else self._enforced_example(made, None)
        if enforced is None:
            return []
        try:
            await runner.rehearse(enforced.batch, enforced.params)
        except ModelError as error:
            if str(error).startswith(_NEVER):
                raise
            return [f"it has no input example, and a made-up row does not suit it ({error.shown})"]
        return []

    def _enforced_example(self, example: RawInput, params: Any) -> Enforced | None:
        try:
            signature, mode, type_hints, _ = self.rules()
            return enforce(signature, example, params, mode, type_hints=type_hints)
        except InvalidInput:
            return None

    async def _merging_is_safe(self, runner: Runner, batch: Batch, params: Mapping[str, Any]) -> bool:
        one = repeated(batch, 1)
        if one is None:
            return True
        single = await runner.rehearse(one, params)
        for times in (2, 8):
            many = repeated(batch, times)
            if many is None:
                return False
            try:
                answer = await runner.rehearse(many, params)
            except ModelError:
                return False
            if not agree(single, answer, times):
                return False
        return True


def _mismatch(prepared: Prepared) -> tuple[str, ...] | None:
    warning = None if prepared.runtime is None else prepared.runtime.warning
    return None if warning is None else (warning,)
