"""How the aliases of one model move: the operator's policy, with what the registry says about the model on
top.

Knows settings and registered models; decides nothing about a version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

if TYPE_CHECKING:
    from gateway.registries.base import Model
    from gateway.settings import Rollout, Settings


def policy_of(settings: Settings, model: Model) -> tuple[Rollout, str | None]:
    """A model's policy, and what is wrong with the registry's part of it (None: nothing). Where something is
    wrong, the operator's part holds alone."""
    own = settings.for_model(model.name).rollout or settings.rollout
    try:
        return type(own).model_validate({**own.model_dump(), **model.rollout}), None
    except ValidationError as error:
        problem = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        return own, f"the rollout policy of {model.name} in the registry is not valid: {problem}"
