"""A prediction, from the request's parsed parts to the model's answer. Knows no protocol.

This module reads top to bottom as the life of a request: resolve, lease, enforce, batch, run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gateway.names import Reference
    from gateway.registries.base import Version
    from loaders.batch import Batch
    from loaders.enforce import RawInput


@dataclass(slots=True)
class Inference:
    """A request, parsed but untyped. `deadline` is in the event loop's time; `reference` None means the
    default model. `registry` and `principal` name the registry and the caller (one of each so far)."""

    reference: Reference | None
    raw: RawInput
    params: Any = None
    deadline: float | None = None
    principal: str | None = None
    registry: str | None = None


@dataclass(slots=True)
class Answer:
    """What a model answered. `queue_seconds` is the wait for a turn, `predict_seconds` the model's own time."""

    result: Batch
    version: Version
    alias: str | None
    warnings: tuple[str, ...] = ()
    queue_seconds: float = 0.0
    predict_seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
