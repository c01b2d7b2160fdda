"""What is wrong now, as a list: versions that failed, aliases that differ from the registry, processes that
do not work. Each says what to do.

Reads the live parts; changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

from gateway.quantities import utc
from gateway.rollouts.alias import number
from gateway.serving.servable import Status

if TYPE_CHECKING:
    from gateway.rollouts.aliases import Aliases
    from gateway.serving.manager import Manager

#: So many are listed.
MOST: Final = 200


@dataclass(frozen=True, slots=True)
class Trouble:
    """`kind`: what is wrong, in some words. `subject`: the version (NAME/VERSION) or alias (NAME@ALIAS).
    `name`: its model. `alias`: empty for a version. `text`: why. `help`: what to do. `since`: UTC, or empty.
    """

    kind: str
    subject: str
    name: str
    alias: str
    text: str
    help: str
    since: str = ""


def troubles(aliases: Aliases, manager: Manager, reads: Callable[[str], bool] | None = None) -> list[Trouble]:
    """At most `MOST`, the most urgent kind first. `reads`: whether a model may be named; None: all."""
    found = [*_stuck(manager), *_aliases(aliases), *_failed(manager), *_elsewhere(manager)]
    return [*islice((one for one in found if reads is None or reads(one.name)), MOST)]


def _stuck(manager: Manager) -> list[Trouble]:
    return [
        Trouble(
            "a process does not work",
            str(one.version),
            one.version.name,
            "",
            one.runner.stuck,
            "unload the version, which ends its process: the next request loads it again",
        )
        for one in manager
        if one.runner is not None and one.runner.stuck is not None
    ]


def _aliases(aliases: Aliases) -> list[Trouble]:
    found = []
    for one in aliases:
        if not one.diverged or one.phase == "deleted":
            continue
        serving = number(one.serving)
        answers = "no version answers" if serving is None else f"version {serving} answers"
        reason = one.error or (None if one.refusal is None else one.refusal.message) or one.phase
        hint = None if one.refusal is None else one.refusal.hint
        found.append(
            Trouble(
                f"{one.phase}: {answers}, not version {number(one.desired)}",
                f"{one.name}@{one.alias}",
                one.name,
                one.alias,
                reason,
                hint
                or "correct the version and push it again, or promote the alias to another version; "
                "promoting to the same version tries it once more",
                utc(one.since),
            )
        )
    return found


def _failed(manager: Manager) -> list[Trouble]:
    return [
        Trouble(
            "it cannot be loaded",
            str(version),
            version.name,
            "",
            problem.message,
            problem.hint or "gateway check says whether it would load; gateway load tries it now",
        )
        for version, problem in manager.failures()
    ]


def _elsewhere(manager: Manager) -> list[Trouble]:
    found = []
    for one in manager:
        runtime = None if one.prepared is None else one.prepared.runtime
        if one.status is Status.READY and runtime is not None and runtime.warning is not None:
            helps = runtime.help or "build its own environment: gateway env build"
            found.append(
                Trouble("another environment", str(one.version), one.version.name, "", runtime.warning, helps)
            )
    return found
