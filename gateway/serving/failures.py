"""Versions that failed to load: the reason, and when they may be tried again. A broken version costs one load
per pause, not one per request.

Pure: the clock and the random numbers are arguments. Knows problems and packages; must not load any.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachetools import TLRUCache

from gateway import backoff
from gateway.errors import Problem, pathless

if TYPE_CHECKING:
    from gateway.artifacts.packages import Prepared
    from gateway.registries.base import Version

#: A failure is remembered for this time after its pause, in seconds, so that the pauses grow.
FORGET_AFTER = 600.0
#: The exceptions of a model whose libraries are not installed here.
_NOT_INSTALLED = ("MissingFramework", "ModuleNotFoundError")
#: A quarantine counts as this many failed attempts.
QUARANTINE_ATTEMPTS = 6


@dataclass(slots=True)
class Failure:
    """A version that failed to load: the reason, when it may be tried again, and the number of attempts."""

    problem: Problem
    until: float
    attempts: int


class Failures:
    """The memory of versions that failed. `clock`: seconds."""

    def __init__(self, clock: Callable[[], float], chance: random.Random | None = None) -> None:
        self._clock = clock
        self._chance = chance or random.Random()
        self._kept: TLRUCache[Version, Failure] = TLRUCache(
            10_000, ttu=lambda _, failure, now: failure.until + FORGET_AFTER, timer=clock
        )

    def find(self, version: Version) -> Problem | None:
        failure = self._kept.get(version)
        return None if failure is None else failure.problem

    def items(self) -> list[tuple[Version, Problem]]:
        """Every version that failed lately, with the reason."""
        return [(version, failure.problem) for version, failure in self._kept.items()]

    def check(self, version: Version) -> None:
        """Raises the Problem of a version that may not be tried again yet."""
        failure = self._kept.get(version)
        now = self._clock()
        if failure is not None and now < failure.until:
            raise failure.problem.again(failure.until - now)

    def remember(self, version: Version, problem: Problem) -> None:
        """Records that the version cannot be loaded, and sets `retry_after`. Ignores problems that are not
        the version's (no memory, a gateway that stops)."""
        if problem.code != "MODEL_UNAVAILABLE":
            return
        before = self._kept.get(version)
        attempts = 1 if before is None else before.attempts + 1
        problem.retry_after = backoff.pause(attempts, chance=self._chance)
        self._kept[version] = Failure(problem, self._clock() + problem.retry_after, attempts)

    def quarantine(self, version: Version, problem: Problem) -> None:
        """Prevents another attempt until the longest pause is over."""
        problem.retry_after = backoff.LONGEST
        self._kept[version] = Failure(problem, self._clock() + backoff.LONGEST, QUARANTINE_ATTEMPTS)

    def forget(self, version: Version) -> None:
        """Forgets the failure: the version has loaded, or the operator wants another attempt now."""
        self._kept.pop(version, None)


def explained(version: Version, during: str, error: Exception, prepared: Prepared | None) -> Problem:
    """The Problem of a version whose load raised `error`. `during`: what it did then."""
    # A missing library stays missing, so a retry by the client does not help.
    hopeless = str(error).startswith(_NOT_INSTALLED)
    # Some frameworks add the stack of their own code.
    reason = pathless(str(error).partition("\nStack trace:")[0].rstrip())
    message, helps = f"{version} failed {during}: {reason}", None
    runtime = None if prepared is None else prepared.runtime
    if runtime is not None and runtime.warning is not None:
        # This is the most likely cause, and a retry does not change it.
        message, helps, hopeless = f"{message}; {runtime.warning}", runtime.help, True
    return Problem("MODEL_UNAVAILABLE", message, hint=helps, retryable=False if hopeless else None)
