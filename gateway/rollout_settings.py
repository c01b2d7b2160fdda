"""The settings of rollouts: the keys under `rollout` in the settings, in a registry file and in MLflow's tag
`gateway.rollout`; and the settings `capture` and `notify`.

Knows values and their limits. `gateway.rollouts.policy` decides which policy applies to a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, field_validator

from gateway.quantities import Duration, Part, Size, listed

STEPS: Final = "write percentages between 0 and 100 that rise, such as 5, 25, 50"
PRINCIPAL: Final = "principal"
"""As the `key` of a canary: callers are told apart by their credentials."""


def _is_off(value: object) -> bool:
    """Whether a value switches something off. YAML reads `off` as False; 0 is a number."""
    return value is False or (isinstance(value, str) and value in ("off", "none"))


def _canary(value: object) -> object:
    return {"steps": []} if _is_off(value) else value


def steps_of(value: object) -> list[float]:
    """The steps of a canary from a list, or from text with commas. Raises ValueError, which names the first
    wrong step by its number."""
    given = listed(value)
    if not isinstance(given, list | tuple):
        raise ValueError(f"it is not a list; {STEPS}")
    steps: list[float] = []
    for number, step in enumerate(given, 1):
        try:
            percent = float(step)
        except (TypeError, ValueError, OverflowError):
            percent = 0.0
        if not 0 < percent < 100:
            raise ValueError(f"step {number} is {step}; {STEPS}")
        if steps and percent <= steps[-1]:
            raise ValueError(f"step {number} is {step}, after {steps[-1]:g}; {STEPS}")
        steps.append(percent)
    return steps


def _limit(value: object) -> object:
    return None if _is_off(value) else value


def _no_time(value: object) -> object:
    return 0.0 if _is_off(value) else value


Excess = Annotated[Annotated[float, Field(ge=0, lt=1)] | None, BeforeValidator(_limit)]


class Canary(Part):
    """The steps in which a new version gets a share of the requests before it replaces the version in
    service."""

    steps: Annotated[list[Annotated[float, Field(gt=0, lt=100)]], BeforeValidator(steps_of)] = []
    """Rising percentages of callers: `[5, 25, 50]`. The swap follows the last step. Empty: no steps."""
    every: Duration = 120.0
    """The shortest duration of a step."""
    requests: Annotated[int, Field(ge=1)] = 100
    """The fewest requests that the new version answers in a step."""
    within: Duration = 6 * 3600.0
    """The time after which a step with fewer requests has too little traffic; then `thin` decides."""
    key: str | None = None
    """The header that names a caller, or `principal`: the caller's credential. One caller always gets the
    same version. Not set, or without the header or a credential: the id of each request."""
    retry: bool = True
    """Whether the version in service answers a request that fails on the new version."""

    @field_validator("key")
    @classmethod
    def _header(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", value):
            raise ValueError("write the name of a header, such as X-User-Id, or principal")
        return value


class Replay(Part):
    """The captured requests of the version in service that a new version answers before it serves."""

    requests: Annotated[int, Field(ge=1, le=10_000)] = 200
    """How many requests it answers: the last ones that were captured."""
    agreement: Annotated[float, Field(ge=0, le=1)] = 0.98
    """The lowest share of rows whose answers are those of the version in service."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Numbers agree if they differ by at most this share of the larger one."""
    within: Annotated[Duration, Field(gt=0)] = 600.0
    """The time after which the requests that were not answered count as missing."""


class Shadow(Part):
    """Before callers get the new version, it answers copies of requests, after their answers were sent. Its
    answers are compared with those of the version in service."""

    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of the requests that are copied: 1.0 is all of them."""
    requests: Annotated[int, Field(ge=1)] = 500
    """The fewest answers that are compared."""
    within: Annotated[Duration, Field(gt=0)] = 3600.0
    """The time after which a shadow with fewer answers has too little traffic; then `thin` decides."""
    agreement: Annotated[float, Field(gt=0, le=1)] = 0.98
    """The smallest share of requests on which both versions agree."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Numbers agree if they differ by at most this share of the larger one. Labels and text must be equal."""
    deadline: Annotated[Duration, Field(gt=0)] = 10.0
    """The time after which the gateway does not wait longer for the answer to a copy."""


