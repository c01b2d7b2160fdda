"""The grammar of a rollout policy: what may be written under `rollout` in the settings, in a registry file
and in MLflow's tag `gateway.rollout`.

Knows values and their bounds. Which policy holds for a model is decided in `gateway.rollouts.policy`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, field_validator

from gateway.quantities import Duration, Part, listed

#: Keys that other releases may know. They are refused: a check that is only written down protects nobody.
UNAVAILABLE: Final = frozenset({"replay", "shadow", "watch"})

OFF: Final = ("off", "none", False)


def _canary(value: object) -> object:
    return {"steps": []} if value in OFF else value


def _limit(value: object) -> object:
    return None if value in OFF else value


Excess = Annotated[Annotated[float, Field(ge=0, lt=1)] | None, BeforeValidator(_limit)]


class Canary(Part):
    """The steps in which a new version gets requests before it replaces the version in service."""

    steps: Annotated[list[Annotated[float, Field(gt=0, lt=100)]], BeforeValidator(listed)] = []
    """Percentages of the callers, rising: `[5, 25, 50]`. The swap follows the last one. Empty: none."""
    every: Duration = 120.0
    """How long a step lasts at least."""
    requests: Annotated[int, Field(ge=1)] = 100
    """How many requests of a step the new version answers at least."""
    within: Duration = 6 * 3600.0
    """After this time a step with fewer requests has too little traffic: `thin` decides."""
    key: str | None = None
    """The header that names a caller, so that one caller always gets the same version. Not set: the id of
    each request."""
    retry: bool = True
    """Whether a request that fails on the new version is answered by the version in service."""

    @field_validator("steps")
    @classmethod
    def _rising(cls, value: list[float]) -> list[float]:
        if any(later <= earlier for earlier, later in pairwise(value)):
            raise ValueError("steps must rise, such as 5, 25, 50")
        return value

    @field_validator("key")
    @classmethod
    def _header(cls, value: str | None) -> str | None:
        if value == "principal":
            raise ValueError("principal is not available in this version: name a header")
        if value is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", value):
            raise ValueError("write the name of a header, such as X-User-Id")
        return value


class Guards(Part):
    """How much worse than the version in service a new version may be. `off` switches a guard off."""

    errors: Excess = 0.01
    """The allowed excess of the error rate: 0.01 is one more failure in a hundred requests."""
    latency: Annotated[Annotated[float, Field(ge=1)] | None, BeforeValidator(_limit)] = 1.25
    """The allowed ratio of the median times of a call."""
    output: Excess = 0.01
    """The allowed excess of answers that are not as the output schema says."""


class Rollout(Part):
    """How an alias moves."""

    gate: Literal["compatible", "none"] = "compatible"
    """`compatible`: a new version must accept what present callers send; `none`: not compared."""
    environment: Literal["refuse", "warn"] = "refuse"
    """A version whose environment cannot be had is refused, or runs in this interpreter with a warning."""
    canary: Annotated[Canary, BeforeValidator(_canary)] = Canary()
    """The steps before the swap. `off`: the swap follows the checks at once."""
    guards: Guards = Guards()
    """What ends a canary."""
    thin: Literal["hold", "refuse"] = "hold"
    """With too little traffic: `hold` until a person says `finish` or `abort`, or `refuse` the version."""
    lock: bool = False
    """Whether policies in registries are ignored. It counts in the settings alone."""
    deleted: Literal["end", "keep"] = "end"
    """A deleted alias ends at once (`end`), or answers for `deleted_grace` more (`keep`)."""
    deleted_grace: Duration = 3600.0
    """How long a deleted alias goes on answering with `deleted: keep`."""

    @property
    def grace(self) -> float:
        """Seconds for which a deleted alias goes on answering."""
        return self.deleted_grace if self.deleted == "keep" else 0.0

    def written(self) -> dict[str, Any]:
        """The keys that somebody wrote, without defaults."""
        return self.model_dump(exclude_unset=True)


def laid_over(weaker: Mapping[str, Any], stronger: Mapping[str, Any]) -> dict[str, Any]:
    """Two policies as plain mappings, merged key by key; `stronger` wins. Pure."""
    merged = dict(weaker)
    for key, value in stronger.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = laid_over(below, value)
        merged[key] = value
    return merged


def unknown(key: str) -> str | None:
    """What to say of a key that the grammar does not have, None for nothing special."""
    if key in UNAVAILABLE:
        return "is not available in this version of the gateway"
    return None
