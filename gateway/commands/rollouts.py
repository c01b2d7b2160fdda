"""`rollout`: see how an alias moves, and say how it goes on.

Knows the control routes and how to show what they answer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final
from urllib.parse import quote

import typer

from gateway.commands.options import ConfigOption, KeyOption, OutputOption, UrlOption, alias_of, connect
from gateway.commands.terminal import REFUSED, Failure, Output, note, result

if TYPE_CHECKING:
    from gateway.commands.client import Client

VERBS: Final = ("pause", "resume", "abort", "finish")
#: Phases that a rollout does not leave by itself, and those in which the version did not get to serve.
FAILED: Final = frozenset({"refused", "rolled_back", "aborted", "superseded"})
LOOK_EVERY: Final = 0.5
"""Seconds between two looks at a rollout that is followed."""


def rollout(
    first: Annotated[
        str | None,
        typer.Argument(metavar="[VERB]", help="pause, resume, abort or finish; nothing: show it."),
    ] = None,
    second: Annotated[
        str | None, typer.Argument(metavar="[NAME@ALIAS]", help="The alias, such as iris@champion.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="A line for each step, until the rollout ends.")
    ] = False,
    url: UrlOption = None,
    admin_key_file: KeyOption = None,
    config: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Show rollouts of the running gateway, or say how one goes on.

    pause stops its clock, resume goes on (also after too little traffic), abort takes the new version back,
    finish lets it serve at once.

    Example: gateway rollout iris@champion --watch
    """
    verb, reference = (first, second) if first in VERBS else (None, first)
    if verb is None and second is not None:
        raise typer.BadParameter(f"{first!r} is none of {', '.join(VERBS)}")
    if (verb is not None or watch) and reference is None:
        raise typer.BadParameter("name the alias: NAME@ALIAS")
    with connect(url, admin_key_file, config) as client:
        if reference is None:
            views = client.call("GET", "/rollouts")["rollouts"]
            lines = [_line(view) for view in views]
            result(output, {"rollouts": views, "target": client.url}, "\n".join(lines) or "no aliases")
            return
        name, alias = alias_of(reference)
        if verb is not None:
            client.call("POST", f"{path_of(name, alias)}/{verb}")
            note(f"{verb}: {reference} at {client.url}")
        if watch:
            view = follow(client, name, alias)
        else:
            view = client.call("GET", path_of(name, alias))
        result(output, {**view, "target": client.url}, _told(view))
        if watch and (view.get("rollout") or {}).get("phase") in FAILED:
            raise typer.Exit(REFUSED)


def path_of(name: str, alias: str) -> str:
    return f"/rollouts/{quote(name, safe='')}@{quote(alias, safe='')}"


def follow(client: Client, name: str, alias: str) -> dict[str, Any]:
    """Shows each change of a rollout until it ends, and returns the last view. Ctrl-C leaves the rollout
    running."""
    shown = 0
    while True:
        view = client.call("GET", path_of(name, alias))
        known = view.get("rollout") or {}
        changes = known.get("changes", [])
        for change in changes[shown:]:
            note(_changed(change, known))
        shown = len(changes)
        if known.get("step") is None:
            return view
        if known["phase"] == "held":
            note(f"held: gateway rollout finish {name}@{alias}, or abort")
            return view
        time.sleep(LOOK_EVERY)


def failure(view: Mapping[str, Any]) -> Failure | None:
    """Why a followed move did not end with its version in service, None where it did or is held."""
    known = view.get("rollout") or {}
    if known.get("phase") not in FAILED:
        return None
    said = str(known["phase"]).replace("_", " ")
    message = f"version {known['version']} was {said}: {known['reason']}"
    return Failure(message, f"version {view['serving']} serves")


def _line(view: Mapping[str, Any]) -> str:
    wanted = "" if view["desired"] == view["serving"] else f", wanted {view['desired']}"
    error = f": {view['error']}" if view["error"] else ""
    return f"{view['name']}@{view['alias']}  {view['phase']}  serves {view['serving']}{wanted}{error}"


def _changed(change: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    reason = f": {change['reason']}" if change.get("reason") else ""
    return f"{change['at']}  version {known['version']}  {change['phase']}{reason}{_evidence(change)}"


def _evidence(change: Mapping[str, Any]) -> str:
    evidence = change.get("evidence")
    if not evidence:
        return ""
    shown = []
    for arm in ("candidate", "service"):
        counts = evidence[arm]
        median = counts.get("median_seconds")
        speed = "" if median is None else f", median {median * 1000:.1f} ms"
        shown.append(f"{arm} {counts['errors']} errors of {counts['requests']}{speed}")
    return f" ({'; '.join(shown)})"


def _told(view: Mapping[str, Any]) -> str:
    lines = [_line(view)]
    known = view.get("rollout")
    if known:
        lines.append(f"version {known['version']}, compared with {known['compared_with']}: {known['phase']}")
        step = known["step"]
        if step is not None:
            paused = ", paused" if step["paused"] else ""
            lines.append(
                f"step {step['number']} of {step['of']}, {step['percent']:g} % of the callers: "
                f"{step['seconds']:g} of {step['seconds_wanted']:g} s, "
                f"{step['requests']} of {step['requests_wanted']} requests{paused}"
            )
        if known["reason"]:
            lines.append(known["reason"])
        for guard, found in ((known["evidence"] or {}).get("guards") or {}).items():
            lines.append(
                f"  {guard}: {found['candidate']} against {found['service']}, allowed {found['allowed']} "
                f"(evidence {found['evidence']:g}, bound {found['bound']:g})"
            )
    return "\n".join(lines)
