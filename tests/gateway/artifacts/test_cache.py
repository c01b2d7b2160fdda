from __future__ import annotations

import errno
import gc
import hashlib
import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest

from gateway.artifacts.base import ArtifactError, Meter
from gateway.artifacts.cache import Artifacts, Local
from gateway.artifacts.sources import Sources
from gateway.registries.base import Version
from gateway.staging import SMALL
from loaders.package import digest, files_bytes
from tests.support.cached import MB, entries, make_package, under_way, version


@pytest.fixture
def cache(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "cache", disk_limit=100 * MB)


def test_a_package_is_copied_verified_and_read_only(cache: Artifacts, tmp_path: Path) -> None:
    package = make_package(tmp_path / "package")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.pyc").write_text("covered by no digest")
    (package / "registered_model_meta").write_text("model_name: iris")
    wanted = version(package)
    local = cache.fetch(wanted)
    assert local.path == tmp_path / "cache" / wanted.digest.replace(":", "-")  # type: ignore[union-attr]
    assert (local.digest, local.bytes) == (wanted.digest, files_bytes(package))
    assert digest(local.path) == wanted.digest
    assert not (local.path / "__pycache__").exists()
    assert not (local.path / "registered_model_meta").exists()
    for path in (local.path, *local.path.rglob("*")):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o222
    assert cache.bytes() == local.bytes
    assert not under_way(tmp_path / "cache")


@pytest.mark.parametrize("size", [0, 1, SMALL - 1, SMALL, SMALL + 1, 3 * SMALL])
def test_a_file_of_any_size_is_copied_whole(size: int, cache: Artifacts, tmp_path: Path) -> None:
    content = os.urandom(size)
    wanted = version(make_package(tmp_path / "package", content))
    local = cache.fetch(wanted)
    assert (local.path / "data" / "weights").read_bytes() == content
    assert digest(local.path) == local.digest == wanted.digest
    assert local.bytes == files_bytes(local.path)


@pytest.mark.parametrize("size", [10, 3 * SMALL])
def test_a_file_that_grows_while_it_is_read_has_the_digest_of_its_copy(
    size: int, cache: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make_package(tmp_path / "package", b"x" * size)
    weights = package / "data" / "weights"
    read = os.read
    grown: list[int] = []

    def growing(descriptor: int, count: int) -> bytes:
        found = read(descriptor, count)
        if not grown and os.path.samestat(os.fstat(descriptor), weights.stat()):
            with weights.open("ab") as handle:
                grown.append(handle.write(b"more" * 100_000))
        return found

    monkeypatch.setattr(os, "read", growing)
    monkeypatch.setattr("gateway.staging._cloned", lambda source, target: False)
    local = cache.fetch(version(package, digested=False))
    assert grown
    assert (local.path / "data" / "weights").read_bytes() == weights.read_bytes()
    assert local.digest == digest(local.path) == digest(package)
    assert local.bytes == files_bytes(package)
    assert int((tmp_path / "cache" / ".room.lock").read_bytes()) == local.bytes


def test_the_files_are_only_their_owners_where_new_files_are(cache: Artifacts, tmp_path: Path) -> None:
    wanted = version(make_package(tmp_path / "package", b"x" * 2 * SMALL))
    before = os.umask(0o077)
    try:
        path = cache.fetch(wanted).path
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (path / "MLmodel", path / "data" / "weights")} == {
        0o400
    }


def test_an_edit_of_the_source_does_not_reach_the_cache(cache: Artifacts, tmp_path: Path) -> None:
    package = make_package(tmp_path / "package")
    local = cache.fetch(version(package))
    with (package / "data" / "weights").open("r+b") as handle:
        handle.write(b"two")
    assert (local.path / "data" / "weights").read_bytes() == b"one"


