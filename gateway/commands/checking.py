"""`check`: reports whether a package would load and serve here, and may replace the version in service.

Needs no running gateway. `gateway.rollouts.preflight` decides what is checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.commands.options import (
    ConfigOption,
    KeyOption,
    OutputOption,
    RegistryOption,
    alias_of,
    connect,
    settings_of,
    target_of,
    url_given,
)
from gateway.commands.rollouts import answered
from gateway.commands.terminal import Failure, Output, result, working
from loaders.spelling import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.capture.store import CaptureStore
    from gateway.registries.base import NotInRegistry, Registry, Snapshot, Version
    from gateway.rollout_settings import Replay
    from gateway.rollouts.preflight import Report
    from gateway.rollouts.replay import Replays
    from gateway.rollouts.replay import Report as ReplayReport
    from gateway.settings import Settings
    from loaders.signature import Signature


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
    replay: Annotated[
        bool,
        typer.Option("--replay", help="Also let it answer captured requests of that version, and compare."),
    ] = False,
    captures: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The captured requests, from `gateway capture export --form frames`.  [default: those of "
            "the gateway at --url or $GATEWAY_URL, else of the state of this machine]",
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="The gateway whose captured requests are replayed.")
    ] = None,
    admin_key_file: KeyOption = None,
    registry: RegistryOption = None,
    config: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Report whether a model would load and serve here, with every reason.

    The command reads and verifies the package, checks its environment, loads it in a temporary process and
    predicts its input example. Without URI it checks every version that an alias of the registry points to.
    Exit code 1 if one would not serve or does not exist. --replay uses the `replay` of the rollout
    policy, or its defaults.

    Example: gateway check ./my-model --against iris@champion --registry registry.yaml
    """
    if uri is None and against is not None:
        raise typer.BadParameter("--against needs URI: it compares one model with the version of an alias")
    if replay and against is None:
        raise typer.BadParameter("--replay needs --against: it replays requests of the version of an alias")
    if (captures is not None or url is not None) and not replay:
        raise typer.BadParameter("--captures and --url need --replay")
    uri = _as_reference(uri)
    target = target_of(registry, config) if uri is None or against or uri.startswith("models:") else None
    settings = settings_of(config, registry=target)
    if environment is not None:
        settings = settings.model_copy(update={"environment": environment})
    with working(f"checking {uri or target}") as say:
        source = Replayed(captures, url, admin_key_file, config) if replay else None
        reports = asyncio.run(_reports(uri, against, target, settings, say, source))
    text = {"reports": [report.to_json() for report in reports], "serves": all(r.serves for r in reports)}
    result(output, text, lambda: _show(reports))
    refused = sum(not report.serves for report in reports)
    if refused:
        raise Failure(f"of {counted(len(reports), 'checked version')}, {refused} would not serve here")


def _as_reference(uri: str | None) -> str | None:
    """NAME@ALIAS, NAME/VERSION and NAME/versions/VERSION as URIs, unless there is such a file."""
    from gateway.names import InvalidReference, parse_short

    if uri is None or "://" in uri or Path(uri).exists():
        return uri
    try:
        reference = parse_short(uri)
    except InvalidReference:
        return uri
    return uri if reference.alias is None and reference.version is None else str(reference)


def _in_service(snapshot: Snapshot, name: str, alias: str) -> Version:
    """The version that callers of an alias use: of one that was taken back, the version before. Raises
    NotInRegistry."""
    from gateway.names import Reference
    from gateway.registries.resolution import resolve

    standing = resolve(snapshot, Reference(name, alias=alias))
    model = snapshot.models[name]
    entry = model.aliases[alias]
    good = None if entry.refused is None or entry.last_good is None else model.versions.get(entry.last_good)
    return standing if good is None else good


async def _reports(
    uri: str | None,
    against: str | None,
    target: str | None,
    settings: Settings,
    say: Any,
    replayed: Replayed | None = None,
) -> list[Report]:
    from gateway.names import Reference
    from gateway.registries import open_registry
    from gateway.registries.base import NotInRegistry
    from gateway.registries.listed import ListedModels
    from gateway.rollout_settings import Replay
    from gateway.rollouts.offline import workshop
    from gateway.rollouts.policy import policy_of
    from gateway.rollouts.preflight import Report, examined, stated
    from gateway.rollouts.replay import Replays

    opened: Registry | None = None if target is None else open_registry(target)
    try:
        signature, replaced, policy = None, None, None
        if against is not None and opened is not None:
            name, alias = alias_of(against)
            snapshot = await asyncio.to_thread(opened.find, Reference(name, alias=alias))
            standing = _in_service(snapshot, name, alias)
            async with workshop(settings, opened) as parts:
                signature = await stated(parts, standing)
            replaced, policy = str(standing), policy_of(settings, snapshot.models[name])[0]
        place: Registry
        versions: list[tuple[Version | NotInRegistry, str]]
        if uri is not None and not uri.startswith("models:"):
            place = ListedModels([uri])
            versions = [(next(iter(place.read().models.values())).versions["1"], uri)]
        else:
            assert opened is not None
            place = opened
            versions = await asyncio.to_thread(_versions, opened, uri)
        reports = []
        async with workshop(settings, place) as parts, contextlib.AsyncExitStack() as stack:
            for version, subject in versions:
                say(f"checking {subject}")
                if isinstance(version, NotInRegistry):
                    hints = [version.hint] if version.hint else []
                    reports.append(Report(subject, [version.message], hints))
                    continue
                replay = None
                if replayed is not None:
                    assert target is not None
                    assert policy is not None
                    chosen = policy.replay or Replay()
                    store = stack.enter_context(replayed.store(settings, target, standing, chosen.requests))
                    replay = partial(
                        _replay, Replays(store, parts.manager, parts.io), version, standing, chosen
                    )
                reports.append(
                    await examined(
                        parts, version, subject, against=signature, replaced=replaced, policy=policy,
                        replay=replay,
                    )
                )  # fmt: skip
                parts.manager.retire(version, "checked")
        return reports
    finally:
        if opened is not None:
            opened.close()


