"""The gateway's side of one model process: made by a zygote, called, ended.

It processes one message at a time, in order. Everything runs on the event loop. When its process ends, a
worker reports that once, with the reason; its owner decides what to do. The process may be hostile:
everything that it sends is checked, and a process that breaks the protocol is ended. Must not know why it is
called.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final

from gateway.runners.base import ModelError, RunnerCrashed, RunnerTimeout, loaded_of
from gateway.runners.child import Child, described
from gateway.runners.deadline import Deadline
from gateway.runners.environments import Environment
from gateway.runners.files import Watch
from gateway.runners.memory import Footprint, Memory, peak
from gateway.runners.output import Output, Sink
from gateway.runners.pending import Call, NotReached, Reply
from gateway.runners.pulse import Pulse, of_group, read
from gateway.runners.zygote import ZygoteGone, Zygotes
from loaders.worker import wire

log = logging.getLogger("gateway.runners")

#: A larger frame, or one with a larger header, is decoded in a thread. The header determines the time.
_DECODE_ON_LOOP: Final = 256 << 10
_HEADER_ON_LOOP: Final = 64 << 10
_ANSWER_SLACK: Final = 1 << 20
_SOCKET_BUFFER: Final = 1 << 20
_STATUS_WAIT: Final = 1.0
_LAST_WORD: Final = 0.25
#: The first answers of a process write to memory that it shared: its memory is read again after them.
_WARMING: Final = 16
_ANSWERS: Final = ("answer", "error", "loaded")


class Worker:
    """`idle` is called after each answer, `ended` once when the process has ended. `queues`: it accepts calls
    while it works; those of one turn of the loop are sent together. `worked` is called for each answer,
    in order, with the caller and the seconds."""

    def __init__(
        self,
        zygotes: Zygotes,
        environment: Environment,
        sink: Sink,
        *,
        ended: Callable[[Worker, str], None],
        idle: Callable[[Worker], None] | None = None,
        max_answer: int = wire.MAX_FRAME,
        queues: bool = False,
        worked: Callable[[object, float], None] = lambda asker, seconds: None,
    ) -> None:
        self._worked = worked
        self._queues = queues
        self._zygotes = zygotes
        self._environment = environment
        self._sink = sink
        self._idle = idle
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._max_answer = max_answer
        self._reader = wire.Reader(min(wire.MAX_FRAME, max_answer + _ANSWER_SLACK))
        self._sock: socket.socket | None = None
        self._child: Child | None = None
        self._output: Output | None = None
        self._footprint: Footprint | None = None
        self._most_tasks: int | None = None
        self._user: int | None = None
        self._pending: deque[wire.Segment] = deque()
        self._calls: deque[Call] = deque()
        self._sending = False
        self._writing = False
        self._deadline = Deadline(self._loop, self._overdue)
        self._verdict: Exception | None = None
        self._reaping: asyncio.Task[None] | None = None
        #: The caller of the call in which it ended.
        self.unanswered: object = None
        self.pulse = Pulse()
        self.loaded: dict[str, Any] = {}
        self.load_peak = 0
        self.retiring = False
        self._files: Watch | None = None
        self._felt = 0
        self.answers = 0
        #: When it began the first of its calls, in the loop's time.
        self.working_since = 0.0

    def __repr__(self) -> str:
        state = "ended" if self.gone else "busy" if self.busy else "idle"
        return f"<Worker {self.pid} {state}>"

    @property
    def pid(self) -> int:
        return 0 if self._child is None else self._child.pid

    @property
    def busy(self) -> bool:
        return bool(self._calls)

    @property
    def first(self) -> object:
        """The caller of its current call."""
        return self._calls[0].asker if self._calls else None

    @property
    def waiting(self) -> int:
        """How many calls it has not begun."""
        return max(0, len(self._calls) - 1)

    @property
    def gone(self) -> bool:
        return self._reaping is not None

    @property
    def timed_out(self) -> bool:
        return isinstance(self._verdict, RunnerTimeout)

    def memory(self) -> Memory:
        """The current memory of its processes; zeros before the first reading."""
        return Memory() if self._footprint is None else self._footprint.read()

    async def measured_memory(self) -> Memory:
        """The same, read in a thread."""
        return Memory() if self._footprint is None else await self._zygotes.read(self._footprint)

    def recent_memory(self, since: float = float("-inf")) -> Memory:
        """The same, as of a moment ago, but not before `since`: cheap."""
        return Memory() if self._footprint is None else self._footprint.recent(since)

    def feel(self, now: float) -> str | None:
        """Checks whether the process makes progress; the result is in `pulse`. Returns why it must end, or
        None: it is stuck for good, or it started more processes and threads than it may."""
        sign = read(self.pid)
        if sign is None:
            return None
        call = self.answers if self.busy else None
        if self.pulse.look(now, sign, call, lambda: of_group(self.pid)):
            return f"{self.pulse.stuck}, and was ended"
        if self._footprint is None:
            return None
        if self._felt < min(self.answers, _WARMING):
            self._footprint.expire()
        self._felt = self.answers
        if self._most_tasks is not None and self._footprint.tasks > self._most_tasks:
            return f"it started more than {self._most_tasks} processes and threads, and was ended"
        return None

    @property
    def files(self) -> int:
        """The bytes of its temporary files at the last measurement."""
        return 0 if self._files is None else self._files.bytes

    def look_at_files(self) -> None:
        """Starts a measurement of its temporary files, one at a time. Above the limit the process is
        ended."""
        if self._files is not None and not self.gone:
            self._files.look(self.busy, self.answers)

    def _too_many_files(self, said: str) -> None:
        self.kill(RunnerCrashed(said))

    def memory_bound(self) -> int:
        """A value never below the private bytes of `memory`, cheap to read."""
        return 0 if self._footprint is None else self._footprint.upper_bound()

    async def start(self, load: Mapping[str, Any], timeout: float | None) -> None:
        """Starts the process and loads the model. Raises ModelError, RunnerCrashed, RunnerTimeout; then the
        process has ended or is ending."""
        try:
            self._user = self._zygotes.users.take()
            self._sock, theirs = socket.socketpair()
            self._sock.setblocking(False)
            for end in (self._sock, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
            self._output = Output(self._sink)
            with theirs:
                async with asyncio.timeout(timeout):
                    self._child = await self._zygotes.make(self._environment, theirs, self._output.write_end)
        except TimeoutError:
            self._close()
            raise RunnerTimeout(f"no process was made for it within {timeout:g} s") from None
        except (ZygoteGone, OSError, RuntimeError) as error:
            self._close()
            raise RunnerCrashed(f"no process could be started: {error}") from None
        except asyncio.CancelledError:
            self._close()
            raise
        self._output.close_write_end()
        self._loop.add_reader(self._child.handle, self._process_ended)
        self._loop.add_reader(self._sock, self._receive)
        if (disk := load["confinement"].disk) is not None:
            self._files = Watch(disk, partial(self._zygotes.measure, self._child, disk), self._too_many_files)
        self._most_tasks = load["confinement"].processes
        message = {
            "op": "load",
            **load,
            "timed": self._zygotes.timed,
            "confinement": load["confinement"].to_json(self._user),
        }
        try:
            reply = await self.ask(wire.encode(message), timeout)
        except wire.WireError as error:
            self.kill(RunnerCrashed("the package cannot be sent"))
            raise ModelError(f"the package's description cannot be sent: {error}") from None
        except asyncio.CancelledError:
            self.kill(RunnerCrashed("no caller waits for it any more"))
            raise
        try:
            loaded_of(reply)
        except (ModelError, RunnerCrashed):
            self.kill(RunnerCrashed("the model could not be loaded"))
            await self.wait_gone()
            raise
        self.loaded = reply
        memory = await self.measured_memory()
        # The process's peak includes memory shared with the zygote, which it did not add.
        self.load_peak = max(memory.private, peak(self.pid) - (memory.resident - memory.private))

    def ask(
        self, pieces: deque[wire.Segment], timeout: float | None, asker: object = None
    ) -> asyncio.Future[Reply]:
        """Sends a message. The future gets the answer, or RunnerCrashed, or RunnerTimeout after `timeout`
        seconds of work, which also ends the process, or NotReached if the process ends before it begins the
        call. A caller may cancel: the answer is then dropped. Only for an idle worker, unless it `queues`."""
        future: asyncio.Future[Reply] = self._loop.create_future()
        self.send(pieces, Call(future, timeout, asker))
        return future

    def send(self, pieces: deque[wire.Segment], call: Call) -> None:
        """The same, for any call."""
        calls = self._calls
        if (calls and not self._queues) or self._reaping is not None or self._sock is None:
            raise RuntimeError(f"{self!r} cannot be asked now")
        calls.append(call)
        self._pending.extend(pieces)
        if len(calls) == 1:  # the process waits for it
            self._begin(call)
            self._send()
        elif not self._sending:
            self._sending = True
            self._loop.call_soon(self._send_gathered)

    def let_go(self) -> None:
        """Gives up calls that it has not begun: they get `NotReached`. The process is ended after its current
        call, or at once if there is none."""
        first = self._calls.popleft() if self._calls else None
        self._refuse_waiting()
        if first is None:
            self.kill(RunnerCrashed("it is not needed any more"))
        else:
            self._calls.append(first)
            self.retiring = True

    def kill(self, verdict: Exception) -> None:
        """Ends the process now; pending calls get `verdict`."""
        if not self.gone:
            self._verdict = self._verdict or verdict
            if self._child is not None:
                self._child.kill()
            self._finish()

    async def close(self, grace: float = 2.0) -> None:
        """Lets the process end by itself, and kills it after `grace` seconds. Returns when it has ended."""
        if self._child is None:
            self._close()
            return
        if not self.gone:
            self._verdict = RunnerCrashed("the model was unloaded")
            if self._sock is not None:
                self._loop.remove_reader(self._sock)
                self._loop.remove_writer(self._sock)
                with suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)
            left = asyncio.Event()
            self._loop.add_reader(self._child.handle, left.set)
            try:
                with suppress(TimeoutError):
                    await asyncio.wait_for(left.wait(), grace)
            finally:  # a caller that does not wait leaves no process behind
                self._child.kill()
                self._finish()
        await self.wait_gone()

    async def wait_gone(self) -> None:
        if self._reaping is not None:
            await asyncio.shield(self._reaping)

    # ---- calls

    def _begin(self, call: Call) -> None:
        self.working_since = now = self._loop.time()
        self._deadline.begin(now, call.timeout)

    def _refuse_waiting(self) -> None:
        while self._calls:
            answer = self._calls.popleft().answer
            if not answer.done():
                answer.set_exception(NotReached())
                answer.exception()  # mark as retrieved, even if no caller waits

    def _send_gathered(self) -> None:
        self._sending = False
        if not self.gone and not self._writing:
            self._send()

    def _send(self) -> None:
        assert self._sock is not None
        try:
            wire.transmit(self._sock, self._pending)
        except BlockingIOError:
            self._writing = True
            self._loop.add_writer(self._sock, self._send_more)
        except OSError:
            self._finish()

    def _send_more(self) -> None:
        assert self._sock is not None
        try:
            wire.transmit(self._sock, self._pending)
        except BlockingIOError:
            return
        except OSError:
            self._finish()
            return
        self._writing = False
        self._loop.remove_writer(self._sock)

    def _receive(self) -> None:
        assert self._sock is not None
        try:
            if self._footprint is None:
                self._receive_footprint()
                return
            if not self._take_all(self._sock):
                self._finish()
        except BlockingIOError:
            return
        except wire.WireError as error:
            self.kill(RunnerCrashed(f"the model process broke the protocol: {error}"))
        except OSError:
            self._finish()

    def _receive_footprint(self) -> None:
        assert self._sock is not None
        data, descriptors, _, _ = socket.recv_fds(self._sock, 1, 2, socket.MSG_CMSG_CLOEXEC)
        if not descriptors:
            if data:
                raise wire.WireError("its first message is wrong")
            self._finish()
            return
        measured, *shared_memory = descriptors
        self._footprint = Footprint(measured, self.pid, *shared_memory)
        self._zygotes.footprints.add(self._footprint)

    def _take_all(self, sock: socket.socket) -> bool:
        """Takes the answers that have come. Returns False at the end of the stream."""
        if not self._reader.pull(sock):
            return False
        while self._reaping is None and (whole := self._reader.frame()) is not None:
            self._take(*whole)
        return True

    def _take(self, frame: wire.Array, header: int) -> None:
        """Takes an answer; a large one is decoded in a thread. Raises WireError."""
        call = self._answered()
        if len(frame) > _DECODE_ON_LOOP or header > _HEADER_ON_LOOP:
            decoding = self._loop.run_in_executor(self._zygotes.answers, self._decode, frame, header)
            decoding.add_done_callback(lambda done: self._deliver(call, done.result))
        else:
            self._deliver(call, self._decode, frame, header)

    def _decode(self, frame: wire.Array, header: int) -> Reply:
        """Decodes a message. A message that would take more memory than an answer may is an error of the
        model."""
        try:
            return wire.decode(frame, header, self._max_answer)
        except wire.TooLarge as error:
            return {"op": "error", "type": "AnswerTooLarge", "message": str(error)}

    def _answered(self) -> Call:
        """The call whose answer has arrived, in the order of the calls; begins the next one."""
        calls = self._calls
        if not calls:
            raise wire.WireError("it answered without a call")
        call = calls.popleft()
        since = self.working_since
        if calls:
            self._begin(calls[0])
            seconds = self.working_since - since
        else:
            self._deadline.end()
            seconds = self._loop.time() - since
        self._worked(call.asker, seconds)
        return call

    def _deliver(self, call: Call, decoded: Callable[..., Reply], *frame: Any) -> None:
        try:
            message = decoded(*frame)
            if message.get("op") not in _ANSWERS:
                raise wire.WireError("its message is not an answer")
        except (Exception, asyncio.CancelledError) as error:  # whatever it sends, its call must end
            if not isinstance(error, (wire.WireError, asyncio.CancelledError)):
                log.exception("cannot read what a model process sent")
            verdict = RunnerCrashed(f"the model process broke the protocol: {error}")
            if not call.answer.done():
                call.answer.set_exception(verdict)
            self.kill(verdict)
            return
        self.answers += 1
        # First it is free, then its caller may call it again.
        if self._idle is not None and self.loaded and (message["op"] != "loaded" or self._queues):
            self._idle(self)
        if not call.answer.done():
            call.answer.set_result(message)

    def _overdue(self) -> None:
        if self._calls:
            call = self._calls[0]
            verdict = RunnerTimeout(f"the model did not answer within {call.timeout:g} s and was stopped")
            if not call.answer.done():
                call.answer.set_exception(verdict)
            self.kill(verdict)

    # ---- the end

    def _process_ended(self) -> None:
        """Handles the end of the process. An answer sent before the end may still be in the socket, and
        counts."""
        if self._child is not None:
            self._loop.remove_reader(self._child.handle)
        while self._calls and not self.gone and self._sock is not None and self._footprint is not None:
            try:
                if not self._take_all(self._sock):
                    break
            except (wire.WireError, OSError):
                break
        self._finish()

    def _finish(self) -> None:
        if self._reaping is None:
            self._reaping = asyncio.ensure_future(self._reap())

    async def _reap(self) -> None:
        child = self._child
        if self._sock is not None:
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
        said, code = "ended", None
        if child is not None:
            self._loop.remove_reader(child.handle)
            code = await child.exit_code(_LAST_WORD) if self._verdict is None else None
            if code is None:
                child.kill()
                if await child.exit_code(_STATUS_WAIT) is not None:
                    said = "closed its connection and was stopped"
            else:
                said = described(code)
        outside = code == -signal.SIGKILL
        verdict = self._verdict or RunnerCrashed(f"the model process {said}", outside=outside)
        if self._calls:
            call = self._calls.popleft()
            self.unanswered = call.asker
            if not call.answer.done():
                call.answer.set_exception(verdict)
                call.answer.exception()  # mark as retrieved, even if no caller waits
        self._refuse_waiting()
        self._close()
        self._ended(self, str(verdict))

    def _close(self) -> None:
        self._deadline.close()
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._output is not None:
            self._output.close()
            self._output = None
        if self._footprint is not None:
            self._footprint.close()
        if self._child is not None:
            self._child.close()
        if self._user is not None:
            self._zygotes.users.give_back(self._user)
            self._user = None
