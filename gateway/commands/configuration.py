"""`config`: the settings in force, each with where it came from.

Knows the settings and how people write their values; starts nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from gateway.commands.options import ConfigOption, OutputOption, settings_of
from gateway.commands.terminal import Output, note, result, table

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from gateway.settings import Settings


def config(
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of gateway.yaml instead.")
    ] = False,
    file: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Show the settings in force and where each came from.

    A flag wins over the environment (GATEWAY_…, nested with __: GATEWAY_MODELS__iris__TIMEOUT), that over the
    settings file, that over the default. --schema is for editors and for checking a file before it is used.
    """
    from gateway import settings

    if schema:
        typer.echo(json.dumps(settings.schema(), indent=2))
        return
    effective = settings_of(file)
    sources = effective.sources()
    values = effective.model_dump(mode="json", by_alias=True, exclude={"models"})
    view = {name: {"value": value, "source": _source(name, value, sources)} for name, value in values.items()}
    # Of a model only what was written: the rest is the default, which `--schema` shows.
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
    sources = effective.sources()
    rows = []
    for name, shown in _leaves(effective):
        source = _nearest(name, sources)
        if name in found:
            given = found[name]
            shown, source = _value(given["value"], type(effective).model_fields[name]), given["source"]
        rows.append([name, shown, source])
    table(["SETTING", "VALUE", "FROM"], rows)


def _leaves(part: BaseModel, above: str = "", *, written: bool = False) -> Iterator[tuple[str, str]]:
    """Every key below a mapping of settings with its value as text; `written`: only those that somebody
    wrote."""
    from pydantic import BaseModel

    for field_name, field in type(part).model_fields.items():
        if written and field_name not in part.model_fields_set:
            continue
        value = getattr(part, field_name)
        name = f"{above}{field.alias or field_name}"
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{name}.", written=written)
        elif isinstance(value, dict) and any(isinstance(item, BaseModel) for item in value.values()):
            for key, item in value.items():
                yield from _leaves(item, f"{name}.{key}.", written=True)
        elif name != "models":
            yield name, _value(value, field)


def _value(value: Any, field: FieldInfo) -> str:
    from gateway.quantities import DURATION_SCHEMA, SIZE_SCHEMA, shown_seconds, shown_size

    if value is None or value in ([], {}):
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float) and _has(field, SIZE_SCHEMA):
        return shown_size(int(value))
    if isinstance(value, int | float) and _has(field, DURATION_SCHEMA):
        return shown_seconds(value)
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return ", ".join(item if isinstance(item, str) else f"{item:g}" for item in value)
    return json.dumps(value, default=str) if isinstance(value, dict | list) else str(value)


def _has(field: FieldInfo, mark: object) -> bool:
    """Whether a field's type is marked as a size, or as a duration."""

    def marked(annotation: object) -> bool:
        if mark in getattr(annotation, "__metadata__", ()):
            return True
        return any(marked(argument) for argument in get_args(annotation))

    return mark in field.metadata or marked(field.annotation)


def _found(effective: Settings) -> dict[str, dict[str, Any]]:
    """The registry that `serve` would take, and how often it would look, where no setting says so. Nothing
    where there is none: that `serve` says."""
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
    """Where a value came from; of a mapping, each place that gave a part of it."""
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
