"""Events as data: the core emits each once; metrics, the log and the feed use them.

Must not know its listeners. Names and versions are plain strings; times are in seconds, sizes in bytes.
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
    """`reason` is safe to show to clients; `trace` is for the log."""

    model: str
    version: str
    seconds: float
    code: str
    reason: str
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Unloaded:
    """`reason`: evicted, unloaded, replaced, removed, idle, quarantined, shutdown. `why`: for an eviction,
    the version that needed the memory, and why this one was chosen; `idle`: seconds since its last request;
    `asking`: the model that needed the memory, empty if it was none."""

    model: str
    version: str
    reason: str
    why: str = ""
    idle: float | None = None
    asking: str = ""


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
    """A rollout of `version` reached a phase or a step; `previous` is the version in service. `evidence`:
    counts, rates, bounds and the test, JSON-ready."""

    model: str
    alias: str
    version: str
    previous: str | None
    phase: str
    reason: str | None
    evidence: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class AliasDeleted:
    """An alias that was in use is no longer in the registry. `version` served until now, and continues for
    `grace` seconds."""

    model: str
    alias: str
    version: str | None
    reason: str
    grace: float


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
    """A process of a version is alive but does not work. An empty `reason` means that it works again."""

    model: str
    version: str
    reason: str


@dataclass(frozen=True, slots=True)
class InputRefused:
    """A request whose input did not fit the signature. `problems`: kinds of violations, without data."""

    model: str
    version: str
    problems: tuple[str, ...]
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class OutputDiffers:
    """An answer did not match the output schema; the client got it anyway."""

    model: str
    version: str
    problem: str


@dataclass(frozen=True, slots=True)
class RequestRefused:
    """A request was refused before its model was called."""

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
    """One failed read or query. `repeated`: for the same reason as the one before."""

    reason: str
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class MemoryShort:
    """The machine or the container is short of memory, but no model is the cause."""

    message: str


@dataclass(frozen=True, slots=True)
class Warned:
    """A fact about a version that serves, which its operator should know."""

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
