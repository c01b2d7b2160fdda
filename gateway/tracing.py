"""The trace that a request belongs to: W3C Trace Context, read, carried and passed on.

The caller's `traceparent` names a trace; the gateway's part in it gets an id of its own, which is what those
are told whom the gateway asks because of the request. It is carried by the request's context, so that tasks
which work for the request have it, and ends with the request's task: a load or a process that the request
started lives on without it. Knows nothing of HTTP and of logs.
Source of the form: https://www.w3.org/TR/trace-context-1/, section 3.2.
"""

from __future__ import annotations

import asyncio
import weakref
from contextvars import ContextVar
from random import Random
from typing import Any, Final

_HEX: Final = b"0123456789abcdef"
_LENGTH: Final = len("00-") + 32 + 1 + 16 + len("-00")
_SAMPLED: Final = 1
#: More than the standard asks to be passed on is not.
_MAX_STATE: Final = 512
_IDS: Final = Random()


class Trace:
    """One request's part in a trace. Ids are lower-case hex, of 32 and 16 digits."""

    __slots__ = ("_state", "_task", "flags", "span_id", "trace_id")

    def __init__(self, trace_id: str, flags: int, state: str, task: asyncio.Task[Any]) -> None:
        self.trace_id = trace_id
        self.span_id = f"{_IDS.getrandbits(64) or 1:016x}"
        self.flags = flags
        self._state = state
        self._task = weakref.ref(task)

    @property
    def parent(self) -> str:
        """The `traceparent` of what is done because of this request."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"

    @property
    def goes_on(self) -> bool:
        task = self._task()
        return task is not None and not task.done()

    def headers(self) -> dict[str, str]:
        """What a call to another server carries."""
        return {"traceparent": self.parent} | ({"tracestate": self._state} if self._state else {})


_current: ContextVar[Trace | None] = ContextVar("trace", default=None)


def begin(traceparent: bytes, tracestate: bytes = b"") -> Trace | None:
    """Lets the running task be part of the trace that the caller names; None for a header that is not valid,
    which is ignored."""
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


def current() -> Trace | None:
    """The trace of the request that this is done for, as long as the request goes on."""
    trace = _current.get()
    return trace if trace is not None and trace.goes_on else None


def headers() -> dict[str, str]:
    """What a call that is made now carries: nothing, where no trace is."""
    trace = current()
    return {} if trace is None else trace.headers()


def parse(traceparent: bytes) -> tuple[str, int] | None:
    """The trace's id and its flags, of which only "sampled" has a meaning; None where it is not valid.

    Of a later version, the first four fields are read as those of this one; what follows them is ignored.
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
    return trace_id.decode(), int(flags, 16) & _SAMPLED
