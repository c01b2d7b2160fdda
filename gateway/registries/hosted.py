"""The models that a managed host adds and removes while the gateway runs, as a registry: SageMaker's
multi-model contract. It stores nothing: the host says again what it wants after a restart.

Each model has one version, with the alias `champion`. Knows names and places below one directory.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Final

from gateway.names import check_name
from gateway.registries.base import Alias, Model, RegistryError, Snapshot, Version
from gateway.registries.halves import ReadOnly, Whole
from gateway.registries.listed import ALIAS
from loaders import package

_NONE: Final = Model("", {}, {})


class HostedModels(Whole, ReadOnly):
    """`root`: models are taken from below this directory only. Used by the event loop alone."""

    poll_interval = 3600.0
    lasting = False
    why_not = "the host of this container adds and removes its models"

    def __init__(self, root: Path) -> None:
        self._root = root
        self._models: dict[str, Model] = {}
        self._numbers = count(1)
        self._stamps = count()
        self.target = str(root)
        self.identity = f"hosted:{root}"
        self._snapshot = Snapshot({}, "0")

    def read(self) -> Snapshot:
        return self._snapshot

    def close(self) -> None:
        pass

    @property
    def places(self) -> dict[str, str]:
        """The directory of each model."""
        return {name: next(iter(model.versions.values())).source for name, model in self._models.items()}

    def checked(self, name: str, place: str) -> Path:
        """The directory of a model that may be added. Reads files. Raises RegistryError for a directory that
        is not below the root or holds no model, InvalidReference for a name that no model may have."""
        check_name(name)
        directory = Path(place).resolve()
        if not directory.is_relative_to(self._root.resolve()):
            raise RegistryError(f"the url of {name} is not below {self._root}")
        try:
            package.read(directory)
        except (package.PackageError, OSError) as error:
            problem = error.strerror if isinstance(error, OSError) else error
            raise RegistryError(f"the url of {name} is not a model directory: {problem}") from None
        return directory

    def add(self, name: str, directory: Path) -> Version:
        """Adds a model in a directory that was `checked`."""
        number = str(next(self._numbers))
        version = Version(name, number, str(directory))
        self._models[name] = Model(name, {number: version}, {ALIAS: Alias(number)})
        self._changed()
        return version

    def remove(self, name: str, version: Version | None = None) -> None:
        """Removes a model if it is there. `version`: only if it is still this one."""
        if version is None or version.version in self._models.get(name, _NONE).versions:
            self._models.pop(name, None)
            self._changed()

    def _changed(self) -> None:
        self._snapshot = Snapshot(dict(self._models), f"hosted {next(self._stamps)}")
