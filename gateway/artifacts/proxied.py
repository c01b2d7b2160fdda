"""Reads a version's files through an MLflow server's artifact proxy.

Does not trust the server's listing: a name must stay inside the package.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from gateway.artifacts import ranges
from gateway.artifacts.base import (
    MAX_DEPTH,
    ArtifactError,
    File,
    Meter,
    PeerCheck,
    Room,
    Unreachable,
    checked_list,
    stays_inside,
    target_of,
)
from gateway.artifacts.ranges import AT_ONCE, again, in_ranges
from gateway.registries.base import Version
from gateway.registries.mlflow_client import MLflowClient, MLflowError
from loaders.files import is_part

PROXY: Final = "/api/2.0/mlflow-artifacts/artifacts/"


class Proxied:
    """A source behind an MLflow server's artifact proxy. `peer`: see `PeerCheck`."""

    def __init__(
        self, version: Version, server: str, environ: Mapping[str, str], peer: PeerCheck | None = None
    ) -> None:
        _, found, self._place = version.source.partition(PROXY)
        try:
            self._client = MLflowClient(server, environ, peer=peer)
        except ValueError as error:
            raise ArtifactError(f"the source of {version} cannot be reached from here", str(error)) from error
        if not found:
            raise ArtifactError(f"the source of {version} is not behind an artifact proxy", version.source)

    def files(self, version: Version) -> list[File]:
        try:
            return checked_list(version, list(self._below(version, "", 0)))
        except MLflowError as error:
            self._client.close()
            raise self._failed(version, error) from error
        except ArtifactError:
            self._client.close()
            raise

    def _below(self, version: Version, above: str, depth: int) -> Iterator[File]:
        place = f"{self._place.rstrip('/')}/{above}".rstrip("/")
        for name, is_directory, size in again(lambda: self._client.files(place)):
            relative = above + name
            if "/" in name or not stays_inside(relative) or depth > MAX_DEPTH:
                raise ArtifactError(f"the source of {version} lists a file outside of it", relative)
            if is_directory:
                yield from self._below(version, f"{relative}/", depth + 1)
            elif is_part(relative):
                yield relative, f"{self._place.rstrip('/')}/{relative}", size

    def copy(
        self, version: Version, files: list[File], to: Path, *, room: Room, meter: Meter
    ) -> dict[str, str]:
        def whole(file: File) -> None:
            relative, place, size = file
            assert size is not None
            target = target_of(to, relative)
            again(lambda: self._whole(place, size, target, meter))

        hashed = {}
        try:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                for _ in pool.map(whole, (file for file in files if (file[2] or 0) < ranges.RANGED)):
                    pass
            for relative, place, size in files:
                if size is not None and size >= ranges.RANGED:
                    read = functools.partial(self._client.read_range, place)
                    hashed[relative] = in_ranges(read, size, target_of(to, relative), meter)
            return hashed
        except MLflowError as error:
            raise self._failed(version, error) from error
        finally:
            self._client.close()

    def _whole(self, place: str, size: int, target: Path, meter: Meter) -> None:
        came = 0
        try:
            with target.open("wb") as file:
                for chunk in self._client.download(place, size):
                    file.write(chunk)
                    meter.add(len(chunk))
                    came += len(chunk)
        except BaseException:
            meter.add(-came)
            raise

    def _failed(self, version: Version, error: MLflowError) -> ArtifactError:
        if error.status == 404:
            return ArtifactError(f"cannot read the files of {version}: they do not exist", str(error))
        problem = f"cannot read the files of {version}: the MLflow server does not"
        if error.status in (401, 403):
            return ArtifactError(f"{problem} accept this gateway's credentials", str(error))
        return Unreachable(f"{problem} {'return them' if error.status else 'answer'}", str(error))