async def _replay(
    replays: Replays, candidate: Version, service: Version, policy: Replay, signature: Signature | None
) -> ReplayReport:
    report = replays.report(candidate, service, policy)
    await replays.run(report, signature=signature)
    return report


@dataclass(frozen=True, slots=True)
class Replayed:
    """Where the captured requests come from: a file, a gateway, or the state of this machine."""

    file: Path | None
    url: str | None
    admin_key_file: Path | None
    config: Path | None

    @contextlib.contextmanager
    def store(self, settings: Settings, target: str, version: Version, count: int) -> Iterator[CaptureStore]:
        """The captured requests of a version. Raises Failure."""
        from gateway.capture.exchange import from_frames
        from gateway.capture.records import Unreadable
        from gateway.capture.store import CaptureStore, Limits
        from gateway.commands.capture import here, path_of

        if self.file is None and url_given(self.url) is None:
            with here(settings, target) as found:
                yield found
            return
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(TemporaryDirectory()))
            copy = stack.enter_context(contextlib.closing(CaptureStore(directory, target)))
            if self.file is not None:
                chunks = _pieces(self.file)
            else:
                client = stack.enter_context(connect(self.url, self.admin_key_file, self.config))
                path = path_of(version.name, version.version)
                chunks = client.chunks(path, form="frames", last=str(count))
            try:
                for record in from_frames(chunks):
                    # All of it may be replayed, however old it is.
                    copy.add([record], Limits(math.inf, 1 << 62))
            except Unreadable as error:
                raise Failure(
                    f"cannot read the captured requests of {self.file or self.url}: {error}"
                ) from None
            yield copy


def _pieces(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as opened:
            while piece := opened.read(1 << 20):
                yield piece
    except OSError as error:
        raise Failure(f"cannot read {file}: {error.strerror}") from None


def _versions(registry: Registry, uri: str | None) -> list[tuple[Version | NotInRegistry, str]]:
    """The version that `uri` names, else each version that an alias points to; each with a name to show. An
    alias whose version does not exist gives the error NotInRegistry."""
    from gateway.names import Reference, parse_uri
    from gateway.registries.base import NotInRegistry
    from gateway.registries.resolution import resolve

    if uri is not None:
        reference = parse_uri(uri)
        return [(resolve(registry.find(reference), reference), uri)]
    found: dict[Version, list[str]] = {}
    missing: list[tuple[Version | NotInRegistry, str]] = []
    listing = registry.listing()
    for name, model in listing.models.items():
        # The listing of a partial registry has only some versions of each model.
        snapshot = registry.find(Reference(name)) if registry.partial and model.aliases else listing
        for alias in model.aliases:
            try:
                found.setdefault(resolve(snapshot, Reference(name, alias=alias)), []).append(alias)
            except NotInRegistry as error:
                missing.append((error, f"{name}@{alias}"))
    subjects = {version: f"{version} ({', '.join(sorted(names))})" for version, names in found.items()}
    return [*subjects.items(), *missing]


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
        verdict = "would serve" if report.serves else "would NOT serve"
        if report.serves and report.replaces is not None:
            verdict += f", and may replace {report.replaces}"
        typer.echo(f"{report.subject}: {verdict}")
        facts = [
            f"runs in {report.place}" if report.place else "",
            "its files can execute code when they are loaded" if report.executes_code else "",
            "no signature" if report.signature is False else "",
        ]
        if any(facts):
            typer.echo(f"  {', '.join(fact for fact in facts if fact)}")
        if report.from_cache:
            typer.echo("  the files are from the cache: their source was not read")
        for line in said(report.environment):
            typer.echo(f"  {line}")
        for line in answered("replay", report.replay):
            typer.echo(line)
        for line in report.reasons:
            typer.echo(f"  refused: {line}")
        for line in report.hints:
            typer.echo(f"  help: {line}")
        for line in report.warnings:
            typer.echo(f"  warning: {line}")
