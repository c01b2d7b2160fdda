"""How far a load is, for people: its phase, and the seconds that such a load takes.

Must not know aliases, registries or protocols.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from gateway.serving.servable import Phase, Servable
from gateway.views.shapes import ABSENT, Absent

if TYPE_CHECKING:
    from gateway.artifacts.packages import Fetched

BEFORE_ROLLOUT: Final = {
    Phase.FETCHING: "fetching",
    Phase.BUILDING: "building",
    Phase.WARMING: "warming",
    Phase.SERVING: "checking",
}
"""The phase of an alias by that of the version that it moves to; the others are `loading`."""


def before_rollout(servable: Servable | None, *, fetched: bool) -> str:
    """Returns the phase of an alias before its new version begins its rollout, or serves. `servable`: of the
    new version, None if it is not being loaded yet. `fetched`: its files are being downloaded."""
    if servable is None:
        return "fetching" if fetched else "resolving"
    return BEFORE_ROLLOUT.get(servable.phase, "loading")


def loading(
    servable: Servable, fetched: Fetched | None, now: float
) -> tuple[str, Mapping[str, Any] | Absent]:
    """Returns the progress of a load, as text and numbers. `now`: by the clock of the load.
    `expected_seconds`: the last load time of these files; None for new files."""
    if fetched is not None:
        return fetching(fetched), ABSENT
    if servable.began is None:
        if servable.building is not None and servable.phase is Phase.BUILDING:
            return f"building its environment: {servable.building}", ABSENT
        return servable.phase.value, ABSENT
    seconds = round(now - servable.began, 1)
    before = None if servable.prepared is None else servable.prepared.load_seconds
    if before is None:
        known = ""
    elif seconds <= before:
        known = f" of about {before:.1f} s"
    else:
        known = f", longer than usual ({before:.1f} s)"
    load = {"phase": servable.phase.value, "seconds": seconds, "expected_seconds": before}
    return f"{servable.phase.value} {seconds} s{known}", load


def fetching(fetched: Fetched) -> str:
    total = "" if fetched.total is None else f"/{fetched.total / 1e6:.1f}"
    return f"fetching {fetched.bytes / 1e6:.1f}{total} MB"
