"""The Python API: log a model to a registry, push a model directory, load a model. The command line uses it.

Knows registries, the artifact cache and `loaders`; must not know a running gateway.
"""

from __future__ import annotations

import os
import re
import shutil
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
from gateway.settings import Settings
from loaders import bare, keywords, proof
from loaders import package as packages

_ABSENT: Any = object()
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A version in a registry. `source` is the place of its files, `digest` their SHA-256. `alias` is the
    alias that was moved to it, or None."""

    name: str
    version: str
    source: str
    digest: str | None
    alias: str | None = None


def log_model(
    model: Any = _ABSENT,
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
    """Saves a live model as the next version of `name`, and moves `alias` to it if one is given.

    Flavor and signature are inferred when they are not given; `options` go to the flavor. MLflow's keywords
    (`sk_model`, `registered_model_name`, `pip_requirements`, `conda_env`, …) are accepted; an unknown keyword
    is an error. With `verify`, a new process loads the saved package before the registry is written. Its
    answer to the example is compared with the answer of `model`, and recorded (see `loaders.save_model`). A
    registry file that does not exist is created, with its store `models/` next to it. Raises what
    `loaders.save_model` raises, RegistryError and InvalidReference.
    """
    model = keywords.the_model(model, options, _ABSENT)
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
                f"{name} has no signature: the gateway passes inputs to the model unchecked. Give an "
                "input_example or a signature",
                stacklevel=2,
            )
        return _add(package, name, alias, registry, tags)


def _registered_name(name: str | None, options: dict[str, Any]) -> str:
    """Returns the model's name, given by any of MLflow's keywords for it, and removes these from `options`.
    In MLflow, `name` (earlier `artifact_path`) is the name within the run if `registered_model_name` is given
    too. Raises TypeError."""
    registered, path = options.pop("registered_model_name", None), options.pop("artifact_path", None)
    chosen = next((word for word in (registered, name, path) if word is not None), None)
    if not isinstance(chosen, str):
        raise TypeError("log_model needs name: the name of the model in the registry")
    return chosen


def push(
    directory: str | os.PathLike[str],
    name: str,
    alias: str | None = None,
    registry: str | os.PathLike[str] | None = None,
    *,
    tags: Mapping[str, str] | None = None,
) -> ModelVersion:
    """Copies a model directory into the registry's store as the next version of `name`. If a version with the
    same digest exists, returns that version and adds nothing. `alias` is moved without any gate.

    Of a directory without an `MLmodel` only the model file is copied, unless it is an ONNX graph, whose
    weights may be in other files. If the directory holds others, a warning says so.

    If the package records its answer to its own example, a new process loads it (this executes its code) and
    answers the example again; a different answer is a warning. Raises PackageError if `directory` is not a
    package, RegistryError and InvalidReference.
    """
    package = packages.read(os.fspath(directory))
    file = None if package.bare is None else package.path / package.bare
    if os.path.isfile(directory):
        file = Path(directory)
    elif file is not None and "onnx" in package.flavors:
        file = None  # its weights may be in other files
    elif file is not None and len(os.listdir(package.path)) > 1:
        told = f"only {package.bare} is copied, and nothing else of the directory: it has no MLmodel"
        warnings.warn(f"{name}: {told}", stacklevel=2)
    if file is not None:
        with tempfile.TemporaryDirectory(prefix="model-") as alone:  # nothing else of its directory
            shutil.copy(file, alone)
            return _add(packages.read(alone), name, alias, registry, tags)
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
    """Loads a model into this process: from a registry (`models:/NAME@ALIAS`, `models:/NAME/VERSION`,
    `models:/NAME/latest`, `models:/NAME` for the default alias; NAME@ALIAS and NAME/VERSION for short), from
    a directory, or from any URL that fsspec reads. An existing directory of that name is preferred.

    A digest is verified before any byte is deserialised. Executes the package's code. Raises RegistryError,
    ArtifactError, InvalidReference, and what `loaders.load_model` raises.
    """
    return load(uri, registry, model_config, configuration.load({}, os.environ))


def load(
    uri: str | os.PathLike[str],
    registry: str | os.PathLike[str] | None,
    model_config: Mapping[str, Any] | None,
    chosen: Settings,
) -> loaders.Model:
    """The same as `load_model`, with these settings."""
    text = os.fspath(uri)
    reference = None if _is_place(text) else _reference(text)
    if reference is None and not _SCHEME.match(text):
        return loaders.load_model(text, model_config, chosen.enforcement or "strict")
    if reference is None:
        version = Version("model", "0", text)
    else:
        version = _resolved(reference, _target(registry, chosen), chosen.default_alias)
    named = (
        Sources() if reference is None else sources_for(_target(registry, chosen), chosen.artifact_sources)
    )
    local = Artifacts(chosen.cache_dir, chosen.disk_limit, named).fetch(version)
    model = loaders.load_model(local.path, model_config, chosen.enforcement or "strict")
    # The model may read its files later: they stay in the cache until the model is freed.
    weakref.finalize(model, _let_go, local)
    return model


def _is_place(text: str) -> bool:
    """Returns True if a text is the path of a model directory or model file."""
    return os.path.isdir(text) or (bare.is_bare(Path(text)) and os.path.isfile(text))


def _reference(text: str) -> Reference | None:
    """The reference to a model in a registry; None if the text is a URL of a directory."""
    if text.startswith(("models:/", "runs:/")):
        return parse_reference(text)
    if _SCHEME.match(text):
        return None
    try:
        return parse_short(text)
    except InvalidReference as error:
        raise InvalidReference(f"{text} is neither a directory nor a model reference: {error}") from None


def _resolved(reference: Reference, target: str, default_alias: list[str]) -> Version:
    opened = open_registry(target)
    try:
        return resolve(opened.find(reference), reference, default_alias)
    finally:
        opened.close()


def _target(registry: str | os.PathLike[str] | None, chosen: Settings | None = None) -> str:
    """The registry to use: as for the commands, which `chosen` or the settings of this process name."""
    if registry is not None:
        return os.fspath(registry)
    return default_target(flag=(chosen or configuration.load({}, os.environ)).registry)


def _let_go(local: Local) -> None:
    """Keeps a reference to the package until the model is freed, which calls this."""
