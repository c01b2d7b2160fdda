"""The log: one line for each load, swap, refusal, crash and failure, as text for people or JSON for machines.

Turns events into lines. Events contain no keys and no tokens, so no line does. A model's error text is logged
whole, and may quote its input rows. Must not know who emits events.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import sys
import time
from collections.abc import Callable, Hashable
from typing import Any, Literal

import orjson

from gateway import events, tracing
from gateway.events import Event

log = logging.getLogger("gateway")

_LEVELS: dict[type, int] = {
    events.LoadFailed: logging.WARNING,
    events.SwapRefused: logging.WARNING,
    events.AliasDeleted: logging.WARNING,
    events.Crashed: logging.ERROR,
    events.PredictionFailed: logging.WARNING,
    events.InputRefused: logging.INFO,
    events.RequestRefused: logging.WARNING,
    events.OutputDiffers: logging.WARNING,
    events.RegistryFailed: logging.ERROR,
    events.MemoryShort: logging.ERROR,
    events.Stuck: logging.ERROR,
    events.Warned: logging.WARNING,
}
#: The fields that a JSON line may have in addition to its event.
_UNLOADED = {
    "unloaded": "an operator requested it",
    "evicted": "to make room,",
    "replaced": "another version serves",
    "removed": "it is not in the registry any more",
    "idle": "it had no request for its idle_ttl",
    "quarantined": "its processes ended again and again",
    "superseded": "no alias wants it any more",
    "rolled back": "its rollout was taken back",
    "shutdown": "the gateway stops",
}
"""Why a version left, in words."""

_ABOUT = ("model", "version", "request_id", "trace_id", "span_id")
#: Refused inputs and requests of one model are logged at most once in this time, in seconds, with their
#: count.
BURST_SECONDS = 10.0
#: A version that is refused again for the same reason is logged at most once in this time, in seconds, with
#: the count: it is tried again all the time.
REFUSAL_SECONDS = 3600.0
#: For this many versions the last traceback is remembered, so that a repeated one is counted, not printed;
#: for this many aliases the last refusal.
KEPT_TRACES = 1000
#: Log lines that any client can cause, as often as it wants.
_OF_STRANGERS = ("Invalid HTTP request received", "Unsupported upgrade request")
#: Characters that would move the cursor, change colours, reorder a terminal's text or begin a line: control
#: characters, separators of lines and paragraphs, marks of writing direction.
_UNPRINTABLE = {
    code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    for code in (
        *range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F),
        *range(0x2066, 0x206A), 0xFEFF,
    )
    if chr(code) != "\t"
}  # fmt: skip
#: Advice to install a library that the gateway does not need.
_OF_NO_USE = "No supported WebSocket library"


class Bursts:
    """Passes one line of a kind in `BURST_SECONDS`, and counts the others."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since: dict[Hashable, tuple[float, int]] = {}

    def ending(self, kind: Hashable) -> str | None:
        """What the line ends with: the count of those that were left out. None: leave this one out."""
        since, count = self._since.get(kind, (-BURST_SECONDS, 0))
        if self._clock() - since < BURST_SECONDS:
            self._since[kind] = since, count + 1
            return None
        self._since[kind] = self._clock(), 0
        return f" (and {count} more since the last such line)" if count else ""


