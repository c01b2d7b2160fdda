"""`status`, `load` and `unload`: show what a running gateway holds and why, load and unload versions.

Knows the control routes and the views that they return; must not know a registry or a model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from gateway.commands.options import (
    ConfigOption,
    KeyOption,
    OutputOption,
    ReferenceArgument,
    UrlOption,
    connect,
    reference_of,
)
from gateway.commands.rollouts import progress
from gateway.commands.terminal import Output, result, size, table, working
from loaders.spelling import counted

Key: TypeAlias = tuple[str, str]
"""A model's name and a version."""

_EVICTIONS_SHOWN = 5
_WARNINGS = 5
_NAMES = 5
_PLACES = {"pack": "in packs", "process": "in processes of their own"}

WaitOption = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Wait until it is done, or return at once.")
]


def status(
    url: UrlOption = None,
    admin_key_file: KeyOption = None,
    config: ConfigOption = None,
    every: Annotated[bool, typer.Option("--all", help="Show versions that are not loaded, too.")] = False,
    why: Annotated[
        bool, typer.Option("--why", help="Name every version in a place, and all recent evictions.")
    ] = False,
    output: OutputOption = Output.text,
) -> None:
    """Show what the running gateway holds, and why.

    Prints one line for every version that is loaded, loading or failed, and for every alias that does not
    serve the version in the registry. REQ/S, ERR % and P99 MS cover the last minute of a loaded version. They
    start when a request enters the model's queue, so they do not include a cold start. P99 MS needs twenty
    requests. LAST ERROR says why the version is not loaded, why the alias did not move, or how the last
    failed request ended. The lines below the table say where the versions run and why, which versions were
    evicted, for which model, and why these.
    """
    with connect(url, admin_key_file, config) as client:
        ready = client.call("GET", "/readyz", accept=(503,))
        models, rollouts = client.call("GET", "/models"), client.call("GET", "/rollouts")
        rows = _rows(models["models"], rollouts["rollouts"])
        shown = [row for row in rows if every or row["state"] != "UNLOADED" or row["last_error"]]
        evicted = sorted(
            (row for row in rows if row["evicted"]), key=lambda row: row["evicted"]["seconds_ago"]
        )
        view = {
            "url": client.url,
            **ready,
            "versions": shown,
            "not_shown": len(rows) - len(shown),
            "evicted": evicted if why else evicted[:_EVICTIONS_SHOWN],
            "differences": _differences(rollouts["rollouts"]),
            "verdicts_shared_by": rollouts.get("verdicts_shared_by"),
            "peers": rollouts.get("peers"),
            "skew": _skew(rollouts["rollouts"]),
        }
        result(output, view, lambda: _show(view, why))


