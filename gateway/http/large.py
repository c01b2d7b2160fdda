"""Large bodies: a separate process parses and enforces them, one at a time.

Parsing a large body holds the interpreter's lock for its whole duration, and Python keeps much of the memory.
In another process neither affects other requests. The gateway gets back one frame, and forwards it unread to
the model's process. The process starts with the first large body. It ends when none has come for a while, and
after a body that made it grow, so that the system gets the memory back.

Because one body is parsed at a time, its parsed form does not count with the other requests. Up to the budget
a body is always parsed; above it only if the machine, or the container, has enough free memory.

This module holds both ends: `LargeBodies` in the gateway, `main` in the process. It knows bodies, signatures
and frames; must not know models.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from gateway.cgroup import Usage, memory_usages
from gateway.errors import Detail, Problem, overloaded
from gateway.http import bodies
from gateway.http.media import Media, parse
from loaders.enforcement import InvalidInput, Violation, enforce
from loaders.signature import Signature
from loaders.worker import wire

if TYPE_CHECKING:
    from gateway.names import Reference
    from loaders.enforcement import Mode

#: How long the process waits for work, and how long one body may take, in seconds.
IDLE_SECONDS: Final = 30.0
BODY_SECONDS: Final = 120.0
#: The process ends after a body that made it grow by more than this, in bytes.
_GROWN: Final = 64 << 20
#: What the limit on its memory allows in addition to the parsed body: its own code, and temporary copies.
_HEADROOM: Final = 512 << 20
#: A parsed body may be in memory twice: MLflow's casts begin with a copy.
_COPIES: Final = 2
#: Which part of all memory may be in use while a body above the budget is parsed.
_SHARE: Final = 0.7
#: The most bytes of memory that one byte of a body with values becomes (`{"a":1},` makes 40); a body of empty
#: lists becomes more, and has no room above the budget.
_DENSEST: Final = 42

_log = logging.getLogger("gateway.http")


class Enforced(NamedTuple):
    """A body after enforcement, with its params."""

    batch: wire.Framed
    warnings: tuple[str, ...]
    lenient: bool


@dataclass(slots=True)
class LargeBody:
    """A body that was received but not parsed. `reference`: the model that the path or the header names.
    `becomes`: the bytes that it takes when it is parsed, which are counted in `held`. `asked`: as in
    `Parsed`, set by `enforce`."""

    body: bytes
    media: Media
    reference: Reference | None
    place: LargeBodies
    held: bodies.Held
    becomes: int = 0
    asked: Any = None

    async def model(self, deadline: float | None) -> object:
        """The body's member `model`, for a request that names its model nowhere else. `deadline`: in the
        loop's time. Raises Problem."""
        message = {"op": "model", "media": list(self.media), "body": _array(self.body)}
        try:
            async with asyncio.timeout_at(deadline):
                reply, _ = await self.place.ask(message, self.becomes, self.held)
        except TimeoutError:
            late = "the caller's deadline passed before the body was parsed"
            raise Problem("DEADLINE_EXCEEDED", late) from None
        return _model(reply)

    async def enforce(
        self, signature: Signature | None, mode: Mode, type_hints: bool, positional: bool
    ) -> Enforced:
        """The result of `enforce`. Raises InvalidInput, and Problem for a body that cannot be parsed or whose
        rows take too much memory."""
        message = {
            "op": "enforce",
            "media": list(self.media),
            "body": _array(self.body),
            "signature": None if signature is None else signature.to_json(),
            "mode": mode,
            "type_hints": type_hints,
            "positional": positional,
        }
        reply, frame = await self.place.ask(message, self.becomes, self.held)
        assert frame is not None
        if self.reference is not None:
            bodies.agreed(self.reference, _model(reply))
        self.asked = reply["asked"]
        # For a compressed form `becomes` is a guess: what really came is held as long as the request waits.
        self.held.charge(len(self.body), max(0, frame[0].nbytes - self.becomes))
        return Enforced(wire.Framed(reply["rows"], *frame), tuple(reply["warnings"]), reply["lenient"])


