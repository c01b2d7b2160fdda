"""What is seen of a version while its files are fetched, and what becomes of it when they cannot be."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import fsspec
import pytest
from cachetools import LRUCache

from gateway.artifacts import packages as module
from gateway.artifacts.cache import Artifacts
from gateway.artifacts.packages import FormatPolicy, Packages, _store
from gateway.artifacts.sources import Sources
from gateway.errors import Problem
from gateway.registries.base import Version
from gateway.staging import remove_tree
from loaders.package import read
from tests.support.hostile import eventually
from tests.support.processes import until
from tests.support.served import Served, settings

if TYPE_CHECKING:
    from gateway.environments.choose import Needs

FILES = {"m/MLmodel": b"flavors: {python_function: {loader_module: mine}}", "m/weights": b"x" * 1000}


class Halting(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A store that gives one file and half of another, and the rest when it is told."""

    protocol = "halting"
    cachable = False
    halted = threading.Event()
    go_on = threading.Event()

    def find(self, path: str, **_: Any) -> dict[str, Any]:
        return {name: {"type": "file", "size": len(content)} for name, content in FILES.items()}

    def get_file(self, rpath: str, lpath: str, callback: Any = None, **_: Any) -> None:
        content = FILES[rpath]
        with open(lpath, "wb") as file:
            for part in (content[:500], content[500:]):
                if rpath == "m/weights" and file.tell():
                    self.halted.set()
                    assert self.go_on.wait(30)
                file.write(part)
                callback.relative_update(len(part))


