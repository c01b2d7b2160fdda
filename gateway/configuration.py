"""Reads the settings from flags, environment variables and `gateway.yaml`, and writes them for users.

A flag overrides the environment (`GATEWAY_…`, nested with `__`), which overrides the file, which overrides
the default. All problems are reported at once, each with its place. `gateway.settings` defines the settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from gateway import cgroup, yamltext
from gateway.credentials import AccessSettings, Jwt, Limit, Team
from gateway.names import near
from gateway.quantities import DURATION_SCHEMA, SIZE_SCHEMA, shown_seconds, shown_size
from gateway.rollout_settings import Canary, Capture, Guards, Notify, Replay, RolloutPolicy, Shadow
from gateway.settings import (
    Batch,
    ModelSettings,
    Settings,
    SettingsError,
)

PREFIX: Final = "GATEWAY_"
FILE: Final = "gateway.yaml"

# Variables of the commands, not of the server; and those that configure the tests.
_NOT_SETTINGS = frozenset({"GATEWAY_CONFIG", "GATEWAY_URL", "GATEWAY_ADMIN_KEY", "GATEWAY_TEST_ALL"})
# Variables that Kubernetes sets in every container for a Service named gateway, or gateway-something.
_INJECTED_NAME = re.compile(
    r"GATEWAY_(.*_)?(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)\Z"
)
_INJECTED_VALUE = re.compile(r"(tcp|udp|sctp)://")

#: What pydantic puts behind the place of a value that may be of several types.
_ALTERNATIVE = re.compile(r"constrained-\w+|literal\[.*\]")
#: pydantic's kind of error → the problem in our words.
_PROBLEMS: Final = {
    "int_parsing": "not a whole number",
    "int_type": "not a whole number",
    "int_from_float": "not a whole number",
    "float_parsing": "not a number",
    "float_type": "not a number",
    "bool_parsing": "write true or false",
    "bool_type": "write true or false",
    "string_type": "write text",
    "list_type": "write a list",
    "dict_type": "write a mapping",
    "model_type": "write a mapping",
    "missing": "missing",
    "literal_error": "write {expected}",
    "enum": "write {expected}",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
}


def load(
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    config: Path | None = None,
    *,
    directory: Path = Path(),
    cgroup_root: Path = cgroup.ROOT,
) -> Settings:
    """Returns the effective settings. `flags`: values by the settings' names; None means not given. `config`:
    the file; by default the one that GATEWAY_CONFIG names, else `gateway.yaml` in `directory` if it exists.

    Raises SettingsError with all problems.
    """
    problems: list[tuple[str, str]] = []
    sources: dict[str, str] = {}
    merged: dict[str, Any] = {}
    file = config or (Path(environ["GATEWAY_CONFIG"]) if environ.get("GATEWAY_CONFIG") else None)
    if file is None and (directory / FILE).is_file():
        file = directory / FILE
    if file is not None:
        _merge(merged, _from_file(file, problems), str(file), sources)
    foreign: list[str] = []
    for name in sorted(environ):
        path = _variable_path(name, environ[name])
        if path is None or not environ[name]:
            continue
        if path[0] not in Settings.model_fields and not _almost_a_setting(path[0]):
            foreign.append(name)
            continue
        try:
            _merge(merged, _nested(path, _from_text(environ[name])), name, sources)
        except ValueError as error:
            problems.append((name, f"not JSON, although it begins like JSON: {error}"))
    for name, value in flags.items():
        if value is not None:
            _merge(merged, {name: value}, f"flag --{name.replace('_', '-')}", sources)
    try:
        settings = Settings.model_validate(merged, context={"memory_total": cgroup.memory_total(cgroup_root)})
    except ValidationError as error:
        problems += [_told(item, sources) for item in error.errors(include_url=False, include_input=False)]
    if problems:
        raise SettingsError(problems)
    return settings.read_from({name: source for name, source in sources.items() if name}, foreign)


def shown(part: BaseModel, above: str = "", *, written: bool = False) -> Iterator[tuple[str, str]]:
    """Yields every setting below `part` with its value as text. `written`: only settings that are not
    defaults."""
    for field_name, field in type(part).model_fields.items():
        if written and field_name not in part.model_fields_set:
            continue
        value = getattr(part, field_name)
        name = f"{above}{field.alias or field_name}"
        if isinstance(value, BaseModel):
            yield from shown(value, f"{name}.", written=written)
        elif isinstance(value, dict) and any(isinstance(item, BaseModel) for item in value.values()):
            for key, item in value.items():
                yield from shown(item, f"{name}.{key}.", written=True)
        elif name != "models":
            yield name, _value(value, field)


def shown_value(name: str, value: Any) -> str:
    """Returns a value of the setting `name` in the form that users write."""
    return _value(value, Settings.model_fields[name])


def _value(value: Any, field: FieldInfo) -> str:
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
    """Returns whether a field's type is marked as a size, or as a duration."""

    def marked(annotation: object) -> bool:
        if mark in getattr(annotation, "__metadata__", ()):
            return True
        return any(marked(argument) for argument in get_args(annotation))

    return mark in field.metadata or marked(field.annotation)


