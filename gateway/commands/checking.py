"""`check`: reports whether a package would load and serve here, and may replace the version in service.

Needs no running gateway. `gateway.rollouts.preflight` decides what is checked.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.commands.options import (
    ConfigOption,
    OutputOption,
    RegistryOption,
    alias_of,
    settings_of,
    target_of,
)
from gateway.commands.terminal import Failure, Output, result, working
from loaders.spelling import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.registries.base import Registry, Version
    from gateway.rollouts.preflight import Report
    from gateway.settings import Settings


def check(
    uri: Annotated[
        str | None, typer.Argument(metavar="[URI]", help="A model directory or a models:/ URI.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="NAME@ALIAS", help="Also check that it may replace the version of this alias."),
    ] = None,
    environment: Annotated[
        str | None,
        typer.Option(
            metavar="E", help="auto, same, own or a name from environments.named.  [default: the setting]"
        ),
    ] = None,
    registry: RegistryOption = None,
    config: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Report whether a model would load and serve here, with every reason.

    The command reads and verifies the package, checks its environment, loads it in a temporary process and
    predicts its input example. Without URI it checks every version that an alias of the registry points to.
    Exit code 1 if one would not serve.

    Example: gateway check ./my-model --against iris@champion --registry registry.yaml
    """
    if uri is None and against is not None:
        raise typer.BadParameter("--against needs URI: it compares one model with the version of an alias")
    target = target_of(registry) if uri is None or against or uri.startswith("models:") else None
    settings = settings_of(config, registry=target)
    if environment is not None:
        settings = settings.model_copy(update={"environment": environment})
    with working(f"checking {uri or target}") as say:
        reports = asyncio.run(_reports(uri, against, target, settings, say))
    text = {"reports": [report.to_json() for report in reports], "serves": all(r.serves for r in reports)}
    result(output, text, lambda: _show(reports))
    refused = sum(not report.serves for report in reports)
    if refused:
        raise Failure(f"of {counted(len(reports), 'checked version')}, {refused} would not serve here")


async def _reports(
    uri: str | None, against: str | None, target: str | None, settings: Settings, say: Any
) -> list[Report]:
    from gateway.names import Reference
    from gateway.registries import open_registry
    from gateway.registries.listed import ListedModels
    from gateway.registries.resolution import resolve
    from gateway.rollouts.offline import workshop
    from gateway.rollouts.policy import policy_of
    from gateway.rollouts.preflight import examined

    opened: Registry | None = None if target is None else open_registry(target)
    try:
        signature, replaced, policy = None, None, None
        if against is not None and opened is not None:
            name, alias = alias_of(against)
            snapshot = await asyncio.to_thread(opened.find, Reference(name, alias=alias))
            standing = resolve(snapshot, Reference(name, alias=alias))
            async with workshop(settings, opened) as parts:
                signature = (await parts.packages.get(standing, remember=False)).package.signature
            replaced, policy = str(standing), policy_of(settings, snapshot.models[name])[0]
        place: Registry
        if uri is not None and not uri.startswith("models:"):
            place = ListedModels([uri])
            versions = [(next(iter(place.read().models.values())).versions["1"], uri)]
        else:
            assert opened is not None
            place = opened
            versions = await asyncio.to_thread(_versions, opened, uri)
        reports = []
        async with workshop(settings, place) as parts:
            for version, subject in versions:
                say(f"checking {subject}")
                reports.append(
                    await examined(
                        parts, version, subject, against=signature, replaced=replaced, policy=policy
                    )
                )
                parts.manager.retire(version, "checked")
        return reports
    finally:
        if opened is not None:
            opened.close()


def _versions(registry: Registry, uri: str | None) -> list[tuple[Version, str]]:
    """The version that `uri` names, else each version that an alias points to; each with a name to show."""
    from gateway.names import parse_uri
    from gateway.registries.resolution import resolve

    if uri is not None:
        reference = parse_uri(uri)
        return [(resolve(registry.find(reference), reference), uri)]
    found: dict[Version, list[str]] = {}
    for model in registry.listing().models.values():
        for alias, entry in model.aliases.items():
            if (version := model.versions.get(entry.version)) is not None:
                found.setdefault(version, []).append(alias)
    return [(version, f"{version} ({', '.join(sorted(names))})") for version, names in found.items()]


def said(view: Mapping[str, Any] | None) -> list[str]:
    """What a person should know of a version's environment, as its view says it: nothing where it fits this
    interpreter; where else it runs and why; what helps where it is not its own."""
    if view is None or view.get("sentence") is None:
        return []
    if view.get("mismatch") is not None:
        lines = [f"warning: the model runs in another environment than its own: {view['mismatch']}"]
        return lines + ([f"help: {view['help']}"] if view.get("help") else [])
    place = f"it runs in {view['place']}" if "place" in view else "this interpreter is not its own"
    return [f"environment: {place}: {view['sentence']}"]


def _show(reports: list[Report]) -> None:
    for report in reports:
        typer.echo(f"{report.subject}: {'would serve' if report.serves else 'would NOT serve'}")
        facts = [
            f"runs in {report.runs_in}" if report.runs_in else "",
            "executes code" if report.executes_code else "",
            "no signature" if report.signature is False else "",
        ]
        if any(facts):
            typer.echo(f"  {', '.join(fact for fact in facts if fact)}")
        for line in said(report.environment):
            typer.echo(f"  {line}")
        for line in report.reasons:
            typer.echo(f"  refused: {line}")
        for line in report.hints:
            typer.echo(f"  help: {line}")
        for line in report.warnings:
            typer.echo(f"  warning: {line}")
