"""The model process: loads packages, then answers one request after another until the stream ends.

It belongs to one model, or it is a pack: several models in one process, each with a number.

A zygote starts it, by fork or by exec. It exchanges frames (`wire`) with the gateway over one socket. Every
exception of the model, including `SystemExit`, is an answer. Printed text goes to a pipe that the gateway
reads. When the gateway ends, the kernel ends this process and its children; the model cannot prevent this,
because the gateway holds the cause. Must not know the gateway's modules. Imports only numpy and the standard
library; frameworks come with the model.
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
from functools import lru_cache
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
"""Thread limits that frameworks read when they are imported: 1 before a fork, the model's share after it."""

#: The place where a model answers its example before it serves; the gateway shows it.
IN_PLACE: Final = "in place"
FORKED: Final = "in a throw-away fork"
LOADED_AGAIN: Final = "in place, then loaded again"

_LENGTH: Final = 8
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_M_MMAP_THRESHOLD: Final = -3
#: A pack collects garbage at least once in this many unloads.
_COLLECT_EVERY: Final = 16
#: A pack collects garbage at once if a model used this many bytes and its unload freed less than half of
#: them.
_WORTH_COLLECTING: Final = 256 << 10


def main(options: Mapping[str, Any]) -> None:
    """Runs a model process to its end; never returns.

    `connection`: the socket to the gateway; `log`: the pipe for printed text; `temporary`: the directory of
    this process.
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
        # Skip the interpreter's shutdown: freeing a large model object by object takes seconds.
        os._exit(code)


def _set_up(log: int, temporary: str) -> None:
    """Sets up the process's own process group, output and directory."""
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
    # Make new streams, line by line: the old ones may be set up for a file.
    sys.stdout = sys.__stdout__ = _text(1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _text(2)  # type: ignore[misc]
    # Not `update` with keywords: it visits all subclasses of Mapping, and so copies their memory.
    os.environ["TMPDIR"] = os.environ["HOME"] = temporary
    tempfile.tempdir = None
    os.chdir(temporary)
    # Otherwise all children of a zygote would draw the same random numbers.
    np.random.seed()


def _text(descriptor: int) -> TextIOWrapper:
    return open(descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


class RequestLoop:
    """Reads requests and writes answers on one socket. A process of one model receives `load` once, first,
    then any number of `predict`. A pack receives `open` first, then any of `load`, `predict`, `unload`, each
    with the number of the model that it is for."""

    def __init__(self, sock: socket.socket, temporary: str) -> None:
        self._sock = sock
        self._temporary = temporary
        self._reader = wire.Reader()
        self._models: dict[int, Model] = {}
        self._prewarms: dict[int, str] = {}
        self._for = 0
        self._pack = False
        self._timed = False
        self._unloaded = 0
        self._grown: dict[int, int] = {}
        self._pid = os.getpid()
        self._limit = wire.MAX_FRAME

    def run(self) -> None:
        """Runs until the gateway ends the stream. Raises OSError and WireError, which cannot be reported."""
        while (message := wire.receive(self._sock, self._reader)) is not None:
            self._for = self._reader.model
            apart = message["op"] == "prewarm" and self._prewarms.get(self._for) == FORKED
            answer = self._apart(message) if apart else self._encoded(message)
            del message
            wire.transmit(self._sock, answer)

    def _encoded(self, message: dict[str, Any]) -> deque[wire.Segment]:
        try:
            return wire.encode(self._answer(message), self._limit, lenient=True)
        except wire.TooLarge as error:
            return wire.encode({**_failure(error), "type": "AnswerTooLarge"})
        except wire.WireError as error:  # its text holds no data
            return wire.encode({**_failure(error), "type": "AnswerNotWritable", "shown": str(error)})
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
            if not self._timed:
                return {"op": "answer", "batch": model.run(message["batch"], message["params"])}
            began = time.time_ns()
            batch = model.run(message["batch"], message["params"])
            return {"op": "answer", "batch": batch, "worked": [began, time.time_ns()]}
        except BaseException as error:  # noqa: BLE001  (every exception of the model is an answer)
            return _failure(error)
        finally:
            if os.getpid() != self._pid:
                os._exit(0)  # the model forked and its child returned here; the parent owns the connection
            _flush()

    def _apart(self, message: dict[str, Any]) -> deque[wire.Segment]:
        """Returns the answer of a throw-away fork of this process, so that the call leaves no traces here."""
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
            # Do not read until the pipe closes: a process started in the fork may keep it open.
            size = int.from_bytes(pipe.read(_LENGTH), "little")
            frame = pipe.read(size)
        status = 0
        with suppress(ChildProcessError):  # the model may let the kernel reap its children
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
        """Makes this process an empty pack."""
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
        self._timed = message.get("timed", False)
        return self._confine(message)

    def _unload(self) -> dict[str, Any]:
        """Frees a model of a pack. Collects garbage only if that freed too little, because a collection
        visits every object of every model."""
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
        """Gives up rights that a model does not need. Sends the descriptors for measuring memory, so that the
        gateway can read them even if it may not inspect this process."""
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
    """Returns an exception as text. The exception object itself does not leave the process."""
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
    """Returns True if a fork of this process can answer without side effects. A fork has no other threads,
    and their locks stay locked in it. It would share files and connections that loading opened.
    """
    try:
        tasks = len(os.listdir("/proc/self/task"))
    except OSError:
        return False
    return tasks == 1 and bool(held) and _descriptors() <= held


def _known(model: Any) -> dict[str, Any]:
    """Returns known values for made-up rows. Errors of the model are ignored, because it is loaded."""
    try:
        return dict(model.known)
    except Exception:  # noqa: BLE001
        return {}


def _accepted(model: Model) -> dict[str, str | None] | None:
    """Returns the signature of the accepted input if it differs from the package's."""
    signature = model.accepted
    return None if signature is None else signature.to_json()


def _resident() -> int:
    """Returns the resident bytes that belong to no file; 0 if the kernel does not report them. Takes
    microseconds."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            _, resident, files, _ = statm.read().split(b" ", 3)
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(files)) * _PAGE


def _return_large_blocks() -> None:
    """Makes the C library allocate each large block directly from the kernel, so that a freed block returns
    at once. By default it takes larger and larger blocks from its heap, which keeps them."""
    mallopt = _c_function("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 256 << 10)


def _limit_threads(threads: int) -> None:
    """Sets the thread pools of modules imported before the fork, and the limits for later imports."""
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(threads)
    if threads > 1 and (pools := thread_pools()) is not None:
        pools.limit(limits=threads)


@lru_cache(maxsize=1)
def thread_pools() -> Any:
    """Returns the thread pools of the libraries that are loaded when it is first called, None if they cannot
    be found. A zygote finds them for its children. Later libraries read the environment."""
    try:
        import threadpoolctl
    except ImportError:
        return None
    return threadpoolctl.ThreadpoolController()


def _trim() -> None:
    """Returns memory that loading freed to the kernel."""
    trim = _c_function("malloc_trim")
    if trim is not None:
        trim(0)


@lru_cache(maxsize=None)
def _c_function(name: str) -> Any:
    """A function of the C library, None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue  # the model closed or replaced the stream