class EventLog:
    """Writes a line for each event that has one. Only the event loop uses it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._bursts = Bursts(clock)
        #: By version and kind of event: the last traceback, and how often it was repeated.
        self._traces: dict[tuple[str, str, str], tuple[str, int]] = {}
        #: By alias: the last refusal in the log, when it was written, and how often it was repeated.
        self._refusals: dict[tuple[str, str], tuple[events.SwapRefused, float, int]] = {}
        self._clock = clock

    def __call__(self, event: Event) -> None:
        if isinstance(event, events.RegistryRead) and not (event.changed or event.recovered):
            return
        if isinstance(event, events.RegistryFailed) and event.repeated:
            return
        more = ""
        if isinstance(event, events.InputRefused | events.RequestRefused | events.OutputDiffers):
            ending = self._bursts.ending((event.model, type(event)))
            if ending is None:
                return
            more = ending
        if isinstance(event, events.Swapped):
            self._refusals.pop((event.model, event.alias), None)
        if isinstance(event, events.SwapRefused):
            ending = self._refused(event)
            if ending is None:
                return
            more = ending
        if isinstance(event, events.PredictionFailed | events.LoadFailed):
            repeats = self._repeats(event)
            if repeats:
                event = dataclasses.replace(event, trace="")
                more = f" (repeated {repeats} times; the traceback is above)"
        level = _LEVELS.get(type(event), logging.INFO)
        if log.isEnabledFor(level):
            log.log(level, sentence(event) + more, extra={"event": event})

    def _refused(self, event: events.SwapRefused) -> str | None:
        """What the line of a refusal ends with; None: it was written a moment ago, leave this one out."""
        key, now = (event.model, event.alias), self._clock()
        last, since, count = self._refusals.pop(key, (None, now, 0))
        repeated = event == last
        is_new = not repeated or now - since >= REFUSAL_SECONDS
        self._refusals[key] = (event, now, 0) if is_new else (event, since, count + 1)
        while len(self._refusals) > KEPT_TRACES:
            del self._refusals[next(iter(self._refusals))]
        if not is_new:
            return None
        return f" (and {count} more times since the last such line)" if repeated and count else ""

    def _repeats(self, event: events.PredictionFailed | events.LoadFailed) -> int:
        """How often the same failure of this version happened before; 0: its traceback was not printed yet.
        Two failures are the same if their tracebacks have the same lines of code: messages may quote rows."""
        key = (event.model, event.version, type(event).__name__)
        places = "\n".join(line for line in event.trace.splitlines() if line.startswith("  File "))
        told = places or event.reason
        last, count = self._traces.pop(key, ("", 0))
        self._traces[key] = told, count + 1 if last == told else 0
        while len(self._traces) > KEPT_TRACES:
            del self._traces[next(iter(self._traces))]
        return self._traces[key][1]


def sentence(event: Event) -> str:
    """Describes the event in words."""
    match event:
        case events.Loaded():
            return (
                f"loaded {event.model}/{event.version} in {event.seconds:.3f} s, {event.bytes / 1e6:.1f} MB"
            )
        case events.LoadFailed():
            return f"could not load {event.model}/{event.version}: {event.reason}{_indented(event.trace)}"
        case events.Unloaded():
            why = f" {event.why}" if event.why else ""
            reason = _UNLOADED.get(event.reason, event.reason)
            return f"unloaded {event.model}/{event.version}: {reason}{why}"
        case events.Swapped():
            before = "" if event.previous is None else f", previously {event.previous}"
            return f"{event.model}@{event.alias} serves version {event.version}{before} ({event.moved_by})"
        case events.SwapRefused():
            return f"{event.model}@{event.alias} did not move to version {event.version}: {event.reason}"
        case events.RolloutChanged():
            why = f": {event.reason}" if event.reason else ""
            return f"rollout of {event.model}@{event.alias} to version {event.version}: {event.phase}{why}"
        case events.AliasDeleted():
            left = "it is no longer served" if not event.grace else f"served for {event.grace:.0f} s more"
            if event.version is None:
                left = "it was not served"
            return f"{event.model}@{event.alias} was deleted: {event.reason}; {left}"
        case events.PredictionFailed():
            said = f"{event.model}/{event.version} raised {event.reason} (request {event.request_id})"
            return said + _indented(event.trace)
        case events.InputRefused():
            return f"refused the input of a request for {event.model}/{event.version}: {event.problems[0]}"
        case events.OutputDiffers():
            return f"an answer of {event.model}/{event.version} does not match its schema: {event.problem}"
        case events.RequestRefused():
            return f"refused a request for {event.model}: {event.reason}"
        case events.Crashed():
            return f"a process of {event.model}/{event.version} ended ({event.what}): {event.reason}"
        case events.Restarted():
            return f"a process of {event.model}/{event.version} serves again"
        case events.Stuck() if not event.reason:
            return f"the processes of {event.model}/{event.version} work again"
        case events.Stuck():
            return f"{event.model}/{event.version} is STUCK: {event.reason}"
        case events.RegistryRead():
            again = " again, after failures" if event.recovered else ""
            return f"read the registry{again}: {event.models} models"
        case events.RegistryFailed():
            return f"cannot read the registry, the last valid content stays in use: {event.reason}"
        case events.MemoryShort():
            return event.message
        case events.Warned():
            return f"{event.model}/{event.version}: {event.message}"


def printable(text: str) -> str:
    """Text for a terminal or a log of lines: control characters, `\\n` included, become escapes."""
    return text.translate(_UNPRINTABLE)


class OnceInAWhile(logging.Filter):
    """Passes each line that any client can cause once in `BURST_SECONDS`, with its count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._bursts = Bursts(clock)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name != "uvicorn.error" or record.levelno != logging.WARNING:
            return True
        said = str(record.msg)
        if not said.startswith(_OF_STRANGERS):
            return not said.startswith(_OF_NO_USE)
        more = self._bursts.ending(said)
        if more:
            record.msg = said + more
        return more is not None


def configure(form: Literal["auto", "json", "text"], level: str) -> None:
    """Sends the log to standard error; `auto` is text on a terminal and JSON elsewhere."""
    handler = logging.StreamHandler(sys.stderr)
    as_json = form == "json" or (form == "auto" and not sys.stderr.isatty())
    handler.addFilter(OnceInAWhile())
    handler.addFilter(_with_trace)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # These loggers write a line per request; the metrics cover that.
    for name in ("httpx", "httpcore", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _with_trace(record: logging.LogRecord) -> bool:
    """Adds the trace of the current request to a line, if there is one."""
    trace = tracing.current()
    if trace is not None:
        record.trace_id, record.span_id = trace.trace_id, trace.span_id
    return True


class TextFormatter(logging.Formatter):
    """A line for people. A model's output begins with the model's name; a line of a trace ends with its id.
    Control characters are escaped and further lines are indented, so that text from a model or a client
    cannot look like a line of the log."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the base class's name
        model, version, trace = (getattr(record, name, None) for name in ("model", "version", "trace_id"))
        about = "" if model is None else f"{model}/{version}: "
        ending = "" if trace is None else f" (trace {trace})"
        return f"{record.asctime} {record.levelname} {about}{record.message}{ending}"

    def format(self, record: logging.LogRecord) -> str:
        first, *more = super().format(record).split("\n")
        indented = (line if line.startswith("    ") else f"    {line}" for line in more)
        return "\n".join(map(printable, (first, *indented)))


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, message, the event's fields, and the model, version and
    trace."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        event = getattr(record, "event", None)
        if dataclasses.is_dataclass(event) and not isinstance(event, type):
            line["event"] = type(event).__name__
            line |= {key: value for key, value in dataclasses.asdict(event).items() if key not in line}
        for name in _ABOUT:
            if (value := getattr(record, name, None)) is not None:
                line.setdefault(name, value)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def _indented(trace: str) -> str:
    return "".join(f"\n    {line}" for line in trace.rstrip().splitlines()) if trace else ""
