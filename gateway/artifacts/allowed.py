"""Decides which sources a version's files may come from: the operator's list, and the rules without one.

A remote registry may not name this machine, a metadata service is never contacted, and each link of a chain
is checked. Resolves the names of hosts and makes no other network call.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from gateway.artifacts.base import NotAllowed
from gateway.registries.base import Version

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_WITH_HOST: Final = frozenset(
    {"http", "https", "mlflow+http", "mlflow+https", "ftp", "sftp", "webdav", "webhdfs", "hdfs", "smb"}
)
#: What may stand before the last link of a chain: it reads what the next link gives, and no other place.
_READERS: Final = frozenset({"zip", "tar", "simplecache"})
#: Schemes that a remote registry may name without the operator's list: each reaches a store of its own, or
#: connects to an address that was checked. Of the other schemes with a host, the library looks it up itself.
_KNOWN: Final = frozenset(
    {"http", "https", "mlflow+http", "mlflow+https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl"}
    | {"oci", "oss", "hf", "wasbs", "dbfs", "memory"}
)
_METADATA_NAMES: Final = frozenset({"metadata", "metadata.google.internal", "instance-data"})
_METADATA: Final = tuple(
    ipaddress.ip_network(net)
    for net in ("169.254.0.0/16", "fe80::/10", "fd00:ec2::/32", "100.100.100.200/32", "192.0.0.192/32")
)


class Allowed:
    """`prefixes`: the operator's list of what sources may begin with (`s3://bucket/models/`, `https://host`,
    `/srv/models`), or schemes alone (`gs://`); empty: whatever the registry may reasonably mean. `local`: the
    registry is on this machine, so its sources may be too. `resolve` gives the addresses of a host."""

    def __init__(
        self,
        prefixes: Sequence[str] = (),
        *,
        local: bool = True,
        resolve: Callable[[str], Iterable[str]] | None = None,
    ) -> None:
        self._prefixes = tuple(prefixes)
        self._local = local
        self._resolve = _addresses if resolve is None else resolve

    def check(self, version: Version) -> None:
        """Raises NotAllowed for a source that is not allowed; makes no network call. Checks every
        link of a chain (`A::B`): the last one is a place, the others only read what the next one
        gives."""
        *readers, source = links(version.source)
        for reader in readers:
            kind = reader.partition("://")[0].lower()
            if kind not in _READERS:
                raise NotAllowed(
                    f"the source of {version} is refused: {kind[:40]}:: is not supported in a chain",
                    version.source,
                )
        if self._prefixes:
            if not any(is_below(source, prefix) for prefix in self._prefixes):
                raise NotAllowed(f"the source of {version} is not among those allowed", source)
        elif not self._local and is_local(source):
            problem = "a remote registry names a place on this machine"
            raise NotAllowed(f"the source of {version} is refused: {problem}", source)
        if not self._local and not self._prefixes:
            match = SCHEME.match(source)
            if match is not None and match[1].lower() not in _KNOWN:
                problem = f"{match[1].lower()}:// of a remote registry must be in artifact_sources"
                raise NotAllowed(f"the source of {version} is refused: {problem}", source)
        if (host := host_of(source)) is not None:
            if host.rstrip(".").lower() in _METADATA_NAMES:
                raise NotAllowed(f"the source of {version} is refused: a metadata service", source)
            self.check_peer(version, host, [host])

    def check_directory(self, version: Version, path: Path) -> Path:
        """Returns the directory without links in its path. Raises NotAllowed if links lead it out of the
        places that the operator allows."""
        found = os.path.realpath(path)
        places = [
            path_of(prefix) if SCHEME.match(prefix) else prefix
            for prefix in self._prefixes
            if is_local(prefix)
        ]
        if self._prefixes and not any(is_below(found, os.path.realpath(place)) for place in places):
            raise NotAllowed(f"the source of {version} is not among those allowed: it is a link", str(path))
        return Path(found)

    def check_addresses(self, version: Version, place: str) -> None:
        """Looks up the host in `place`, where it has one. Raises NotAllowed if it leads to an address that
        may not be asked."""
        if (host := host_of(place)) is not None:
            self.check_peer(version, host, self._resolve(host))

    def check_peer(self, version: Version, host: str, addresses: Iterable[str]) -> None:
        """Checks the addresses of a host before anything is sent to them: its name may lead elsewhere than it
        did at the first look. Raises NotAllowed."""
        named = any((host_of(prefix) or "").lower() == host.lower() for prefix in self._prefixes)
        for text in addresses:
            try:
                address = ipaddress.ip_address(text.partition("%")[0])
            except ValueError:
                continue
            address = getattr(address, "ipv4_mapped", None) or address
            if any(address.version == net.version and address in net for net in _METADATA):
                raise NotAllowed(f"the source of {version} is refused: a metadata service", version.source)
            if not (self._local or named) and (address.is_loopback or address.is_unspecified):
                raise NotAllowed(f"the source of {version} is refused: this machine itself", version.source)


def links(source: str) -> list[str]:
    """The links of a chain, as fsspec takes it apart; an IPv6 address in a URL is not one."""
    if "://" not in source:
        return [source]
    return re.split(r"::(?![0-9A-Fa-f:.]*\])", source)


def path_of(source: str) -> str:
    """The path of a `file:` URL."""
    return "/" + unquote(source.partition(":")[2]).lstrip("/")


def is_local(source: str) -> bool:
    match = SCHEME.match(source)
    return match is None or match[1].lower() in ("file", "local")


def is_here(registry: str) -> bool:
    """Returns whether a registry's target is on this machine."""
    host = host_of(registry)
    if host is None:
        return is_local(registry)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def host_of(source: str) -> str | None:
    """Returns the host in a source; None where the scheme has none (a bucket is not a host)."""
    match = SCHEME.match(source)
    if match is None or match[1].lower() not in _WITH_HOST:
        return None
    try:
        return urlsplit(source).hostname
    except ValueError:
        return ""


def is_below(source: str, prefix: str) -> bool:
    """Whether a source is the place `prefix` or lies below it; `s3://` is all of a scheme."""
    if is_local(source):
        path = path_of(source) if SCHEME.match(source) else source
        root = path_of(prefix) if SCHEME.match(prefix) else prefix
        inside = is_local(prefix) and Path(os.path.normpath(path)).is_relative_to(os.path.normpath(root))
        return inside and os.path.isabs(path)
    if ".." in unquote(source).split("/"):
        return False
    if prefix.endswith("/"):
        return source.startswith(prefix)
    return source == prefix or source.startswith(f"{prefix}/") or _host_port(source, prefix)


def _host_port(source: str, prefix: str) -> bool:
    """A prefix without a port means every port of the host."""
    at, wanted = urlsplit(source), urlsplit(prefix)
    plain = not wanted.path and wanted.port is None and wanted.hostname is not None
    return plain and (at.scheme, at.hostname) == (wanted.scheme, wanted.hostname)


def _addresses(host: str) -> list[str]:
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except OSError:
        return []  # the connection fails later and says why
