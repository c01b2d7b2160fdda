"""`push`, `models`, `gc`: add a version to a registry, show its content, clean up its store.

Knows registries; must not know a running gateway.
"""

from __future__ import annotations

import dataclasses
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.commands.checking import said
from gateway.commands.options import ConfigOption, OutputOption, RegistryOption, target_of
from gateway.commands.terminal import Failure, Output, note, result, size, table, working
from loaders.spelling import few

if TYPE_CHECKING:
    from gateway.registries.base import Model, Version
    from gateway.registries.store import Collected

#: The most names that the hint for an unknown name lists.
SHOWN = 20


def push(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A model directory: it has an MLmodel file.")
    ],
    name: Annotated[str, typer.Option(metavar="NAME", help="The model's name in the registry.")],
    alias: Annotated[
        str | None, typer.Option(metavar="A", help="Move this alias to the new version.")
    ] = None,
    registry: RegistryOption = None,
    config: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Add a model directory to the registry as the next version.

    The command copies the directory into the registry's store, or only the model file of a directory without
    an MLmodel. If a version with the same digest exists, it adds nothing and prints that version. It creates
    a registry file that does not exist, with its store models/ next to it. --alias moves the alias without
    any gate; use promote to move one that is served. If the package records its answer to its own example, a
    new process answers the example again; a different answer is a warning.

    Example: gateway push ./my-model --name iris --alias challenger
    """
    from gateway import api
    from gateway.names import check_alias, check_name

    if not directory.exists():
        raise Failure(
            f"{directory}: there is no such directory", "give a model directory: it has an MLmodel file"
        )
    check_name(name)
    if alias is not None:
        check_alias(alias)
    target = target_of(registry, config)
    with working(f"pushing {directory} to {target}"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        pushed = api.push(directory, name, alias=alias, registry=target)
    told = [str(one.message) for one in caught if one.category is UserWarning]
    for text in told:
        note(f"warning: {text}")
    pointing = f"; {name}@{alias} points to it" if alias else ""
    environment = _environment(directory)
    for line in said(environment):
        note(line)
        command = ["gateway", "env", "build", f"models:/{name}/{pushed.version}"]
        command += ["--registry", registry] if registry else []
        note(f"{shlex.join(command)} builds its own environment ahead of time")
    text = f"{pushed.name}/{pushed.version} is in {target}{pointing} ({pushed.digest})"
    value = {**dataclasses.asdict(pushed), "registry": target, "warnings": told, "environment": environment}
    result(output, value, text)
    if alias is None and output is Output.text:
        command = ["gateway", "promote", f"{name}@champion", pushed.version]
        note(f"next: {shlex.join(command + (['--registry', registry] if registry else []))}")


def _environment(directory: Path) -> dict[str, Any]:
    """How this interpreter differs from the one that a package was made in."""
    from gateway.environments import check, facts
    from loaders import package

    found = facts.read(package.read(directory))
    return {"python_version": found.python or None, **check.check(found, check.here()).to_json()}


def models(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show only this model, with its versions.")
    ] = None,
    registry: RegistryOption = None,
    config: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Show the models in the registry, with their versions and aliases."""
    from gateway.registries import open_registry

    target = target_of(registry, config)
    opened = open_registry(target)
    try:
        found = opened.listing(name).models
        if name is not None and name not in found:
            others = sorted(opened.listing().models)
            raise Failure(f"{target} has no model {name}", f"its models: {few(others, SHOWN) or 'none'}")
    finally:
        opened.close()
    if name is None:
        chosen = [found[key] for key in sorted(found)]
        result(output, {"models": [_view(model) for model in chosen]}, lambda: _show_models(chosen, registry))
    else:
        result(output, _view(found[name]), lambda: _show_versions(found[name]))


