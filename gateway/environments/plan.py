"""How few environments a set of packages needs, and which packages share one. Pure.

Two packages share an environment where one lock satisfies both: they run on the same Python, and no package
is in two versions. Locks that agree are merged; what was pinned stays pinned, so each model gets exactly what
its own lock says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.environments.lock import Lock, merged


@dataclass(frozen=True, slots=True)
class Group:
    """The members that share an environment, by name, and its lock."""

    members: tuple[str, ...]
    lock: Lock


def grouped(locks: Mapping[str, Lock]) -> list[Group]:
    """The groups, the one with most members first. Greedy: the largest lock first, and each into the first
    group that it agrees with."""
    groups: list[tuple[list[str], list[Lock], dict[str, str]]] = []
    for name, lock in sorted(locks.items(), key=lambda item: (-len(item[1].packages), item[0])):
        for members, parts, packages in groups:
            if agree(parts[0], packages, lock):
                members.append(name)
                parts.append(lock)
                packages.update(lock.packages)
                break
        else:
            groups.append(([name], [lock], dict(lock.packages)))
    made = [Group(tuple(sorted(members)), _merged(parts)) for members, parts, _ in groups]
    return sorted(made, key=lambda group: (-len(group.members), group.members))


def agree(first: Lock, packages: Mapping[str, str], other: Lock) -> bool:
    """Whether a lock can join a group that has these packages."""
    if (first.python, first.platform) != (other.python, other.platform):
        return False
    return all(packages.get(name, version) == version for name, version in other.packages.items())


def conflicts(one: Lock, other: Lock) -> list[str]:
    """Why two locks cannot share an environment; empty: they can."""
    if one.python != other.python:
        return [f"Python {one.python[0]}.{one.python[1]} and {other.python[0]}.{other.python[1]}"]
    return [
        f"{name} {version} and {other.packages[name]}"
        for name, version in sorted(one.packages.items())
        if other.packages.get(name, version) != version
    ]


def _merged(parts: Sequence[Lock]) -> Lock:
    """The one that satisfies all the others if there is one, else their union."""
    for lock in parts:
        if all(lock.satisfies(other) for other in parts):
            return lock
    return merged(parts)
