"""`rollout`: shows the rollouts of a running gateway; pauses, resumes, aborts or finishes one.

Knows the control routes and how to show their answers; must not know how a rollout decides.
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
#: The final phases in which the version does not serve.
FAILED: Final = frozenset({"refused", "rolled_back", "aborted", "superseded"})
#: The phases of a version that is loaded and checked before its rollout.
BEFORE: Final = frozenset({"resolving", "fetching", "building", "loading", "warming", "checking"})
LOOK_EVERY: Final = 0.5
"""Seconds between two requests for the state of a rollout that is followed."""


def rollout(
    first: Annotated[
        str | None,
        typer.Argument(
            metavar="[VERB]", help="pause, resume, abort or finish; without it: show the rollout."
        ),
    ] = None,
    second: Annotated[
        str | None, typer.Argument(metavar="[NAME@ALIAS]", help="The alias, such as iris@champion.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Print a line for each change until the rollout ends.")
    ] = False,
    url: UrlOption = None,
    admin_key_file: KeyOption = None,
    config: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Show the rollouts of the running gateway, or control one.

    pause stops its clock. resume continues it, also after too little traffic. abort takes the new version
    out. finish lets the new version serve all callers at once.

    Example: gateway rollout iris@champion --watch
    """
    verb, reference = (first, second) if first in VERBS else (None, first)
    if verb is None and second is not None:
        raise typer.BadParameter(f"{first!r} is not one of {', '.join(VERBS)}")
    if (verb is not None or watch) and reference is None:
        raise typer.BadParameter("give the alias as NAME@ALIAS, such as iris@champion")
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
            view = client.call("GET", path_of(name, alias))
            if _before(view) is None and (view.get("rollout") or {}).get("step") is None:
                note(f"no rollout of {reference} is under way; the last one:")
            view = follow(client, name, alias)
        else:
            view = client.call("GET", path_of(name, alias))
        result(output, {**view, "target": client.url}, _told(view))
        if watch and (view.get("rollout") or {}).get("phase") in FAILED:
            raise typer.Exit(REFUSED)


def path_of(name: str, alias: str) -> str:
    return f"/rollouts/{quote(name, safe='')}@{quote(alias, safe='')}"


def follow(client: Client, name: str, alias: str, version: str | None = None) -> dict[str, Any]:
    """Prints each change of a rollout until it ends or is held, and returns the last view. Ctrl-C ends this
    command, not the rollout. `version`: the rollout of this version, also if a newer one takes its place."""
    last: Mapping[str, Any] | None = None
    before: str | None = None
    while True:
        view = client.call("GET", path_of(name, alias))
        known = of_version(view, version)
        if (now := _before(view)) is not None and version in (None, view["desired"]):
            if now != before:
                note(now)
            before = now
            time.sleep(LOOK_EVERY)
            continue
        changes = known.get("changes", [])
        for change in changes[changes.index(last) + 1 if last in changes else 0 :]:
            note(_changed(change, known))
            last = change
        if known.get("step") is None:
            return view
        if known["phase"] == "held":
            note(
                f"held: run `gateway rollout finish {name}@{alias}` or `gateway rollout abort {name}@{alias}`"
            )
            return view
        time.sleep(LOOK_EVERY)


def _before(view: Mapping[str, Any]) -> str | None:
    """What is done with a new version before its rollout begins; None if there is no such version."""
    trial = view.get("trial")
    if trial is not None:
        return f"version {trial['version']} is checked: {trial['now'] or 'the registry is written'}"
    return f"version {view['desired']} is {view['phase']}" if view["phase"] in BEFORE else None


def of_version(view: Mapping[str, Any], version: str | None) -> Mapping[str, Any]:
    """The last rollout of a version, which may be an earlier one of the alias; None: the current or the last
    one. Empty if there was none."""
    known = view.get("rollout") or {}
    if version is None or known.get("version") == version:
        return known
    earlier = view.get("earlier_rollouts") or ()
    return next((one for one in earlier if one["version"] == version), {})


def failure(view: Mapping[str, Any], version: str) -> Failure | None:
    """Why a followed move of an alias to `version` did not succeed; None if the version serves and its
    rollout is over."""
    known = of_version(view, version)
    phase, reason = known.get("phase"), known.get("reason")
    serving = "no version" if view["serving"] is None else f"version {view['serving']}"
    serves = f"{name_of(view)} serves {serving}"
    if phase == "held":
        return Failure(f"the rollout of version {version} is held: {reason}", serves)
    if view["serving"] == view["desired"] == version and view["phase"] not in FAILED:
        return None
    if phase in FAILED:
        return Failure(f"version {version} was {str(phase).replace('_', ' ')}: {reason}", serves)
    if view["desired"] is None:
        return Failure(f"{name_of(view)} was deleted meanwhile", serves)
    if view["desired"] != version:
        return Failure(f"{name_of(view)} was moved to version {view['desired']} meanwhile", serves)
    return Failure(f"version {version} does not serve: {view['error'] or view['phase']}", serves)