class LargeBodies:
    """The gateway's end of the process. `budget`: the bytes that one parsed body may always take. `usages`
    reads how much memory is in use, and how much there is."""

    def __init__(self, budget: int, usages: Callable[[], list[Usage]] = memory_usages) -> None:
        self._budget = budget
        self._usages = usages
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="io-large")
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._turn = asyncio.Lock()
        self._waiting = 0

    @property
    def pid(self) -> int | None:
        """The id of the process; None if there is none."""
        process = self._process
        return None if process is None else process.pid

    async def ask(
        self, message: Mapping[str, Any], becomes: int, held: bodies.Held
    ) -> tuple[dict[str, Any], tuple[wire.Array, int] | None]:
        """Sends one message. Returns the reply, and the frame that follows the reply to `enforce`. `becomes`:
        the bytes of the parsed body. `held`: what the request holds; if its caller leaves while the body is
        parsed, it is held until the end of that. Raises BODY_TOO_LARGE if it can never be parsed here,
        OVERLOADED if it cannot be parsed now."""
        loop = asyncio.get_running_loop()
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        self._waiting += 1
        try:
            # Here, not in the thread's queue: a body whose caller leaves while it waits is dropped.
            await self._turn.acquire()
            running = loop.run_in_executor(self._thread, self._ask, message, becomes)
            running.add_done_callback(lambda done: self._turn.release())
            try:
                reply, frame = await asyncio.shield(running)
            except asyncio.CancelledError:
                held.outlast(running)
                raise
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._idle = loop.call_later(IDLE_SECONDS, self._thread.submit, self._end)
        if reply["op"] == "invalid":
            violations = [Violation(*violation) for violation in reply["violations"]]
            raise InvalidInput(violations, reply["total"])
        if reply["op"] == "problem":
            details = [Detail(*detail) for detail in reply["details"]]
            raise Problem(reply["code"], reply["message"], details=details, hint=reply["hint"])
        return reply, frame

    async def close(self) -> None:
        """Ends the process. Later bodies are refused."""
        if self._idle is not None:
            self._idle.cancel()
        process = self._process
        if process is not None:
            process.kill()  # it may still parse a body whose caller has left
        await asyncio.get_running_loop().run_in_executor(self._thread, self._end)
        self._thread.shutdown(wait=False)

    # ---- in the thread

    def _ask(
        self, message: Mapping[str, Any], becomes: int
    ) -> tuple[dict[str, Any], tuple[wire.Array, int] | None]:
        if becomes > self._budget:
            if becomes > _DENSEST * len(message["body"]):
                raise too_large(self._budget)
            self._check_room(_COPIES * becomes)
        most = max(self._budget, becomes)
        try:
            if self._process is None or self._process.poll() is not None:
                self._start()
            sock, reader = self._sock, wire.Reader()
            assert sock is not None
            wire.transmit(sock, wire.encode({**message, "most": most}))
            reply = wire.receive(sock, reader)
            if reply is None:
                raise EOFError
            frame = None
            if reply["op"] == "enforced":
                while (frame := reader.frame()) is None:
                    if not reader.pull(sock):
                        raise EOFError
            if reply["grown"]:
                self._end()
        except (OSError, EOFError, wire.WireError, KeyError) as error:
            ended = self._process
            self._end()
            _log.error("the process for large bodies failed (%s)", type(error).__name__)
            if ended is not None and isinstance(error, EOFError | BrokenPipeError):
                raise too_large(most) from None
            raise Problem(
                "INTERNAL", "the body could not be parsed; the gateway's log has the reason"
            ) from None
        return reply, frame

    def _check_room(self, size: int) -> None:
        """A small container must have room, however much the machine has, and the machine as well."""
        usages = self._usages()
        if any(size > usage.limit * _SHARE - min(usage.used, usage.limit // 4) for usage in usages):
            raise Problem(
                "BODY_TOO_LARGE",
                f"the body would take about {size} bytes of memory when it is parsed, and there are "
                f"{min(usage.limit for usage in usages)} for everything",
                hint="send fewer rows in one request, or Arrow",
            )
        if any(size > usage.limit * _SHARE - usage.used for usage in usages):
            raise overloaded(
                "the gateway",
                f"the body would take about {size} bytes of memory when it is parsed, which are not free now",
                5.0,
                "send fewer rows in one request, or Arrow, or wait as long as Retry-After says",
            )

    def _start(self) -> None:
        self._end()
        ours, theirs = socket.socketpair()
        environment = {
            name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "LC_ALL")
        }
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        paths = os.pathsep.join(path for path in sys.path if path)
        command = [sys.executable, "-m", "gateway.http.large", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env={**environment, "PYTHONPATH": paths},
                stdin=subprocess.DEVNULL,
            )
        ours.settimeout(BODY_SECONDS)
        self._sock = ours

    def _end(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def too_large(budget: int) -> Problem:
    """The problem of a body that would take too much memory once it is parsed."""
    return Problem(
        "BODY_TOO_LARGE",
        f"the body would take more than {budget} bytes of memory when it is parsed",
        hint="send fewer rows in one request, or Arrow",
    )


def _array(body: bytes) -> wire.Array:
    return np.frombuffer(body, np.uint8)


def _model(reply: Mapping[str, Any]) -> object:
    return reply["model"] if reply["named"] else bodies.ABSENT


# ---- in the process


def main(descriptor: int) -> None:
    """Answers until the gateway closes the socket."""
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)  # from the terminal: the gateway decides when it ends
    with suppress(OSError):
        # If memory runs out nevertheless, the kernel ends this process and not the gateway.
        Path("/proc/self/oom_score_adj").write_text("1000")
    before = _peak()
    reader = wire.Reader()
    with socket.socket(fileno=descriptor) as sock:
        while (message := wire.receive(sock, reader)) is not None:
            most = int(message.pop("most"))
            _limit_memory(_COPIES * most + _HEADROOM)
            reply, batch = _answer(message, most)
            del message
            reply["grown"] = _peak() - before > _GROWN
            pieces = wire.encode(reply)
            if batch is not None:
                pieces += batch
            del batch
            wire.transmit(sock, pieces)


def _limit_memory(size: int) -> None:
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (size, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _answer(message: dict[str, Any], most: int) -> tuple[dict[str, Any], Any]:
    try:
        parsed = parse(Media(*message["media"]), message.pop("body").tobytes())
        named = parsed.model is not bodies.ABSENT
        about: dict[str, Any] = {
            "named": named,
            "model": parsed.model if isinstance(parsed.model, str) else None,
        }
        if message["op"] == "model":
            return {"op": "model", **about}, None
        signature = message["signature"]
        enforced = enforce(
            None if signature is None else Signature.from_json(signature),
            parsed.raw,
            parsed.params,
            message["mode"],
            type_hints=message["type_hints"],
            positional=message["positional"],
        )
        about |= {"asked": parsed.asked, "lenient": enforced.lenient}
        del parsed
        frame = wire.encode({"op": "predict", "batch": enforced.batch, "params": enforced.params})
        rows = enforced.batch.rows
        return {"op": "enforced", "rows": rows, "warnings": list(enforced.warnings), **about}, frame
    except InvalidInput as error:
        violations = [[v.path, v.problem, v.expected, v.got] for v in error.violations]
        return {"op": "invalid", "violations": violations, "total": error.total}, None
    except Problem as error:
        return _problem(error), None
    except MemoryError:
        return _problem(too_large(most)), None
    except wire.WireError:
        return _problem(Problem("INVALID_INPUT", "the input cannot be sent to the model")), None


def _problem(error: Problem) -> dict[str, Any]:
    details = [[d.path, d.problem, d.expected, d.got] for d in error.details]
    said = {"code": error.code, "message": error.message, "details": details, "hint": error.hint}
    return {"op": "problem", **said}


def _peak() -> int:
    """The peak memory of this process, in bytes. (`getrusage` would count its parent's memory too.)"""
    try:
        status = Path("/proc/self/status").read_text("ascii", "replace")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(status.partition("VmHWM:")[2].split(None, 1)[0]) * 1024


if __name__ == "__main__":
    main(int(sys.argv[1]))
