"""The space that the artifact cache takes: what is removed, what stays, and how several gateways count it."""

from __future__ import annotations

import fcntl
import gc
import multiprocessing
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from gateway.artifacts.base import ArtifactError
from gateway.artifacts.cache import COUNT_AGAIN, Artifacts, Local
from loaders.package import digest, files_bytes
from tests.support.cached import MB, entries, make_package, name_of, under_way, version


def test_what_is_larger_than_the_cache(tmp_path: Path) -> None:
    cache = Artifacts(tmp_path / "cache", disk_limit=MB)
    with pytest.raises(ArtifactError, match=r"do not fit in the cache: 2 MB, the disk limit is 1 MB"):
        cache.fetch(version(make_package(tmp_path / "package", b"x" * 2 * MB)))


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = Artifacts(tmp_path / "cache", disk_limit=3 * MB + 1000)
    versions = [version(make_package(tmp_path / name, name.encode() * MB), name) for name in "1234"]
    for i, wanted in enumerate(versions[:3]):
        path = cache.fetch(wanted).path
        os.utime(f"{path}.lock", (i, i))
    cache.fetch(versions[0])  # used again, so the second is the oldest now
    last = cache.fetch(versions[3])
    kept = {wanted.version for wanted in versions if (last.path.parent / name_of(wanted)).exists()}
    assert kept == {"1", "3", "4"}
    assert cache.bytes() <= 3 * MB + 1000
    assert not under_way(tmp_path / "cache")


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    cache = Artifacts(tmp_path / "cache", disk_limit=2 * MB + 1000)
    one, two, three = (version(make_package(tmp_path / name, name.encode() * MB), name) for name in "123")
    held: list[Local] = [cache.fetch(one), cache.fetch(two)]
    with pytest.raises(
        ArtifactError, match="the cache has no space for iris/3: 1 MB are needed and 2 MB in use of 2 MB"
    ):
        cache.fetch(three)
    assert all(local.path.exists() for local in held)
    freed = held.pop(0).path
    gc.collect()
    cache.fetch(three)
    assert not freed.exists()
    assert held[0].path.exists()


def test_a_count_serves_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    cache = Artifacts(tmp_path / "cache", disk_limit=100 * MB, clock=lambda: now[0])
    counts = []
    count = Artifacts._own

    def counted(self: Artifacts, names: list[str]) -> dict[str, int]:
        sizes = count(self, names)
        counts.append(sum(sizes.values()))
        return sizes

    monkeypatch.setattr(Artifacts, "_own", counted)
    sizes = []
    for name in "1234":
        sizes.append(cache.fetch(version(make_package(tmp_path / name, name.encode()), name)).bytes)
        now[0] += COUNT_AGAIN / 3
    assert counts == [0, sum(sizes[:3])]


def test_what_another_gateway_took_since_the_last_count_counts(tmp_path: Path) -> None:
    one, other = (Artifacts(tmp_path / "cache", disk_limit=3 * MB + 1000) for _ in range(2))
    versions = [version(make_package(tmp_path / name, name.encode() * MB), name) for name in "1234"]
    kept = [one.fetch(versions[0]), other.fetch(versions[1]), other.fetch(versions[2])]
    with pytest.raises(ArtifactError, match="no space"):
        one.fetch(versions[3])
    kept.pop()
    gc.collect()
    kept.append(one.fetch(versions[3]))
    assert sum(local.bytes for local in kept) == other.bytes() <= 3 * MB + 1000


def test_a_removed_cache_is_counted_again(tmp_path: Path) -> None:
    """The number of bytes that were ever reserved begins with nothing then."""
    cache = Artifacts(tmp_path / "cache", disk_limit=2 * MB + 1000)
    versions = [version(make_package(tmp_path / name, name.encode() * MB), name) for name in "123"]
    for wanted in versions[:2]:
        cache.fetch(wanted)
    gc.collect()
    for path in (tmp_path / "cache").rglob("*"):
        path.chmod(0o700)
    shutil.rmtree(tmp_path / "cache")
    kept = [cache.fetch(wanted) for wanted in versions[1:]]
    assert cache.bytes() == sum(local.bytes for local in kept)