def test_what_is_cached_needs_no_source(cache: Artifacts, tmp_path: Path) -> None:
    wanted = version(make_package(tmp_path / "package"))
    first = cache.fetch(wanted)
    (tmp_path / "package").rename(tmp_path / "gone")
    assert cache.fetch(wanted).path == first.path
    again = Artifacts(tmp_path / "cache", disk_limit=100 * MB)  # a restart
    assert again.fetch(wanted).path == first.path
    assert again.bytes() == first.bytes


def test_without_a_digest_the_files_decide(cache: Artifacts, tmp_path: Path) -> None:
    package = make_package(tmp_path / "package")
    plain = version(package, digested=False)
    first = cache.fetch(plain)
    assert first.digest == digest(package)
    assert cache.fetch(plain).path == first.path
    (package / "data" / "weights").write_bytes(b"two")
    second = cache.fetch(plain)
    assert second.digest == digest(package) != first.digest
    assert len(entries(tmp_path / "cache")) == 2


def test_a_wrong_digest_is_refused_and_nothing_is_kept(cache: Artifacts, tmp_path: Path) -> None:
    package = make_package(tmp_path / "package")
    wanted = Version("iris", "3", str(package), "sha256:" + "0" * 64)
    with pytest.raises(ArtifactError) as error:
        cache.fetch(wanted)
    expected = (
        f"digest mismatch of iris/3: the registry has {wanted.digest}, the files have {digest(package)}"
    )
    assert error.value.public == expected
    assert entries(tmp_path / "cache") == []
    assert not under_way(tmp_path / "cache")


@pytest.mark.parametrize("source", ["{tmp}/absent", "file://{tmp}/absent", "{tmp}/package/MLmodel"])
def test_a_directory_that_is_not_there(source: str, cache: Artifacts, tmp_path: Path) -> None:
    make_package(tmp_path / "package")
    with pytest.raises(ArtifactError) as error:
        cache.fetch(Version("iris", "1", source.format(tmp=tmp_path)))
    assert error.value.public == "the directory of iris/1 does not exist"
    assert str(tmp_path) in str(error.value)


def test_a_file_uri_is_decoded(cache: Artifacts, tmp_path: Path) -> None:
    package = make_package(tmp_path / "a b%")
    assert cache.fetch(Version("iris", "1", package.as_uri())).digest == digest(package)


def test_a_link_inside_is_copied_as_its_file(cache: Artifacts, tmp_path: Path) -> None:
    package = make_package(tmp_path / "package")
    (package / "alias").symlink_to("data/weights")
    local = cache.fetch(version(package))
    assert not (local.path / "alias").is_symlink()
    assert (local.path / "alias").read_bytes() == b"one"


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda p: (p / "x").symlink_to("/etc/passwd"), "x: is a link that leaves the package"),
        (lambda p: (p / "x").symlink_to("nowhere"), "x: is a link that leads nowhere"),
        (lambda p: (p / "x").symlink_to("x"), "x: is a link that leads nowhere"),
        (lambda p: (p / "x").symlink_to("data"), "x: is a link to a directory"),
    ],
)
def test_what_a_package_must_not_hold(make: Any, problem: str, cache: Artifacts, tmp_path: Path) -> None:
    package = make_package(tmp_path / "package")
    make(package)
    with pytest.raises(ArtifactError) as error:
        cache.fetch(Version("iris", "1", str(package)))
    assert error.value.public == f"the files of iris/1 cannot be used: {problem}"
    assert entries(tmp_path / "cache") == []


@pytest.mark.parametrize("swapped", ["MLmodel", "data"])
def test_a_link_that_takes_a_files_place_while_it_is_copied_is_not_followed(
    swapped: str, tmp_path: Path
) -> None:
    package, secret = make_package(tmp_path / "package"), make_package(tmp_path / "secret")
    wanted = version(package)
    source = Sources().open(wanted)
    files = source.files(wanted)
    os.rename(package / swapped, tmp_path / "gone")
    (package / swapped).symlink_to(secret / swapped)
    (tmp_path / "to").mkdir()
    with pytest.raises(OSError, match="a link leads elsewhere"):
        source.copy(wanted, files, tmp_path / "to", room=lambda count: None, meter=Meter(files))


