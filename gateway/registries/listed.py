"""The models named on the command line, as a registry. It stores nothing, and its aliases do not move.

Each is version 1 of a model, with the alias `champion`. Its name is the directory's, or the one in NAME=DIR.
`Subset` narrows a real registry to some of its names. Knows the places of files, not their content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from gateway.names import InvalidReference, Reference, check_name
from gateway.registries.base import (
    Alias,
    Model,
    Move,
    Observation,
    Registry,
    RegistryError,
    Snapshot,
    Version,
)
from gateway.registries.halves import ReadOnly, Whole
from gateway.registries.store import DOCUMENTS
from loaders import bare, package

ALIAS = "champion"


class ListedModels(Whole, ReadOnly):
    """A registry of model directories (paths or URLs). Raises RegistryError for one that is not valid."""

    poll_interval = 3600.0
    lasting = False  # the user may save another model in the same directory and serve it again
    why_not = (
        "models named on the command line have fixed aliases; use a registry (gateway push) to move them"
    )

    def __init__(self, sources: Sequence[str]) -> None:
        self.target = ", ".join(sources)
        #: The models that are files without an `MLmodel`.
        self.bare: list[str] = []
        models: dict[str, Model] = {}
        for source in sources:
            name, place, is_file = _located(source)
            self.bare += [name] if is_file else []
            if name in models:
                raise RegistryError(f"two models have the name {name}: give one another name with NAME=DIR")
            versions = {"1": Version(name, "1", place)}
            models[name] = Model(name, versions, {ALIAS: Alias("1")})
        self.names = list(models)
        stamp = hashlib.sha256("\n".join(sorted(m.versions["1"].source for m in models.values())).encode())
        self.identity = f"listed:{stamp.hexdigest()}"
        self._snapshot = Snapshot(models, stamp.hexdigest())

    def read(self) -> Snapshot:
        return self._snapshot

    def close(self) -> None:
        pass


class Subset:
    """A subset of the names of another registry. Writes go to that registry; other names are not found."""

    def __init__(self, registry: Registry, names: Sequence[str]) -> None:
        self._registry = registry
        self._names = dict.fromkeys(names)
        self._names_stamp = hashlib.sha256("\n".join(self._names).encode()).hexdigest()[:16]
        self.identity = registry.identity
        self.target = registry.target
        self.poll_interval = registry.poll_interval
        self.longest_pause = registry.longest_pause
        self.partial = registry.partial
        self.lasting = registry.lasting
        self.forget = registry.forget
        self.why_not_writable = registry.why_not_writable
        self.record_digest = registry.record_digest
        self.record_status = registry.record_status
        self.add_version = registry.add_version
        self.close = registry.close

    @property
    def writable(self) -> bool:
        return self._registry.writable

    def read(self) -> Snapshot:
        return self._narrowed(self._registry.read())

    def find(self, reference: Reference) -> Snapshot:
        if self.partial and reference.name not in self._names:
            known = self.known()
            return Snapshot({}, "") if known is None else known
        return self._narrowed(self._registry.find(reference))

    def known(self) -> Snapshot | None:
        known = self._registry.known()
        return None if known is None else self._narrowed(known)

    def listing(self, name: str | None = None) -> Snapshot:
        return self._narrowed(self._registry.listing(name))

    def resume(self, snapshot: Snapshot) -> None:
        self._registry.resume(self._narrowed(snapshot))

    def move(self, move: Move) -> Snapshot:
        return self._narrowed(self._registry.move(move))

    def delete_alias(self, name: str, alias: str) -> Snapshot:
        return self._narrowed(self._registry.delete_alias(name, alias))

    def record(self, observation: Observation) -> Snapshot | None:
        recorded = self._registry.record(observation)
        return None if recorded is None else self._narrowed(recorded)

    def _narrowed(self, snapshot: Snapshot) -> Snapshot:
        # Look up each name: a large registry parses only the models that are looked up.
        models = {name: snapshot.models[name] for name in self._names if name in snapshot.models}
        # Not the registry's own stamp: the saved content of one must not count as that of the other.
        return Snapshot(models, f"{snapshot.stamp} of {self._names_stamp}")


def _located(text: str) -> tuple[str, str, bool]:
    """The name and the place in DIR or NAME=DIR, and whether it has no `MLmodel`. If the directory's name is
    only a version number, as in a registry's store, the name is that of its parent directory. A model file
    has its own name, and `model.EXT` that of its directory."""
    given, equals, source = text.partition("=")
    if not equals or "/" in given or ":" in given or Path(text).exists():
        given, source = "", text
    parts = urlsplit(source)
    local = not parts.scheme or parts.scheme == "file" or len(parts.scheme) == 1
    place = str(Path(parts.path if parts.scheme == "file" else source).absolute()) if local else source
    if not source:
        raise RegistryError(f"{text}: write NAME=FILE-OR-DIR, or FILE-OR-DIR alone")
    if local and not Path(place).exists():
        raise RegistryError(f"{source} does not exist: give a model directory or file, or a models:/ URI")
    is_file = local and not Path(place, "MLmodel").is_file()
    if is_file:
        _check_bare(Path(place), source)
    above, _, last = place.rstrip("/").rpartition("/")
    if is_file and Path(place).is_file():
        last = Path(place).stem
        if last == "model":
            above, _, last = above.rpartition("/")
    name = given or (above.rpartition("/")[2] if last.isdigit() else "") or last
    try:
        return check_name(name), place, is_file
    except InvalidReference as error:
        raise RegistryError(f"{source}: {error}") from None


def _check_bare(place: Path, source: str) -> None:
    """Raises RegistryError unless a place is a model file, or a directory with one."""
    try:
        if place.is_file() and bare.is_bare(place):
            bare.described(place.parent, place.name)  # a link counts as its file, which is copied
        else:
            package.read(place)
    except package.PackageError as error:
        document = place.is_file() and place.suffix.lower() in DOCUMENTS
        hint = f"; to serve the models of a registry file, write --registry {source}" if document else ""
        if place.is_file() and not bare.is_bare(place):
            known = ", ".join(bare.ENDINGS)
            told = f"{source} is not a model file: its name must end in one of {known}"
            raise RegistryError(f"{told}{hint}") from None
        raise RegistryError(f"{source} cannot be served: {error}{hint}") from None
    except OSError as error:
        raise RegistryError(f"{source} cannot be read: {error.strerror}") from None