def gc(
    registry: RegistryOption = None,
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Only files unchanged for this time, such as 12h or 30d.")
    ] = "7d",
    delete: Annotated[
        bool, typer.Option("--delete/--dry-run", help="Remove them, or only list them.")
    ] = False,
    config: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """List or remove files in the store of a registry file that no version uses.

    Interrupted pushes leave such files, and so do versions whose entries were deleted from the file. The
    command keeps files that another document next to the registry names, and files that a push cannot have
    made. It removes nothing without --delete: removed files cannot be restored.

    Example: gateway gc --older-than 30d --delete
    """
    from gateway.quantities import seconds
    from gateway.registries import open_registry
    from gateway.registries.file import FileRegistry

    target = target_of(registry, config)
    try:
        age = float(str(seconds(older_than)))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--older-than'") from None
    opened = open_registry(target)
    if not isinstance(opened, FileRegistry):
        raise Failure(f"{target} has no store here", "gc works on a registry file with its store next to it")
    with working(f"searching the store of {target}"):
        collected = opened.collect(age, delete=delete)
    found = [
        {"path": str(one.path.relative_to(collected.store)), "bytes": one.bytes, "reason": one.reason}
        | {"age_seconds": round(one.age)}
        for one in collected.found
    ]
    total = sum(one.bytes for one in collected.found)
    facts = {"registry": target, "store": str(collected.store), "deleted": delete, "bytes": total}
    value = {**facts, "older_than_seconds": age, "younger": collected.younger, "found": found}
    result(output, value, lambda: _show_collected(collected, total))
    if found and not delete and output is Output.text:
        command = ["gateway", "gc", "--older-than", older_than, "--delete"]
        command += ["--registry", registry] if registry else []
        note(f"nothing was removed; to remove: {shlex.join(command)}")


def _show_collected(collected: Collected, total: int) -> None:
    if collected.found:
        rows = [
            [
                str(one.path.relative_to(collected.store)),
                size(one.bytes),
                f"{one.age / 86400:.1f} d",
                one.reason,
            ]
            for one in collected.found
        ]
        table(["DIRECTORY", "SIZE", "AGE", "WHY"], rows, right=["SIZE", "AGE"])
    count = f"{len(collected.found)} director{'y' if len(collected.found) == 1 else 'ies'}"
    what = "removed" if collected.deleted else "could be removed"
    younger = f"; {collected.younger} more changed too recently" if collected.younger else ""
    typer.echo(f"{count} of {collected.store} {what}, {size(total)}{younger}")


def _versions(model: Model) -> list[Version]:
    return sorted(model.versions.values(), key=lambda version: int(version.version))


def _aliases(model: Model) -> dict[str, str]:
    return {alias: model.aliases[alias].version for alias in sorted(model.aliases)}


def _verdicts(model: Model) -> dict[str, dict[str, Any]]:
    """The verdicts that stand against the versions of aliases. `last_good`: the version that serves there."""
    found = {}
    for alias in sorted(model.aliases):
        entry = model.aliases[alias]
        if entry.refused is not None:
            found[alias] = {**entry.refused.to_json(), "last_good": entry.last_good}
    return found


def _marked(model: Model, alias: str) -> str:
    """What follows an alias whose version was refused: ` (refused, 1 serves)`; else nothing."""
    entry = model.aliases[alias]
    if entry.refused is None:
        return ""
    serves = f", {entry.last_good} serves" if entry.last_good else ""
    return f" ({entry.refused.said}{serves})"


def _view(model: Model) -> dict[str, Any]:
    versions = []
    for version in _versions(model):
        facts = {"version": version.version, "source": version.source, "digest": version.digest}
        versions.append({**facts, "created": version.created, "tags": dict(version.tags)})
    return {
        "name": model.name,
        "aliases": _aliases(model),
        "verdicts": _verdicts(model),
        "versions": versions,
    }


def _show_models(models: Sequence[Model], registry: str | None) -> None:
    if not models:
        given = f" --registry {shlex.quote(registry)}" if registry else ""
        typer.echo(f"no models yet; `gateway push DIR --name NAME{given}` adds one")
        return
    rows = []
    for model in models:
        aliases = ", ".join(f"{alias}={at}{_marked(model, alias)}" for alias, at in _aliases(model).items())
        latest = model.latest()
        rows.append([model.name, aliases or "-", str(len(model.versions)), latest.version if latest else "-"])
    table(["MODEL", "ALIASES", "VERSIONS", "LATEST"], rows, right=["VERSIONS", "LATEST"])


def _show_versions(model: Model) -> None:
    pointing = _aliases(model)
    rows = []
    for version in _versions(model):
        here = [alias for alias, at in pointing.items() if at == version.version]
        aliases = ", ".join(f"{alias}{_marked(model, alias)}" for alias in here)
        digest = version.digest.removeprefix("sha256:")[:12] if version.digest else "-"
        rows.append([version.version, aliases or "-", version.created or "-", digest, version.source])
    missing = {at for at in pointing.values() if at not in model.versions}
    for number in sorted(missing, key=int):
        aliases = ", ".join(alias for alias, at in pointing.items() if at == number)
        rows.append([number, aliases, "-", "-", "this version does not exist"])
    table(["VERSION", "ALIASES", "CREATED", "SHA-256", "SOURCE"], rows, right=["VERSION"])
