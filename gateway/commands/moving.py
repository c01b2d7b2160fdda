"""`promote` and `rollback`: move an alias through a running gateway, or directly in the registry.

Both ways use the same `Promotions`: the gateway's, or one built in this process
(`gateway.rollouts.offline`). Must not know how a move is carried out.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from gateway.commands.checking import said
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
from gateway.commands.rollouts import answered, failure, follow
from gateway.commands.terminal import Failure, Output, note, result, working

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from gateway.commands.client import Client
    from gateway.registries.base import Registry
    from gateway.rollouts.promotions import Moved, Promotions
    from gateway.settings import Settings

ABSENT = "none"
"""The value of `--expect` for an alias that does not exist."""
NO_GATEWAY = "--wait has no effect without a gateway: name one with --url or GATEWAY_URL"
CHECK_EVERY = 0.25
"""Seconds between two requests for the checks that a gateway has made so far."""


def promote(
    reference: AliasArgument,
    version: Annotated[
        str | None, typer.Argument(metavar="[VERSION]", help="The version to move it to.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="ALIAS", help="Move it to the version of this alias of the model."),
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option(metavar="V", help="Only if it points to V now; `none`: only if it does not exist."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Move it even if the signatures are not compatible.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run the gates and the replay of the policy, but move nothing.")
    ] = False,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait",
            help="Wait for the end of its rollout, with its steps and its watch; exit 1 unless it then "
            "serves (needs a gateway).",
        ),
    ] = False,
    canary: Annotated[
        str | None,
        typer.Option(metavar="STEPS", help="Percentages of callers, such as 5,25,50 (needs a gateway)."),
    ] = None,
    shadow: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="The share of the requests whose copies it answers first (needs a gateway)."
        ),
    ] = None,
    registry: RegistryOption = None,
    url: UrlOption = None,
    admin_key_file: KeyOption = None,
    config: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Move an alias to a version that passes the gates.

    The gates check that its files match its digest, that it accepts the inputs of the current version, and
    that it loads and answers its saved example. A refused promotion changes nothing and exits with 1.

    With --url or $GATEWAY_URL the running gateway runs the gates and writes its registry. Otherwise this
    command runs the gates and writes the registry; gateways that follow the registry then move by themselves.

    With --shadow, or with `shadow` in the rollout policy, the new version first answers copies of requests,
    which callers do not notice. With --canary, or with `canary` in the policy, it then gets a growing share
    of the callers.

    --wait follows the rollout to its end: through all steps and, with `watch` in the policy, through the
    watch after the swap. It exits with 0 only if the version serves then, and with 1 and the reason if it was
    refused, rolled back, superseded or held. Ctrl-C leaves the rollout running.

    Example: gateway promote iris@champion 2 --url http://127.0.0.1:8080 --wait
    """
    name, alias = alias_of(reference)
    if (version is None) == (source is None):
        raise typer.BadParameter("give either VERSION or --from ALIAS")
    wanted = None if version is None else version_of(version, name)
    if expect is not None and expect != ABSENT:
        version_of(expect)
    if url is not None or (registry is None and url_given(url)):
        with connect(url, admin_key_file, config) as client:
            wanted = wanted or _points_to(client, name, source or "")
            steps = None if canary is None else _steps(canary)
            body = _body(wanted, expect, force=force, steps=steps, shadow=shadow)
            done = _promote_there(client, name, alias, body, dry_run=dry_run, wait=wait)
            target = client.url
            if wait and not dry_run:
                done |= follow(client, name, alias, wanted)
                if (refused := failure(done, wanted)) is not None:
                    raise refused
    else:
        for option, given in (("--canary", canary), ("--shadow", shadow)):
            if given is not None:
                raise typer.BadParameter(f"{option} needs a running gateway: name it with --url")
        with _opened(registry, config) as (opened, target):
            goal = wanted or _alias_here(opened, name, source or "")
            stands = _expectation(expect)
            done = _here(
                f"promoting {name}@{alias} to {goal}",
                opened,
                settings_of(config, registry=target),
                lambda here: here.promote(name, alias, goal, expect=stands, force=force, dry_run=dry_run),
                shown=wait or dry_run,
            )
            if wait:
                note(NO_GATEWAY)
    for line in said(done.get("environment")):
        note(line)
    result(output, {**done, "target": target}, _told(reference, done, target, dry_run=dry_run))


