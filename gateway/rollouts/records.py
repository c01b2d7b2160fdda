"""The facts about an alias before a decision: from the registry, from the durable state, and from the serving
version.

Pure: takes facts, returns facts. Must not know the manager or the event loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.errors import Problem
from gateway.registries import base
from gateway.registries.base import Model, Verdict, Version
from gateway.rollouts.alias import LiveAlias
from gateway.rollouts.memory import Memory
from gateway.state import Served

PROMOTE, ROLLBACK = "promote", "rollback"
ROLLED_BACK = "rolled back: "
"""The prefix of the reason in the history when a version was rolled back."""


@dataclass(frozen=True, slots=True)
class Record:
    """The facts about an alias when a version is checked for it.

    `model`: the registry's current model. `against`: the version that callers of the alias use now (None:
    unknown). `good`: the number of the last version that answered. `served`: the numbers of the versions that
    have proved themselves under the alias: they need no steps, no watch and no comparison, and a rollback may
    go to them. `verdict`: another gateway's verdict on the version that the alias points to.
    """

    model: Model
    against: Version | None = None
    good: str | None = None
    served: frozenset[str] = frozenset()
    verdict: Verdict | None = None


def seen(model: Model, alias: str, memory: Memory, now: float) -> LiveAlias:
    """An alias that was not used here yet, made from the registry and the memory. `now`: unix seconds."""
    entry = model.aliases[alias]
    found = LiveAlias(model.name, alias, since=now, history=memory.history(model.name, alias))
    good = memory.last_good(model.name, alias) or entry.last_good
    found.last_good = None if good is None else model.versions.get(good)
    return found


def want(found: LiveAlias, model: Model, entry: base.Alias, own: Verdict | None = None) -> str | None:
    """Sets the desired version from the registry. `own`: this gateway's verdict if the registry has none.
    Returns a reason against the version that needs no look at its files, or None."""
    desired = model.versions.get(entry.version) or Version(found.name, entry.version, source="")
    found.desired, found.forced, found.verdict = desired, entry.forced, entry.refused or own
    if desired == found.serving:
        found.desired = found.serving  # one object, so that `is` holds on the hot path
    found.fallback = None
    if found.verdict is None:
        return None if desired.source else not_registered(desired).message
    good = None if entry.last_good is None else model.versions.get(entry.last_good)
    found.fallback = next(
        (v for v in (good, found.serving, found.last_good) if v not in (None, desired)), None
    )
    return f"version {desired.version} was {found.verdict.said}: {found.verdict.reason}"


def record_of(
    model: Model, alias: str, found: LiveAlias | None, history: Sequence[Served], *, again: bool = False
) -> Record:
    """The facts about an alias for its gates. `again`: the operator wants the version checked again, so an
    earlier verdict is ignored."""
    entry = model.aliases.get(alias)
    if entry is None or found is None:
        return Record(model)
    good = None if found.last_good is None else found.last_good.version
    served = _served(entry, history, good)
    against = found.serving or found.last_good
    if against is None and entry.refused is None and not again:
        against = model.versions.get(entry.version)
    return Record(model, against, good, served, None if again else entry.refused)


def _served(entry: base.Alias, history: Sequence[Served], good: str | None) -> frozenset[str]:
    """The versions that have served, here or (from the registry) elsewhere. A version that was rolled back
    each time that it served here has not proved itself, but a person's rollback may go to it."""
    stayed = {stretch.version for stretch in history if not (stretch.reason or "").startswith(ROLLED_BACK)}
    taken_back = {stretch.version for stretch in history} - stayed
    said = {*stayed, *entry.previous, entry.last_good} - taken_back
    back = entry.version if entry.back else None
    return frozenset(version for version in (*said, good, back) if version is not None)


def earlier(record: Record, alias: str, history: Sequence[Served]) -> str | None:
    """The target of a rollback: the version that served before, here or (from the registry) elsewhere."""
    entry = record.model.aliases[alias]
    good = None if entry.back else entry.last_good  # after a rollback, that may be the version it left
    known = (rollback_target(history, entry.version), *entry.previous, good)
    return next((version for version in known if version in record.served - {entry.version}), None)


def not_registered(target: Version) -> Problem:
    message = f"the alias points to version {target.version} of {target.name}, which is not registered"
    return Problem("VERSION_NOT_FOUND", message, hint="register that version, or move the alias")


def rollback_target(history: Sequence[Served], current: str | None) -> str | None:
    """The version served before the present one, going further back with every rollback. Pure.

    Moves forward push onto a stack, a rollback pops down to where it went; so a second rollback goes
    behind the first one instead of forward again. That holds too for a version that has not served here
    before: it served elsewhere, before all that did here. None: nothing was served before.
    """
    stack: list[str] = []
    for served in history:
        while served.moved_by == ROLLBACK and stack and stack[-1] != served.version:
            stack.pop()
        if not stack or stack[-1] != served.version:
            stack.append(served.version)
    if current is not None and stack and stack[-1] != current:
        # What the registry wants now has not served yet: back means to what serves.
        return stack[-1]
    return stack[-2] if len(stack) > 1 else None


def is_other(service: Version | None, target: Version) -> bool:
    """Whether there is another version in service that the target can be compared with."""
    return service is not None and service != target and bool(service.source)


def has_served(found: LiveAlias, model: Model, target: Version) -> bool:
    """Whether a version has proved itself under an alias: it needs no steps and no watch."""
    return target.version in record_of(model, found.alias, found, found.history).served
