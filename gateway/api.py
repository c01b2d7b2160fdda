"""The gateway in Python: put a model into a registry, take one out. The command line uses the same.

Knows registries, the artifact cache and `loaders`; no running gateway.
"""

from __future__ import annotations

import os
import re
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loaders
from gateway import configuration
from gateway.artifacts.cache import Artifacts, Local
from gateway.artifacts.sources import Sources, sources_for
from gateway.names import InvalidReference, Reference, check_alias, check_name, parse_reference, parse_short
from gateway.registries import default_target, open_registry
from gateway.registries.base import Version
from gateway.registries.resolution import resolve
from loaders import package as packages
from loaders import proof

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A version in a registry. `source` is where its files are, `digest` what they are; `alias` the one
    that was pointed to it, None if none was."""

    name: str
    version: str
    source: str
    digest: str | None
    alias: str | None = None


def log_model(
    model: Any,
    name: str | None = None,
    registry: str | os.PathLike[str] | None = None,
    *,
    input_example: Any = None,
    alias: str | None = None,
    signature: loaders.Signature | None = None,
    metadata: Mapping[str, Any] | None = None,
    requirements: str | Path | Iterable[str] | None = None,
    code_paths: Iterable[str | Path] | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    flavor: str | None = None,
    verify: bool = True,
    **options: Any,
) -> ModelVersion:
    """Saves a live model as the next version of `name`; `alias`, where given, is moved to it.

    Flavor and signature are inferred when they are not given; `options` go to the flavor. MLflow's keywords
    are taken by their names (`registered_model_name`, `pip_requirements`, `conda_env`, …); an unknown one is
    an error. Before anything reaches the registry the saved package is loaded in a fresh process, and its
    answer to the example is compared with that of `model` and recorded (`verify`; see `loaders.save_model`).
    A registry file that does not exist is created, with its store `models/` next to it. Raises what
    `loaders.save_model` raises, RegistryError and InvalidReference.
    """
    name = _registered_name(name, options)
    check_name(name)
    if alias is not None:
        check_alias(alias)
    with tempfile.TemporaryDirectory(prefix="model-") as directory:
        path = Path(directory, "model")
        loaders.save_model(
            model,
            path,
            signature=signature,
            input_example=input_example,
            metadata=metadata,
            requirements=requirements,
            code_paths=code_paths,
            params=params,
            flavor=flavor,
            verify=verify,
            **options,
        )
        package = packages.read(path)
        if package.signature is None:
            warnings.warn(
                f"{name} has no signature: whatever comes is handed to the model unchecked. Give an "
                "input_example or a signature",
                stacklevel=2,
            )
        return _add(package, name, alias, registry, tags)


def _registered_name(name: str | None, options: dict[str, Any]) -> str:
    """The model's name by any of MLflow's words for it, which are taken out of `options`. There `name`
    (earlier `artifact_path`) is the name in the run where `registered_model_name` is given too. Raises
    TypeError."""
    registered, path = options.pop("registered_model_name", None), options.pop("artifact_path", None)
    chosen = next((word for word in (registered, name, path) if word is not None), None)
    if not isinstance(chosen, str):
        raise TypeError("log_model needs a name: the model's in the registry")
    return chosen


def push(
    directory: str | os.PathLike[str],
    name: str,
    alias: str | None = None,
    registry: str | os.PathLike[str] | None = None,
    *,
    tags: Mapping[str, str] | None = None,
) -> ModelVersion:
    """Copies a model directory into the registry's store as the next version of `name`. A directory with
    the digest of an existing version is that version, unchanged. `alias` is moved without any gate.

    A package that records its answer to its own example is asked it here, in a fresh process (which executes
    what it holds); another answer is a warning. Raises PackageError for what is no package, RegistryError and
    InvalidReference.
    """
    package = packages.read(os.fspath(directory))
    for text in proof.changed(package):
        warnings.warn(f"{name}: {text}", stacklevel=2)
    return _add(package, name, alias, registry, tags)


def _add(
    package: packages.Package,
    name: str,
    alias: str | None,
    registry: str | os.PathLike[str] | None,
    tags: Mapping[str, str] | None,
) -> ModelVersion:
    opened = open_registry(_target(registry), create=True)
    try:
        digest = packages.digest(package.path)
        version = opened.add_version(name, str(package.path), digest, tags=tags, alias=alias)
    finally:
        opened.close()
    return ModelVersion(version.name, version.version, version.source, version.digest, alias)


def load_model(
    uri: str | os.PathLike[str],
    registry: str | os.PathLike[str] | None = None,
    model_config: Mapping[str, Any] | None = None,
) -> loaders.Model:
    """Loads a model here: from a registry (`models:/NAME@ALIAS`, `/VERSION`, `/latest`, `models:/NAME` for
    the default alias; NAME@ALIAS and NAME/VERSION for short), from a directory, or from any URL that
    fsspec reads. A directory of that name wins over a model.

    A digest is verified before a byte is deserialised. Executes what the package holds. Raises
    RegistryError, ArtifactError, InvalidReference, and what `loaders.load_model` raises.
    """
    text = os.fspath(uri)
    chosen = configuration.load({}, os.environ)
    reference = None if os.path.isdir(text) else _reference(text)
    if reference is None and not _SCHEME.match(text):
        return loaders.load_model(text, model_config, chosen.enforcement or "strict")
    if reference is None:
        version = Version("model", "0", text)
    else:
        version = _resolved(reference, _target(registry), chosen.default_alias)
    named = Sources() if reference is None else sources_for(_target(registry), chosen.artifact_sources)
    local = Artifacts(chosen.cache_dir, chosen.disk_limit, named).fetch(version)
    model = loaders.load_model(local.path, model_config, chosen.enforcement or "strict")
    # The files stay in the cache for as long as the model is there to read them.
    weakref.finalize(model, _let_go, local)
    return model


def _reference(text: str) -> Reference | None:
    """What is named in a registry; None for the place of a directory."""
    if text.startswith(("models:/", "runs:/")):
        return parse_reference(text)
    if _SCHEME.match(text):
        return None
    try:
        return parse_short(text)
    except InvalidReference as error:
        raise InvalidReference(f"there is no directory {text}, and it names no model: {error}") from None


def _resolved(reference: Reference, target: str, default_alias: list[str]) -> Version:
    opened = open_registry(target)
    try:
        return resolve(opened.find(reference), reference, default_alias)
    finally:
        opened.close()


def _target(registry: str | os.PathLike[str] | None) -> str:
    return default_target(flag=None if registry is None else os.fspath(registry))


def _let_go(local: Local) -> None:
    """Holds the package until it is called, which is when the model is gone."""
