"""Registries: they say which versions exist and where aliases point.

`open_registry` chooses the kind by the form of the target. `default_target` gives the target if none is
named. Must not know running models.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from gateway import plugins
from gateway.plugins import Plugin
from gateway.registries.base import NoRegistry, Registry, RegistryError

GROUP: Final = "gateway.registries"
REGISTRIES: Final[dict[str, Plugin]] = {
    "file": Plugin("gateway.registries.file:FileRegistry"),
    "mlflow": Plugin("gateway.registries.mlflow:MLflowRegistry"),
    "remote": Plugin("gateway.registries.remote:RemoteRegistry"),
}
"""Kind of registry → its class. A factory is called as `factory(target, create=…)`. A kind that another
distribution adds is chosen by a URL with the kind as its scheme."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_DOCUMENTS: Final = (".yaml", ".yml", ".json")


def open_registry(
    target: str, *, create: bool = False, stages: bool = False, tagging: bool = True, digests: bool = False
) -> Registry:
    """The registry at `target`: a file's path, `file://…`, the URL of a registry document (it ends in .yaml,
    .yml or .json), an MLflow server, or a URL whose scheme names a registered part.

    `create`: adding a first version may create a registry that does not exist. For an MLflow server: `stages`
    shows stages as aliases, `tagging` writes back the digests of first fetches, and `digests` queries again
    for versions that have none. Reads nothing yet. Raises RegistryError.
    """
    kind = _kind(target)
    try:
        factory = plugins.find(GROUP, REGISTRIES, kind)
    except plugins.PluginError as error:
        raise RegistryError(str(error)) from error
    options = {"stages": stages, "tagging": tagging, "digests": digests} if kind == "mlflow" else {}
    registry: Registry = factory(target, create=create, **options)
    return registry


def _kind(target: str) -> str:
    """The kind of registry that a target names, by its form alone. Raises RegistryError."""
    match = _SCHEME.match(target)
    scheme = match[1].lower() if match else target if target.startswith("databricks") else "file"
    if scheme.startswith(("databricks", "uc")):
        raise RegistryError(
            f"{target}: Databricks is not supported; give an MLflow server or a registry file"
        )
    if scheme in ("mlflow+http", "mlflow+https"):
        return "mlflow"
    if scheme == "file" or scheme in plugins.known(GROUP, REGISTRIES) - REGISTRIES.keys():
        return scheme
    if not target[len(scheme) :].startswith("://"):
        return "file"  # a path with a colon in it
    if urlsplit(target).path.lower().endswith(_DOCUMENTS):
        return "remote"
    if scheme in ("http", "https"):
        return "mlflow"
    kinds = "a file, the URL of a document (.yaml, .yml, .json), or the http(s)://HOST of an MLflow server"
    raise RegistryError(f"{target} is not a registry: give {kinds}")


def default_target(
    environ: Mapping[str, str] | None = None, flag: str | None = None, directory: Path = Path()
) -> str:
    """The registry to use: the flag (or setting) if given, else the environment's (None: this process's),
    else `registry.yaml` in `directory`. Raises NoRegistry, which names all five ways."""
    environ = os.environ if environ is None else environ
    for target in (
        flag,
        environ.get("GATEWAY_REGISTRY"),
        environ.get("MLFLOW_REGISTRY_URI"),
        environ.get("MLFLOW_TRACKING_URI"),
    ):
        if target:
            return target
    here = directory / "registry.yaml"
    if here.is_file():
        return str(here)
    raise NoRegistry(
        "no registry: give --registry, set GATEWAY_REGISTRY (or registry in gateway.yaml), "
        "MLFLOW_REGISTRY_URI or MLFLOW_TRACKING_URI, or have a file ./registry.yaml"
    )
