"""The model process: loads packages, then answers one request after the other until the stream ends.

It belongs to one model, or it is a pack: several models, each under a number, in one process.

It is started by a zygote, by fork or by exec, and talks to the gateway over one socket in frames
(`wire`). Whatever the model raises, `SystemExit` included, is an answer. What it prints goes to a pipe that
the gateway reads. When the gateway is gone the kernel ends this process and all that it started; what makes
the kernel do so lies with the gateway, out of this process's reach. Must not know of the gateway's modules.
numpy and the standard library only; frameworks come with the model.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np

from loaders.compat.pythons import exit_code, send_descriptors, traced
from loaders.flavors.failures import failure
from loaders.worker import sandbox, wire

if TYPE_CHECKING:
    from loaders.model import Model

MAX_MESSAGE: Final = 4_000
MAX_TRACE: Final = 64_000
THREAD_VARIABLES: Final = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "LOKY_MAX_CPU_COUNT",
)
"""The caps that frameworks read when they are imported: 1 before a fork, the model's share after it."""

#: How a model answers its example before it serves; the gateway shows it.
IN_PLACE: Final = "in place"
FORKED: Final = "in a throw-away fork"
LOADED_AGAIN: Final = "in place, then loaded again"

_LENGTH: Final = 8
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_M_MMAP_THRESHOLD: Final = -3
#: A pack collects its garbage at least at one of so many unloads.
_COLLECT_EVERY: Final = 16
#: It collects at once where a model grew by so many bytes and gave back less than half of them.
_WORTH_COLLECTING: Final = 256 << 10


def main(options: Mapping[str, Any]) -> None:
    """Runs a model process to its end; never returns.

    `connection`: the socket to the gateway; `log`: the pipe for what is printed; `temporary`: this process's
    own directory.
    """
    code = 1
    try:
        os.set_inheritable(options["connection"], False)
        _set_up(options["log"], options["temporary"])
        with socket.socket(fileno=options["connection"]) as sock:
            RequestLoop(sock, options["temporary"]).run()
        _flush()
        atexit._run_exitfuncs()
        code = 0
    except BaseException:  # noqa: BLE001  (the last place that can say anything before the process ends)
        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        # Not by way of interpreter shutdown: freeing a large model object by object takes seconds.
        os._exit(code)