@pytest.mark.parametrize("reference", ["slow/versions/1", "slow@champion"])
def test_how_far_a_fetch_is_can_be_seen(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.artifacts.base._TOLD_EACH", 0.0)
    Halting.halted.clear()
    Halting.go_on.clear()
    fsspec.register_implementation("halting", Halting, clobber=True)
    registry = tmp_path / "registry.yaml"
    registry.write_text("models: {slow: {versions: {1: {source: 'halting://m'}}, aliases: {champion: 1}}}\n")
    with Served(settings(tmp_path), str(registry)) as server:
        shown = server.get("/models/slow/versions/1").json
        assert (shown["state"], "fetch" in shown) == ("UNLOADED", False)
        assert server.post(f"/models/{reference}/load?wait=false").status == 202
        assert Halting.halted.wait(30)
        total = sum(map(len, FILES.values()))
        for path in ("/models/slow/versions/1", "/models", "/models/slow"):
            shown = server.get(path).json
            shown = shown["models"][0] if "models" in shown else shown
            shown = shown["versions"][0] if "versions" in shown else shown
            assert (shown["state"], shown["reason"]) == ("LOADING", "fetching 0.0/0.0 MB")
            assert shown["fetch"] == {"bytes": total - 500, "total": total}
        Halting.go_on.set()
        # Its flavor is unknown. A second load would forget the failure.
        assert eventually(lambda: server.get("/models/slow/versions/1").json["state"] == "FAILED")
        assert "fetch" not in server.get("/models/slow/versions/1").json


class Leaving(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A store that is there, or refuses, or does not answer until it is told."""

    protocol = "leaving"
    cachable = False
    content: ClassVar = {
        "m/MLmodel": b"flavors: {python_function: {loader_module: mlflow.sklearn}, sklearn: {}}"
    }
    fault: Exception | None = None
    hang: threading.Event | None = None
    asked = threading.Semaphore(0)

    def find(self, path: str, **_: Any) -> dict[str, Any]:
        self.asked.release()
        if self.hang is not None:
            assert self.hang.wait(30)
        if self.fault is not None:
            raise self.fault
        return {name: {"type": "file", "size": len(content)} for name, content in self.content.items()}

    def get_file(self, rpath: str, lpath: str, callback: Any = None, **_: Any) -> None:
        Path(lpath).write_bytes(self.content[rpath])


@pytest.fixture
def leaving(monkeypatch: pytest.MonkeyPatch) -> type[Leaving]:
    fsspec.register_implementation("leaving", Leaving, clobber=True)
    for name in ("fault", "hang", "content"):
        monkeypatch.setattr(Leaving, name, getattr(Leaving, name))  # to be put back
    return Leaving


@pytest.fixture
def executors() -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor]]:
    with ThreadPoolExecutor(1) as fetches, ThreadPoolExecutor(1) as disk:
        yield fetches, disk


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("fault", [RuntimeError("no route"), TimeoutError("too long"), OSError(5, "reset")])
def test_without_its_source_a_version_is_what_it_was(
    fault: Exception, lasting: bool, leaving: type[Leaving], executors: Any, tmp_path: Path
) -> None:
    known: dict[Version, str] = {}
    cache = Artifacts(tmp_path / "cache", 10**9)
    packages = Packages(cache, *executors, remembered=known.get, remember=known.__setitem__, lasting=lasting)
    version = Version("iris", "1", "leaving://m")
    first = asyncio.run(packages.get(version))
    leaving.fault = fault
    assert asyncio.run(packages.get(version)).digest == first.digest
    if not lasting:  # the store is not asked again at once
        while leaving.asked.acquire(blocking=False):
            pass
        assert asyncio.run(packages.get(version)).digest == first.digest
        assert not leaving.asked.acquire(blocking=False)
        packages._away.clear()
    with pytest.raises(Problem, match="cannot read"):
        asyncio.run(packages.get(Version("iris", "2", "leaving://other")))
    leaving.fault = None
    packages._away.clear()
    leaving.content = {"m/MLmodel": leaving.content["m/MLmodel"] + b" "}
    again = asyncio.run(packages.get(version))
    assert (again.digest == first.digest) is lasting
    # An error from the source itself is not an outage.
    leaving.fault = FileNotFoundError("gone")
    if lasting:
        assert asyncio.run(packages.get(version)).digest == first.digest
    else:
        with pytest.raises(Problem, match=r"do(es)? not exist"):
            asyncio.run(packages.get(version))


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        ("s3://bucket/iris/1", "s3://bucket/sky/2", True),
        ("https://host:9/iris/1", "https://host:8/iris/1", False),
        ("/srv/iris/1", "/mnt/iris/1", False),
        ("file:///srv/iris/1", "file:///mnt/iris/1", False),
    ],
)
def test_sources_of_one_host_are_away_together(one: str, other: str, together: bool) -> None:
    stores = {_store(Version("iris", "1", source)) for source in (one, other)}
    assert len(stores) == (1 if together else 2)


def test_a_source_that_is_not_a_url_is_refused_with_a_reason(executors: Any, tmp_path: Path) -> None:
    packages = Packages(Artifacts(tmp_path / "cache", 10**9), *executors)
    # If the library for HTTP is not installed, that is the reason.
    with pytest.raises(Problem, match=r"iris/1 cannot be (reached|loaded: cannot read the files)"):
        asyncio.run(packages.get(Version("iris", "1", "http://[x/y")))


@pytest.mark.parametrize(
    ("source", "digest", "policy", "retryable"),
    [
        ("https://169.254.169.254/x", None, FormatPolicy(), False),
        ("elsewhere://x", None, FormatPolicy(), False),
        ("package", "sha256:" + "0" * 64, FormatPolicy(), False),
        ("package", None, FormatPolicy(require_digest=True), False),
        ("package", None, FormatPolicy(), False),  # no such loader
        ("missing", None, FormatPolicy(), True),  # it may be mounted later
    ],
    ids=["a metadata service", "not allowed", "digest", "no digest", "not readable", "missing"],
)
def test_what_trying_again_cannot_help_is_not_retryable(
    source: str, digest: str | None, policy: FormatPolicy, retryable: bool, executors: Any, tmp_path: Path
) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "MLmodel").write_text("flavors: [")
    place = source if "://" in source else str(tmp_path / source)
    sources = Sources([str(tmp_path), "https://"])
    packages = Packages(Artifacts(tmp_path / "cache", 10**9, sources), *executors, policy=lambda *_: policy)
    with pytest.raises(Problem) as caught:
        asyncio.run(packages.get(Version("iris", "1", place, digest)))
    assert (caught.value.code, caught.value.retryable) == ("MODEL_UNAVAILABLE", retryable)
    assert ("gateway check models:/iris/1" in (caught.value.hint or "")) is not retryable


@pytest.mark.anyio
async def test_a_download_that_hangs_does_not_keep_out_what_is_here(
    leaving: type[Leaving], executors: Any, tmp_path: Path
) -> None:
    packages = Packages(Artifacts(tmp_path / "cache", 10**9), *executors)
    here = await packages.get(Version("iris", "1", "leaving://m"))
    leaving.hang = threading.Event()
    while leaving.asked.acquire(blocking=False):
        pass
    hanging = asyncio.ensure_future(packages.get(Version("iris", "2", "leaving://m")))
    assert await asyncio.to_thread(leaving.asked.acquire, timeout=30)
    stored = Version("iris", "1", "leaving://m", here.digest)
    async with asyncio.timeout(90):
        assert (await packages.get(stored)).local.path == here.local.path
    assert not hanging.done()
    leaving.hang.set()
    await hanging


@pytest.mark.anyio
async def test_the_descriptions_that_are_kept_have_a_bound_in_bytes(
    executors: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_KEPT_BYTES", 10_000, raising=False)
    packages = Packages(Artifacts(tmp_path / "cache", 10**9), *executors)
    for number, size in enumerate((4_000, 4_001, 4_002, 20_000), 1):
        package = tmp_path / str(number)
        package.mkdir()
        text = "flavors: {python_function: {loader_module: mlflow.sklearn, model_path: m.pkl}}\n#"
        (package / "MLmodel").write_text(text + " " * size)
        prepared = await packages.get(Version("iris", str(number), str(package)))
        assert prepared.flavor == "sklearn"
    assert len(packages._read) == 2


def test_threads_share_what_was_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of the facts removes entries while other threads read it."""
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "MLmodel").write_bytes(FILES["m/MLmodel"])
    package, made = read(tmp_path / "p"), cast("Needs", object())
    with ThreadPoolExecutor(8) as pool:
        packages = Packages(Artifacts(tmp_path / "cache", 10**9), pool, pool, examine=lambda package: made)
        packages._examined = LRUCache(2)
        wanted = Version("m", "1", "/m")
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            digests = [str(i % 5) for i in range(20_000)]
            found = list(pool.map(lambda digest: packages._needs(wanted, package, digest), digests))
        finally:
            sys.setswitchinterval(before)
    assert all(needs is made for needs in found)
    assert len(packages._examined) == 2


@pytest.mark.anyio
async def test_files_that_were_verified_a_moment_ago_are_not_read_again(
    executors: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "VERIFIED_SECONDS", 0.2)
    package = tmp_path / "p"
    package.mkdir()
    (package / "MLmodel").write_text(
        "flavors: {python_function: {loader_module: mlflow.sklearn, model_path: m.pkl}}"
    )
    measured: dict[str, tuple[int | None, float]] = {}
    artifacts = Artifacts(tmp_path / "cache", 10**9)
    packages = Packages(artifacts, *executors, measured=measured.get)
    digest = (await packages.get(Version("iris", "1", str(package)))).digest
    version = Version("iris", "1", str(package), digest)
    looks: list[Version] = []
    find = artifacts.find
    monkeypatch.setattr(artifacts, "find", lambda one: looks.append(one) or find(one))
    first = await packages.get(version)
    measured[digest] = (1234, 0.5)
    again = await packages.get(version)
    assert looks == [version]
    assert (again.local, again.estimate, again.load_seconds) == (first.local, 1234, 0.5)
    entry = first.local.path
    del first, again
    gc.collect()
    assert not artifacts._remove(entry.name), "it is in use, so that it can be loaded"
    await until(lambda: artifacts._remove(entry.name))
    assert (await packages.get(version)).estimate == 1234
    assert looks == [version, version]


@pytest.mark.anyio
async def test_a_fetch_gets_the_space_of_files_that_were_verified_a_moment_ago(
    executors: Any, tmp_path: Path
) -> None:
    text = "flavors: {python_function: {loader_module: mlflow.sklearn, model_path: m.pkl}}"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "MLmodel").write_text(f"{text}\n# {name}")
    packages = Packages(Artifacts(tmp_path / "cache", 150), *executors)
    digest = (await packages.get(Version("a", "1", str(tmp_path / "a")))).digest
    again = await packages.get(Version("a", "1", str(tmp_path / "a"), digest))
    assert again.digest == digest
    del again
    assert (await packages.get(Version("b", "1", str(tmp_path / "b")))).digest != digest


@pytest.mark.anyio
async def test_a_cache_that_an_operator_removes_is_filled_again(executors: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    text = "flavors: {python_function: {loader_module: mlflow.sklearn, model_path: m.pkl}}"
    (tmp_path / "a" / "MLmodel").write_text(text)
    packages = Packages(Artifacts(tmp_path / "cache", 10**9), *executors)
    digest = (await packages.get(Version("a", "1", str(tmp_path / "a")))).digest
    version = Version("a", "1", str(tmp_path / "a"), digest)
    await packages.get(version)
    remove_tree(tmp_path / "cache")
    assert (await packages.get(version)).local.path.is_dir()
