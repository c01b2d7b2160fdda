"""The plan: how many environments a set of packages needs, and which packages share one.

Two packages share an environment if one lock satisfies both: they run on the same Python, and do not need two
versions of a distribution. Locks that agree are merged; pinned versions stay pinned. If locks differ only in
requirements that the packages left open, and the packages are of about the same time, their requirements are
resolved together. Pure: the caller passes in the resolver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final

from gateway.environments.lock import Lock, Wanted, merged, pins, union

WINDOW = timedelta(days=31)
"""How far the days of packages may lie apart that are resolved together."""

_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class Group:
    """The names of the members that share an environment, and its lock. `apart`: why it is not merged with
    the others, one line each."""

    members: tuple[str, ...]
    lock: Lock
    apart: tuple[str, ...] = ()


def grouped(locks: Mapping[str, Lock]) -> list[Group]:
    """The groups, the one with the most members first. Greedy: takes the largest lock first, and adds each to
    the first group that it agrees with."""
    groups: list[tuple[list[str], list[Lock], dict[str, str]]] = []
    for name, lock in sorted(locks.items(), key=lambda item: (-len(item[1].packages), item[0])):
        for members, parts, packages in groups:
            if agree(parts[0], packages, lock) and all(nested(part, lock) for part in parts):
                members.append(name)
                parts.append(lock)
                packages.update(lock.packages)
                break
        else:
            groups.append(([name], [lock], dict(lock.packages)))
    return _ordered(Group(tuple(sorted(members)), _merged(parts)) for members, parts, _ in groups)


def united(
    groups: Sequence[Group],
    wishes: Mapping[str, Wanted],
    resolve: Callable[[Wanted], Lock | None],
    window: timedelta = WINDOW,
) -> list[Group]:
    """Fewer groups where members' wishes can be met together. `resolve` gives None where they cannot."""
    found: list[Group] = []
    for group in groups:
        for place, other in enumerate(found):
            both = _together(other, group, wishes, resolve, window)
            if both is not None:
                found[place] = both
                break
        else:
            found.append(group)
    ordered = _ordered(found)
    return [
        replace(group, apart=_apart(group, ordered[:place], wishes)) for place, group in enumerate(ordered)
    ]


def _together(
    one: Group,
    other: Group,
    wishes: Mapping[str, Wanted],
    resolve: Callable[[Wanted], Lock | None],
    window: timedelta,
) -> Group | None:
    if (one.lock.python, one.lock.platform) != (other.lock.python, other.lock.platform):
        return None
    members = (*one.members, *other.members)
    days = [wishes[name].created for name in members]
    known = [day for day in days if day is not None]
    if known and (len(known) < len(days) or max(known) - min(known) > window):
        return None
    wanted = union([wishes[name] for name in members], one.lock.python)
    lock = None if wanted is None else resolve(wanted)
    if lock is None or lock.python != one.lock.python:
        return None
    return Group(tuple(sorted(members)), lock)


def agree(first: Lock, packages: Mapping[str, str], other: Lock) -> bool:
    """Returns True if a lock can join a group with these packages."""
    if (first.python, first.platform) != (other.python, other.platform):
        return False
    return all(packages.get(name, version) == version for name, version in other.packages.items())


def nested(one: Lock, other: Lock) -> bool:
    """Whether for each package the files that one lock allows are all among those of the other, so that the
    narrower choice satisfies both."""
    for name, files in one.hashes.items():
        others = other.hashes.get(name, frozenset())
        if files and others and not (files <= others or others <= files):
            return False
    return True


def conflicts(one: Lock, other: Lock) -> list[str]:
    """The reasons why two locks cannot share an environment; empty if they can."""
    if one.python != other.python:
        return [f"Python {one.python[0]}.{one.python[1]} and {other.python[0]}.{other.python[1]}"]
    return [
        f"{name} {version} and {other.packages[name]}"
        for name, version in sorted(one.packages.items())
        if other.packages.get(name, version) != version
    ]


def _apart(group: Group, others: Sequence[Group], wishes: Mapping[str, Wanted]) -> tuple[str, ...]:
    """Against each larger group of the same Python, what the packages name first; against none of another
    one, where that is the reason."""
    lines = []
    for other in others:
        if other.lock.python != group.lock.python:
            continue
        found = conflicts(other.lock, group.lock)
        named = {name for member in group.members for name in pins(wishes[member].requirements)}
        found.sort(key=lambda conflict: conflict.partition(" ")[0] not in named)
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        lines.append(f"apart from {other.members[0]}: {', '.join(found[:_SHOWN])}{more}")
    return tuple(lines)


def _ordered(groups: Iterable[Group]) -> list[Group]:
    return sorted(groups, key=lambda group: (-len(group.members), group.members))


def _merged(parts: Sequence[Lock]) -> Lock:
    """The lock that satisfies all others if there is one, else their union."""
    for lock in parts:
        if all(lock.satisfies(other) for other in parts):
            return lock
    return merged(parts)