class Guards(Part):
    """How much worse than the version in service a new version may be. `off` switches a guard off."""

    errors: Excess = 0.01
    """The allowed excess of the error rate: 0.01 means one more failure per hundred requests."""
    latency: Annotated[Annotated[float, Field(ge=1)] | None, BeforeValidator(_limit)] = 1.25
    """The allowed ratio of the median times of a call: 1.25 means 25 % slower."""
    output: Excess = 0.01
    """The allowed excess of answers that do not match the output schema."""


class RolloutPolicy(Part):
    """The policy for a move of an alias."""

    gate: Literal["compatible", "none"] = "compatible"
    """`compatible`: a new version must accept the inputs of the version in service; `none`: no comparison."""
    environment: Literal["refuse", "warn"] = "refuse"
    """For a version whose environment is not available: `refuse` it, or `warn` and run it in this
    interpreter."""
    replay: Annotated[Replay | None, BeforeValidator(_limit)] = None
    """Captured requests that the new version answers before it serves. `off` or not set: none."""
    shadow: Annotated[Shadow | None, BeforeValidator(_limit)] = None
    """Copies of requests that the new version answers before the first step. `off` or not set: none."""
    canary: Annotated[Canary, BeforeValidator(_canary)] = Canary()
    """The steps before the swap. `off`: the swap follows directly after the checks."""
    guards: Guards = Guards()
    """The limits that end a canary or a watch."""
    watch: Annotated[Duration, BeforeValidator(_no_time)] = 0.0
    """How long the version before stays loaded after the swap, while the guards compare the new version with
    its last ten minutes. 0 or `off`: no comparison."""
    thin: Literal["hold", "refuse"] = "hold"
    """With too few captured requests or too little traffic: `hold` until a person runs `finish` or `abort`,
    or `refuse` the version."""
    lock: bool = False
    """Whether to ignore policies in registries. It has an effect only in the settings."""
    deleted: Literal["end", "keep"] = "end"
    """A deleted alias stops at once (`end`), or continues to answer for `deleted_grace` (`keep`)."""
    deleted_grace: Duration = 3600.0
    """How long a deleted alias continues to answer with `deleted: keep`."""

    @property
    def grace(self) -> float:
        """Seconds for which a deleted alias continues to answer."""
        return self.deleted_grace if self.deleted == "keep" else 0.0

    def written(self) -> dict[str, Any]:
        """The keys that were written, without defaults."""
        return self.model_dump(exclude_unset=True)


def _capture(value: object) -> object:
    return {"share": 0} if _is_off(value) else value


class Capture(Part):
    """Which answered requests are kept for a while, under `state_dir`, so that a new version can answer them
    before it serves."""

    share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of the requests that is kept, such as 0.01. 0, or `capture: off`: none."""
    keep: Annotated[Duration, Field(gt=0)] = 24 * 3600.0
    """How long a request is kept."""
    max_bytes: Size = 1000**3
    """The most that a model's requests take on disk; the oldest go first."""
    redact: Annotated[list[str], BeforeValidator(listed)] = []
    """The columns (params, members of objects) that are left out, in any case of letters. A model's list is
    added to the gateway's."""

    def with_own(self, own: Capture) -> Capture:
        """This setting with a model's own keys. Redacted columns add up: what is secret stays secret."""
        written = {key: getattr(own, key) for key in own.model_fields_set}
        written["redact"] = list(dict.fromkeys([*self.redact, *own.redact]))
        return self.model_copy(update=written)


CaptureSetting = Annotated[Capture, BeforeValidator(_capture)]


class Notify(Part):
    """A URL that gets signed JSON when an alias serves another version, or does not."""

    url: str
    """The address that it is posted to; only one entry may have it."""
    secret_file: Path
    """The file with the secret of the signature; it is read for each delivery."""
    on: Annotated[
        list[Literal["served", "refused", "rolled_back", "held"]],
        BeforeValidator(listed),
        Field(min_length=1),
    ] = ["served", "refused", "rolled_back", "held"]
    """Which news are sent."""

    @field_validator("url")
    @classmethod
    def _http(cls, value: str) -> str:
        if not re.fullmatch(r"https?://[^/\s]+\S*", value):
            raise ValueError("write an http or https URL")
        return value

    @field_validator("secret_file")
    @classmethod
    def _path(cls, value: Path) -> Path:
        return value.expanduser().absolute()


def laid_over(weaker: Mapping[str, Any], stronger: Mapping[str, Any]) -> dict[str, Any]:
    """Merges two policies, given as plain mappings, key by key; `stronger` wins. Pure."""
    merged = dict(weaker)
    for key, value in stronger.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = laid_over(below, value)
        merged[key] = value
    return merged