def test_a_link_that_takes_the_directorys_place_after_the_check_is_not_followed(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    package, secret = make_package(allowed / "package"), make_package(tmp_path / "secret")
    wanted = version(package)
    source = Sources([str(allowed)]).open(wanted)
    os.rename(package, tmp_path / "gone")
    package.symlink_to(secret)
    (tmp_path / "to").mkdir()
    files = source.files(wanted)
    with pytest.raises(OSError, match="a link leads elsewhere"):
        source.copy(wanted, files, tmp_path / "to", room=lambda count: None, meter=Meter(files))


def test_a_pipe_is_not_part_of_a_package_for_the_digest_and_for_the_copy(
    cache: Artifacts, tmp_path: Path
) -> None:
    package = make_package(tmp_path / "package")
    wanted = version(package)
    os.mkfifo(package / "data" / "x")
    assert digest(package) == wanted.digest
    assert not (cache.fetch(wanted).path / "data" / "x").exists()


def test_threads_that_want_the_same_copy_it_once(cache: Artifacts, tmp_path: Path) -> None:
    wanted = version(make_package(tmp_path / "package", b"x" * MB))
    barrier = threading.Barrier(4)
    found: list[Local] = []

    def want() -> None:
        barrier.wait(30)
        found.append(cache.fetch(wanted))

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({local.path for local in found}) == 1
    assert len(found) == 4


def test_a_damaged_entry_is_fetched_again_after_a_restart(cache: Artifacts, tmp_path: Path) -> None:
    wanted = version(make_package(tmp_path / "package"))
    weights = cache.fetch(wanted).path / "data" / "weights"
    gc.collect()
    weights.chmod(0o644)
    weights.write_bytes(b"")  # what a power cut leaves
    local = Artifacts(tmp_path / "cache", disk_limit=100 * MB).fetch(wanted)
    assert digest(local.path) == wanted.digest
    assert not under_way(tmp_path / "cache")


def test_a_lock_is_closed_once_when_a_damaged_entry_cannot_be_removed(
    cache: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = version(make_package(tmp_path / "package"))
    weights = cache.fetch(wanted).path / "data" / "weights"
    gc.collect()
    weights.chmod(0o644)
    weights.write_bytes(b"")
    others = []

    def full(*args: Any) -> bool:
        others.append(os.open(os.devnull, os.O_RDONLY))  # takes the number of what was closed
        raise OSError(errno.ENOSPC, "the disk is full")

    monkeypatch.setattr(cache, "_remove", full)
    with pytest.raises(ArtifactError):
        cache.find(wanted)
    (other,) = others
    os.close(other)  # raises if it was closed by another


def test_a_lost_mark_is_made_again(cache: Artifacts, tmp_path: Path) -> None:
    wanted = version(make_package(tmp_path / "package"))
    path = cache.fetch(wanted).path
    gc.collect()
    os.unlink(f"{path}.lock")
    assert cache.bytes() == files_bytes(path)
    assert cache.fetch(wanted).bytes == files_bytes(path)


KILLED = """
import os, signal, sys
from pathlib import Path
import fsspec
from fsspec.implementations.local import LocalFileSystem
from gateway.artifacts.cache import Artifacts
from gateway.artifacts.base import Meter
from gateway.artifacts.sources import Sources
from gateway.registries.base import Version

class Stuck(LocalFileSystem):  # a store that has given one file, and then nothing more
    protocol = "stuck"
    def get(self, remote, local, **options):
        super().get(remote[:1], local[:1])
        print("here", flush=True)
        signal.pause()

fsspec.register_implementation("stuck", Stuck)
Artifacts(Path(sys.argv[1]), disk_limit=10**8).fetch(Version("iris", "1", "stuck://" + sys.argv[2]))
"""


def test_a_download_that_was_killed_is_never_seen_and_swept_away(tmp_path: Path) -> None:
    package = make_package(tmp_path / "package")
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "cache"), str(package)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "here\n"
    living = Artifacts(tmp_path / "cache", disk_limit=100 * MB)
    assert len(under_way(tmp_path / "cache")) == 1  # its maker lives
    child.send_signal(signal.SIGKILL)
    child.wait(30)
    child.stdout.close()
    assert entries(tmp_path / "cache") == []
    living.fetch(version(package))
    assert not under_way(tmp_path / "cache")


# -- other stores


@pytest.fixture
def store(tmp_path: Path) -> Any:
    memory = fsspec.filesystem("memory")
    memory.put(str(make_package(tmp_path / "package")), "/bucket/iris", recursive=True)
    yield memory
    memory.rm("/bucket", recursive=True)


def test_a_package_comes_from_any_store_that_fsspec_reaches(
    cache: Artifacts, store: Any, tmp_path: Path
) -> None:
    store.pipe("/bucket/iris/__pycache__/x.pyc", b"covered by no digest")
    wanted = digest(tmp_path / "package")
    local = cache.fetch(Version("iris", "1", "memory://bucket/iris", wanted))
    assert local.digest == wanted
    assert not (local.path / "__pycache__").exists()
    assert cache.fetch(Version("iris", "2", "memory://bucket/iris")).path == local.path


def test_a_store_with_nothing_there(cache: Artifacts) -> None:
    with pytest.raises(ArtifactError) as error:
        cache.fetch(Version("iris", "1", "memory://secret@bucket/absent"))
    assert error.value.public == "the source of iris/1 holds no files"
    assert "secret" not in error.value.public


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("nonsense://bucket/x", "nonsense:// is not supported"),
        ("models:/iris/1", "models:/ is not supported"),
        ("hdfs://host/x", "pyarrow"),  # what fsspec says to install
    ],
)
def test_a_scheme_that_cannot_be_reached(source: str, reason: str, cache: Artifacts) -> None:
    if reason == "pyarrow" and importlib.util.find_spec("pyarrow"):
        reason = "hdfs"
    with pytest.raises(ArtifactError) as error:
        cache.fetch(Version("iris", "1", source))
    assert reason in error.value.public