def test_small_packages_go_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The more packages a full cache has, the longer takes a count of them."""
    versions = [version(make_package(tmp_path / f"{i}", f"{i:01000}".encode()), f"{i}") for i in range(204)]
    size = files_bytes(tmp_path / "0")
    limit = 200 * size
    cache = Artifacts(tmp_path / "cache", disk_limit=limit, clock=lambda: 0.0)
    for i, wanted in enumerate(versions[:200]):
        os.utime(f"{cache.fetch(wanted).path}.lock", (i, i))
    gc.collect()
    counts = []
    make_room = Artifacts._make_room

    def counted(self: Artifacts, needed: int, names: list[str]) -> tuple[int, int]:
        counts.append(needed)
        return make_room(self, needed, names)

    monkeypatch.setattr(Artifacts, "_make_room", counted)
    for wanted in versions[200:]:
        assert cache.fetch(wanted).bytes == size
        assert cache.bytes() <= limit
    assert counts == [size]
    kept = {wanted.version for wanted in versions if (tmp_path / "cache" / name_of(wanted)).exists()}
    assert kept == {f"{i}" for i in range(4, 204)}, "those used longest ago went"


def hold(cache_dir: str, package: str, ready: Any, done: Any) -> None:
    local = Artifacts(Path(cache_dir), disk_limit=100 * MB).fetch(version(package))
    ready.set()
    done.wait(60)
    assert local.path.exists()


def test_what_another_process_uses_stays(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    ready, done = spawn.Event(), spawn.Event()
    package = make_package(tmp_path / "a", b"x" * MB)
    other = spawn.Process(target=hold, args=(str(tmp_path / "cache"), str(package), ready, done))
    other.start()
    assert ready.wait(60)
    cache = Artifacts(tmp_path / "cache", disk_limit=MB + 1000)
    second = version(make_package(tmp_path / "b", b"y" * MB), "2")
    with pytest.raises(ArtifactError, match="no space"):
        cache.fetch(second)
    done.set()
    other.join(60)
    assert other.exitcode == 0
    cache.fetch(second)
    assert len(entries(tmp_path / "cache")) == 1


ROOM = 3 * (MB + 1000)  # as much as three processes need at once, each with one package of four


def fetch_many(cache_dir: str, packages: list[str], barrier: Any) -> None:
    cache = Artifacts(Path(cache_dir), disk_limit=ROOM)
    barrier.wait()
    for _ in range(3):
        for package in packages:
            local = cache.fetch(version(package))
            assert digest(local.path) == local.digest
            del local
            gc.collect()


def test_several_processes_share_a_small_cache(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(3)
    packages = [str(make_package(tmp_path / f"p{i}", bytes([i]) * MB)) for i in range(4)]
    arguments = [(str(tmp_path / "cache"), packages[i:] + packages[:i], barrier) for i in range(3)]
    processes = [spawn.Process(target=fetch_many, args=given) for given in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert 0 < Artifacts(tmp_path / "cache", disk_limit=ROOM).bytes() <= ROOM
    assert not under_way(tmp_path / "cache")


def test_nothing_appears_while_room_is_counted(tmp_path: Path) -> None:
    """Or it would be counted neither as under way nor as there, and the cache would grow over its limit."""
    cache = Artifacts(tmp_path / "cache", disk_limit=100 * MB)
    wanted = version(make_package(tmp_path / "package", b"x" * MB))
    counting = os.open(tmp_path / "cache" / ".room.lock", os.O_RDWR | os.O_CREAT)

    begun = threading.Event()

    def count(*_: object) -> None:
        fcntl.flock(counting, fcntl.LOCK_EX)
        begun.set()

    fetching = threading.Thread(target=cache.fetch, args=(wanted, count))
    fetching.start()
    assert begun.wait(60)
    fetching.join(0.3)
    assert fetching.is_alive()
    assert entries(tmp_path / "cache") == []
    assert len(under_way(tmp_path / "cache")) == 1
    os.close(counting)
    fetching.join(60)
    assert len(entries(tmp_path / "cache")) == 1
