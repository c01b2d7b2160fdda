"""The halves that registries share: `Whole` reads everything at once, `ReadOnly` cannot be written from here.

Must not know files, servers or caches.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from gateway.names import Reference
from gateway.registries.base import (
    LONGEST_PAUSE,
    Move,
    Observation,
    RegistryReadOnly,
    Snapshot,
    Version,
)


class Whole:
    """The reading half of a registry whose snapshots hold the whole content."""

    longest_pause = LONGEST_PAUSE
    partial = False
    lasting = True

    def read(self) -> Snapshot:
        """Returns the whole content. Each registry has its own way. Raises RegistryError."""
        raise NotImplementedError

    def find(self, reference: Reference) -> Snapshot:
        return self.read()

    def known(self) -> Snapshot | None:
        return None

    def listing(self, name: str | None = None) -> Snapshot:
        return self.read()

    def resume(self, snapshot: Snapshot) -> None:
        """Does nothing: the registry is read as a whole."""

    def forget(self, names: Collection[str]) -> None:
        """Does nothing: the registry is read as a whole."""

    def record_digest(self, version: Version, digest: str) -> None:
        """Does nothing: the owner writes digests."""

    def record_status(self, name: str, alias: str, version: str, status: str) -> None:
        """Does nothing: only observations are written."""


class ReadOnly:
    """The writing half of a registry that cannot be written from here. `why_not` says why, and what to do."""

    writable = False
    why_not: str

    def why_not_writable(self) -> str | None:
        return self.why_not

    def move(self, move: Move) -> Snapshot:
        raise RegistryReadOnly(self.why_not)

    def delete_alias(self, name: str, alias: str) -> Snapshot:
        raise RegistryReadOnly(self.why_not)

    def record(self, observation: Observation) -> Snapshot | None:
        return None

    def add_version(
        self,
        name: str,
        package: str,
        digest: str,
        *,
        tags: Mapping[str, str] | None = None,
        alias: str | None = None,
    ) -> Version:
        raise RegistryReadOnly(self.why_not)
