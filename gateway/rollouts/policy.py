"""Which rollout policy holds for a model: the operator's, with what the registry says about the model on top.

Weakest first: the settings' `rollout`, `models: PATTERN: rollout`, then the registry (a file's
`models.NAME.rollout`, MLflow's tag `gateway.rollout`), merged key by key. Knows settings and registered
models; decides nothing about a version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ValidationError

from gateway.names import near
from gateway.registries.base import UNREADABLE
from gateway.rollout_settings import Canary, Guards, Replay, RolloutPolicy, Shadow, laid_over

if TYPE_CHECKING:
    from gateway.registries.base import Model
    from gateway.settings import Settings

#: What a registry may tighten and not loosen: values from loose to strict.
STRICTER: Final = {"gate": ("none", "compatible"), "environment": ("warn", "refuse")}


def policy_of(settings: Settings, model: Model) -> tuple[RolloutPolicy, str | None]:
    """A model's policy, and the error in the registry's part of it (None if valid). With an error, only the
    operator's part applies."""
    own = settings.for_model(model.name).rollout or settings.rollout
    if own.lock or not model.rollout:
        return own, None
    if UNREADABLE in model.rollout:
        return own, f"the rollout policy of {model.name} cannot be read: {model.rollout[UNREADABLE]}"
    said: dict[str, Any] = {key: value for key, value in model.rollout.items() if not key.startswith("x-")}
    wrong: list[str] = []
    if "lock" in said:
        wrong.append("lock: it is allowed only in the gateway's settings")
    for key, values in STRICTER.items():
        mine, theirs = getattr(own, key), said.get(key)
        if theirs in values and values.index(theirs) < values.index(mine):
            wrong.append(f"{key}: {theirs} is less strict than the gateway's settings ({mine})")
    try:
        merged = RolloutPolicy.model_validate(laid_over(own.written(), said))
    except ValidationError as error:
        wrong += [_told(item) for item in error.errors(include_url=False, include_input=False)]
    if wrong:
        return own, f"the rollout policy of {model.name} in the registry is not valid: {'; '.join(wrong)}"
    return merged, None


def _told(error: Any) -> str:
    """One of pydantic's errors as text: its place, and what is wrong there."""
    *above, key = (str(part) for part in error["loc"])
    place = ".".join([*above, key])
    if error["type"] != "extra_forbidden":
        return f"{place}: {str(error['msg']).removeprefix('Value error, ')}"
    parts: dict[str, type[BaseModel]] = {
        "canary": Canary,
        "guards": Guards,
        "replay": Replay,
        "shadow": Shadow,
    }
    part = parts.get(above[0], RolloutPolicy) if above else RolloutPolicy
    meant = near(key, part.model_fields)
    return f"{place}: unknown key" + (f", did you mean {meant}?" if meant else "")
