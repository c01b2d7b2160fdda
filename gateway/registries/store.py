"""The store of a registry file: model directories next to it, at `models/NAME/VERSION`.

Knows directories and package files. The registry holds its lock and passes the models of the document.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from gateway.registries import gc
from gateway.registries.base import (
    Model,
    RegistryError,
    RegistryUnavailable,
)
from gateway.staging import copy_file, sync_tree
from loaders import package as packages
from loaders.files import PackageError, package_files

STORE: Final = "models"
DOCUMENTS: Final = (".yaml", ".yml", ".json")
MAX_BYTES: Final = 1 << 28


@dataclass(frozen=True, slots=True)
class Collected:
    """The garbage `found` in `store`. If `deleted`, it was removed. `younger`: the number of directories that
    are not old enough yet."""

    store: Path
    found: tuple[gc.Garbage, ...]
    younger: int
    deleted: bool


def collect(
    document: Path, models: Iterable[Model], aside: ExitStack | None, older_than: float, now: float
) -> Collected:
    """Finds directories in the store of `document` that none of `models` refers to and that have not changed
    for `older_than` seconds. With `aside`, moves them out of the store, and removes them when `aside` is
    closed.

    Raises RegistryError.
    """
    store = document.parent / STORE
    if store.is_symlink():
        raise RegistryError(f"{store} is a link: the gateway removes nothing through a link")
    if not store.is_dir():
        return Collected(store, (), 0, aside is not None)
    sources = (version.source for model in models for version in model.versions.values())
    try:
        found = gc.find(store, sources, _beside(document), now)
        old = [garbage for garbage in found if garbage.age >= older_than]
        if aside is not None:
            for staged in gc.set_aside(store, old):
                aside.enter_context(staged)
    except OSError as error:
        raise RegistryUnavailable(f"{error.filename or store}: {error.strerror}") from error
    return Collected(store, tuple(old), len(found) - len(old), aside is not None)


def _beside(document: Path) -> list[str]:
    """The documents next to the registry, which may be registries that share its store."""
    found = []
    for path in document.parent.iterdir():
        if path.suffix.lower() not in DOCUMENTS or path == document or not path.is_file():
            continue
        if path.stat().st_size <= MAX_BYTES:  # a larger file is not a registry
            found.append(path.read_text("utf-8", "replace"))
    return found


def copy_package(package: str, to: Path, digest: str) -> None:
    """Copies a model directory, and checks that the copy has the digest."""
    try:
        for relative, file, _ in package_files(Path(package)):
            target = to / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            copy_file(str(file), str(target))
    except PackageError as error:
        raise RegistryError(f"{package}: {error}") from None
    except FileNotFoundError as error:
        raise RegistryError(f"{package}: {error.strerror}: {error.filename}") from error
    if (found := packages.digest(to)) != digest:
        raise RegistryError(f"{package} changed while it was copied: {digest} became {found}")
    sync_tree(to)


def next_number(model: Model, directory: Path) -> int:
    """Returns one more than any version number ever entered or stored, so that no number is used twice."""
    stored = [int(name) for name in os.listdir(directory) if re.fullmatch(r"[1-9][0-9]{0,17}", name)]
    return max([0, *stored, *(int(version) for version in model.versions)]) + 1


def directory_of(name: str) -> str:
    """Returns the directory name for a model's name: percent-encoded, never hidden, short enough for every
    file system."""
    encoded = re.sub(r"\A\.", "%2E", quote(name, safe=" @+,=()"))
    if len(encoded) <= 200:
        return encoded
    return f"{encoded[:150]}-{hashlib.sha256(name.encode()).hexdigest()[:32]}"