def load(
    reference: ReferenceArgument,
    wait: WaitOption = True,
    url: UrlOption = None,
    admin_key_file: KeyOption = None,
    config: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Load a version into the running gateway now, before its first request.

    A version that failed before is tried again at once.
    """
    _verb("load", reference, wait, url, admin_key_file, config, output)


def unload(
    reference: ReferenceArgument,
    wait: WaitOption = True,
    url: UrlOption = None,
    admin_key_file: KeyOption = None,
    config: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Unload a version from the running gateway, after its requests are answered.

    The next request for it loads it again.
    """
    _verb("unload", reference, wait, url, admin_key_file, config, output)


def _verb(
    verb: str,
    text: str,
    wait: bool,
    url: str | None,
    admin_key_file: Path | None,
    config: Path | None,
    output: Output,
) -> None:
    from gateway.names import url_path

    reference = reference_of(text)
    if not reference.name or reference.latest:
        raise typer.BadParameter(f"{text!r}: write NAME, NAME@ALIAS or NAME/VERSION")
    with connect(url, admin_key_file, config) as client, working(f"{verb} {text} at {client.url}"):
        done = client.call("POST", f"/models/{url_path(reference)}/{verb}", timeout=0, wait=wait)
    version = f"{done['name']}/{done['version']}" if "version" in done else done["name"]
    said = f"{version} is {done['state']}" if wait else f"the {verb} of {version} has begun"
    result(output, {**done, "target": client.url}, f"{said} at {client.url}")


def _rows(
    models: Sequence[Mapping[str, Any]],
    rollouts: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """The rows of the table, one per version, with the aliases that serve it or should serve it."""
    aliases: dict[Key, list[str]] = {}
    errors: dict[Key, str] = {}
    for rollout in rollouts:
        name, alias, desired, serving = (rollout[field] for field in ("name", "alias", "desired", "serving"))
        if serving is None or serving == desired:
            aliases.setdefault((name, desired), []).append(alias)
        else:
            aliases.setdefault((name, serving), []).append(alias)
            aliases.setdefault((name, desired), []).append(f"{alias} (wanted)")
        if rollout["error"]:
            errors[name, desired] = rollout["error"]
    rows = []
    for model in models:
        for version in model["versions"]:
            key = (model["name"], version["version"])
            failed = version["reason"] if version["state"] == "FAILED" else None
            recent = version["recent"] or {}
            rows.append(
                {
                    "model": key[0],
                    "version": key[1],
                    "aliases": aliases.get(key, []),
                    "state": version["state"],
                    "progress": version["reason"] if version["state"] == "LOADING" else None,
                    "bytes": version["bytes"],
                    "stuck": version["stuck"],
                    "placement": version["placement"],
                    "requests_per_second": recent.get("requests_per_second"),
                    "error_rate": recent.get("error_rate"),
                    "p99_seconds": recent.get("p99_seconds"),
                    "last_error": failed or errors.get(key) or _failed(version["last_error"]),
                    "evicted": version.get("evicted"),
                    "hint": version.get("hint"),
                    "environment": version.get("environment"),
                    "warnings": version.get("warnings", []),
                }
            )
    return rows


def _places(rows: Sequence[Mapping[str, Any]], most: int | None) -> list[str]:
    """A line for each place and reason, with the versions that run there, at most `most` of them."""
    names: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if (place := row["placement"]) is not None and place["isolation"] in _PLACES:
            names.setdefault((place["isolation"], place["reason"]), []).append(
                f"{row['model']}/{row['version']}"
            )
    lines = []
    for (isolation, reason), found in sorted(names.items()):
        more = "" if most is None or len(found) <= most else f" and {len(found) - most} more"
        lines.append(f"{_PLACES[isolation]}: {', '.join(found[:most])}{more} ({reason})")
    return lines


def _failed(error: Mapping[str, Any] | None) -> str | None:
    """Describes how the last failed request of a loaded version ended, or why its process ended."""
    if error is None:
        return None
    ago = max(0.0, time.time() - error["at"])
    failed = f", {error['total']} failed since it was loaded" if error["total"] else ""
    return f"{error['kind']} ({ago:.0f} s ago{failed})"


def _differences(rollouts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each alias that does not serve the version in the registry, or not to all callers."""
    lines = []
    for rollout in rollouts:
        if (step := rollout.get("step")) is not None:
            lines.append(_under_way(rollout, step))
            continue
        if rollout["phase"] == "deleted" and rollout["serving"] is None:
            continue  # a deleted alias is expected to serve nothing
        if not rollout["diverged"] and rollout["phase"] != "deleted":
            continue
        wanted = "is deleted" if rollout["desired"] is None else f"should serve version {rollout['desired']}"
        if rollout["phase"] == "deleted":
            lines.append(f"{rollout['name']}@{rollout['alias']} {rollout['error'] or 'is deleted'}")
            continue
        served = "serves no version" if rollout["serving"] is None else f"serves version {rollout['serving']}"
        reason = f": {rollout['error']}" if rollout["error"] else ""
        lines.append(f"{rollout['name']}@{rollout['alias']} {wanted}, but {served}{reason}")
    return lines


def _skew(rollouts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each alias of which other gateways serve another version than this one."""
    lines = []
    for rollout in rollouts:
        versions, serving = rollout.get("peers") or {}, rollout["serving"]
        others = {version: count for version, count in versions.items() if version != serving}
        if serving is not None and others:
            shown = ", ".join(
                f"version {version} at {counted(count, 'peer')}" for version, count in others.items()
            )
            lines.append(f"{rollout['name']}@{rollout['alias']} serves version {serving} here, but {shown}")
    return lines


def _peers(peers: Mapping[str, Any]) -> list[str]:
    """How many of the other gateways answer, and why the others do not."""
    ago = peers["last_contact_seconds"]
    heard = "none was heard" if ago is None else f"last heard {ago:.1f} s ago"
    lines = [f"peers: {peers['reached']} of {peers['known']} reached, {heard}"]
    for one in peers.get("addresses", ()):  # only with control access
        if not one["reached"]:
            lines.append(f"peer {one['address']}: {one['problem'] or 'not asked yet'}")
    return lines


def _under_way(rollout: Mapping[str, Any], step: Mapping[str, Any]) -> str:
    """How far a rollout is: its phase, the share of the new version and the step."""
    subject, desired, phase = f"{rollout['name']}@{rollout['alias']}", rollout["desired"], rollout["phase"]
    if rollout["serving"] == desired:
        return f"{subject} serves version {desired}: {phase}, {progress(step)}"
    others = "answers the others" if step.get("number") else "answers"
    return (
        f"{subject} moves to version {desired}: {phase}, {progress(step)}; "
        f"version {rollout['serving']} {others}"
    )


def _show(view: Mapping[str, Any], why: bool) -> None:
    memory, registry = view["memory"], view["registry"]
    held = sum(memory.get(state) or 0 for state in ("reserved", "resident", "closing"))
    limit = memory.get("limit_bytes")
    facts = [f"{view['url']} {'ready' if view['ready'] else 'NOT ready'}"]
    facts.append(f"memory {size(held)} of {size(limit)}")
    age = registry.get("age_seconds")
    target = f" {registry['target']}" if "target" in registry else ""  # only with control access
    facts.append(f"registry{target} read {'never' if age is None else f'{age:.1f} s ago'}")
    typer.echo(" · ".join(facts))
    if registry.get("error"):
        typer.echo(f"registry error: {registry['error']}")
    for line in [*(_peers(view["peers"]) if view["peers"] else ()), *view["skew"], *view["differences"]]:
        typer.echo(line)
    for sentence in view.get("preload_unmatched", {}).values():
        typer.echo(f"preload: {sentence}")
    for sentence in view.get("settings_unmatched", {}).values():
        typer.echo(f"settings: {sentence}")
    for text in view["preload_pending"]:
        reason = view["preload_errors"].get(text)
        typer.echo(f"preload: {text} is not loaded" + (f": {reason}" if reason else " yet"))
    if view["versions"]:
        columns = ["MODEL", "VERSION", "ALIASES", "STATE", "MB", "REQ/S", "ERR %", "P99 MS", "LAST ERROR"]
        rows = [_cells(row) for row in view["versions"]]
        table(columns, rows, right=["VERSION", "MB", "REQ/S", "ERR %", "P99 MS"])
    shared = memory.get("shared") or 0
    if shared:
        models = sum(row["bytes"] or 0 for row in view["versions"])
        rest = held - shared - models
        others = f" + {size(rest)} for versions that are not listed" if rest > 0 else ""
        typer.echo(
            f"memory: {size(models)} for the models above + {size(shared)} shared by their processes{others}"
        )
    if uncounted := memory.get("uncounted"):
        typer.echo(
            f"memory: {size(uncounted)} more are taken by processes that models share, and the limit has no "
            "room for them now: raise memory_limit if this lasts"
        )
    inline = [f"{row['model']}/{row['version']}" for row in view["versions"] if _is_inline(row)]
    if inline:
        typer.echo(f"not contained, in the gateway's own process (isolation: inline): {', '.join(inline)}")
    for line in _places(view["versions"], None if why else _NAMES):
        typer.echo(line)
    if why and not view["evicted"]:
        typer.echo("no version was evicted lately")
    for row in view["evicted"]:
        gone = row["evicted"]
        typer.echo(
            f"evicted: {row['model']}/{row['version']}, {gone['seconds_ago']:.0f} s ago, for {gone['for']}: "
            f"{gone['why']}"
        )
    for row in view["versions"]:
        name = f"{row['model']}/{row['version']}"
        if (environment := row["environment"]) is not None and environment["runs_in"] != "same":
            typer.echo(f"{name}: it runs in {environment['place']}")
        helps = row["hint"] if row["state"] == "FAILED" else (environment or {}).get("help")
        if helps:
            typer.echo(f"{name}: help: {helps}")
        for warning in row["warnings"][:_WARNINGS]:
            typer.echo(f"{row['model']}/{row['version']}: {warning}")
        if len(row["warnings"]) > _WARNINGS:
            more = len(row["warnings"]) - _WARNINGS
            typer.echo(f"{row['model']}/{row['version']}: {more} more warnings; --output json shows them")
    if view["not_shown"]:
        typer.echo(f"not loaded: {counted(view['not_shown'], 'other version')}; --all to show all")


def _is_inline(row: Mapping[str, Any]) -> bool:
    return row["placement"] is not None and row["placement"]["isolation"] == "inline"


def _cells(row: Mapping[str, Any]) -> list[str]:
    aliases, held, tail = row["aliases"], row["bytes"], row["p99_seconds"]
    rate, errors = row["requests_per_second"], row["error_rate"]
    state = row["state"] if row["progress"] is None else f"{row['state']}: {row['progress']}"
    return [
        row["model"],
        row["version"],
        ", ".join(aliases) or "-",
        state if row["stuck"] is None else f"STUCK: {row['stuck']}",
        "-" if held is None else f"{held / 1e6:.1f}",
        "-" if rate is None else f"{rate:.1f}",
        "-" if errors is None else f"{100 * errors:.1f}",
        "-" if tail is None else f"{tail * 1000:.1f}",
        row["last_error"] or "-",
    ]