class Hostile(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A store that does as its path says."""

    protocol = "hostile"
    cachable = False

    def find(self, path: str, **_: Any) -> dict[str, Any]:
        names = {"outside": "outside/../../escaped", "elsewhere": "/etc/passwd", "short": "short/file"}
        if path == "broken":
            raise RuntimeError("secret detail")
        return {names[path]: {"type": "file", "size": 10}}

    def get(self, remote: list[str], local: list[str], **_: Any) -> None:
        for path in local:
            Path(path).write_bytes(b"half")


@pytest.mark.parametrize(
    ("path", "public"),
    [
        ("outside", "the source of iris/1 lists a file outside of it"),
        ("elsewhere", "the source of iris/1 lists a file outside of it"),
        ("short", "a file of iris/1 is incomplete: file, 4 of 10 bytes"),
        ("broken", "cannot read the files of iris/1 from their source: RuntimeError"),
    ],
)
def test_a_store_is_not_trusted(path: str, public: str, cache: Artifacts, tmp_path: Path) -> None:
    fsspec.register_implementation("hostile", Hostile, clobber=True)
    with pytest.raises(ArtifactError) as error:
        cache.fetch(Version("iris", "1", f"hostile://{path}"))
    assert error.value.public == public
    assert entries(tmp_path / "cache") == []
    assert not under_way(tmp_path / "cache")


def test_a_full_disk_is_said(cache: Artifacts, tmp_path: Path) -> None:
    class Full(Hostile):
        protocol = "full"

        def find(self, path: str, **_: Any) -> dict[str, Any]:
            return {f"{path}/file": {"type": "file", "size": 1}}

        def get(self, remote: list[str], local: list[str], **_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    fsspec.register_implementation("full", Full, clobber=True)
    with pytest.raises(ArtifactError) as error:
        cache.fetch(Version("iris", "1", "full://x"))
    assert error.value.public == "the files of iris/1 do not fit on the disk of cache_dir"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_small_disk_that_is_full_and_then_read_only(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=True)
    try:
        cache = Artifacts(disk / "cache", disk_limit=100 * MB)
        small = version(make_package(tmp_path / "small", b"x" * 1000))
        with pytest.raises(ArtifactError) as full:
            cache.fetch(version(make_package(tmp_path / "large", b"x" * 4 * MB)))
        assert full.value.public == "the files of iris/1 do not fit on the disk of cache_dir"
        assert entries(disk / "cache") == []
        assert not under_way(disk / "cache")
        assert cache.fetch(small).bytes > 1000, "what fits is fetched afterwards"
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(ArtifactError) as refused:
            Artifacts(disk / "cache", disk_limit=100 * MB).fetch(
                version(make_package(tmp_path / "other", b"y" * 1000))
            )
        assert refused.value.public == "cannot write the files of iris/1 to cache_dir"
        assert Artifacts(disk / "cache", disk_limit=100 * MB).fetch(small).bytes > 1000, "what is there"
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_the_digest_is_the_contracts(cache: Artifacts, tmp_path: Path) -> None:
    package = make_package(tmp_path / "package")
    lines = []
    for name in ("MLmodel", "data/weights"):
        content = (package / name).read_bytes()
        lines.append(f"{hashlib.sha256(content).hexdigest()} {len(content)} {name}\n")
    expected = "sha256:" + hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    assert cache.fetch(version(package, digested=False)).digest == expected


def test_what_was_changed_in_the_cache_under_a_running_gateway_is_fetched_again(
    cache: Artifacts, tmp_path: Path
) -> None:
    wanted = version(make_package(tmp_path / "package"))
    local = cache.fetch(wanted)
    weights = local.path / "data" / "weights"
    times = weights.stat()
    weights.parent.chmod(0o700)
    weights.unlink()
    weights.write_bytes(b"two")  # as many bytes
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    del local
    gc.collect()
    assert cache.find(wanted) is None
    assert (cache.fetch(wanted).path / "data" / "weights").read_bytes() == b"one"


def test_what_did_not_change_is_not_hashed_again(
    cache: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = version(make_package(tmp_path / "package"))
    cache.fetch(wanted)
    monkeypatch.setattr("gateway.artifacts.cache._digest_or_none", lambda path: pytest.fail("hashed"))
    assert cache.find(wanted) is not None


def test_a_cache_that_is_removed_is_made_again(cache: Artifacts, tmp_path: Path) -> None:
    wanted = version(make_package(tmp_path / "package"))
    directory = cache.fetch(wanted).path.parent
    gc.collect()
    for path in directory.rglob("*"):
        path.chmod(0o700)
    shutil.rmtree(directory)
    assert cache.bytes() == 0
    assert (cache.fetch(wanted).path / "data" / "weights").read_bytes() == b"one"


def test_a_fetch_reads_no_other_entry(
    cache: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    size_of = Artifacts._size_of

    def counted(self: Artifacts, name: str) -> int:
        read.append(name)
        return size_of(self, name)

    monkeypatch.setattr(Artifacts, "_size_of", counted)
    kept = [cache.fetch(version(make_package(tmp_path / str(n), str(n).encode()))) for n in range(10)]
    assert cache.bytes() == sum(local.bytes for local in kept)
    assert read == []
    other = Artifacts(tmp_path / "cache", disk_limit=100 * MB)
    assert [other.bytes(), other.bytes()] == [cache.bytes()] * 2
    assert len(read) == len(set(read)) == len(kept)
