"""Reads a version's files through fsspec: from object stores, web servers and archives.

Does not trust a source's listing: a name must stay inside the package, and a file must have the announced
size. Each call has a time limit, because the libraries behind fsspec retry for minutes.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import fsspec
import fsspec.asyn
import fsspec.callbacks

from gateway.artifacts import ranges
from gateway.artifacts.base import (
    LISTING_SECONDS,
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
from gateway.artifacts.ranges import CHUNK, in_ranges
from gateway.filesystems import CONNECT_SECONDS, asked, connected, within
from gateway.registries.base import Version
from gateway.registries.mlflow_client import download_seconds
from loaders.files import MAX_FILES, is_part

_BATCH: Final = 64


class Remote:
    """A source that fsspec reaches. `peer`: see `PeerCheck`; used for HTTP."""

    def __init__(self, version: Version, scheme: str, peer: PeerCheck) -> None:
        problem = f"the source of {version} cannot be reached from here"
        if "://" not in version.source:  # fsspec would read it as a local directory
            raise ArtifactError(f"{problem}: {scheme}:/ is not supported", version.source)
        # An allowed server must not redirect to one that is not allowed.
        self._web = scheme in ("http", "https")
        web = {"allow_redirects": False, "get_client": _checked(peer), "skip_instance_cache": True}
        options: dict[str, Any] = web if self._web else {}
        if scheme == "chain":
            options = {"http": web, "https": web}
        try:
            self._files, self._path = connected(version.source, **options)
        except ImportError as error:
            raise ArtifactError(
                f"{problem}: {error}"
            ) from error  # fsspec's text names the package to install
        except ValueError as error:
            raise ArtifactError(f"{problem}: {scheme}:// is not supported", str(error)) from error
        except OSError as error:
            if type(error) is OSError and error.errno is None:  # a library without one of its dependencies
                raise ArtifactError(f"{problem}: {scheme}:// does not work here", str(error)) from error
            raise Unreachable(
                f"{problem}: {error.strerror or type(error).__name__}", f"{version.source}: {error}"
            ) from error
        except Exception as error:  # each file system raises the errors of its own library
            raise Unreachable(f"{problem}: {type(error).__name__}", f"{version.source}: {error}") from error

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
            if relative == name or not stays_inside(relative):
                raise ArtifactError(f"the source of {version} lists a file outside of it", name)
            if is_part(relative):
                size = info.get("size")
                found.append((relative, name, None if size is None else int(size)))
        return checked_list(version, found)

    def _linked(self, version: Version, place: str, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the files that a web server's directory pages link to below `place`. It ends with a slash,
        because a server redirects a path without one, and redirects are not followed. Skips links to other
        places, which are common."""
        if depth > MAX_DEPTH:
            raise ArtifactError(f"the source of {version} has directories that are nested too deep", place)
        for info in self._asked(version, "ls", LISTING_SECONDS, place, detail=True):
            name: str = info["name"]
            below = name.removeprefix(place)
            if below in (name, "", "/") or "?" in below or "#" in below:
                continue
            yield name, info  # directories too: the caller's limit must count them
            if name.endswith("/"):
                yield from self._linked(version, name, depth + 1)

    def copy(
        self, version: Version, files: list[File], to: Path, *, room: Room, meter: Meter
    ) -> dict[str, str]:
        small = [file for file in files if file[2] is not None and file[2] < ranges.RANGED]
        # Without an event loop, a call that was given up goes on in its thread: it must not have more files.
        batch = _BATCH if getattr(self._files, "async_impl", False) else 1
        for i in range(0, len(small), batch):
            part = small[i : i + batch]
            targets = [target_of(to, relative) for relative, _, _ in part]
            remote = [name for _, name, _ in part]
            local = [str(target) for target in targets]
            total = sum(size or 0 for _, _, size in part)
            counted = _Counted(meter)
            self._asked(version, "get", download_seconds(total), remote, local, callback=counted)
            for (relative, _, size), target in zip(part, targets, strict=True):
                got = target.stat().st_size
                if got != size:
                    problem = f"a file of {version} is incomplete: {relative}, {got} of {size} bytes"
                    raise ArtifactError(problem)
            meter.add(total - counted.bytes)  # not every library reports all received bytes
        hashed = {}
        for relative, name, size in files:
            if size is None:
                with self._failing(version):
                    self._stream(name, target_of(to, relative), room, meter)
            elif size >= ranges.RANGED:
                read = self._range_of(version, name)
                with self._failing(version):
                    hashed[relative] = in_ranges(read, size, target_of(to, relative), meter)
        return hashed

    def _stream(self, name: str, target: Path, room: Room, meter: Meter) -> None:
        """Copies a file of unknown size."""
        seconds = download_seconds(CHUNK)
        opened = within(seconds, lambda: self._files.open(name, "rb", block_size=0))
        try:
            with target.open("xb") as file:
                while chunk := within(seconds, lambda: opened.read(CHUNK)):
                    room(len(chunk))
                    file.write(chunk)
                    meter.add(len(chunk))
        finally:
            with contextlib.suppress(Exception):  # a source that went silent may not answer this either
                within(CONNECT_SECONDS, opened.close)

    def _range_of(self, version: Version, name: str) -> Callable[[int, int], bytes]:
        def read(start: int, end: int) -> bytes:
            seconds = download_seconds(end - start)
            content: bytes = asked(self._files, "cat_file", seconds, name, start=start, end=end)
            if len(content) != end - start:
                got = f"{len(content)} bytes for {end - start}"
                raise ArtifactError(f"a file of {version} is incomplete: {got}", name)
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
        except Exception as error:  # each file system raises the errors of its own library
            problem = f"cannot read the files of {version} from their source: {type(error).__name__}"
            raise Unreachable(problem, f"{version.source}: {error}") from error


def _checked(peer: PeerCheck) -> Callable[..., Awaitable[Any]]:
    """Returns a factory for a file system's HTTP client, which connects only to addresses that `peer`
    allows."""

    async def client(**options: Any) -> Any:
        import aiohttp

        class Resolver(aiohttp.ThreadedResolver):
            async def resolve(self, host: str, *args: Any, **more: Any) -> list[Any]:
                found = await super().resolve(host, *args, **more)
                peer(host, [entry["host"] for entry in found])
                return found

        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(resolver=Resolver()), **options)

    return client


class _Counted(fsspec.callbacks.Callback):  # type: ignore[misc]
    """Progress callback of fsspec. Counts the bytes of the files, not their number. `bytes` is the total
    reported so far."""

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
