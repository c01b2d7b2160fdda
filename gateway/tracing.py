"""The trace that a request belongs to: W3C Trace Context, read, carried and passed on.

The client's `traceparent` names a trace. The gateway's part in it has its own id, which it sends with every
call that it makes for the request. The request's context carries the trace, so that its tasks have it too.
The trace ends with the request's task: a load or a process that the request started continues without it.
Must not know HTTP or logs. Source of the form: https://www.w3.org/TR/trace-context-1/, section 3.2.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from contextvars import ContextVar
from random import Random
from typing import Any, Final, NamedTuple

_HEX: Final = b"0123456789abcdef"
_LENGTH: Final = len("00-") + 32 + 1 + 16 + len("-00")
#: The flag of a trace that is recorded.
SAMPLED: Final = 1
#: The standard requires to pass on this much; more is dropped.
_MAX_STATE: Final = 512
_IDS: Final = Random()


class Work(NamedTuple):
    """One call of a model: when it began and ended, in nanoseconds since the epoch, measured in the model's
    process where it has one; how many requests shared it, and their rows."""

    began: int
    ended: int
    requests: int
    rows: int


class Trace:
    """One request's part in a trace. Ids are lower-case hex, of 32 and 16 digits."""

    __slots__ = ("_state", "_task", "flags", "span_id", "trace_id")

    def __init__(
        self, trace_id: str, flags: int, state: str, task: asyncio.Task[Any], span_id: str = ""
    ) -> None:
        self.trace_id = trace_id
        self.span_id = span_id or f"{_IDS.getrandbits(64) or 1:016x}"
        self.flags = flags
        self._state = state
        self._task = weakref.ref(task)

    @property
    def parent(self) -> str:
        """The `traceparent` for calls made for this request."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"

    @property
    def goes_on(self) -> bool:
        task = self._task()
        return task is not None and not task.done()

    def headers(self) -> dict[str, str]:
        """The headers for a call to another server."""
        return {"traceparent": self.parent} | ({"tracestate": self._state} if self._state else {})


_current: ContextVar[Trace | None] = ContextVar("trace", default=None)
_worked: ContextVar[tuple[int, int] | None] = ContextVar("worked", default=None)


def begin(traceparent: bytes, tracestate: bytes = b"") -> Trace | None:
    """Makes the running task a part of the trace that the client names. Ignores an invalid header and returns
    None."""
    named = parse(traceparent)
    task = asyncio.current_task()
    if named is None or task is None:
        return None
    state = tracestate.decode("latin-1")
    if len(state) > _MAX_STATE or not (state.isascii() and state.isprintable()):
        state = ""
    trace = Trace(*named, state, task)
    _current.set(trace)
    return trace


def enter(trace_id: str, span_id: str, flags: int, state: str) -> Trace | None:
    """Makes the running task the part of a trace that has this id. Returns None outside of a task."""
    task = asyncio.current_task()
    if task is None:
        return None
    trace = Trace(trace_id, flags, state, task, span_id)
    _current.set(trace)
    return trace


def origin() -> Trace | None:
    """The trace of the request that caused what runs now, also after its end."""
    return _current.get()


def current() -> Trace | None:
    """The trace of the current request, until the request ends; None if there is none."""
    trace = _current.get()
    return trace if trace is not None and trace.goes_on else None


def headers() -> dict[str, str]:
    """The headers for a call that is made now; empty without a trace."""
    trace = current()
    return {} if trace is None else trace.headers()


def parse(traceparent: bytes) -> tuple[str, int] | None:
    """The trace's id and its flags, of which only "sampled" has a meaning; None if the header is not valid.

    In a later version of the header, the first four fields are read as in this one; the rest is ignored.
    """
    fields, rest = traceparent[:_LENGTH], traceparent[_LENGTH:]
    if len(fields) < _LENGTH or fields.translate(None, _HEX) != b"---":
        return None
    version, trace_id, parent_id, flags = fields.split(b"-")
    if (len(version), len(trace_id), len(parent_id)) != (2, 32, 16):
        return None
    if version == b"ff" or (rest and (version == b"00" or not rest.startswith(b"-"))):
        return None
    if not trace_id.strip(b"0") or not parent_id.strip(b"0"):
        return None
    return trace_id.decode(), int(flags, 16) & SAMPLED


def report(worked: object) -> None:
    """Keeps the times that a model process gave for the call that the running task made. The process may be
    hostile: anything but two times in order is ignored."""
    match worked:
        case [int(began), int(ended)] if 0 < began <= ended < 1 << 63:
            _worked.set((began, ended))


def work(requests: int, rows: int, seconds: float) -> Work:
    """The call that the running task has just made: by the times that its process gave, else by these
    seconds."""
    worked = _worked.get()
    if worked is None:
        ended = time.time_ns()
        return Work(ended - round(seconds * 1e9), ended, requests, rows)
    _worked.set(None)
    return Work(*worked, requests, rows)
