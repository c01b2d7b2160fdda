"""Where a version's files come from: a directory here, what fsspec reaches, an MLflow server's proxy; and
which of those the operator lets be asked.

What a source lists is not trusted: a name must stay inside, a file has the size that was announced. Large
files come in parallel ranges. Knows nothing of digests, and nothing of where the files go.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import ipaddress
import itertools
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias
from urllib.parse import unquote, urlsplit

import fsspec
import fsspec.callbacks

from gateway import backoff
from gateway.artifacts.staging import MAX_FILES, UnfitPackage, copy_file, is_part, package_files
from gateway.artifacts.stores import asked
from gateway.registries.base import Version
from gateway.registries.mlflow_client import MLflowClient, MLflowError, MLflowUnavailable, download_seconds

File: TypeAlias = "tuple[str, str, int | None]"
"""(path within the package, the source's own name of it, bytes; None: not announced)."""

Progress: TypeAlias = Callable[[int, int | None], None]
"""Called with the bytes received and the total (None: unknown), from any thread."""

#: A file at least this large is fetched in ranges of `RANGE` bytes, so many at once.
RANGED: Final = 32 * 1024**2
RANGE: Final = 8 * 1024**2
AT_ONCE: Final = 8
#: Seconds within which a store says what a version's files are.
LISTING_SECONDS: Final = 15.0
_ATTEMPTS: Final = 3
_BATCH: Final = 64
_CHUNK: Final = 1 << 18
#: Seconds between two words of a download's progress.
_TOLD_EACH: Final = 0.1
_MAX_DEPTH: Final = 32
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_PROXY: Final = "/api/2.0/mlflow-artifacts/artifacts/"
_WITH_HOST: Final = ("http", "https", "mlflow+http", "mlflow+https", "ftp", "sftp", "webdav", "smb")
#: What may stand before the last link of a chain: it reads what the next link gives, and no other place.
_READERS: Final = frozenset({"zip", "tar", "simplecache"})
#: Schemes that a remote registry may name without the operator's list: each reaches a store of its own.
_KNOWN: Final = frozenset(
    {"http", "https", "mlflow+http", "mlflow+https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl"}
    | {"hdfs", "webhdfs", "oci", "oss", "hf", "wasbs", "dbfs", "ftp", "sftp", "webdav", "smb", "memory"}
)
_METADATA_NAMES: Final = frozenset({"metadata", "metadata.google.internal", "instance-data"})
_METADATA: Final = tuple(
    ipaddress.ip_network(net)
    for net in ("169.254.0.0/16", "fe80::/10", "fd00:ec2::/32", "100.100.100.200/32", "192.0.0.192/32")
)


class ArtifactError(Exception):
    """A version's files cannot be had. `public` is fit for clients: it names no path and no address; the
    exception's own text is for operators and the log."""

    def __init__(self, public: str, detail: str | None = None) -> None:
        super().__init__(f"{public}: {detail}" if detail else public)
        self.public = public


class DigestMismatch(ArtifactError):
    """The files are not those that the digest stands for. `found`: their digest."""

    def __init__(self, public: str, found: str) -> None:
        super().__init__(public)
        self.found = found


class Unreachable(ArtifactError):
    """The source did not answer: nothing may be concluded from it about the files."""


class Source(Protocol):
    def files(self, version: Version) -> list[File]:
        """All files of the package. Raises ArtifactError, OSError."""

    def copy(
        self, version: Version, files: list[File], to: Path, *, limit: int, meter: Meter
    ) -> dict[str, str]:
        """Puts them into the directory `to`; never more than `limit` bytes in all. What comes is added to
        `meter`. Returns the SHA-256 of files that were read through meanwhile, by their paths within the
        package. Raises ArtifactError, OSError."""


class Meter:
    """Adds up what comes, in any thread, and tells `progress` now and then: first of nothing, and last of
    all of it."""

    def __init__(
        self,
        files: list[File],
        progress: Progress | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        sizes = [size for _, _, size in files]
        self._total = None if None in sizes else sum(size or 0 for size in sizes)
        self._progress = progress
        self._clock = clock
        self._lock = threading.Lock()
        self._bytes = 0
        self._told = -_TOLD_EACH
        self.add(0)

    def add(self, count: int) -> None:
        """So many bytes came; fewer than none where they have to come once more."""
        if self._progress is None:
            return
        with self._lock:
            self._bytes += count
            now = self._clock()
            if now - self._told < _TOLD_EACH and self._bytes != self._total:
                return
            self._told = now
            # A library may repeat a part by itself: never report more than the total.
            so_far = self._bytes if self._total is None else min(self._bytes, self._total)
            self._progress(so_far, self._total)


class Sources:
    """`allowed`: the operator's list of what sources may begin with (`s3://bucket/models/`, `https://host`,
    `/srv/models`), or schemes alone (`gs://`); empty: whatever the registry may reasonably mean. `local`: the
    registry is this machine's own, so that its sources may be, too. `servers`: the MLflow servers that the
    operator named, the only ones that are sent credentials."""

    def __init__(
        self,
        allowed: Sequence[str] = (),
        *,
        local: bool = True,
        servers: Iterable[str] = (),
        environ: Mapping[str, str] | None = None,
        resolve: Callable[[str], Iterable[str]] | None = None,
    ) -> None:
        self._allowed = tuple(allowed)
        self._local = local
        self._environ = os.environ if environ is None else environ
        self._servers = {_server(target): target for target in servers}
        self._resolve = _addresses if resolve is None else resolve

    def check(self, version: Version) -> None:
        """Raises ArtifactError for a source that is not allowed; makes no network call. Checks every
        link of a chain (`A::B`): the last one is a place, the others only read what the next one
        gives."""
        *readers, source = _links(version.source)
        for reader in readers:
            kind = reader.partition("://")[0].lower()
            if kind not in _READERS:
                raise ArtifactError(
                    f"the source of {version} is refused: {kind[:40]}:: is not supported in a chain",
                    version.source,
                )
        if self._allowed:
            if not any(_below(source, prefix) for prefix in self._allowed):
                raise ArtifactError(f"the source of {version} is not among those allowed", source)
        elif not self._local and _is_local(source):
            problem = "a remote registry names a place on this machine"
            raise ArtifactError(f"the source of {version} is refused: {problem}", source)
        if not self._local and not self._allowed:
            match = _SCHEME.match(source)
            if match is not None and match[1].lower() not in _KNOWN:
                problem = f"{match[1].lower()}:// of a remote registry must be in artifact_sources"
                raise ArtifactError(f"the source of {version} is refused: {problem}", source)
        if (host := _host(source)) is not None:
            if host.rstrip(".").lower() in _METADATA_NAMES:
                raise ArtifactError(f"the source of {version} is refused: a metadata service", source)
            self._check_address(version, host, [host])

    def open(self, version: Version) -> Source:
        """The source of a version. Raises ArtifactError where it may not or cannot be asked."""
        self.check(version)
        *readers, place = _links(version.source)
        if readers:
            if (host := _host(place)) is not None:
                self._check_address(version, host, self._resolve(host))
            return _Remote(version, "chain")
        match = _SCHEME.match(version.source)
        if match is None:
            return _Directory(Path(version.source))
        scheme = match[1].lower()
        if scheme == "file":
            return _Directory(Path(_path(version.source)))
        if (host := _host(version.source)) is not None:
            self._check_address(version, host, self._resolve(host))
        if scheme.startswith("mlflow+"):
            base = version.source.partition(_PROXY)[0]
            server = self._servers.get(_server(base))
            return _Proxied(version, server or base, self._environ if server else {})
        return _Remote(version, scheme)

    def _check_address(self, version: Version, host: str, addresses: Iterable[str]) -> None:
        named = any((_host(prefix) or "").lower() == host.lower() for prefix in self._allowed)
        for text in addresses:
            try:
                address = ipaddress.ip_address(text.partition("%")[0])
            except ValueError:
                continue
            address = getattr(address, "ipv4_mapped", None) or address
            if any(address.version == net.version and address in net for net in _METADATA):
                raise ArtifactError(f"the source of {version} is refused: a metadata service", version.source)
            if not (self._local or named) and (address.is_loopback or address.is_unspecified):
                raise ArtifactError(
                    f"the source of {version} is refused: this machine itself", version.source
                )


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
    return Sources(allowed, local=_is_here(registry), servers=servers, environ=environ)


class _Directory:
    """A source on a disk of this machine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def files(self, version: Version) -> list[File]:
        if not self._path.is_absolute():
            raise ArtifactError(f"the source of {version} is no absolute path", str(self._path))
        if not self._path.is_dir():
            raise ArtifactError(f"the directory of {version} is not there", str(self._path))
        try:
            return [(relative, str(file), size) for relative, file, size in package_files(self._path)]
        except UnfitPackage as error:
            raise ArtifactError(f"the files of {version} cannot be used: {error}", str(self._path)) from None

    def copy(
        self, version: Version, files: list[File], to: Path, *, limit: int, meter: Meter
    ) -> dict[str, str]:
        for relative, file, _ in files:
            meter.add(copy_file(Path(file), _target(to, relative)))
        return {}


class _Remote:
    """A source that fsspec reaches."""

    def __init__(self, version: Version, scheme: str) -> None:
        problem = f"the source of {version} cannot be reached from here"
        if "://" not in version.source:  # fsspec would take it for the name of a directory here
            raise ArtifactError(f"{problem}: {scheme}:/ is not supported", version.source)
        # A server that is allowed must not send us on to one that is not.
        self._web = scheme in ("http", "https")
        options: dict[str, Any] = {"allow_redirects": False} if self._web else {}
        if scheme == "chain":
            options = {kind: {"allow_redirects": False} for kind in ("http", "https")}
        try:
            self._files, self._path = fsspec.core.url_to_fs(version.source, **options)
        except ImportError as error:
            raise ArtifactError(f"{problem}: {error}") from error  # fsspec says what to install
        except ValueError as error:
            raise ArtifactError(f"{problem}: {scheme}:// is not supported", str(error)) from error
        except OSError as error:  # a library that is there, and lacks something itself
            raise ArtifactError(f"{problem}: {scheme}:// does not work here", str(error)) from error

    def files(self, version: Version) -> list[File]:
        self._files.invalidate_cache()
        root = self._path.rstrip("/") + "/"
        listed: dict[str, Any]
        if self._web:
            links = list(itertools.islice(self._linked(version, root, 0), MAX_FILES + 1))
            if len(links) > MAX_FILES:
                raise ArtifactError(f"the source of {version} lists more than {MAX_FILES:,} files")
            listed = dict(links)
        else:
            listed = self._asked(version, "find", LISTING_SECONDS, self._path, detail=True)
        found: list[File] = []
        for name, info in listed.items():
            if info.get("type") == "directory" or name.endswith("/"):
                continue
            relative = name.removeprefix(root)
            if self._web:
                relative = unquote(relative)
            if relative == name or not _stays_inside(relative):
                raise ArtifactError(f"the source of {version} lists a file outside of it", name)
            if is_part(relative):
                size = info.get("size")
                found.append((relative, name, None if size is None else int(size)))
        return _all(version, found)

    def _linked(self, version: Version, place: str, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """What a web server's pages of directories lead to below `place`, which ends with a slash: without it
        a server sends us on, and we do not go. Links to elsewhere are common, and not followed."""
        if depth > _MAX_DEPTH:
            raise ArtifactError(f"the source of {version} lists directories without end", place)
        for info in self._asked(version, "ls", LISTING_SECONDS, place, detail=True):
            name: str = info["name"]
            below = name.removeprefix(place)
            if below in (name, "", "/") or "?" in below or "#" in below:
                continue
            yield name, info  # directories too: the caller's limit must count them
            if name.endswith("/"):
                yield from self._linked(version, name, depth + 1)

    def copy(
        self, version: Version, files: list[File], to: Path, *, limit: int, meter: Meter
    ) -> dict[str, str]:
        small = [file for file in files if file[2] is not None and file[2] < RANGED]
        for i in range(0, len(small), _BATCH):
            part = small[i : i + _BATCH]
            targets = [_target(to, relative) for relative, _, _ in part]
            remote = [name for _, name, _ in part]
            local = [str(target) for target in targets]
            total = sum(size or 0 for _, _, size in part)
            counted = _Counted(meter)
            self._asked(version, "get", download_seconds(total), remote, local, callback=counted)
            for (relative, _, size), target in zip(part, targets, strict=True):
                got = target.stat().st_size
                if got != size:
                    problem = f"a file of {version} came incomplete: {relative}, {got} of {size} bytes"
                    raise ArtifactError(problem)
            meter.add(total - counted.bytes)  # not every library says all that comes
        hashed = {}
        left = limit - sum(size or 0 for _, _, size in files)
        for relative, name, size in files:
            if size is None:
                with self._failing(version):
                    left -= self._stream(version, name, _target(to, relative), left, meter)
            elif size >= RANGED:
                read = self._range_of(version, name)
                with self._failing(version):
                    hashed[relative] = _in_ranges(read, size, _target(to, relative), meter)
        return hashed

    def _stream(self, version: Version, name: str, target: Path, limit: int, meter: Meter) -> int:
        """A file whose size was not announced; returns it."""
        size = 0
        with self._files.open(name, "rb", block_size=0) as from_, target.open("xb") as file:
            while chunk := from_.read(_CHUNK):
                size += len(chunk)
                if size > limit:
                    raise ArtifactError(f"the files of {version} are larger than the cache")
                file.write(chunk)
                meter.add(len(chunk))
        return size

    def _range_of(self, version: Version, name: str) -> Callable[[int, int], bytes]:
        def read(start: int, end: int) -> bytes:
            seconds = download_seconds(end - start)
            content: bytes = asked(self._files, "cat_file", seconds, name, start=start, end=end)
            if len(content) != end - start:
                got = f"{len(content)} bytes for {end - start}"
                raise ArtifactError(f"a file of {version} came incomplete: {got}", name)
            return content

        return read

    def _asked(self, version: Version, verb: str, seconds: float, *args: Any, **options: Any) -> Any:
        with self._failing(version):
            return asked(self._files, verb, seconds, *args, **options)

    @contextlib.contextmanager
    def _failing(self, version: Version) -> Iterator[None]:
        try:
            yield
        except (OSError, ArtifactError):
            raise
        except Exception as error:  # each file system raises what its own library raises
            problem = f"the files of {version} cannot be read from their source: {type(error).__name__}"
            raise Unreachable(problem, f"{version.source}: {error}") from error


class _Proxied:
    """A source behind an MLflow server's artifact proxy."""

    def __init__(self, version: Version, server: str, environ: Mapping[str, str]) -> None:
        _, found, self._place = version.source.partition(_PROXY)
        try:
            self._client = MLflowClient(server, environ)
        except ValueError as error:
            raise ArtifactError(f"the source of {version} cannot be reached from here", str(error)) from error
        if not found:
            raise ArtifactError(f"the source of {version} is not behind an artifact proxy", version.source)

    def files(self, version: Version) -> list[File]:
        try:
            return _all(version, list(self._below(version, "", 0)))
        except MLflowError as error:
            self._client.close()
            raise self._failed(version, error) from error
        except ArtifactError:
            self._client.close()
            raise

    def _below(self, version: Version, above: str, depth: int) -> Iterator[File]:
        place = f"{self._place.rstrip('/')}/{above}".rstrip("/")
        for name, is_directory, size in _again(lambda: self._client.files(place)):
            relative = above + name
            if "/" in name or not _stays_inside(relative) or depth > _MAX_DEPTH:
                raise ArtifactError(f"the source of {version} lists a file outside of it", relative)
            if is_directory:
                yield from self._below(version, f"{relative}/", depth + 1)
            elif is_part(relative):
                yield relative, f"{self._place.rstrip('/')}/{relative}", size

    def copy(
        self, version: Version, files: list[File], to: Path, *, limit: int, meter: Meter
    ) -> dict[str, str]:
        def whole(file: File) -> None:
            relative, place, size = file
            assert size is not None
            target = _target(to, relative)
            _again(lambda: self._whole(place, size, target, meter))

        hashed = {}
        try:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                for _ in pool.map(whole, (file for file in files if (file[2] or 0) < RANGED)):
                    pass
            for relative, place, size in files:
                if size is not None and size >= RANGED:
                    read = functools.partial(self._client.read_range, place)
                    hashed[relative] = _in_ranges(read, size, _target(to, relative), meter)
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
            return ArtifactError(f"the files of {version} cannot be read: they are not there", str(error))
        problem = f"the files of {version} cannot be read: the MLflow server does not"
        if error.status in (401, 403):
            return ArtifactError(f"{problem} let this gateway in", str(error))
        return Unreachable(f"{problem} {'give them' if error.status else 'answer'}", str(error))


class _Counted(fsspec.callbacks.Callback):  # type: ignore[misc]
    """What fsspec calls while it gets files: each file's bytes are added, and not the files' number. `bytes`
    is what was said of all of them."""

    def __init__(self, meter: Meter, whole: _Counted | None = None) -> None:
        super().__init__()
        self.bytes = 0
        self._meter = meter
        self._whole = whole

    def branched(self, path_1: str, path_2: str, **options: Any) -> _Counted:
        return _Counted(self._meter, self)

    def relative_update(self, inc: int = 1) -> None:
        if self._whole is not None:
            self._whole.bytes += inc
            self._meter.add(inc)


def _in_ranges(read: Callable[[int, int], bytes], size: int, target: Path, meter: Meter) -> str:
    """Fetches a file of `size` bytes in parallel ranges, each of which is tried again by itself. Returns its
    SHA-256, taken from the disk while the rest is still coming."""

    def fetch(start: int) -> None:
        end = min(start + RANGE, size)
        content = _again(lambda: read(start, end))
        written = 0
        while written < len(content):
            written += os.pwrite(handle, memoryview(content)[written:], start + written)
        meter.add(written)

    content = hashlib.sha256()
    handle = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.truncate(handle, size)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            tasks = {start: pool.submit(fetch, start) for start in range(0, size, RANGE)}
            try:
                for start, task in tasks.items():
                    task.result()
                    end = min(start + RANGE, size)
                    for at in range(start, end, _CHUNK):
                        content.update(os.pread(handle, min(_CHUNK, end - at), at))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        os.close(handle)
    return content.hexdigest()


def _again(read: Callable[[], Any]) -> Any:
    """Calls `read` up to three times; retries transient errors only."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return read()
        except (MLflowUnavailable, OSError) as error:
            told = isinstance(error, FileNotFoundError) or getattr(error, "status", 0) in (401, 403, 404)
            if told or attempt == _ATTEMPTS:
                raise
            time.sleep(backoff.pause(attempt, first=0.1, asked=getattr(error, "retry_after", None)))
    raise AssertionError("every attempt returns or raises")


def _all(version: Version, found: list[File]) -> list[File]:
    if not found:
        raise ArtifactError(f"the source of {version} holds no files", version.source)
    if len(found) > MAX_FILES:
        raise ArtifactError(f"the source of {version} holds more than {MAX_FILES:,} files")
    return sorted(found, key=lambda file: file[0])


def _stays_inside(relative: str) -> bool:
    return not any(part in ("", ".", "..") or "\0" in part for part in relative.split("/"))


def _target(to: Path, relative: str) -> Path:
    target = to / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _links(source: str) -> list[str]:
    """The links of a chain, as fsspec takes it apart; an IPv6 address in a URL is not one."""
    if "://" not in source:
        return [source]
    return re.split(r"::(?![0-9A-Fa-f:.]*\])", source)


def _path(source: str) -> str:
    """The path of a `file:` URL."""
    return "/" + unquote(source.partition(":")[2]).lstrip("/")


def _is_local(source: str) -> bool:
    match = _SCHEME.match(source)
    return match is None or match[1].lower() in ("file", "local")


def _is_here(registry: str) -> bool:
    """Returns whether a registry's target is on this machine."""
    host = _host(registry)
    if host is None:
        return _is_local(registry)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _server(target: str) -> str:
    """A server's URL without credentials and ending, to compare."""
    parts = urlsplit(target.removeprefix("mlflow+"))
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"


def _host(source: str) -> str | None:
    """Returns the host in a source; None where the scheme has none (a bucket is not a host)."""
    match = _SCHEME.match(source)
    if match is None or match[1].lower() not in _WITH_HOST:
        return None
    try:
        return urlsplit(source).hostname
    except ValueError:
        return ""


def _below(source: str, prefix: str) -> bool:
    """Whether a source is the place `prefix` or lies below it; `s3://` is all of a scheme."""
    if _is_local(source):
        path = _path(source) if _SCHEME.match(source) else source
        root = _path(prefix) if _SCHEME.match(prefix) else prefix
        inside = _is_local(prefix) and Path(os.path.normpath(path)).is_relative_to(os.path.normpath(root))
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
        return []  # whoever connects says so
