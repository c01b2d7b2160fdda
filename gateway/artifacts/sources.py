"""Opens the source of a version's files: a local directory, a file system of fsspec, an MLflow server's
proxy.

`allowed` decides which sources may be used. Must not know digests, or where the files go.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from gateway.artifacts.allowed import SCHEME, Allowed, is_here, is_local, links, path_of
from gateway.artifacts.base import READ_ONLY, ArtifactError, File, Meter, Room, Source, target_of
from gateway.artifacts.proxied import PROXY, Proxied
from gateway.artifacts.remote import Remote
from gateway.registries.base import Version
from gateway.staging import copy_file
from loaders.bare import is_bare
from loaders.files import PackageError, listed


class Sources:
    """Opens the source that a version names. `allowed`, `local`, `resolve`: see `Allowed`. `servers`: the
    MLflow servers that the operator named; only these are sent credentials."""

    def __init__(
        self,
        allowed: Sequence[str] = (),
        *,
        local: bool = True,
        servers: Iterable[str] = (),
        environ: Mapping[str, str] | None = None,
        resolve: Callable[[str], Iterable[str]] | None = None,
    ) -> None:
        self._allowed = Allowed(allowed, local=local, resolve=resolve)
        self._environ = os.environ if environ is None else environ
        self._servers = {_server(target): target for target in servers}

    def check(self, version: Version) -> None:
        """Raises ArtifactError for a source that is not allowed; makes no network call."""
        self._allowed.check(version)

    def open(self, version: Version) -> Source:
        """The source of a version. Raises ArtifactError where it may not or cannot be asked."""
        self.check(version)
        *readers, place = links(version.source)
        if readers:
            self._allowed.check_addresses(version, place)
            if is_local(place):
                self._allowed.check_directory(version, _path(place))
            return Remote(version, "chain", partial(self._allowed.check_peer, version))
        match = SCHEME.match(version.source)
        scheme = "file" if match is None else match[1].lower()
        if is_local(version.source):
            path = _path(version.source)
            return _Directory(path, self._allowed.check_directory(version, path))
        self._allowed.check_addresses(version, version.source)
        peer = partial(self._allowed.check_peer, version)
        if scheme.startswith("mlflow+"):
            base = version.source.partition(PROXY)[0]
            server = self._servers.get(_server(base))
            return Proxied(version, server or base, self._environ if server else {}, peer)
        return Remote(version, scheme, peer)


def sources_for(
    registry: str,
    allowed: Sequence[str] = (),
    named: Sequence[str | None] = (),
    environ: Mapping[str, str] | None = None,
) -> Sources:
    """What the versions of the registry at `registry` may name. `named`: how the operator named it, with
    credentials perhaps."""
    environ = os.environ if environ is None else environ
    given = (registry, environ.get("MLFLOW_TRACKING_URI"), environ.get("MLFLOW_REGISTRY_URI"), *named)
    servers = [target for target in given if target and re.match(r"(mlflow\+)?https?://", target)]
    return Sources(allowed, local=is_here(registry), servers=servers, environ=environ)


class _Directory:
    """A source on a disk of this machine: a directory, or one model file. `root`: the path without links that
    was checked. A link that takes the place of any part of it later leads to files outside of `root`, which
    are not copied."""

    def __init__(self, path: Path, root: Path) -> None:
        self._path = path
        self._root = root

    def files(self, version: Version) -> list[File]:
        if not self._path.is_absolute():
            raise ArtifactError(f"the source of {version} is not an absolute path", str(self._path))
        if is_bare(self._path) and self._root.is_file():
            return [(self._path.name, str(self._root), self._root.stat().st_size)]
        if not self._path.is_dir():
            raise ArtifactError(f"the directory of {version} does not exist", str(self._path))
        try:
            return [*listed(self._root)]
        except PackageError as error:
            raise ArtifactError(f"the files of {version} cannot be used: {error}", str(self._path)) from None

    def copy(
        self, version: Version, files: list[File], to: Path, *, room: Room, meter: Meter
    ) -> dict[str, str]:
        root = str(self._root)
        hashed = {}
        for relative, file, _ in files:
            copied = copy_file(file, str(target_of(to, relative)), root, READ_ONLY)
            meter.add(copied.bytes)
            if copied.sha256 is not None:
                hashed[relative] = copied.sha256
        return hashed


def _path(source: str) -> Path:
    """The path of a local source, a URL or not."""
    return Path(path_of(source) if SCHEME.match(source) else source)


def _server(target: str) -> str:
    """A server's URL without credentials and ending, to compare."""
    parts = urlsplit(target.removeprefix("mlflow+"))
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
