"""What happened, as data: the core says it once, metrics and the log each make of it what they want.

Knows nothing of who listens. Names and versions are plain strings; times are seconds, sizes bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class Loaded:
    model: str
    version: str
    seconds: float
    bytes: int


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """`reason` is fit for clients; `trace` is for the log."""

    model: str
    version: str
    seconds: float
    code: str
    reason: str
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Unloaded:
    """`reason`: evicted, unloaded, replaced, removed, idle, quarantined, shutdown. `why`: of an eviction, for
    which version, and why this one."""

    model: str
    version: str
    reason: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Swapped:
    model: str
    alias: str
    version: str
    previous: str | None
    moved_by: str


@dataclass(frozen=True, slots=True)
class SwapRefused:
    model: str
    alias: str
    version: str
    reason: str


@dataclass(frozen=True, slots=True)
class RolloutChanged:
    """A rollout of `version` reached a phase or a step; `previous` answers meanwhile. `evidence`: counts,
    rates, bounds and the test, JSON-ready."""

    model: str
    alias: str
    version: str
    previous: str | None
    phase: str
    reason: str | None
    evidence: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class AliasDeleted:
    """An alias that was in use is no longer in the registry; `version` served until now, and goes on for
    `grace` seconds."""

    model: str
    alias: str
    version: str | None
    reason: str
    grace: float


@dataclass(frozen=True, slots=True)
class Dispatched:
    """One call of a model: `requests` of them were merged."""

    model: str
    version: str
    requests: int
    rows: int


@dataclass(frozen=True, slots=True)
class PredictionFailed:
    model: str
    version: str
    reason: str
    trace: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Crashed:
    """A process of a version ended. `what`: crashed, timeout, recycled, stopped, quarantined."""

    model: str
    version: str
    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class Restarted:
    model: str
    version: str


@dataclass(frozen=True, slots=True)
class Stuck:
    """A process of a version lives and does not work; an empty `reason`: it works again."""

    model: str
    version: str
    reason: str


@dataclass(frozen=True, slots=True)
class InputRefused:
    """One request whose input did not fit. `problems`: kinds, not texts that hold data."""

    model: str
    version: str
    problems: tuple[str, ...]
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class OutputDiffers:
    """An answer did not look as the output schema says; it was given all the same."""

    model: str
    version: str
    problem: str


@dataclass(frozen=True, slots=True)
class RequestRefused:
    """A request was turned away at the door."""

    model: str
    version: str
    reason: str
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class RegistryRead:
    """`recovered`: the read before this one failed."""

    models: int
    changed: bool
    recovered: bool = False


@dataclass(frozen=True, slots=True)
class RegistryFailed:
    """One failed read or question. `repeated`: for the same reason as the one before."""

    reason: str
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class MemoryShort:
    """The machine or the container is short of memory, and no model is the cause."""

    message: str


@dataclass(frozen=True, slots=True)
class Warned:
    """Something an operator should know of a version that serves all the same."""

    model: str
    version: str
    message: str


Event: TypeAlias = (
    Loaded
    | LoadFailed
    | Unloaded
    | Swapped
    | SwapRefused
    | RolloutChanged
    | AliasDeleted
    | Dispatched
    | PredictionFailed
    | Crashed
    | Restarted
    | Stuck
    | InputRefused
    | RequestRefused
    | OutputDiffers
    | RegistryRead
    | RegistryFailed
    | MemoryShort
    | Warned
)
Emit: TypeAlias = Callable[[Event], None]
