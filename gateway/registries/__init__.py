"""Registries: who says which versions exist and where aliases point.

`open_registry` picks the member by the form of its target; `default_target` says which target is meant
where none was given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from gateway import plugins
from gateway.plugins import Plugin
from gateway.registries.base import Registry, RegistryError

GROUP: Final = "gateway.registries"
REGISTRIES: Final[dict[str, Plugin]] = {
    "file": Plugin("gateway.registries.file:FileRegistry"),
}
"""What a registry's target begins with → its member. A factory is called as `factory(target, create=…)`."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


def open_registry(target: str, *, create: bool = False) -> Registry:
    """The registry at `target`: a file's path, `file://…`, or a URL whose scheme names a registered part.

    `create`: writing a first version may make a registry that does not exist. Nothing is read yet.
    Raises RegistryError.
    """
    match = _SCHEME.match(target)
    scheme = match[1].lower() if match else "file"
    if scheme not in plugins.known(GROUP, REGISTRIES):
        raise RegistryError(
            f"{target}: this build reads registries from files, not from {scheme}:// "
            f"(kinds: {', '.join(sorted(plugins.known(GROUP, REGISTRIES)))})"
        )
    try:
        factory = plugins.find(GROUP, REGISTRIES, scheme)
    except plugins.PluginError as error:
        raise RegistryError(str(error)) from error
    registry: Registry = factory(target, create=create)
    return registry


def default_target(
    environ: Mapping[str, str] | None = None, flag: str | None = None, directory: Path = Path()
) -> str:
    """The registry that is meant: the flag (or setting) if given, else what the environment says (None:
    this process's), else `registry.yaml` in `directory`. Raises RegistryError, naming all five."""
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
    raise RegistryError(
        "no registry: give --registry, set GATEWAY_REGISTRY, MLFLOW_REGISTRY_URI or MLFLOW_TRACKING_URI, "
        "or have a file ./registry.yaml"
    )
