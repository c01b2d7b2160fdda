"""The gateway's side of zygotes: starts them when first needed, requests model processes, ends idle ones.

A zygote runs `loaders.worker.zygote`. If one is killed, a new one repeats the current loads. Everything runs
on the event loop, except that threads read memory and count temporary files. Must not know packages or
predictions.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import socket
import subprocess
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from gateway.pools import IO_THREAD, LARGE_THREAD
from gateway.runners import files
from gateway.runners.child import Child
from gateway.runners.confinement import Users
from gateway.runners.environments import Environment
from gateway.runners.memory import Footprint, Memory
from gateway.runners.orphans import Orphans
from gateway.runners.output import Output, Sink
from gateway.runners.pulse import Pulse, read
from loaders.worker import temporary

_MAX_MESSAGE: Final = 1 << 16
_TRIES: Final = 3
#: So many refreshes are one piece of work of the thread that reads memory.
_REFRESHED_AT_ONCE: Final = 16
_LOG: Final = logging.getLogger("gateway.models")


class ZygoteGone(Exception):
    """The zygote ended before it had finished the request."""


class Zygote:
    """One zygote process."""

    def __init__(self, environment: Environment, scratch: str, sink: Sink, orphans: Orphans) -> None:
        self.environment = environment
        self.start_method: str | None = None
        self.missing: tuple[str, ...] = ()
        self.children: dict[int, Child] = {}
        self.last_used = 0.0
        self._pulse = Pulse()
        self._scratch = scratch
        self._sink = sink
        self._orphans = orphans
        self._loop = asyncio.get_running_loop()
        self._tokens = itertools.count()
        self._asked: dict[int, asyncio.Future[Child]] = {}
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._output: Output | None = None
        self._footprint: Footprint | None = None

    @property
    def alive(self) -> bool:
        return self._control is not None

    @property
    def waiting(self) -> int:
        """How many requested processes it has not made yet."""
        return len(self._asked)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def bytes(self) -> int:
        """Its own memory in bytes. The memory that its children share with it counts here, once."""
        return 0 if self._footprint is None else self._footprint.recent().anonymous

    @property
    def footprint(self) -> Footprint | None:
        return self._footprint

    async def start(self) -> None:
        """Starts it; it can make processes when this returns. Raises ZygoteGone, OSError."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        self._output = Output(self._sink)
        options = {
            "control": theirs.fileno(),
            "parent": os.getpid(),
            "preload": self.environment.preload,
            "start": self.environment.start,
            "scratch": self._scratch,
        }
        with theirs:
            self._process = subprocess.Popen(  # noqa: ASYNC220  (vfork and exec: well under a millisecond)
                [self.environment.python, _entry(), "zygote", json.dumps(options)],
                stdin=subprocess.DEVNULL,
                stdout=self._output.write_end,
                stderr=self._output.write_end,
                env=self.environment.variables(),
                cwd=self._scratch,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self._orphans.spare(self._process)
        self._output.close_write_end()
        self._loop.add_reader(self._control, self._read)
        await self._ready
        self.last_used = self._loop.time()

    async def make(self, connection: socket.socket, log: int) -> Child:
        """Makes a new model process with this connection and log. Raises ZygoteGone, OSError."""
        if self._control is None:
            raise ZygoteGone("the zygote has ended")
        token = next(self._tokens)
        answer = self._asked[token] = self._loop.create_future()
        self.last_used = self._loop.time()
        message = json.dumps({"token": token}).encode()
        try:
            socket.send_fds(self._control, [message], [connection.fileno(), log])
            child: Child = await answer
            return child
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                # The caller left in the same turn of the loop in which the process was ready: end it here.
                answer.result().kill()
                answer.result().close()
            raise
        except (BrokenPipeError, ConnectionError, BlockingIOError):
            raise ZygoteGone("the zygote does not listen") from None
        finally:
            self._asked.pop(token, None)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def tend(self) -> None:
        """Ends it if it stays stopped, because nothing can be loaded meanwhile."""
        sign = None if self.pid is None or not self.alive else read(self.pid)
        if sign is not None and self._pulse.look(self._loop.time(), sign, None, lambda: 0):
            _LOG.warning("ending the process that makes model processes: %s", self._pulse.stuck)
            self.kill()

    async def close(self, grace: float = 5.0) -> None:
        """Ends it and every process that it made; kills it after `grace` seconds. Returns when it has
        ended."""
        self._lost("the gateway closed it")
        process = self._process
        try:
            for _ in range(2):
                if process is None or await _exited(process, grace):
                    break
                process.kill()
        finally:
            if process is not None and process.poll() is None:  # its caller does not wait
                process.kill()
            if self._output is not None:
                self._output.close()
            if self._footprint is not None:
                self._footprint.close()
                self._footprint = None

    def _read(self) -> None:
        assert self._control is not None
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, _MAX_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        if not data:
            self._lost("it ended")
            return
        self._told(json.loads(data), descriptors)

    def _told(self, message: dict[str, Any], descriptors: list[int]) -> None:
        match message["op"]:
            case "ready":
                self.start_method = message["start"]
                self.missing = tuple(message["missing"])
                self._footprint = Footprint(descriptors[0])
                if not self._ready.done():
                    self._ready.set_result(None)
            case "started":
                answer = self._asked.get(message["token"])
                try:
                    child = self.children[message["pid"]] = Child(message["pid"], message["temporary"])
                except OSError as error:  # it has ended already
                    if answer is not None and not answer.done():
                        answer.set_exception(error)
                    return
                if answer is None or answer.done():
                    child.kill()  # the caller left
                    child.close()
                else:
                    answer.set_result(child)
            case "failed":
                answer = self._asked.get(message["token"])
                if answer is not None and not answer.done():
                    answer.set_exception(OSError(message["reason"]))
            case "ended":
                ended = self.children.pop(message["pid"], None)
                self.last_used = self._loop.time()
                if ended is not None and not ended.ended.done():
                    ended.ended.set_result(message["code"])

    def _lost(self, reason: str) -> None:
        if self._control is None:
            return
        self._loop.remove_reader(self._control)
        self._control.close()
        self._control = None
        waiting: list[asyncio.Future[Any]] = [self._ready, *self._asked.values()]
        for answer in waiting:
            if not answer.done():
                answer.set_exception(ZygoteGone(f"the zygote could not help: {reason}"))
                answer.exception()  # mark as retrieved, even if no caller waits
        for child in self.children.values():
            if not child.ended.done():
                child.ended.set_result(None)  # they continue; their exit codes will not be reported
        self._orphans.come(self.children)
        self.children.clear()


class Zygotes:
    """One zygote per environment. `scratch`: the directory for the temporary directories of models.

    `sink` receives the output of zygotes. A zygote without model processes is ended after `idle` seconds.
    `timed`: model processes report when their calls began and ended.
    """

    def __init__(
        self,
        *,
        scratch: Path | None = None,
        idle: float = 300.0,
        sink: Callable[[str], None] = lambda line: None,
        timed: bool = False,
    ) -> None:
        self.timed = timed
        self._scratch = tempfile.mkdtemp(prefix="model-gateway-", dir=scratch)
        os.chmod(self._scratch, 0o711)  # models of other users pass through it to their own
        self._idle = idle
        self._sink = sink
        self._zygotes: dict[Environment, asyncio.Task[Zygote]] = {}
        #: The zygotes that are starting or running.
        self._made: weakref.WeakSet[Zygote] = weakref.WeakSet()
        self._retiring: set[asyncio.Task[int]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._orphans = Orphans()
        self._files = ThreadPoolExecutor(1, thread_name_prefix=f"{IO_THREAD}-files")
        self._memory = ThreadPoolExecutor(2, thread_name_prefix=f"{IO_THREAD}-memory")
        #: The memory of the model processes.
        self.footprints: weakref.WeakSet[Footprint] = weakref.WeakSet()
        #: Decodes the large answers of models, which delay no client's body there.
        self.answers = ThreadPoolExecutor(1, thread_name_prefix=f"{LARGE_THREAD}-answers")
        self.users = Users()

    def __repr__(self) -> str:
        return f"<Zygotes {len(self.alive)} alive>"

    @property
    def scratch(self) -> str:
        """The directory for the directories of models; removed with the gateway, however it ends."""
        return self._scratch

    @property
    def alive(self) -> list[Zygote]:
        return [task.result() for task in self._zygotes.values() if task.done() and _is_alive(task)]

    @property
    def bytes(self) -> int:
        """The memory of all zygotes, in bytes."""
        return sum(zygote.bytes for zygote in self.alive)

    async def make(self, environment: Environment, connection: socket.socket, log: int) -> Child:
        """Makes a model process in that environment. Raises ZygoteGone after several attempts, OSError."""
        for attempt in range(1, _TRIES + 1):
            try:
                zygote = await self._zygote(environment)
                return await zygote.make(connection, log)
            except ZygoteGone:
                if attempt == _TRIES or self._closed:
                    raise
        raise AssertionError("not reached")

    async def read_memory(self) -> None:
        """Refreshes what is known of the memory of all zygotes and model processes, in a thread, where it
        does not hold up the event loop: some milliseconds for each that changed."""
        found = (zygote.footprint for zygote in self.alive)
        footprints = [one for one in (*found, *self.footprints) if one is not None]
        loop = asyncio.get_running_loop()
        for start in range(0, len(footprints), _REFRESHED_AT_ONCE):
            some = footprints[start : start + _REFRESHED_AT_ONCE]
            await loop.run_in_executor(self._memory, _refresh, some)

    async def read(self, footprint: Footprint) -> Memory:
        """Reads one in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._memory, footprint.read)

    def measure(self, child: Child, enough: int) -> Future[int]:
        """The bytes of a process's temporary files; the count ends above `enough`."""
        return self._files.submit(files.used, child.pid, child.temporary, enough)

    async def close(self) -> None:
        """Ends all zygotes, and with them every process they made."""
        self._closed = True
        self._files.shutdown(wait=False, cancel_futures=True)
        self._memory.shutdown(wait=False, cancel_futures=True)
        if self._timer is not None:
            self._timer.cancel()
        tasks = list(self._zygotes.values())
        self._zygotes.clear()
        for task in tasks:
            if not task.done():
                task.cancel()
        await asyncio.gather(*(self._end(task) for task in tasks), *self._retiring)
        self._orphans.end()
        self.answers.shutdown(wait=False, cancel_futures=True)
        # Empty, except for files that the models of a killed zygote left.
        temporary.remove(self._scratch)

    def tend(self) -> None:
        """Checks zygotes, and the processes that killed ones left. Call it about once a second."""
        self._orphans.tend()
        for zygote in list(self._made):
            zygote.tend()

    async def retire_idle(self, now: float | None = None, *, idle: float | None = None) -> int:
        """Ends the zygotes that have no model processes and had no request for `idle` seconds (default: as
        long as an idle one stays)."""
        at = asyncio.get_running_loop().time() if now is None else now
        least = self._idle if idle is None else idle
        unused = [z for z in self.alive if not (z.children or z.waiting) and at - z.last_used >= least]
        for zygote in unused:
            self._zygotes.pop(zygote.environment)
        await asyncio.gather(*(zygote.close() for zygote in unused))
        return len(unused)

    async def _zygote(self, environment: Environment) -> Zygote:
        task = self._zygotes.get(environment)
        if (
            task is not None
            and task.done()
            and (task.cancelled() or task.exception() or not task.result().alive)
        ):
            del self._zygotes[environment]
            await self._end(task)
            task = self._zygotes.get(environment)
        if self._closed:
            raise ZygoteGone("the gateway is closing")
        if task is None:
            task = self._zygotes[environment] = asyncio.ensure_future(self._started(environment))
            self._watch_idle()
        return await asyncio.shield(task)

    async def _started(self, environment: Environment) -> Zygote:
        zygote = Zygote(environment, self._scratch, self._sink, self._orphans)
        self._made.add(zygote)
        try:
            await zygote.start()
        except BaseException:
            await zygote.close()
            raise
        return zygote

    async def _end(self, task: asyncio.Task[Zygote]) -> None:
        with suppress(asyncio.CancelledError, ZygoteGone, OSError):
            await (await task).close()

    def _watch_idle(self) -> None:
        if self._timer is None and not self._closed:
            delay = max(self._idle / 4, 0.05)
            self._timer = asyncio.get_running_loop().call_later(delay, self._look_for_idle)

    def _look_for_idle(self) -> None:
        self._timer = None
        task = asyncio.ensure_future(self.retire_idle())
        self._retiring.add(task)

        def done(finished: asyncio.Task[int]) -> None:
            self._retiring.discard(finished)
            if self._zygotes:
                self._watch_idle()

        task.add_done_callback(done)


def _is_alive(task: asyncio.Task[Zygote]) -> bool:
    return not task.cancelled() and task.exception() is None and task.result().alive


def _entry() -> str:
    """The file that starts our modules under a private name, in any environment."""
    spec = find_spec("loaders.worker.bootstrap")
    if spec is None or spec.origin is None:
        raise RuntimeError("the package loaders is not installed")
    return spec.origin


async def _exited(process: subprocess.Popen[bytes], grace: float) -> bool:
    """Waits for an exit without a thread."""
    if process.poll() is not None:
        return True
    loop = asyncio.get_running_loop()
    handle = os.pidfd_open(process.pid)
    gone = asyncio.Event()
    loop.add_reader(handle, gone.set)
    try:
        with suppress(TimeoutError):
            await asyncio.wait_for(gone.wait(), grace)
        return process.poll() is not None
    finally:
        loop.remove_reader(handle)
        os.close(handle)


def _refresh(footprints: list[Footprint]) -> None:
    for footprint in footprints:
        footprint.refresh()
