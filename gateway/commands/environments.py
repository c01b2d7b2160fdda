"""`env`: plans, builds, lists and removes the environments of models.

Needs no running gateway; a running one finds the environments built here. Must not know how a build works.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.commands.options import ConfigOption, OutputOption, RegistryOption, settings_of, target_of
from gateway.commands.terminal import Failure, Output, note, result, size, table, working
from loaders.spelling import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gateway.environments.build import Store
    from gateway.environments.lock import Lock, Wanted
    from gateway.environments.plan import Group
    from gateway.runners.places import Conditions
    from gateway.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Manage the environments that models run in.")
DAY = 86_400.0


@app.command()
def plan(
    registry: RegistryOption = None, config: ConfigOption = None, output: OutputOption = Output.text
) -> None:
    """Show how many environments a registry needs, which packages share one, and which models share a pack.

    Looks at every version that an alias points to. Packages with the same Python and of about the same time
    share an environment if one environment can satisfy all their pins. Resolves requirements that have no
    lock yet; builds nothing.

    Example: gateway env plan --registry registry.yaml
    """
    found = _planned(registry, config, None)
    value = {
        "environments": [
            {**_group(group, found.store), "packs": found.packs(group.members)} for group in found.groups
        ],
        "here": sorted(found.here),
        "packs_here": found.packs(found.here),
        "alone": found.alone,
        "refused": found.refused,
    }
    result(output, value, lambda: _show_plan(found))


@app.command()
def build(
    reference: Annotated[
        str | None, typer.Argument(metavar="[REF]", help="A model directory or a models:/ URI.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Build for every version that an alias points to.")
    ] = False,
    registry: RegistryOption = None,
    config: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Build environments ahead of time: in CI, in an image, before a promotion.

    With --all, packages share environments as `gateway env plan` shows; from then on they run there. Exit
    code 1 if one cannot be built.

    Example: gateway env build models:/iris/3 --registry registry.yaml
    """
    if (reference is None) is not everything:
        raise typer.BadParameter("give either REF or --all")
    found = _planned(registry, config, reference)
    built = []
    for group in found.groups:
        with working(f"building for {', '.join(group.members)}") as say:
            built.append((group, found.store.build(group.lock, say)))
        for name in group.members:
            if not group.lock.satisfies(found.locks[name]):
                found.store.keep(found.wishes[name], group.lock)  # it is run there from now on
    value = [{"environment": b.key, "members": list(g.members), "bytes": b.bytes} for g, b in built]
    lines = [
        f"{b.key}: {', '.join(g.members)} ({size(b.apparent)}, {size(b.bytes)} of its own)" for g, b in built
    ]
    lines += [f"run in this interpreter: {', '.join(sorted(found.here))}"] if found.here else []
    result(output, {"built": value, "here": sorted(found.here), "refused": found.refused}, "\n".join(lines))
    if found.refused:
        for name, reason in found.refused.items():
            note(f"{name}: {reason}")
        raise Failure(
            f"{counted(len(found.refused), 'package')} cannot have an environment of their own here"
        )


@app.command(name="list")
def listed(config: ConfigOption = None, output: OutputOption = Output.text) -> None:
    """List the environments that exist, the last used one first."""
    from gateway import environments

    store = environments.store(settings_of(config))
    rows = [
        {
            "environment": built.key,
            "python": ".".join(map(str, built.lock.python)),
            "packages": dict(built.lock.packages),
            "bytes": built.bytes,
            "apparent_bytes": built.apparent,
            "last_used": built.used,
        }
        for built in store.all()
    ]
    total = store.bytes()
    result(output, {"environments": rows, "bytes": total}, lambda: _show_list(rows, total))


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Remove them.")] = False,
    days: Annotated[float, typer.Option(metavar="D", min=0, help="Only those not used for D days.")] = 30.0,
    config: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """List environments that were not used for some days; --delete removes them.

    Environments that a running gateway uses are kept. The gateway builds a removed one again when a model
    needs it.
    """
    from gateway import environments

    store = environments.store(settings_of(config))
    old = [built.key for built in store.all() if time.time() - built.used >= days * DAY]
    removed = [key for key in old if store.remove(key)] if delete else []
    verb = "removed" if delete else "not used"
    shown = removed if delete else old
    text = "\n".join([f"{verb}: {key}" for key in shown] or ["nothing"])
    result(output, {"unused": old, "removed": removed}, text)


