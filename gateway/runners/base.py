"""The contract of runners: start a model, call it, close it. Each runner decides where the model runs.

Runners satisfy `Runner`. Failures of the model and failures of its process are different exceptions. Must not
know aliases or protocols.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from loaders.schema import SignatureError
from loaders.signature import Signature

#: Characters of a signature that a model's process may send.
_MAX_SIGNATURE: Final = 1 << 20

if TYPE_CHECKING:
    from loaders.batch import Batch
    from loaders.worker.wire import Framed


class ModelError(Exception):
    """The model raised an exception. The message is its type and text, without paths. It may hold rows, so it
    is only for the log, like `trace`. `shown`: the part that a client may see, None for the type alone.
    `unsuitable`: the input does not suit the model, so the fault is the client's."""

    def __init__(
        self, message: str, trace: str = "", *, shown: str | None = None, unsuitable: bool = False
    ) -> None:
        super().__init__(message)
        self.trace = trace
        self.shown = shown
        self.unsuitable = unsuitable


def unsendable(error: Exception) -> ModelError:
    """The error for an input with a value that has no form between the processes."""
    shown = "it has a value that cannot be sent to the model's process"
    return ModelError(f"{shown}: {error}", shown=shown, unsuitable=True)


class RunnerCrashed(Exception):
    """The process ended during the call. `outside`: it was killed with SIGKILL, so the cause may be outside
    the model."""

    def __init__(self, message: str, *, outside: bool = False) -> None:
        super().__init__(message)
        self.outside = outside


class NoProcess(Exception):
    """No process took the call: no more are started, or none was ready in time. `retry_after`: seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RunnerTimeout(Exception):
    """The operator's timeout passed and the model was stopped."""


FAILURES: Final = (ModelError, RunnerCrashed, RunnerTimeout, NoProcess)
"""The exceptions that loading and calling a model may raise."""


Then: TypeAlias = "Callable[[Batch | None, Exception | None], None]"
"""Is called once, later, with the answer of a call or with its exception."""
Begin: TypeAlias = "Callable[[Batch | Framed, Mapping[str, Any], Then], bool]"


class Runner(Protocol):
    """One version, loaded. The three verbs are called by the event loop, `close` at most once."""

    @property
    def merges(self) -> bool:
        """Whether the flavor allows rows of several requests in one call. Known after `start`."""

    @property
    def known(self) -> Mapping[str, Any]:
        """Values that the model knows, by column: for a made-up row. Known after `start`."""

    @property
    def accepted(self) -> Signature | None:
        """The signature of what the model accepts, where that is another than its package's: it takes more,
        or its package has none and its file states one. Available after `start`."""

    @property
    def pids(self) -> Sequence[int]:
        """Its processes, also one that it shares; empty inside the gateway's process."""

    @property
    def busy_seconds(self) -> float:
        """The time of its calls in a process that it shares, so far."""

    @property
    def slots(self) -> int:
        """How many calls can run at once. Known after `start`."""

    @property
    def load_peak(self) -> int:
        """The peak bytes during its load; 0 if unknown."""

    @property
    def measured_bytes(self) -> int | None:
        """Its private bytes as the kernel counts them; None if they cannot be separated."""

    def recent_bytes(self) -> int | None:
        """`measured_bytes` as of the last reading in a thread, including processes that are still loading."""

    @property
    def alike(self) -> Hashable | None:
        """What decides its answers in addition to its files: runners of the same files with an equal value
        answer alike. None if that cannot be said."""

    @property
    def isolation(self) -> str:
        """`process` or `inline`."""

    @property
    def placement(self) -> str:
        """Why it runs there, for an operator."""

    @property
    def stuck(self) -> str | None:
        """Why one of its processes is alive but does not work; None otherwise."""

    @property
    def spare(self) -> bool | None:
        """True if a spare process is ready; None if the runner cannot have one."""

    def start_spare(self) -> None:
        """Begins to start a spare process. Its memory counts in `measured_bytes`."""

    async def drop_spare(self) -> None:
        """Ends the spare process; its memory is free when this returns."""

    def tend(self) -> None:
        """Checks its processes. Call it about once a second."""

    def stop(self, reason: str) -> None:
        """Ends the model's processes at once, as a crash does. Does nothing without processes."""

    def status(self) -> dict[str, Any]:
        """Its state for operators, JSON-ready."""

    async def start(self) -> None:
        """Loads the model. Raises one of `FAILURES`."""

    async def predict(self, batch: Batch | Framed, params: Mapping[str, Any]) -> Batch:
        """Calls the model. A framed batch holds its params. Several calls may run at once. Raises one of
        `FAILURES`."""

    @property
    def begin(self) -> Begin | None:
        """Begins the call of `predict` without a task, which costs much less. Returns False where it cannot
        begin now. Raises ModelError for a value that cannot be sent. None: it always needs a task."""

    async def prewarm(self, batch: Batch, params: Mapping[str, Any]) -> Batch:
        """Calls the model as `predict` does, before it serves; later answers must not depend on this call. A
        `stateless` flavor is called in place, any other where it leaves no state behind. Raises what
        `predict` raises."""

    async def finish_prewarm(self) -> None:
        """Ends the prewarm: a model that had to be asked in place is loaded again. Raises what `start`
        raises."""

    async def close(self) -> None:
        """Frees the model. When this returns, its memory is free as far as it can be freed."""


def signature_of(reply: Mapping[str, Any]) -> Signature | None:
    """The signature in the answer of a model's process to its load. One that is not valid or too large, as a
    hostile model may send, is none."""
    given = reply.get("accepted")
    if not isinstance(given, dict) or not all(isinstance(part, str | None) for part in given.values()):
        return None
    if sum(len(part or "") for part in given.values()) > _MAX_SIGNATURE:
        return None
    try:
        return Signature.from_json(given)
    except SignatureError:
        return None


_LOADED: Final = {"merges": bool, "known": dict, "prewarms": str, "confinement": dict}


def loaded_of(reply: Mapping[str, Any]) -> Mapping[str, Any]:
    """The facts in the answer of a model's process to its load. Raises ModelError, and RunnerCrashed for
    facts of another form, as a hostile model may send: its process must be ended."""
    if reply["op"] != "loaded":
        raise model_error(reply)
    if not all(isinstance(reply.get(name), kind) for name, kind in _LOADED.items()):
        raise RunnerCrashed("the model process broke the protocol: its answer to the load is wrong")
    return reply


def model_error(reply: Mapping[str, Any]) -> ModelError:
    """The model's exception, from its process's answer."""
    kind, text = str(reply.get("type", "Error")), str(reply.get("message", ""))
    shown = reply.get("shown")
    return ModelError(
        f"{kind}: {text}" if text else kind,
        str(reply.get("trace", "")),
        shown=None if shown is None else str(shown),
        unsuitable=reply.get("unsuitable") is True,
    )