def name_of(view: Mapping[str, Any]) -> str:
    return f"{view['name']}@{view['alias']}"


def progress(step: Mapping[str, Any]) -> str:
    """How far a step of a rollout is: its share, and the time and the requests, where they are wanted."""
    if step.get("number") == 0:
        asked = f"{step['requests']} of {step['requests_wanted']} captured requests"
        return f"{asked}, {step['seconds']:g} s{', paused' if step['paused'] else ''}"
    share = f"{step['percent']:g} % of the {'requests, as copies' if 'copies' in step else 'callers'}"
    wanted = f" of {step['requests_wanted']}" if "requests_wanted" in step else ""
    paused = ", paused" if step["paused"] else ""
    paused += f"; it waits for more evidence: {step['waits']}" if "waits" in step else ""
    facts = (
        f"{share}, {step['seconds']:.0f} of {step['seconds_wanted']:g} s, "
        f"{step['requests']}{wanted} requests{paused}"
    )
    return f"step {step['number']} of {step['of']} ({facts})" if "number" in step else facts


def _line(view: Mapping[str, Any]) -> str:
    wanted = "" if view["desired"] in (None, view["serving"]) else f", wanted {view['desired']}"
    error = f": {view['error']}" if view["error"] else ""
    serves = "serves no version" if view["serving"] is None else f"serves {view['serving']}"
    return f"{name_of(view)}  {view['phase']}  {serves}{wanted}{error}"


def _changed(change: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    reason = f": {change['reason']}" if change.get("reason") else ""
    share = f" {change['percent']:g} %" if "percent" in change else ""
    return f"{change['at']}  version {known['version']}  {change['phase']}{share}{reason}{_evidence(change)}"


def _evidence(change: Mapping[str, Any]) -> str:
    evidence = change.get("evidence")
    if not evidence or "candidate" not in evidence:
        return ""  # the reason has the numbers of a replay
    shown = []
    for arm in ("candidate", "service"):
        counts = evidence[arm]
        median = counts.get("median_seconds")
        speed = "" if median is None else f", median {median * 1000:.1f} ms"
        shown.append(f"{arm} {counts['errors']} errors of {counts['requests']}{speed}")
    return f" ({'; '.join(shown)})"


def _told(view: Mapping[str, Any]) -> str:
    lines = [_line(view)]
    if view.get("trial") is not None and (now := _before(view)) is not None:
        lines.append(now)
    if wrong := view.get("policy_error"):
        lines.append(f"{wrong}; the gateway's own policy is used")
    known = view.get("rollout")
    if known:
        other = known["compared_with"]  # a move without steps and watch has none
        compared = "" if other is None else f", compared with {other}"
        lines.append(f"version {known['version']}{compared}: {known['phase']}")
        step = known["step"]
        if step is not None:
            lines.append(progress(step))
        if known["reason"]:
            lines.append(known["reason"])
        for kind in ("replay", "shadow"):
            lines += answered(kind, (known["evidence"] or {}).get(kind))
        for guard, found in ((known["evidence"] or {}).get("guards") or {}).items():
            lines.append(
                f"  {guard}: {found['candidate']} against {found['service']}, allowed {found['allowed']} "
                f"(evidence {found['evidence']:g}, bound {found['bound']:g})"
            )
    if earlier := view.get("earlier_rollouts"):
        lines.append("earlier rollouts, with what they have shown:")
        lines += [f"  {_changed(one['changes'][-1], one)}" for one in earlier]
    return "\n".join(lines)


def answered(kind: str, found: Mapping[str, Any] | None) -> list[str]:
    """Describes what the answers to captured or copied requests have shown."""
    if not found or not found["requests"]:
        return []
    lines = [
        f"  {kind}: {found['exact']} equal, {found['within_tolerance']} within the tolerance, "
        f"{found['differ']} different of {found['requests']} "
        f"(agreement {found['agreement']:g}, wanted {found['wanted']:g})"
    ]
    dropped = found.get("not_compared") or {}
    if any(dropped.values()):
        lines.append(f"    not compared: {', '.join(f'{count} {why}' for why, count in dropped.items())}")
    for column, counts in found["worst_columns"].items():
        if counts["differ"]:
            lines.append(f"    {column}: {counts['differ']} of {counts['values']} values differ")
    if found["examples"]:
        lines.append(f"    different: {', '.join(found['examples'])}")
    if latency := found.get("latency"):
        then, now = (latency[f"{arm}_median_seconds"] * 1000 for arm in ("captured", "candidate"))
        lines.append(f"    median call: {now:.1f} ms, then {then:.1f} ms")
    return lines
