"""Decisions about moving an alias, without doing it: is the new version safe to take over, and where
does a rollback go. Pure: signatures and history in, reasons and versions out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gateway.settings import Rollout
from gateway.state import Served
from loaders.signature import compatible

if TYPE_CHECKING:
    from loaders.signature import Signature

PROMOTE, ROLLBACK = "promote", "rollback"


def refusals(policy: Rollout, old: Signature | None, new: Signature | None) -> list[str]:
    """Why `new` may not take over from `old`; empty: it may."""
    if policy.gate == "none":
        return []
    return compatible(old, new)


def rollback_target(history: Sequence[Served], current: str | None) -> str | None:
    """The version served before the present one, going further back with every rollback.

    Moves forward push onto a stack, a rollback pops down to where it went; so a second rollback goes
    behind the first one instead of forward again. None: nothing was served before.
    """
    stack: list[str] = []
    for served in history:
        if served.moved_by == ROLLBACK and served.version in stack:
            while stack[-1] != served.version:
                stack.pop()
        elif not stack or stack[-1] != served.version:
            stack.append(served.version)
    if current is not None and stack and stack[-1] != current:
        # What the registry wants now has not served yet: back means to what serves.
        return stack[-1]
    return stack[-2] if len(stack) > 1 else None
