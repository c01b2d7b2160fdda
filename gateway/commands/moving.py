"""`promote` and `rollback`: move an alias through a running gateway, or directly in the registry.

Both ways run the same gates before anything is written; without a gateway they run in this process
(`gateway.rollouts.preflight`). Knows nothing of how a gateway carries a move out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from gateway.commands.options import (
    AliasArgument,
    ConfigOption,
    KeyOption,
    OutputOption,
    RegistryOption,
    UrlOption,
    alias_of,
    connect,
    settings_of,
    target_of,
    url_given,
    version_of,
)
from gateway.commands.terminal import Failure, Output, note, result, working

if TYPE_CHECKING:
    from gateway.commands.client import Client
    from gateway.registries.base import Alias, Model, Registry
    from gateway.settings import Settings

ABSENT = "none"
"""What `--expect` calls an alias that does not exist."""


def promote(
    reference: AliasArgument,
    version: Annotated[
        str | None, typer.Argument(metavar="[VERSION]", help="The version to move it to.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="ALIAS", help="Move it to where this alias of the model points."),
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option(metavar="V", help="Only if it points to V now; `none`: only if it does not exist."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Move it although the signatures are not compatible.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Run the gates, move nothing.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Through a gateway: until it is served there, or refused.")
    ] = False,
    registry: RegistryOption = None,
    url: UrlOption = None,
    admin_key_file: KeyOption = None,
    config: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Move an alias to a version that passes the gates.

    The gates: its files and digest are right, it takes what the present version takes, it loads and answers
    its saved example. A refused promotion changes nothing and exits with 1.

    With --url or $GATEWAY_URL the running gateway runs the gates and writes its registry. Else they run here
    and the registry is written directly; gateways that follow it move by themselves.

    Example: gateway promote iris@champion 2 --url http://127.0.0.1:8080 --wait
    """
    name, alias = alias_of(reference)
    if (version is None) == (source is None):
        raise typer.BadParameter("give either VERSION or --from ALIAS")
    wanted = None if version is None else version_of(version)
    if expect is not None and expect != ABSENT:
        version_of(expect)
    if url is not None or (registry is None and url_given(url)):
        with connect(url, admin_key_file) as client:
            wanted = wanted or _points_to(client, name, source or "")
            done = _promote_there(
                client, name, alias, wanted, expect, force=force, dry_run=dry_run, wait=wait
            )
            target = client.url
    else:
        with _opened(registry) as (opened, target):
            model = _model(opened, name, wanted)
            wanted = wanted or _alias(model, source or "").version
            done = _promote_here(
                opened,
                model,
                alias,
                wanted,
                expect,
                settings_of(config, registry=target),
                force=force,
                dry_run=dry_run,
            )
            if wait:
                note("no gateway was named: there is nothing to wait for")
    result(output, {**done, "target": target}, _told(reference, done, target, dry_run=dry_run))


