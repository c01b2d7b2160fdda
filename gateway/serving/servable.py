"""One version's life, top to bottom: prepare → reserve → start → warm up → serve → close.

A servable knows its own version and nothing of aliases, caches or other servables. The decisions about
room and about who may start belong to the manager; what happens here is in a straight line.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gateway.runners.base import ModelError
from gateway.serving.admission import Admission
from gateway.serving.batching import Batcher, agree, repeated
from loaders.enforcement.enforce import Enforced, InvalidInput, RawInput, enforce
from loaders.package import PackageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.artifacts.packages import Prepared
    from gateway.errors import Problem
    from gateway.registries.base import Version
    from gateway.runners.base import Runner
    from loaders.batch import Batch

Mode = Literal["strict", "warn", "mlflow"]


class Status(enum.Enum):
    """What `/models` shows. A servable that does not exist is UNLOADED."""

    UNLOADED = "UNLOADED"
    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "DRAINING"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class Options:
    """The operator's settings for one model, as the core needs them. `pin`: never evicted; `idle_ttl`: after
    so many seconds without a request it is unloaded; `check_output`: the share of answers that are compared
    with the output schema."""

    enforcement: Mode = "strict"
    max_queue: int = 1000
    max_rows: int = 1024
    batch: bool = True
    pin: bool = False
    idle_ttl: float | None = None
    check_output: float = 0.0


class Servable:
    """One version, loaded or on its way. Everything below is touched by the event loop alone."""

    def __init__(self, version: Version, options: Options) -> None:
        self.version = version
        self.options = options
        self.status = Status.LOADING
        self.phase = "queued"
        #: When its load got its turn, in the manager's time; what is fetched before does not count.
        self.began: float | None = None
        self.problem: Problem | None = None
        self.prepared: Prepared | None = None
        self.warnings: tuple[str, ...] = ()
        self.retiring: str | None = None
        self.gone = asyncio.Event()
        self._runner: Runner | None = None
        self._batcher: Batcher | None = None

    def __repr__(self) -> str:
        return f"<Servable {self.version} {self.status.value} ({self.phase})>"

    async def prepare(
        self, prepare: Callable[[Version], Awaitable[Prepared]], prepared: Prepared | None = None
    ) -> None:
        """Has its files here, verified and read: those of `prepared` where somebody has them already."""
        self.phase = "fetching"
        self.prepared = await prepare(self.version) if prepared is None else prepared
        self.phase = "queued"

    async def load(
        self,
        reserve: Callable[[int], Awaitable[None]],
        open_runner: Callable[[Prepared], Runner],
        dispatched: Callable[[int, int], None],
    ) -> int | None:
        """Makes it ready to answer, after `prepare`. Returns its measured bytes, None where nobody can tell.

        `reserve` returns when that many bytes in all are this servable's. Raises what its steps raise,
        and leaves nothing running then.
        """
        if self.prepared is None:
            raise RuntimeError(f"{self!r} is loaded before it is prepared")
        prepared = self.prepared
        self.phase = "waiting for memory"
        await reserve(prepared.estimate)
        self.phase = "loading"
        # Known from here on: a model that grows without end while it loads must be stoppable.
        self._runner = runner = open_runner(prepared)
        try:
            await runner.start()
            self.phase = "warming up"
            merges, self.warnings = await self._warm_up(runner, prepared)
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
        self.phase = "serving"
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

    def enforce(self, raw: RawInput, params: Any) -> Enforced:
        """The request as this version's signature wants it. Raises InvalidInput."""
        if self.prepared is None:
            raise RuntimeError(f"{self!r} was asked before it was ready")
        package = self.prepared.package
        return enforce(
            package.signature, raw, params, self.options.enforcement, type_hints=package.type_hints
        )

    async def close(self) -> None:
        """Frees the model. When this returns its memory is free."""
        self.phase = "closing"
        runner, self._runner, self._batcher = self._runner, None, None
        if runner is not None:
            await runner.close()
        self.phase = "closed"

    async def _warm_up(self, runner: Runner, prepared: Prepared) -> tuple[bool, tuple[str, ...]]:
        """Asks the model its own saved example: whether requests may be merged, and what to warn of.

        A model that raises on its example is refused (ModelError). An example that does not fit the
        model's own signature says nothing of the model: it is passed over with a warning.
        """
        warnings = list(prepared.findings)
        try:
            example, example_params = prepared.package.example_input()
        except PackageError as error:
            warnings.append(f"the saved input example cannot be read: {error}")
            example, example_params = None, None
        if example is None:
            return runner.merges, tuple(warnings)
        enforced = self._enforced_example(example, example_params)
        if enforced is None:
            warnings.append("the saved input example does not fit the model's signature: no warm-up")
            return runner.merges, tuple(warnings)
        answer = await runner.predict(enforced.batch, enforced.params)
        warnings += prepared.check_output(answer)
        merges = runner.merges and await self._merging_is_safe(runner, enforced.batch, enforced.params)
        if runner.merges and not merges:
            warnings.append("answers change when rows are merged: requests are run one by one")
        return merges, tuple(warnings)

    def _enforced_example(self, example: RawInput, params: Any) -> Enforced | None:
        try:
            return self.enforce(example, params)
        except InvalidInput:
            return None

    async def _merging_is_safe(self, runner: Runner, batch: Batch, params: Mapping[str, Any]) -> bool:
        one = repeated(batch, 1)
        if one is None:
            return True
        single = await runner.predict(one, params)
        for times in (2, 8):
            many = repeated(batch, times)
            if many is None:
                return False
            try:
                answer = await runner.predict(many, params)
            except ModelError:
                return False
            if not agree(single, answer, times):
                return False
        return True
