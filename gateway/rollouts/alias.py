"""One alias in this gateway, as plain facts: desired, serving, last good, and the state of its reconciler.

Knows versions. `rollouts.aliases` changes these facts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from gateway.errors import Problem
from gateway.registries.base import Verdict, Version
from gateway.rollouts.rollout import InService, Rollout
from gateway.state import Served

STOPPED: Final = frozenset({"refused", "rolled_back"})
"""The phases in which the version in the registry was refused."""


#: The versions of an alias whose last minutes are kept.
RECORDS_KEPT: Final = 3


@dataclass(slots=True, eq=False)
class LiveAlias:
    """One alias in this gateway. `generation` counts the moves of `desired`. `since` is the unix time of
    `phase`. `verdict` is any gateway's verdict on `desired`; `fallback` is the version that then answers."""

    name: str
    alias: str
    desired: Version | None = None
    serving: Version | None = None
    last_good: Version | None = None
    forced: bool = False
    verdict: Verdict | None = None
    fallback: Version | None = None
    generation: int = 0
    phase: str = "unloaded"
    error: str | None = None
    since: float = 0.0
    moved_by: str = "registry"
    history: list[Served] = field(default_factory=list)
    #: The reconciler's task, and a future for the end of its present attempt.
    task: asyncio.Task[None] | None = None
    waiting: int = 0
    attempt: asyncio.Future[None] | None = None
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    refusal: Problem | None = None
    #: A new version that gets part of the requests, step by step, before it serves, or is watched after it.
    rollout: Rollout | None = None
    #: The record of the version in service, where the policy may compare it with a later one, and those of
    #: the versions that served before, which may serve again.
    in_service: InService | None = None
    recorded: dict[Version, InService] = field(default_factory=dict)
    #: What records the requests: one of the two above. The only one that a request looks at.
    observer: Rollout | InService | None = None
    #: The version that was replaced last, until it is no longer kept loaded.
    replaced: Version | None = None
    #: The policy that the registry held when the aliases looked last.
    said: Mapping[str, Any] | None = None

    @property
    def goal(self) -> Version | None:
        """The version that should serve: the desired one, unless a verdict forbids it."""
        return self.desired if self.verdict is None or self.fallback is None else self.fallback

    @property
    def in_steps(self) -> bool:
        """Returns True if a new version currently gets a part of the requests."""
        return self.rollout is not None and not self.rollout.watching

    def observe_with(self, rollout: Rollout | None) -> None:
        """Sets the rollout in progress."""
        self.rollout = rollout
        self.observer = rollout or self.in_service

    def record(self, in_service: InService | None) -> None:
        """Sets the record of the version in service."""
        self.in_service = in_service
        if in_service is not None:
            self.recorded.pop(in_service.version, None)
            self.recorded[in_service.version] = in_service  # the newest last
            for version in list(self.recorded)[:-RECORDS_KEPT]:
                del self.recorded[version]
        else:
            self.recorded.clear()
        self.observer = self.rollout or in_service

    @property
    def diverged(self) -> bool:
        """Whether requests do not get what the registry wants: another version, or none."""
        if self.in_steps:
            return False  # on its way
        if self.serving is not None:
            return self.serving != self.desired
        return self.phase in (*STOPPED, "deleted") or self.verdict is not None or self.refusal is not None

    @property
    def unproven(self) -> bool:
        """Whether no version is known to have answered under this alias, at any gateway."""
        return self.last_good is None

    @property
    def stopped(self) -> str:
        """The phase of an alias whose version must not serve."""
        return "refused" if self.verdict is None else self.verdict.outcome

    def show(self, now: float, phase: str, error: str | None = None) -> None:
        """Sets the phase. `now`: unix seconds."""
        if phase != self.phase:
            self.since = now
        self.phase, self.error = phase, error

    def renew_attempt(self) -> None:
        """Begins a new attempt: later callers wait for its end."""
        if self.attempt is None or self.attempt.done():
            self.attempt = asyncio.get_running_loop().create_future()

    def end_attempt(self) -> None:
        if self.attempt is not None and not self.attempt.done():
            self.attempt.set_result(None)

    def __repr__(self) -> str:
        numbers = [None if v is None else v.version for v in (self.desired, self.serving)]
        return f"<Alias {self.name}@{self.alias} desired {numbers[0]}, serving {numbers[1]}, {self.phase}>"


@dataclass(frozen=True, slots=True)
class Attempt:
    """The last attempt on an alias that does not exist or no longer exists, so that `/rollouts` can show it.
    `phase`: refused or deleted."""

    name: str
    alias: str
    version: str | None
    phase: str
    error: str
    since: float


def number(version: Version | None) -> str | None:
    """The number of a version; None without a version."""
    return None if version is None else version.version
