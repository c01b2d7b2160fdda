"""How a loaded model is run: start it, ask it, close it. Where it runs is the member's affair.

Members satisfy `Runner`; a failure of the model is told apart from a failure of what runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from loaders.batch import Batch
    from loaders.worker.wire import Framed


class ModelError(Exception):
    """The model raised. The message is the exception's type and text, without paths; it may hold rows, so it
    is for the log only, as `trace` is. `shown` is what a caller may read of it, None where that is the type
    alone; `unsuitable`: the input does not suit the model, which is the caller's affair."""

    def __init__(
        self, message: str, trace: str = "", *, shown: str | None = None, unsuitable: bool = False
    ) -> None:
        super().__init__(message)
        self.trace = trace
        self.shown = shown
        self.unsuitable = unsuitable


class RunnerCrashed(Exception):
    """The process ended while it worked on the call. `outside`: it was killed with SIGKILL, so the cause may
    lie outside the model."""

    def __init__(self, message: str, *, outside: bool = False) -> None:
        super().__init__(message)
        self.outside = outside


class NoProcess(Exception):
    """No process took the call: none is started any more, or none came within the runner's patience.
    `retry_after`: seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RunnerTimeout(Exception):
    """The operator's timeout passed and the model was stopped."""


FAILURES: Final = (ModelError, RunnerCrashed, RunnerTimeout, NoProcess)
"""What loading and asking a model may raise."""


class Runner(Protocol):
    """One version, loaded. The three verbs are called by the event loop, `close` at most once."""

    @property
    def merges(self) -> bool:
        """Whether the flavor lets rows of several requests share a call. Known after `start`."""

    @property
    def known(self) -> Mapping[str, Any]:
        """Values that the model knows, by column: for a made-up row. Known after `start`."""

    @property
    def slots(self) -> int:
        """How many calls can really run at once. Known after `start`."""

    @property
    def load_peak(self) -> int:
        """The most bytes it took while it loaded; 0 where that cannot be told."""

    @property
    def measured_bytes(self) -> int | None:
        """Private bytes as the kernel counts them; None where they cannot be told apart."""

    def present_bytes(self) -> int | None:
        """`measured_bytes`, read this moment, of processes that are still loading too."""

    @property
    def isolation(self) -> str:
        """`process` or `inline`."""

    @property
    def placement(self) -> str:
        """Why it runs there, for an operator."""

    @property
    def stuck(self) -> str | None:
        """Why a process of it does not work, though it lives; None while that is not so."""

    @property
    def spare(self) -> bool | None:
        """Whether one process more stands by for one that ends; None: there can be none."""

    def start_spare(self) -> None:
        """Begins to make such a process. Its memory counts in `measured_bytes`."""

    async def drop_spare(self) -> None:
        """Gives it up; its memory is free when this returns."""

    def tend(self) -> None:
        """Looks after its processes; to be called about once a second."""

    def stop(self, reason: str) -> None:
        """Ends the model's processes at once, as a crash does; nothing where there are none."""

    def status(self) -> dict[str, Any]:
        """What an operator sees of it, JSON-ready."""

    async def start(self) -> None:
        """Loads the model. Raises one of `FAILURES`."""

    async def predict(self, batch: Batch | Framed, params: Mapping[str, Any]) -> Batch:
        """Asks it. A framed batch holds its params. Several calls may be under way. Raises one of
        `FAILURES`."""

    async def prewarm(self, batch: Batch, params: Mapping[str, Any]) -> Batch:
        """Asks it as `predict` does, before it serves: what it answers later must not depend on this call. A
        flavor that is `stateless` is asked in place, any other where it leaves nothing behind. Raises what
        `predict` raises."""

    async def finish_prewarm(self) -> None:
        """Ends the prewarm: a model that had to be asked in place is loaded again. Raises what `start`
        raises."""

    async def close(self) -> None:
        """Frees it: when this returns, its bytes are free or never will be."""