class _Found:
    """The environments that a registry needs. `here`: versions that run in this interpreter. `refused`: why a
    version has no lock. `packed`: the conditions of the versions that share packs. `alone`: why a version
    shares none."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.here: set[str] = set()
        self.wishes: dict[str, Wanted] = {}
        self.locks: dict[str, Lock] = {}
        self.refused: dict[str, str] = {}
        self.packed: dict[str, Conditions] = {}
        self.alone: dict[str, str] = {}

    def packs(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """The packs that these versions of one environment share, the largest first."""
        members: dict[Conditions, list[str]] = {}
        for name in sorted(names):
            if name in self.packed:
                members.setdefault(self.packed[name], []).append(name)
        packs = [{"pack": str(conditions), "members": found} for conditions, found in members.items()]
        return sorted(packs, key=lambda pack: -len(pack["members"]))

    @cached_property
    def groups(self) -> list[Group]:
        from gateway.environments.plan import grouped, united

        return united(grouped(self.locks), self.wishes, self._together)

    def _together(self, wanted: Wanted) -> Lock | None:
        with contextlib.suppress(*_no_lock()):
            return self.store.resolve(wanted)
        return None


def _planned(registry: str | None, config: Any, reference: str | None) -> _Found:
    local = reference is not None and not reference.startswith("models:")
    target = None if local else target_of(registry, config)
    settings = settings_of(config, registry=target)
    with working(f"reading {reference or target}") as say:
        return asyncio.run(_read(target, settings, reference, say))


async def _read(
    target: str | None, settings: Settings, reference: str | None, say: Callable[[str], None]
) -> _Found:
    from gateway.access.teams import team_patterns, teams_of, tokens_file
    from gateway.commands.checking import _versions
    from gateway.errors import Problem
    from gateway.registries import open_registry
    from gateway.registries.base import NotInRegistry, Registry
    from gateway.registries.listed import ListedModels
    from gateway.rollouts.offline import workshop
    from loaders import scan

    held, allowed = tokens_file(settings), team_patterns(settings)
    opened: Registry = ListedModels([reference or ""]) if target is None else open_registry(target)
    try:
        versions = await asyncio.to_thread(_versions, opened, None if target is None else reference)
        async with workshop(settings, opened) as parts:
            found = _Found(parts.store)
            for version, subject in versions:
                if isinstance(version, NotInRegistry):
                    found.refused[subject] = version.message
                    continue
                name = str(version)
                say(f"resolving {name}")
                policy = settings.for_model(version.name).environment
                try:
                    prepared = await parts.packages.get(version, remember=False)
                except Problem as problem:
                    found.refused[name] = problem.message
                    continue
                assert prepared.needs is not None
                try:
                    verdict = await asyncio.to_thread(scan.package, prepared.package, settings.pack_bytes)
                except OSError as error:
                    found.refused[name] = f"its files cannot be read: {error.strerror}"
                    continue
                place = parts.placement.place(replace(prepared, verdict=verdict))
                if place.isolation == "pack":
                    conditions = parts.placement.conditions(prepared, place.group)
                    found.packed[name] = replace(conditions, teams=teams_of(version.name, held, allowed))
                else:
                    found.alone[name] = place.reason
                if policy not in ("auto", "own") or (policy == "auto" and prepared.needs.check.satisfied):
                    found.here.add(name)
                    continue
                try:
                    found.wishes[name] = parts.chooser.wanted(prepared.needs.facts)
                    found.locks[name] = await asyncio.to_thread(parts.store.resolve, found.wishes[name])
                except _no_lock() as error:
                    found.refused[name] = str(error)
            say("looking for packages that can share an environment")
            await asyncio.to_thread(lambda: found.groups)
            return found
    finally:
        opened.close()


def _no_lock() -> tuple[type[Exception], ...]:
    from gateway.environments.lock import LockError
    from gateway.environments.uv import UvError

    return LockError, UvError


def _group(group: Group, store: Store) -> dict[str, Any]:
    built = store.find(group.lock)
    return {
        "members": list(group.members),
        "python": ".".join(map(str, group.lock.python)),
        "packages": dict(group.lock.packages),
        "lock": group.lock.key,
        "apart": list(group.apart),
        "built": built is not None,
        "bytes": None if built is None else built.bytes,
    }


def _show_plan(found: _Found) -> None:
    rows = []
    for group in found.groups:
        built = found.store.find(group.lock)
        python = ".".join(map(str, group.lock.python))
        rows.append(
            [python, str(len(group.members)), str(len(group.lock.packages)),
             size(None if built is None else built.apparent), ", ".join(group.members)]
        )  # fmt: skip
    if rows:
        table(["Python", "models", "packages", "size", "members"], rows, right=["models", "packages", "size"])
    if found.locks or found.refused:
        typer.echo(
            f"environments for {counted(len(found.locks), 'package')}: {len(found.groups)}; packages that"
            f" run in this interpreter: {len(found.here)}; refused: {len(found.refused)}"
        )
    else:
        runs = "run" if len(found.here) != 1 else "runs"
        here = counted(len(found.here), "package")
        typer.echo(f"no environment is needed: {here} {runs} in this interpreter")
    for place, members in [("this interpreter", found.here), *_named(found.groups)]:
        if packs := found.packs(members):
            shared = ", ".join(f"{pack['pack']} ({len(pack['members'])})" for pack in packs)
            alone = sum(member in found.alone for member in members)
            typer.echo(f"packs in {place}: {shared}; models that share none: {alone}")
    for group in found.groups:
        for line in group.apart:
            typer.echo(f"  {group.members[0]} {line}")
    for name, reason in found.refused.items():
        typer.echo(f"  {name}: {reason}")


def _named(groups: Iterable[Group]) -> list[tuple[str, Iterable[str]]]:
    return [(f"the environment of {group.members[0]}", group.members) for group in groups]


def _show_list(rows: list[dict[str, Any]], total: float) -> None:
    shown = [
        [row["environment"], row["python"], str(len(row["packages"])), size(row["apparent_bytes"]),
         time.strftime("%Y-%m-%d %H:%M", time.gmtime(row["last_used"]))]
        for row in rows
    ]  # fmt: skip
    if shown:
        table(["environment", "Python", "packages", "size", "last used"], shown, right=["packages", "size"])
    typer.echo(f"the size of {counted(len(rows), 'environment')} with the cache is {size(total)}")
