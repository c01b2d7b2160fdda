"""Runs a model in the gateway's own process, for `isolation: inline`: on its own thread, or, where its calls
are brief and execute only framework classes, on the event loop.

The model cannot be killed. Its memory is the growth of the gateway's process during its load and its first
answers; memory that others allocate meanwhile is included. Only models in processes have exact figures.
"""

from __future__ import annotations

import asyncio
import gc
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from gateway.runners import memory
from gateway.runners.base import ModelError, RunnerTimeout, Then
from gateway.runners.brevity import Brevity, size_of
from loaders.batch import Columns, Tensors, Value
from loaders.flavors.failures import failure

if TYPE_CHECKING:
    from loaders.batch import Batch
    from loaders.model import Model
    from loaders.package import Package
    from loaders.signature import Signature
    from loaders.worker.wire import Framed

T = TypeVar("T")

#: How long closing waits for a model that still answers, in seconds.
CLOSE_WITHIN = 5.0
#: The number of first answers that may add to its measured memory: frameworks allocate when they first
#: compute.
WARMING = 4
#: The prefix of the threads' names.
THREAD = "model-"


class InlineRunner:
    """One model, with one call at a time. `threads`: how many threads a call may use, if the framework
    supports a limit. `timeout`: the seconds after which a call is abandoned. `max_answer`: the bytes of one
    answer. `harmless`: its files execute only framework classes, so without a timeout its brief calls may run
    on the loop."""

    slots = 1
    #: What it uses is the gateway's.
    pids: Sequence[int] = ()
    busy_seconds = 0.0
    isolation = "inline"
    alike = None

    def __init__(
        self,
        package: Package,
        config: Mapping[str, Any],
        *,
        threads: int | None = None,
        timeout: float | None = None,
        max_answer: int | None = None,
        placement: str = "",
        harmless: bool = False,
    ) -> None:
        self._package = package
        self._config = config
        self._timeout = timeout
        self.placement = placement
        self._threads = threads
        self._max_answer = max_answer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=THREAD + package.path.name[:24])
        self._model: Model | None = None
        self._prewarmed = False
        self._before = 0
        self._measured: int | None = None
        self._answers = 0
        self._brevity = Brevity() if harmless and timeout is None else None

    @property
    def merges(self) -> bool:
        return self._model is not None and self._model.merges

    @property
    def known(self) -> Mapping[str, Any]:
        return {} if self._model is None else self._model.known

    @property
    def accepted(self) -> Signature | None:
        return None if self._model is None else self._model.accepted

    @property
    def measured_bytes(self) -> int | None:
        """The growth of the gateway's process; None if the kernel does not tell."""
        return self._measured

    @property
    def load_peak(self) -> int:
        return self._measured or 0

    def recent_bytes(self) -> int | None:
        return self._measured

    @property
    def stuck(self) -> str | None:
        return None

    @property
    def spare(self) -> bool | None:
        return None

    def start_spare(self) -> None:
        """Does nothing: the model has no processes."""

    async def drop_spare(self) -> None:
        """Does nothing: the model has no processes."""

    def tend(self) -> None:
        """Does nothing: the model has no processes."""

    def stop(self, reason: str) -> None:
        """A thread cannot be stopped."""

    def status(self) -> dict[str, Any]:
        return {"isolation": self.isolation, "placement": self.placement}

    async def start(self) -> None:
        self._model = await self._in_thread(self._load)
        if self._model.flavor.mlflow_names:  # its calls may wait for those of others
            self._brevity = None

    async def predict(self, batch: Batch | Framed, params: Mapping[str, Any]) -> Batch:
        call = self._in_thread(self._predict, batch, params)
        if self._timeout is None:
            return await call
        try:
            return await asyncio.wait_for(call, self._timeout)
        except TimeoutError:
            raise RunnerTimeout(f"the model did not answer within {self._timeout:g} s") from None

    def begin(self, batch: Batch | Framed, params: Mapping[str, Any], then: Then) -> bool:
        """Begins a brief call, which runs in the next turn of the loop."""
        brevity = self._brevity
        if brevity is None:
            return False
        size = size_of(batch, params)
        if size is None or not brevity.allows(size):
            return False
        asyncio.get_running_loop().call_soon(self._answer_on_loop, brevity, batch, params, then)
        return True

    def _answer_on_loop(
        self, brevity: Brevity, batch: Batch | Framed, params: Mapping[str, Any], then: Then
    ) -> None:
        used, began = time.thread_time(), time.perf_counter()
        try:
            answer = _failing_as_model(self._run, batch, params)
        except ModelError as error:
            then(None, error)
            return
        finally:
            brevity.on_loop(time.thread_time() - used, time.perf_counter() - began)
        then(answer, None)

    async def prewarm(self, batch: Batch, params: Mapping[str, Any]) -> Batch:
        self._prewarmed = True
        return await self.predict(batch, params)

    async def finish_prewarm(self) -> None:
        """Loads a model that may keep state of a call again, because the gateway itself is never forked."""
        if self._prewarmed and self._model is not None and not self._model.flavor.stateless:
            await self._unload()
            await self.start()
        self._prewarmed = False

    async def close(self) -> None:
        await self._unload()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _unload(self) -> None:
        model, self._model = self._model, None
        if model is not None:
            closing = asyncio.ensure_future(self._in_thread(_close, model))
            # A thread cannot be killed: a model that never answers must not keep the gateway from ending.
            await asyncio.wait({closing}, timeout=CLOSE_WITHIN)
            freed = weakref.ref(model)
            del model
            if freed() is not None and closing.done():
                # A full collection stops the process for a tenth of a second, so it runs only if needed.
                await self._in_thread(freeze_heap)
            if closing.done():
                await self._in_thread(memory.trim)

    def _load(self) -> Model:
        from loaders.model import open_model

        memory.trim()  # free memory of the process would hide the growth caused by this model
        self._before = memory.own()
        model = open_model(self._package, self._config, threads=self._threads)
        model.max_answer = self._max_answer
        self._measure()
        return model

    def _measure(self) -> None:
        memory.trim()
        if self._before:
            self._measured = max(self._measured or 0, memory.own() - self._before)

    def _predict(self, batch: Batch | Framed, params: Mapping[str, Any]) -> Batch:
        size = None if self._brevity is None else size_of(batch, params)
        used, began = time.thread_time(), time.perf_counter()
        answer = self._run(batch, params)
        if self._brevity is not None and size is not None:
            self._brevity.in_thread(size, time.thread_time() - used, time.perf_counter() - began)
        if self._answers < WARMING:
            self._answers += 1
            self._measure()
        return answer

    def _run(self, batch: Batch | Framed, params: Mapping[str, Any]) -> Batch:
        if self._model is None:
            raise RuntimeError("the model is closed")
        if isinstance(batch, Columns | Tensors | Value):
            return self._model.run(batch, params)
        message = batch.message()
        return self._model.run(message["batch"], message["params"])

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        call = partial(_failing_as_model, function, *args)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)


def _failing_as_model(function: Callable[..., T], *args: Any) -> T:
    """Calls a function. Every exception of the model's code is its error (ModelError), also `SystemExit`,
    which must not end the gateway's loop."""
    try:
        return function(*args)
    except (KeyboardInterrupt, SystemExit, Exception) as error:  # noqa: BLE001
        shown, unsuitable = failure(error)
        raise ModelError(
            _described(error), traceback.format_exc(), shown=shown, unsuitable=unsuitable
        ) from None


def freeze_heap(whole: bool = True) -> None:
    """Runs a collection, then makes the collector ignore the remaining objects. `whole`: also looks at those
    that it ignores since an earlier call, which stops the process for a tenth of a second."""
    if whole:
        gc.unfreeze()
    gc.collect()
    gc.freeze()


def _close(model: Model) -> None:
    model.close()


def _described(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