def rollback(
    reference: AliasArgument,
    to: Annotated[str | None, typer.Option("--to", metavar="V", help="Back to this version.")] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Through a gateway: until it is served there, or refused.")
    ] = False,
    registry: RegistryOption = None,
    url: UrlOption = None,
    admin_key_file: KeyOption = None,
    config: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Move an alias back to the version before.

    Again: further back. With --url or $GATEWAY_URL that is the version last served before the present one,
    as the running gateway remembers it. Else it is where the registry says the alias pointed before, after
    a look here whether that version still loads.

    Example: gateway rollback iris@champion --url http://127.0.0.1:8080
    """
    name, alias = alias_of(reference)
    wanted = None if to is None else version_of(to)
    if url is not None or (registry is None and url_given(url)):
        with connect(url, admin_key_file) as client, working(f"{reference} goes back"):
            path = f"{_alias_path(name, alias)}/rollback"
            body = {} if wanted is None else {"to": wanted}
            try:
                done = client.call("POST", path, body, timeout=0, wait=wait)
            except Failure as failure:
                if wanted is None and failure.message.endswith("(ROLLOUT_REFUSED)"):
                    # The gateway's own hint names a field of the request.
                    failure.hint = "name the version to go back to: --to V"
                raise
            target = client.url
    else:
        with _opened(registry) as (opened, target):
            done = _rollback_here(
                opened, _model(opened, name, wanted), alias, wanted, settings_of(config, registry=target)
            )
    result(output, {**done, "target": target}, _told(reference, done, target, dry_run=False))


def _promote_there(
    client: Client,
    name: str,
    alias: str,
    version: str,
    expect: str | None,
    *,
    force: bool,
    dry_run: bool,
    wait: bool,
) -> dict[str, Any]:
    body: dict[str, Any] = {"version": version, "force": force}
    if expect is not None:
        body["expect"] = None if expect == ABSENT else expect
    with working(f"{name}@{alias} to {version}: the gates of {client.url}"):
        # However long a large model loads: the answer comes when the gates have spoken.
        path = _alias_path(name, alias)
        return client.call("PUT", path, body, timeout=0, wait=wait, dry_run=dry_run)


def _promote_here(
    opened: Registry,
    model: Model,
    alias: str,
    version: str,
    expect: str | None,
    settings: Settings,
    *,
    force: bool,
    dry_run: bool,
) -> dict[str, Any]:
    from gateway.rollouts import preflight

    standing = model.aliases.get(alias)
    _as_expected(f"{model.name}@{alias}", None if standing is None else standing.version, expect)
    refusals: list[str] = []
    if standing is None or standing.version != version:
        with working(f"{model.name}@{alias} to {version}: the gates"):
            refusals = preflight.gates(model, alias, version, settings)
    if refusals and not force:
        hint = "--force moves the alias all the same"
        raise Failure(f"{model.name}/{version} may not take over: {'; '.join(refusals)}", hint)
    if not dry_run:
        absent = expect == ABSENT
        opened.set_alias(
            model.name,
            alias,
            version,
            expect=None if absent else expect,
            absent=absent,
            forced=bool(refusals),
        )
    previous = None if standing is None else standing.version
    done = {"name": model.name, "alias": alias, "version": version, "previous": previous}
    return {**done, "forced_past": refusals} if refusals else done


def _rollback_here(
    opened: Registry, model: Model, alias: str, to: str | None, settings: Settings
) -> dict[str, Any]:
    from gateway.rollouts import preflight

    standing = _alias(model, alias)
    wanted = to or next((before for before in standing.previous if before != standing.version), None)
    if wanted is None:
        raise Failure(
            f"the registry does not say where {model.name}@{alias} pointed before {standing.version}",
            f"name a version: --to V; versions of {model.name}: {_numbers(model)}",
        )
    model = _model(opened, model.name, wanted)
    with working(f"{model.name}@{alias} back to {wanted}: the gates"):
        preflight.gates(model, alias, wanted, settings, back=True)
    opened.set_alias(model.name, alias, wanted, expect=standing.version, forced=True, back=True)
    return {"name": model.name, "alias": alias, "version": wanted, "previous": standing.version}


def _told(reference: str, done: dict[str, Any], target: str, *, dry_run: bool) -> str:
    """One line for a person: what points where now, and where that was written."""
    if dry_run:
        return f"{reference} may move to {done['version']} in {target}: the gates have nothing against it"
    if "serving" in done:  # a gateway's answer: its rollout
        if done["serving"] == done["desired"]:
            return f"{reference} is {done['desired']} and served at {target}"
        until = (
            f"{done['serving']} serves until it is ready" if done["serving"] else "loaded on first request"
        )
        return f"{reference} is {done['desired']} at {target} ({until})"
    if done["version"] == done["previous"]:
        return f"{reference} is {done['version']} already in {target}"
    before = f" (before: {done['previous']})" if done["previous"] else ""
    return f"{reference} is {done['version']}{before} in {target}"


@contextmanager
def _opened(target: str | None) -> Iterator[tuple[Registry, str]]:
    from gateway.registries import open_registry

    chosen = target_of(target)
    opened = open_registry(chosen)
    try:
        yield opened, chosen
    finally:
        opened.close()


def _model(opened: Registry, name: str, version: str | None) -> Model:
    from gateway.names import Reference
    from gateway.registries.base import ask

    found = ask(opened, Reference(name, version=version)).models
    if name not in found:
        raise Failure(
            f"{opened.target} has no model {name}", f"its models: {', '.join(sorted(found)) or 'none'}"
        )
    return found[name]


def _alias(model: Model, alias: str) -> Alias:
    if alias not in model.aliases:
        known = ", ".join(sorted(model.aliases)) or "none"
        raise Failure(f"{model.name} has no alias {alias}", f"aliases of {model.name}: {known}")
    return model.aliases[alias]


def _as_expected(reference: str, stands: str | None, expect: str | None) -> None:
    """Says at once what the write would say after the gates."""
    if expect is not None and (stands or ABSENT) != expect:
        wanted = "it to be absent" if expect == ABSENT else f"version {expect}"
        found = "it does not exist" if stands is None else f"it points to version {stands}"
        raise Failure(f"{reference}: expected {wanted}, but {found}")


def _numbers(model: Model) -> str:
    return ", ".join(sorted(model.versions, key=int)) or "none"


def _alias_path(name: str, alias: str) -> str:
    return f"/models/{quote(name, safe='')}/aliases/{quote(alias, safe='')}"


def _points_to(client: Client, name: str, alias: str) -> str:
    """Where an alias points, as the running gateway's registry says."""
    aliases = client.call("GET", f"/models/{quote(name, safe='')}")["aliases"]
    if alias not in aliases:
        known = ", ".join(sorted(aliases)) or "none"
        raise Failure(f"{name} has no alias {alias}", f"aliases of {name}: {known}")
    return str(aliases[alias])