def rollback(
    reference: AliasArgument,
    to: Annotated[str | None, typer.Option("--to", metavar="V", help="Back to this version.")] = None,
    wait: Annotated[
        bool,
        typer.Option("--wait", help="Wait until the gateway serves it (needs a gateway)."),
    ] = False,
    registry: RegistryOption = None,
    url: UrlOption = None,
    admin_key_file: KeyOption = None,
    config: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Move an alias back to its previous version.

    A second rollback goes one version further back. With --url or $GATEWAY_URL the running gateway knows
    which version it served before. Otherwise the previous version is the one that the registry records, and
    this command checks first that it still loads.

    Example: gateway rollback iris@champion --url http://127.0.0.1:8080
    """
    name, alias = alias_of(reference)
    wanted = None if to is None else version_of(to)
    if url is not None or (registry is None and url_given(url)):
        with (
            connect(url, admin_key_file, config) as client,
            working(f"rolling back {reference} at {client.url}"),
        ):
            path = f"{_alias_path(name, alias)}/rollback"
            body = {} if wanted is None else {"to": wanted}
            done = client.call("POST", path, body, timeout=0, wait=wait)
            target = client.url
    else:
        with _opened(registry, config) as (opened, target):
            done = _here(
                f"rolling back {name}@{alias} in {target}",
                opened,
                settings_of(config, registry=target),
                lambda here: here.rollback(name, alias, wanted),
            )
            if wait:
                note(NO_GATEWAY)
    for line in said(done.get("environment")):
        note(line)
    result(output, {**done, "target": target}, _told(reference, done, target, dry_run=False))


def _promote_there(
    client: Client,
    name: str,
    alias: str,
    body: dict[str, Any],
    *,
    dry_run: bool,
    wait: bool,
) -> dict[str, Any]:
    version = body["version"]
    with working(f"promoting {name}@{alias} to {version}: running the gates at {client.url}"):
        path = _alias_path(name, alias)
        with _checks_shown(client, name, alias, version, follow=wait or dry_run) as show:
            # The answer comes when the gates have decided. A large model may take long to load.
            done = client.call("PUT", path, body, timeout=0, wait=wait, dry_run=dry_run)
            for check in done.get("checks", ()):
                show(check["check"], check["seconds"])
        return done


def _body(
    version: str, expect: str | None, *, force: bool, steps: list[float] | None, shadow: float | None
) -> dict[str, Any]:
    body: dict[str, Any] = {"version": version, "force": force}
    if expect is not None:
        body["expect"] = None if expect == ABSENT else expect
    if steps is not None:
        body["canary"] = steps
    return body if shadow is None else {**body, "shadow": shadow}


def _steps(text: str) -> list[float]:
    from gateway.rollout_settings import steps_of

    try:
        return steps_of(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--canary'") from None


@contextmanager
def _checks_shown(
    client: Client, name: str, alias: str, version: str, *, follow: bool
) -> Iterator[Callable[[str, float], None]]:
    """While the gateway runs its gates, prints a line for each finished check, with its seconds. Yields the
    function that prints a check; it prints each check once."""
    seen: set[str] = set()
    over = threading.Event()

    def show(check: str, seconds: float) -> None:
        if follow and check not in seen:
            seen.add(check)
            note(f"  {seconds:7.2f} s  {check}")

    def poll() -> None:
        path = f"/rollouts/{quote(name, safe='')}@{quote(alias, safe='')}"
        while not over.wait(CHECK_EVERY):
            try:
                trial = client.call("GET", path).get("trial")
            except Failure:
                continue  # a new alias has no rollout before it exists
            for check in trial["checks"] if trial and trial["version"] == version else ():
                if not over.is_set():
                    show(check["check"], check["seconds"])

    poller = threading.Thread(target=poll, daemon=True)
    if follow:
        poller.start()
    try:
        yield show
    finally:
        over.set()
        if follow:
            poller.join(5)


def _here(
    what: str,
    opened: Registry,
    settings: Settings,
    begin: Callable[[Promotions], AbstractAsyncContextManager[Moved]],
    *,
    shown: bool = False,
) -> dict[str, Any]:
    """Runs a move in this process. With `shown` it prints a line for each check."""
    from gateway.rollouts.offline import offline

    async def run() -> Moved:
        def told(check: str, seconds: float) -> None:
            if shown:
                note(f"  {seconds:7.2f} s  {check}")

        async with offline(settings, opened, told) as here, begin(here) as moved:
            return moved

    with working(f"{what}: running the gates"):
        moved = asyncio.run(run())
    move = moved.move
    done: dict[str, Any] = {"name": move.name, "alias": move.alias, "version": move.version}
    done["previous"] = moved.previous
    done["environment"] = moved.environment
    if moved.replay is not None:
        done["replay"] = moved.replay.to_json()
    return {**done, "forced_past": list(moved.overruled)} if moved.overruled else done


def _expectation(expect: str | None) -> str | None:
    """The value of `--expect` in the form that `Move.expect` has."""
    from gateway.registries.base import ANYWHERE

    if expect is None:
        return ANYWHERE
    return None if expect == ABSENT else expect


def _told(reference: str, done: dict[str, Any], target: str, *, dry_run: bool) -> str:
    """The text output: where the alias points now, and which registry or gateway was changed."""
    if dry_run:
        text = f"{reference} may move to version {done['version']} in {target}: all checks passed"
        replay = done.get("replay")
        if replay is None:
            return text
        held = "; the rollout would be held" if replay["outcome"] == "thin" else ""
        return "\n".join([f"{text}{held}", f"  {replay['says']}", *answered("replay", replay)])
    if "serving" in done:  # a gateway's answer: its rollout
        is_under_way = (done.get("rollout") or {}).get("step") is not None
        if done["serving"] == done["desired"]:
            watched = f"; `gateway rollout {reference} --watch` follows its watch" if is_under_way else ""
            return f"{reference} is {done['desired']} and served at {target}{watched}"
        if is_under_way:
            return f"{reference} is {done['desired']} at {target}: {done['rollout']['phase']}"
        until = (
            f"{done['serving']} serves until it is ready" if done["serving"] else "loaded on first request"
        )
        return f"{reference} is {done['desired']} at {target} ({until})"
    if done["version"] == done["previous"]:
        return f"{reference} is {done['version']} already in {target}"
    before = f" (before: {done['previous']})" if done["previous"] else ""
    return f"{reference} is {done['version']}{before} in {target}"


@contextmanager
def _opened(registry: str | None, config: Path | None) -> Iterator[tuple[Registry, str]]:
    from gateway.registries import open_registry

    chosen = target_of(registry, config)
    opened = open_registry(chosen)
    try:
        yield opened, chosen
    finally:
        opened.close()


def _alias_here(opened: Registry, name: str, alias: str) -> str:
    """The version that an alias points to in the registry. Raises NotInRegistry."""
    from gateway.names import Reference
    from gateway.registries.resolution import find_alias

    return find_alias(opened.find(Reference(name)), name, alias).version


def _alias_path(name: str, alias: str) -> str:
    return f"/models/{quote(name, safe='')}/aliases/{quote(alias, safe='')}"


def _points_to(client: Client, name: str, alias: str) -> str:
    """The version that an alias points to in the registry of the running gateway. Raises Failure."""
    aliases = client.call("GET", f"/models/{quote(name, safe='')}")["aliases"]
    if alias not in aliases:
        known = ", ".join(sorted(aliases)) or "none"
        raise Failure(f"{name} has no alias {alias}", f"aliases of {name}: {known}")
    return str(aliases[alias])
