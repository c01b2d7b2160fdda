"""A model in processes of its own: a pool of 1..N, each answering one call at a time.

A process that ends fails the call it was answering (`serving.batching` repeats it). Other calls wait for the
next process. The first restart is immediate; each further one waits longer; after too many the model is in
quarantine for a while (see `restarts`). A busy model may have a spare process, loaded and idle, that takes
over at once. The operator's timeout and memory limit end a process as well. Everything runs on the event
loop, without threads.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from gateway.runners import calls, environments
from gateway.runners.base import ModelError, RunnerCrashed, Then, signature_of
from gateway.runners.confinement import Confinement
from gateway.runners.environments import Environment
from gateway.runners.pending import Call, Direct, Reply
from gateway.runners.pool import Pool
from gateway.runners.restarts import Policy, Restarts
from gateway.runners.suspects import digest
from gateway.runners.worker import Worker
from loaders.worker import wire
from loaders.worker.process import LOADED_AGAIN

if TYPE_CHECKING:
    from gateway.runners.output import Sink
    from gateway.runners.zygote import Zygotes
    from loaders.batch import Batch
    from loaders.package import Package
    from loaders.signature import Signature

Observe = Callable[[str, str], None]
"""Told what happened to a model's processes: (what, reason). What: crashed, timeout, recycled, stopped,
restarted, quarantined, stuck, moving (a stuck one works again)."""

_MEMORY_INTERVAL: Final = 0.2
_FAR_OVER: Final = 1.5

_LOG: Final = logging.getLogger("gateway.models")


class ProcessRunner:
    """One version in `processes` processes.

    `environment`: None uses this interpreter, with imports that suit the package. `timeout`: the seconds that
    a call may take, None for no limit; `load_timeout`: the same for loading. `memory_limit`: the private
    bytes of one process; above it the process is replaced after its current call, far above it at once.
    `max_answer`: the bytes that one answer may take, in a frame and as values. `env_allow`: names (or
    patterns) of the gateway's environment variables that the model may see. `sink` receives the lines that
    the model prints; without it they go to the log under name and version.
    """

    isolation = "process"
    alike = None

    def __init__(
        self,
        package: Package,
        config: Mapping[str, Any],
        *,
        zygotes: Zygotes,
        name: str,
        version: str,
        processes: int = 1,
        threads: int = 1,
        timeout: float | None = None,
        load_timeout: float | None = 600.0,
        environment: Environment | None = None,
        memory_limit: int | None = None,
        max_answer: int = wire.MAX_FRAME,
        env_allow: Sequence[str] = (),
        confinement: Confinement | None = None,
        restarts: Policy | None = None,
        sink: Sink | None = None,
        observe: Observe = lambda what, reason: None,
        environ: Mapping[str, str] = os.environ,
        placement: str = "",
    ) -> None:
        self._zygotes = zygotes
        self._environment = environment or Environment(
            preload=environments.preload_for(package.loader_module)
        )
        self._processes = processes
        self._timeout = timeout
        self._load_timeout = load_timeout
        self._memory_limit = memory_limit
        self._max_answer = max_answer
        self._restarts = Restarts(restarts)
        self._sink = sink or _logged(name, version)
        self._observe = observe
        self.placement = placement
        self._path = str(package.path)
        self._load = {
            "package": package.to_json(),
            "path": self._path,
            "config": dict(config),
            "threads": threads,
            "max_answer": max_answer,
            "environment": environments.allowed(environ, env_allow),
            "confinement": confinement or Confinement(),
        }
        self._workers: list[Worker] = []
        self._pool = Pool(self._why_none_comes, self._until_restart, self._release)
        self._starting: set[asyncio.Task[None]] = set()
        self._started = False
        self._closed = False
        self._quarantine: str | None = None
        self._retry_at = 0.0
        self._merges = False
        self._known: Mapping[str, Any] = {}
        self._accepted: Signature | None = None
        self._spare: Worker | None = None
        self._spare_starting: asyncio.Task[None] | None = None
        self._stuck: str | None = None
        #: The number of answered calls, and its value when a process last ended.
        self._replies = 0
        self._replies_at_end = 0
        self._prewarmed = False
        self._prewarms = ""
        self._confined: dict[str, str] = {}
        self._load_peak = 0
        self._measured: int | None = None
        self._watch: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<ProcessRunner {len(self._workers)}/{self._processes} processes>"

    @property
    def slots(self) -> int:
        return self._processes

    @property
    def merges(self) -> bool:
        return self._merges

    @property
    def known(self) -> Mapping[str, Any]:
        return self._known

    @property
    def accepted(self) -> Signature | None:
        return self._accepted

    #: Its processes are its own.
    busy_seconds = 0.0

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    @property
    def quarantine(self) -> str | None:
        """Why no more processes are started, or None."""
        return self._quarantine

    @property
    def stuck(self) -> str | None:
        return self._stuck

    @property
    def spare(self) -> bool:
        return self._spare is not None or self._spare_starting is not None

    @property
    def load_peak(self) -> int:
        """The peak private bytes of one process during its load."""
        return self._load_peak

    @property
    def measured_bytes(self) -> int | None:
        """The private bytes of all its processes, at most some seconds old."""
        if self._workers:
            self._measured = self.recent_bytes()
        return self._measured

    def recent_bytes(self) -> int:
        """The private bytes at the last reading, including processes that are still loading."""
        return sum(worker.recent_memory().private for worker in self._workers)

    def status(self) -> dict[str, Any]:
        """Its state for operators, JSON-ready."""
        return {
            "isolation": self.isolation,
            "placement": self.placement,
            "processes": [
                {
                    "pid": w.pid,
                    "busy": w.busy,
                    "bytes": w.recent_memory().private,
                    "temporary_bytes": w.files,
                    "spare": w is self._spare,
                    "stuck": w.pulse.stuck,
                }
                for w in self._workers
            ],
            "stuck": self._stuck,
            "start": self._environment.start,
            "crashes": self._restarts.crashes,
            "quarantined": self._quarantine,
            "load_peak_bytes": self._load_peak,
            "confinement": dict(self._confined),
            "warm_up": self._prewarms,
        }

    async def start(self) -> None:
        self._watch_memory()
        await self._start_worker()
        await asyncio.gather(*(self._start_worker() for _ in range(1, self._processes)))
        self._started = True

    def predict(self, batch: Batch | wire.Framed, params: Mapping[str, Any]) -> Coroutine[Any, Any, Batch]:
        return self._asked("predict", batch, params)

    def prewarm(self, batch: Batch, params: Mapping[str, Any]) -> Coroutine[Any, Any, Batch]:
        self._prewarmed = True
        return self._asked("prewarm", batch, params)

    async def finish_prewarm(self) -> None:
        """Replaces a process that had to answer in place although its model may keep state of a call. The
        prewarmed one ends first, so that memory for two is never needed."""
        prewarmed, self._prewarmed = self._prewarmed, False
        for worker in list(self._workers) if prewarmed else []:
            if worker.loaded["prewarms"] == LOADED_AGAIN:
                self._workers.remove(worker)
                self._pool.drop(worker)
                await worker.close()
                await self._start_worker()
        for worker in list(self._workers):
            await worker.measured_memory()

    async def _asked(self, op: str, batch: Batch | wire.Framed, params: Mapping[str, Any]) -> Batch:
        pieces = calls.pieces(op, batch, params) or await calls.pieces_apart(op, batch, params)
        worker = self._pool.take()
        if worker is None:
            worker = await self._pool.wait()
        reply = await worker.ask(pieces, self._timeout, (batch, params))
        return self._answer_of(worker, reply)

    def begin(self, batch: Batch | wire.Framed, params: Mapping[str, Any], then: Then) -> bool:
        pieces = calls.pieces("predict", batch, params)
        worker = None if pieces is None else self._pool.take()
        if pieces is None or worker is None:
            return False
        answer = Direct(partial(self._answer_of, worker), then, partial(then, None))
        worker.send(pieces, Call(answer, self._timeout, (batch, params)))
        return True

    def _answer_of(self, worker: Worker, reply: Reply) -> Batch:
        self._replies += 1
        try:
            return calls.answer_of(reply, self._path)
        except RunnerCrashed as broken:
            worker.kill(broken)
            raise

    def stop(self, reason: str) -> None:
        """Ends all its processes now, as a crash does. Used for a model that grows without end."""
        for worker in list(self._workers):
            worker.kill(RunnerCrashed(reason))

    def tend(self) -> None:
        """Checks whether its processes work; ends one that stays stopped."""
        now = asyncio.get_running_loop().time()
        found = None
        for worker in self._workers:
            if worker.gone or not worker.pid:
                continue
            worker.look_at_files()
            if (why := worker.feel(now)) is not None:
                worker.kill(RunnerCrashed(why))
            found = found or (worker.pulse.stuck and f"process {worker.pid}: {worker.pulse.stuck}")
        if (found is None) != (self._stuck is None):
            self._observe("moving" if found is None else "stuck", found or "")
        self._stuck = found

    def start_spare(self) -> None:
        if self.spare or self._closed or self._quarantine is not None:
            return
        task = self._spare_starting = asyncio.ensure_future(self._make_spare())
        self._starting.add(task)
        task.add_done_callback(self._spare_started)

    async def _make_spare(self) -> None:
        worker = await self._start_worker(spare=True)
        if len(self._workers) > self._processes and not worker.gone:
            self._spare = worker
        else:
            self._release(worker)  # a process has ended meanwhile

    def _spare_started(self, task: asyncio.Task[None]) -> None:
        self._starting.discard(task)
        self._spare_starting = None
        if not task.cancelled() and (error := task.exception()) is not None:
            # The next process that ends is replaced in the ordinary way.
            _LOG.debug("no spare process was made: %s", error)

    async def drop_spare(self) -> None:
        if self._spare_starting is not None:
            self._spare_starting.cancel()
            await asyncio.wait({self._spare_starting})
        worker, self._spare = self._spare, None
        if worker is not None and worker in self._workers:
            self._workers.remove(worker)  # before it ends, so that its end does not count as a crash
            await worker.close()

    async def close(self) -> None:
        self._closed = True
        if self._watch is not None:
            self._watch.cancel()
        for task in self._starting:
            task.cancel()
        self._pool.refuse("the model was unloaded")
        workers, self._workers = self._workers, []
        self._pool.clear()
        await asyncio.gather(*self._starting, return_exceptions=True)
        await asyncio.gather(*(worker.close() for worker in workers))

    # ---- the pool

    def _why_none_comes(self) -> str | None:
        return "the model was unloaded" if self._closed else self._quarantine

    def _until_restart(self) -> float | None:
        if any(worker.loaded for worker in self._workers):
            return None
        return self._retry_at - asyncio.get_running_loop().time()

    def _release(self, worker: Worker) -> None:
        if worker.gone or self._closed:
            return
        if worker.retiring:
            self._replace(worker)
        else:
            self._pool.give(worker)

    async def _start_worker(self, *, spare: bool = False) -> Worker:
        worker = Worker(
            self._zygotes,
            self._environment,
            self._sink,
            idle=self._release,
            ended=self._lost,
            max_answer=self._max_answer,
        )
        self._workers.append(worker)
        try:
            await worker.start(self._load, self._load_timeout)
        except BaseException as error:
            if worker in self._workers:
                self._workers.remove(worker)
            await worker.close()
            if isinstance(error, ModelError):
                raise calls.without_path(error, self._path) from None
            raise
        self._merges = bool(worker.loaded["merges"])
        self._known = worker.loaded["known"]
        self._accepted = signature_of(worker.loaded)
        self._prewarms = str(worker.loaded["prewarms"])
        self._confined = worker.loaded["confinement"]
        self._load_peak = max(self._load_peak, worker.load_peak)
        if not spare:
            self._release(worker)
        return worker

    def _lost(self, worker: Worker, reason: str) -> None:
        """Handles the end of a process that had loaded. Before that, the code that starts it handles its
        end."""
        self._pool.drop(worker)
        if worker not in self._workers or not worker.loaded:
            return
        self._workers.remove(worker)
        if self._closed:
            return
        timeout = worker.timed_out
        self._observe("timeout" if timeout else "crashed", reason)
        if worker is self._spare:
            self._spare = None  # the next tick may make another
            return
        call = None if timeout else worker.unanswered
        suspect = digest(*call) or None if isinstance(call, tuple) else None
        self._again(reason, crashed=not timeout, suspect=suspect)

    def _again(self, reason: str, *, crashed: bool, suspect: bytes | None = None) -> None:
        loop = asyncio.get_running_loop()
        answered, self._replies_at_end = self._replies > self._replies_at_end, self._replies
        delay = self._restarts.ended(loop.time(), crashed=crashed, suspect=suspect, answered=answered)
        if delay is None:
            self._quarantine = (
                f"the model is in quarantine because its process ended too often; last reason: {reason}"
            )
            self._observe("quarantined", reason)
            self._pool.refuse(self._quarantine)
            return
        spare, self._spare = self._spare, None
        if spare is not None and not spare.gone:
            self._observe("restarted", "")
            self._release(spare)
            return
        self._retry_at = loop.time() + delay
        self._begin(delay)

    def _begin(self, delay: float) -> None:
        task = asyncio.ensure_future(self._restart(delay))
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def _restart(self, delay: float) -> None:
        await asyncio.sleep(delay)
        if self._quarantine is not None:
            return
        if sum(worker is not self._spare for worker in self._workers) >= self._processes:
            return  # a spare process has taken over
        try:
            await self._start_worker()
        except Exception as error:  # noqa: BLE001 - any failure: without another attempt no process starts
            self._observe("crashed", f"it could not be started again: {type(error).__name__}: {error}")
            self._again(str(error), crashed=True)
        else:
            self._observe("restarted", "")

    def _replace(self, worker: Worker) -> None:
        """Ends an idle worker and starts another; calls wait meanwhile, and none fails."""
        self._workers.remove(worker)
        self._pool.drop(worker)
        self._observe("recycled", "it had grown over its memory limit")

        async def replace() -> None:
            await worker.close()
            await self._restart(0)

        task = asyncio.ensure_future(replace())
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    # ---- memory

    def _watch_memory(self) -> None:
        if self._memory_limit is not None and not self._closed:
            self._watch = asyncio.get_running_loop().call_later(_MEMORY_INTERVAL, self._look_at_memory)

    def _look_at_memory(self) -> None:
        limit = self._memory_limit
        assert limit is not None
        for worker in list(self._workers):
            # The resident bytes take microseconds to read, and are never less than the private bytes.
            if worker.gone or worker.memory_bound() <= limit or (private := worker.memory().private) <= limit:
                continue
            said = f"the model's processes took {private} bytes, its limit is {limit}"
            if not worker.loaded or private > limit * _FAR_OVER:
                worker.kill(RunnerCrashed(said))
            elif worker.busy:
                worker.retiring = True
            else:
                self._replace(worker)
        self._watch_memory()


def _logged(name: str, version: str) -> Sink:
    def sink(line: str) -> None:
        _LOG.info("%s", line, extra={"model": name, "version": version})

    return sink
