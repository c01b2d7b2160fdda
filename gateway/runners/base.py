"""How a loaded model is run: start it, ask it, close it. Where it runs is the member's affair.

Members satisfy `Runner`; a failure of the model is told apart from a failure of what runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from loaders.batch import Batch
    from loaders.worker.wire import Framed


class ModelError(Exception):
    """The model raised. The message is the exception's type and text, without rows or paths; `trace` is
    for the log only."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


class RunnerCrashed(Exception):
    """What ran the model ended; the model may be started again, `retry_after` seconds from now at the
    earliest where that is known."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RunnerTimeout(Exception):
    """The operator's timeout passed and the model was stopped."""


class Runner(Protocol):
    """One version, loaded. The three verbs are called by the event loop, `close` at most once."""

    @property
    def merges(self) -> bool:
        """Whether the flavor lets rows of several requests share a call. Known after `start`."""

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

    def stop(self, reason: str) -> None:
        """Ends the model's processes at once, as a crash does; nothing where there are none."""

    def status(self) -> dict[str, Any]:
        """What an operator sees of it, JSON-ready."""

    async def start(self) -> None:
        """Loads the model. Raises ModelError, RunnerCrashed, RunnerTimeout."""

    async def predict(self, batch: Batch | Framed, params: Mapping[str, Any]) -> Batch:
        """Asks it. A framed batch holds its params. Several calls may be under way. Raises ModelError,
        RunnerCrashed, RunnerTimeout."""

    async def close(self) -> None:
        """Frees it: when this returns, its bytes are free or never will be."""