def _from_file(file: Path, problems: list[tuple[str, str]]) -> dict[str, Any]:
    try:
        twice: list[tuple[str, str]] = []
        value = yamltext.data(
            yamltext.parse(file.read_text(encoding="utf-8-sig")), typed=True, problems=twice
        )
        problems += [(f"{file}: {place}", what) for place, what in twice]
    except OSError as error:
        problems.append((str(file), f"cannot be read: {error.strerror or error}"))
        return {}
    except UnicodeDecodeError:
        problems.append((str(file), "not UTF-8"))
        return {}
    except yamltext.InvalidText as error:
        if not error.empty:
            problems += [(f"{file}: {place}" if place else str(file), what) for place, what in error.problems]
        return {}
    if value is None:
        return {}
    if not isinstance(value, dict):
        problems.append((str(file), "must be a mapping of settings"))
        return {}
    return {key: item for key, item in value.items() if not key.startswith("x-")}


def _variable_path(name: str, value: str) -> tuple[str, ...] | None:
    """GATEWAY_MODELS__iris__TIMEOUT → (models, iris, timeout); None for a variable that is not a setting."""
    if not name.startswith(PREFIX) or name in _NOT_SETTINGS or _INJECTED_NAME.match(name):
        return None
    if name.endswith("_PORT") and _INJECTED_VALUE.match(value):
        return None
    parts = name.removeprefix(PREFIX).split("__")
    named = len(parts) > 1 and parts[0].lower() == "models"
    # Keep the case of a model's name and of its config's keys.
    kept = {1} if named else set()
    if named and len(parts) > 3:
        kept |= set(range(3, len(parts))) if parts[2].lower() == "model_config" else set()
    return tuple(part if i in kept else part.lower() for i, part in enumerate(parts))


def _almost_a_setting(name: str) -> bool:
    """Returns True if a setting's name differs by at most two letters, because it was probably meant."""
    return any(_letters_apart(name, known) <= 2 for known in Settings.model_fields)


def _letters_apart(one: str, other: str) -> int:
    """Returns the number of letters to add, remove, replace or swap with the next letter."""
    if abs(len(one) - len(other)) > 2:
        return 3
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, last, row = row, before, [i]
        for j, wanted in enumerate(other, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]


def _from_text(text: str) -> Any:
    """Reads a variable's value: JSON if it is an object or a list, else its text."""
    return json.loads(text) if text.lstrip()[:1] in ("{", "[") else text


def _nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    for name in reversed(path):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def _merge(
    into: dict[str, Any], new: Mapping[str, Any], source: str, sources: dict[str, str], at: str = ""
) -> None:
    """Merges `new` into `into`, mappings key by key, and records the source of each value."""
    for key, value in new.items():
        place = f"{at}.{key}" if at else key
        if isinstance(value, Mapping) and value:
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _merge(into[key], value, source, sources, place)
        else:
            into[key] = value
            sources[place] = source


def _told(error: Any, sources: Mapping[str, str]) -> tuple[str, str]:
    """Converts one of pydantic's errors to (place, problem)."""
    problem = _in_our_words(error)
    parts = [str(part) for part in error["loc"]]
    if parts and _ALTERNATIVE.fullmatch(parts[-1]):
        parts.pop()
    if not parts:  # of the settings as a whole: such a problem names its setting first
        named, colon, rest = problem.partition(": ")
        if colon and named in sources:
            parts, problem = named.split("."), rest
    key = ".".join(parts)
    where = next((place for place in sources if place == key or place.startswith(f"{key}.")), None)
    above = list(parts)
    while where is None and above:
        above.pop()
        where = ".".join(above) if ".".join(above) in sources else None
    source = None if where is None else sources[where]
    place = key if source is None else source if source.startswith(("flag", PREFIX)) else f"{source}: {key}"
    # A variable may hold a whole object: then the place is inside its value.
    named = ".".join(_variable_path(place, "") or ()) if place.startswith(PREFIX) else ""
    inside = named and where is not None and where.startswith(f"{named}.") and key != named
    if inside:
        place = f"{place}: {key[len(named) + 1 :]}"
    if error["type"] == "extra_forbidden":
        meant = near(parts[-1], _known_beside(parts))
        if meant and place.startswith(PREFIX) and not inside:
            meant = place[: len(place) - len(parts[-1])] + meant.upper()
        hint = f"did you mean {meant}?" if meant else "`gateway config --schema` describes every setting"
        return place, f"unknown setting: {hint}"
    return place or "settings", problem


def _in_our_words(error: Any) -> str:
    """The problem that one of pydantic's errors says."""
    said = str(error["msg"]).removeprefix("Value error, ")
    ours = _PROBLEMS.get(error["type"])
    return said if ours is None else ours.format(**error.get("ctx", {}))


def _known_beside(parts: list[str]) -> list[str]:
    """Returns the names of the settings at the same level as this path."""
    if len(parts) == 1:
        return list(Settings.model_fields)
    models: dict[str, type[BaseModel]] = {
        "access": AccessSettings,
        "jwt": Jwt,
        "rollout": RolloutPolicy,
        "batch": Batch,
        "canary": Canary,
        "guards": Guards,
        "capture": Capture,
        "replay": Replay,
        "shadow": Shadow,
    }
    if parts[0] == "notify":
        return list(Notify.model_fields)
    team = parts[:2] == ["access", "teams"]
    model = Team if team else Limit if parts[0] == "limits" else models.get(parts[-2], ModelSettings)
    return [field.alias or name for name, field in model.model_fields.items()]
