"""Resolves a reference in a snapshot, or reports what exists instead.

Pure: must not query a registry.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from gateway.names import Reference, did_you_mean_of_many
from gateway.registries.base import Alias, Model, NotInRegistry, Snapshot, Version
from loaders.spelling import few


def resolve(
    snapshot: Snapshot, reference: Reference, default_alias: Sequence[str] = ("champion",)
) -> Version:
    """Returns the version that a `models:/` reference means now. A bare name means its first existing alias
    of `default_alias`. Raises NotInRegistry with the contract's code and a hint about what exists."""
    model = snapshot.models.get(key(reference))
    if model is None and not reference.name:
        message = f"{reference} does not exist: such references work only with an MLflow registry"
        raise NotInRegistry("MODEL_NOT_FOUND", message)
    if model is None:
        # Any client may request any name: bound the comparisons, however large the registry is.
        hint = did_you_mean_of_many(reference.name, snapshot.models)
        if hint is None and "@" in reference.name:  # a name may have one, but few have
            hint = "a reference has one @, between the name and the alias: NAME@ALIAS"
        raise NotInRegistry("MODEL_NOT_FOUND", f"there is no model {reference.name!r} in the registry", hint)
    if reference.version is not None:
        return _version(model, reference.version, f"{model.name} has no version {reference.version}")
    if reference.latest or not reference.name:
        latest = model.latest()
        if latest is None:
            raise NotInRegistry("VERSION_NOT_FOUND", f"{model.name} has no versions")
        return latest
    wanted = [reference.alias] if reference.alias is not None else list(default_alias)
    for alias in wanted:
        if alias in model.aliases:
            version = model.aliases[alias].version
            missing = f"the alias {alias} of {model.name} points to version {version}, which does not exist"
            return _version(model, version, missing)
    hint = f"aliases of {model.name}: {_some(sorted(model.aliases))}"
    if wanted and not model.aliases and (latest := model.latest()) is not None:
        promote = shlex.join(["gateway", "promote", f"{model.name}@{wanted[0]}", latest.version])
        hint += f"; name a version, such as {model.name}/versions/{latest.version}, or set one: `{promote}`"
    raise NotInRegistry("ALIAS_NOT_FOUND", f"{model.name} has no alias {' or '.join(wanted)}", hint)


def find_alias(snapshot: Snapshot, name: str, alias: str) -> Alias:
    """Returns the target of an alias, even if that version does not exist. Raises NotInRegistry with a
    hint."""
    model = snapshot.models.get(name)
    if model is None or alias not in model.aliases:
        resolve(snapshot, Reference(name, alias=alias))
    assert model is not None
    return model.aliases[alias]


def key(reference: Reference) -> str:
    """Returns a snapshot's key for a reference's model: its name, or the written form of a model id or run
    path, which cannot be a name."""
    return reference.name or str(reference)


def _version(model: Model, version: str, otherwise: str) -> Version:
    if version in model.versions:
        return model.versions[version]
    known = _some(sorted(model.versions, key=int, reverse=True))
    raise NotInRegistry("VERSION_NOT_FOUND", otherwise, f"versions of {model.name}: {known}")


def _some(names: Sequence[str]) -> str:
    """Joins at most twenty names, for a hint."""
    return few(names, 20) or "none"
