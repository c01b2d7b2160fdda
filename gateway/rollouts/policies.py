"""What the operator's settings mean for one model: which formats may load, how it is asked, how its aliases
move. Used wherever a version is taken through its gates: by the gateway, and by commands without one.

Knows settings and what they configure; loads nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from pydantic import ValidationError

from gateway.artifacts.packages import Policy
from gateway.serving.servable import Options

if TYPE_CHECKING:
    from gateway.registries.base import Model
    from gateway.settings import Rollout, Settings


def formats(settings: Settings) -> Callable[[str, str], Policy]:
    """What may be loaded, by a version's name and digest."""

    def policy(name: str, digest: str) -> Policy:
        listed = any(fnmatchcase(name, entry) or entry == digest for entry in settings.unsafe_allowlist)
        allowed = settings.unsafe_formats == "allow" or (settings.unsafe_formats == "allowlist" and listed)
        return Policy("allow" if allowed else "refuse", settings.require_signature, settings.require_digest)

    return policy


def options(settings: Settings, name: str) -> Options:
    """How a model is asked."""
    own = settings.for_model(name)
    return Options(
        enforcement=own.enforcement or settings.enforcement,
        max_queue=settings.max_queue,
        max_rows=own.batch.max_rows,
        batch=own.batch.enabled,
        pin=own.pin,
        idle_ttl=own.idle_ttl,
        check_output=own.check_output,
        warm_up=own.warm_up,
    )


def rollout(settings: Settings, model: Model) -> tuple[Rollout, str | None]:
    """How the aliases of a model move: the operator's policy with what the registry says over it, and what
    is wrong with that; where something is, the operator's alone holds."""
    own = settings.for_model(model.name).rollout or settings.rollout
    try:
        return type(own).model_validate({**own.model_dump(), **model.rollout}), None
    except ValidationError as error:
        problem = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        return own, f"the rollout policy of {model.name} in the registry is not valid: {problem}"
