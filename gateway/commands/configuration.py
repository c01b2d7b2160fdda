"""`config`: the settings in force, each with where it came from.

Knows the settings and how people write their values; starts nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.commands.options import ConfigOption, OutputOption, settings_of
from gateway.commands.terminal import Output, note, result, table

if TYPE_CHECKING:
    from gateway.settings import Settings


def config(
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of gateway.yaml instead.")
    ] = False,
    file: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Show the effective settings and where each came from.

    Order: a flag, then an environment variable (GATEWAY_…, nested with __ as in
    GATEWAY_MODELS__iris__TIMEOUT), then the settings file, then the default. Editors use the schema of
    --schema to check a settings file.
    """
    from gateway import settings

    if schema:
        typer.echo(json.dumps(settings.schema(), indent=2))
        return
    effective = settings_of(file)
    sources = effective.sources()
    values = effective.model_dump(mode="json", by_alias=True, exclude={"models"})
    view = {name: {"value": value, "source": _source(name, value, sources)} for name, value in values.items()}
    # Show only the written keys of a model: `--schema` shows the defaults of the others.
    for pattern, part in effective.models.items():
        written = part.model_dump(mode="json", by_alias=True, exclude_unset=True)
        for key, value in written.items():
            name = f"models.{pattern}.{key}"
            view[name] = {"value": value, "source": _source(name, value, sources)}
    found = _found(effective)
    view |= found
    for name in effective.foreign_variables():
        note(f"{name} is not a setting of the gateway and is ignored")
    result(output, {"settings": view}, lambda: _show(effective, found))


def _show(effective: Settings, found: Mapping[str, Mapping[str, Any]]) -> None:
    """A line for each key, nested ones by their dotted names."""
    from gateway import configuration

    sources = effective.sources()
    rows = []
    for name, shown in configuration.shown(effective):
        source = _nearest(name, sources)
        if name in found:
            given = found[name]
            shown, source = configuration.shown_value(name, given["value"]), given["source"]
        rows.append([name, shown, source])
    table(["SETTING", "VALUE", "FROM"], rows)


def _found(effective: Settings) -> dict[str, dict[str, Any]]:
    """The registry and the poll interval that `serve` would use where the settings name none. Empty without a
    registry: `serve` reports that."""
    from gateway.registries import default_target, open_registry
    from gateway.registries.base import RegistryError

    try:
        target = default_target(os.environ, effective.registry)
        opened = open_registry(target)
    except RegistryError:
        return {}
    opened.close()
    found: dict[str, dict[str, Any]] = {}
    if effective.registry is None:
        named = [name for name in ("MLFLOW_REGISTRY_URI", "MLFLOW_TRACKING_URI") if os.environ.get(name)]
        found["registry"] = {"value": target, "source": named[0] if named else "default"}
    if effective.poll_interval is None:
        found["poll_interval"] = {"value": opened.poll_interval, "source": "default"}
    return found


def _source(name: str, value: Any, sources: Mapping[str, str]) -> str:
    """Where a value came from; for a mapping, each place that set a part of it."""
    parts = {source for place, source in sources.items() if place.startswith(f"{name}.")}
    return ", ".join(sorted(parts)) or sources.get(name, "default")


def _nearest(name: str, sources: Mapping[str, str]) -> str:
    """Where a key came from: its own place, what is below it, or the mapping that it was written in."""
    if any(place.startswith(f"{name}.") for place in sources):
        return _source(name, None, sources)
    place = name
    while place:
        if sources.get(place, "default") != "default":
            return sources[place]
        place = place.rpartition(".")[0]
    return "default"