def _set_up(log: int, temporary: str) -> None:
    """Own process group, own output, own directory."""
    if os.getpgid(0) != os.getpid():
        os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(null)
    os.close(log)
    # New ones, by lines: those of before the change may have been set up for a file.
    sys.stdout = sys.__stdout__ = _text(1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _text(2)  # type: ignore[misc]
    os.environ.update(TMPDIR=temporary, HOME=temporary)
    tempfile.tempdir = None
    os.chdir(temporary)
    # Siblings of one zygote would otherwise draw the same numbers.
    np.random.seed()


def _text(descriptor: int) -> TextIOWrapper:
    return open(descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


class RequestLoop:
    """Requests and answers over one socket. A process of one model is told `load` once, first; then
    `predict`, any number of times. A pack is told `open` first, then any of `load`, `predict`, `unload`;
    `for` names the model that the next message is for, and has no answer."""

    def __init__(self, sock: socket.socket, temporary: str) -> None:
        self._sock = sock
        self._temporary = temporary
        self._reader = wire.Reader()
        self._models: dict[int, Model] = {}
        self._prewarms: dict[int, str] = {}
        self._for = 0
        self._pack = False
        self._unloaded = 0
        self._grown: dict[int, int] = {}
        self._pid = os.getpid()
        self._limit = wire.MAX_FRAME

    def run(self) -> None:
        """Returns when the gateway ends the stream. Raises OSError and WireError: no one can be told then."""
        while (message := wire.receive(self._sock, self._reader)) is not None:
            if message["op"] == "for":
                self._for = message["model"]
                continue
            apart = message["op"] == "prewarm" and self._prewarms.get(self._for) == FORKED
            answer = self._apart(message) if apart else self._encoded(message)
            del message
            wire.transmit(self._sock, answer)

    def _encoded(self, message: dict[str, Any]) -> deque[wire.Segment]:
        try:
            return wire.encode(self._answer(message), self._limit, lenient=True)
        except wire.TooLarge as error:
            return wire.encode({**_failure(error), "type": "AnswerTooLarge"})
        except BaseException as error:  # noqa: BLE001  (writing an answer asks the model's own objects)
            return wire.encode(_failure(error))

    def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            if message["op"] == "load":
                return self._load(message)
            if message["op"] == "open":
                return self._open(message)
            model = self._models.get(self._for)
            if message["op"] == "unload":
                del model
                return self._unload()
            if model is None:
                raise RuntimeError("no model was loaded")
            return {"op": "answer", "batch": model.run(message["batch"], message["params"])}
        except BaseException as error:  # noqa: BLE001  (whatever the model raises is an answer, not an end)
            return _failure(error)
        finally:
            if os.getpid() != self._pid:
                os._exit(0)  # the model forked and let its child return: the connection belongs to the parent
            _flush()

    def _apart(self, message: dict[str, Any]) -> deque[wire.Segment]:
        """The answer of a throw-away fork of this process: nothing of the call stays here."""
        read, write = os.pipe2(os.O_CLOEXEC)
        try:
            child = os.fork()
        except OSError as error:
            os.close(read)
            os.close(write)
            return wire.encode(_failure(error))
        if child == 0:
            self._answer_and_end(message, write)
        os.close(write)
        with open(read, "rb") as pipe:
            # Not to the end of the pipe: what the model started in the fork may hold it open.
            size = int.from_bytes(pipe.read(_LENGTH), "little")
            frame = pipe.read(size)
        status = 0
        with suppress(ChildProcessError):  # the model may have its children reaped by the kernel
            status = os.waitpid(child, 0)[1]
        if frame and len(frame) == size:
            return deque([frame])
        code = exit_code(status)
        ended = f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"
        return wire.encode(_failure(RuntimeError(f"the process that answered the example {ended}")))

    def _answer_and_end(self, message: dict[str, Any], write: int) -> NoReturn:
        try:
            self._pid = os.getpid()
            pieces = self._encoded({**message, "op": "predict"})
            with open(write, "wb") as pipe:
                pipe.write(sum(len(piece) for piece in pieces).to_bytes(_LENGTH, "little"))
                pipe.writelines(pieces)
        finally:
            os._exit(0)

    def _load(self, message: dict[str, Any]) -> dict[str, Any]:
        started = time.monotonic()
        confined = {} if self._pack else self._set_up(message)
        from loaders.model import open_model
        from loaders.package import Package

        package = Package.from_json(message["package"], message["path"])
        held = _descriptors()
        before = _resident()
        private = not self._pack
        model = open_model(package, message["config"], threads=message["threads"], private=private)
        model.max_answer = self._limit
        if private:
            gc.collect()
            _trim()
        self._models[self._for] = model
        self._prewarms[self._for] = (
            IN_PLACE if model.flavor.stateless else FORKED if _may_fork(held) else LOADED_AGAIN
        )
        self._grown[self._for] = grown = _resident() - before
        return {
            "op": "loaded",
            "merges": bool(model.merges),
            "known": _known(model),
            "accepted": _accepted(model),
            "prewarms": self._prewarms[self._for],
            "seconds": time.monotonic() - started,
            "grown": grown,
            "confinement": confined,
        }

    def _open(self, message: dict[str, Any]) -> dict[str, Any]:
        """Makes a pack of this process; nothing is loaded yet."""
        self._pack = True
        _return_large_blocks()
        confined = self._set_up(message)
        gc.collect()
        gc.freeze()
        return {
            "op": "loaded",
            "merges": False,
            "known": {},
            "accepted": None,
            "prewarms": IN_PLACE,
            "confinement": confined,
        }

    def _set_up(self, message: dict[str, Any]) -> dict[str, str]:
        os.environ.update(message["environment"])
        _limit_threads(message["threads"])
        self._limit = message.get("max_answer", self._limit)
        return self._confine(message)

    def _unload(self) -> dict[str, Any]:
        """Frees a model of a pack. Collects only where dropping it gave too little back: that looks at every
        object of every model."""
        before = _resident()
        model = self._models.pop(self._for, None)
        self._prewarms.pop(self._for, None)
        grown = self._grown.pop(self._for, 0)
        if model is not None:
            model.close()
            del model
        _trim()
        self._unloaded += 1
        kept = grown > _WORTH_COLLECTING and before - _resident() < grown // 2
        if kept or self._unloaded % _COLLECT_EVERY == 0:
            gc.collect()
            _trim()
        return {"op": "answer", "freed": before - _resident()}

    def _confine(self, message: dict[str, Any]) -> dict[str, str]:
        """Gives up what a model does not need. Sends what its memory is measured by, so that the gateway can
        read it even where it may not look into this process."""
        measured = [os.open("/proc/self/smaps_rollup", os.O_RDONLY | os.O_CLOEXEC)]
        try:
            applied = sandbox.apply(message["confinement"], message["path"], self._temporary)
            if applied.shared_memory >= 0:
                measured.append(applied.shared_memory)
        finally:
            send_descriptors(self._sock, b"m", measured)
            for descriptor in measured:
                os.close(descriptor)
        return applied.held


def _failure(error: BaseException) -> dict[str, Any]:
    """An exception as text. Nothing of the exception object itself leaves the process."""
    try:
        text = str(error)[:MAX_MESSAGE]
    except BaseException:  # noqa: BLE001  (its __str__ is the model's code as well)
        text = "an exception that cannot be shown"
    try:
        trace = "".join(traced(error))
    except BaseException:  # noqa: BLE001
        trace = ""
    if len(trace) > MAX_TRACE:
        trace = f"{trace[: MAX_TRACE // 2]}\n…\n{trace[-MAX_TRACE // 2 :]}"
    shown, unsuitable = failure(error)
    return {
        "op": "error",
        "type": type(error).__name__,
        "message": text,
        "trace": trace,
        "shown": shown,
        "unsuitable": unsuitable,
    }


def _descriptors() -> frozenset[str]:
    try:
        return frozenset(os.listdir("/proc/self/fd"))
    except OSError:
        return frozenset()


def _may_fork(held: frozenset[str]) -> bool:
    """Whether a fork of this process can answer, and leaves it as it is. Threads are not in the fork, and
    what they locked stays locked there; a file or connection that loading opened would be shared with it.
    """
    try:
        tasks = len(os.listdir("/proc/self/task"))
    except OSError:
        return False
    return tasks == 1 and bool(held) and _descriptors() <= held


def _known(model: Any) -> dict[str, Any]:
    """A help for made-up rows; whatever a model does when it is looked at, it is loaded."""
    try:
        return dict(model.known)
    except Exception:  # noqa: BLE001
        return {}


def _accepted(model: Model) -> dict[str, str | None] | None:
    """The signature of what it accepts, where that is another than its package's."""
    signature = model.accepted
    return None if signature is None else signature.to_json()


def _resident() -> int:
    """Resident bytes that belong to no file; 0 where the kernel does not say. Some microseconds."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            _, resident, files, _ = statm.read().split(b" ", 3)
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(files)) * _PAGE


def _return_large_blocks() -> None:
    """Has the C library ask the kernel for each large block by itself, whatever was freed before, so that it
    goes back at once: its own rule takes ever larger ones from its heap, which keeps them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 256 << 10)


def _limit_threads(threads: int) -> None:
    """Sets the pools of what was imported before the fork, and the caps for what comes after."""
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(threads)
    if threads > 1:
        try:
            import threadpoolctl
        except ImportError:
            return
        threadpoolctl.threadpool_limits(limits=threads)


def _trim() -> None:
    """Hands back to the kernel what loading freed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue  # the model closed or replaced it
