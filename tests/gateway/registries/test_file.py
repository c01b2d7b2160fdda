from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from gateway.registries.base import (
    Alias,
    Move,
    NotInRegistry,
    PreconditionFailed,
    RegistryError,
    RegistryInvalid,
    RegistryReadOnly,
    RegistryUnavailable,
    Version,
)
from gateway.registries.file import FileRegistry
from gateway.staging import PREFIX
from loaders.package import digest

THREE = """\
# kept by team A
version: 1
models:
  iris:
    versions:
      1: {source: models/iris/1}  # the first
      2: {source: models/iris/2}
      3: {source: models/iris/3}
    aliases: {champion: 1}
"""


def make_package(directory: Path, content: str = "one") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "MLmodel").write_text("flavors: {python_function: {loader_module: mine}}\n")
    (directory / "data").mkdir(exist_ok=True)
    (directory / "data" / "weights").write_text(content)
    return directory


def add(registry: FileRegistry, package: Path, name: str = "iris", **more: Any) -> Version:
    return registry.add_version(name, str(package), digest(package), **more)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "registry.yaml"
    path.write_text(THREE)
    return path


def age(path: Path) -> None:
    """Makes a file old enough that no writer can still be writing it."""
    os.utime(path, (1e9, 1e9))


# -- reading


def test_a_missing_file_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(RegistryUnavailable, match="does not exist"):
        FileRegistry(str(tmp_path / "registry.yaml")).read()


def test_a_directory_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(RegistryUnavailable, match="is a directory: name the registry file in it"):
        FileRegistry(str(tmp_path)).read()


def test_an_unchanged_file_gives_the_same_snapshot(file: Path) -> None:
    registry = FileRegistry(str(file))
    first = registry.read()
    assert registry.read() is first
    file.touch()
    assert registry.read() is first
    assert FileRegistry(f"file://{file}").read() == first


def test_a_write_in_place_is_seen_even_with_the_same_size_and_time(file: Path) -> None:
    registry = FileRegistry(str(file))
    age(file)
    before = registry.read()
    status = file.stat()
    with file.open("r+") as handle:
        handle.write(THREE.replace("champion: 1", "champion: 2"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = registry.read()
    assert (file.stat().st_mtime_ns, file.stat().st_size) == (status.st_mtime_ns, status.st_size)
    assert after.models["iris"].aliases["champion"].version == "2"
    assert after.stamp != before.stamp


def test_an_editors_rename_is_seen(file: Path) -> None:
    registry = FileRegistry(str(file))
    registry.read()
    new = file.with_name("registry.yaml~")
    new.write_text(THREE.replace("champion: 1", "champion: 3"))
    new.rename(file)
    assert registry.read().models["iris"].aliases["champion"].version == "3"


def mount_config_map(mount: Path, text: str, stamp: str) -> None:
    """Does what the kubelet does for each update of a ConfigMap."""
    (mount / f"..{stamp}").mkdir(parents=True)
    (mount / f"..{stamp}" / "registry.yaml").write_text(text)
    (mount / "..data_tmp").symlink_to(f"..{stamp}")
    (mount / "..data_tmp").rename(mount / "..data")
    if not (mount / "registry.yaml").is_symlink():
        (mount / "registry.yaml").symlink_to("..data/registry.yaml")


def test_the_swap_of_a_config_map_is_seen(tmp_path: Path) -> None:
    mount_config_map(tmp_path, THREE, "2026_1")
    registry = FileRegistry(str(tmp_path / "registry.yaml"))
    before = registry.read()
    identity = registry.identity
    mount_config_map(tmp_path, THREE.replace("champion: 1", "champion: 2"), "2026_2")
    after = registry.read()
    assert before.models["iris"].aliases["champion"].version == "1"
    assert after.models["iris"].aliases["champion"].version == "2"
    # Relative sources stay where the mount is, whatever its hidden directories are called.
    assert after.models["iris"].versions["1"].source == str(tmp_path / "models/iris/1")
    assert FileRegistry(registry.target).identity == identity


def test_a_config_map_is_not_written(tmp_path: Path) -> None:
    mount_config_map(tmp_path, THREE, "2026_1")
    registry = FileRegistry(str(tmp_path / "registry.yaml"))
    assert not registry.writable
    with pytest.raises(RegistryReadOnly, match="mounted from a ConfigMap: change it there"):
        registry.move(Move("iris", "champion", "2"))
    with pytest.raises(RegistryReadOnly):
        add(registry, make_package(tmp_path / "new"))
    assert (tmp_path / "registry.yaml").read_text() == THREE


def test_a_half_written_file_is_invalid_and_whole_again_later(file: Path) -> None:
    registry = FileRegistry(str(file))
    age(file)
    registry.read()
    file.write_text(THREE[: THREE.index("champion: 1")])
    age(file)
    with pytest.raises(RegistryInvalid, match=r"registry\.yaml is not a valid registry: line \d+"):
        registry.read()
    file.write_text(THREE)
    age(file)
    assert registry.read().models["iris"].aliases["champion"].version == "1"


def test_a_file_that_is_just_being_written_is_read_when_it_rests(tmp_path: Path) -> None:
    file = tmp_path / "registry.yaml"
    file.write_text("version: 1\nmodels:\n  a: {}\n")  # valid, and not all of it
    rest = iter(["  b: {}\n", "  c: {}\n"])

    def pause(_: float) -> None:
        with file.open("a") as handle:
            handle.write(next(rest, ""))

    assert set(FileRegistry(str(file), pause=pause).read().models) == {"a", "b", "c"}


def test_a_file_that_never_rests_is_unavailable(tmp_path: Path) -> None:
    file = tmp_path / "registry.yaml"
    file.write_text("version: 1\n")

    def pause(_: float) -> None:
        with file.open("a") as handle:
            handle.write("# more\n")

    with pytest.raises(RegistryUnavailable, match="changes continuously"):
        FileRegistry(str(file), pause=pause).read()


def test_equal_files_have_one_identity(file: Path) -> None:
    link = file.parent / "link"
    link.symlink_to(file.parent)
    other = file.parent / "other.yaml"
    other.symlink_to("registry.yaml")
    identity = FileRegistry(str(file)).identity
    assert FileRegistry(str(link / "registry.yaml")).identity == identity
    assert FileRegistry(str(other)).identity == identity
    assert FileRegistry(str(file.parent / "another.yaml")).identity != identity


# -- aliases


def test_moving_an_alias_changes_its_line_alone(file: Path) -> None:
    registry = FileRegistry(str(file))
    snapshot = registry.move(Move("iris", "champion", "2", expect="1"))
    assert snapshot.models["iris"].aliases["champion"] == Alias("2", ("1",))
    assert registry.read() is snapshot
    assert file.read_text() == THREE.replace("champion: 1", "champion: {version: 2, previous: 1}")
    registry.move(Move("iris", "champion", "3"))
    assert "champion: {version: 3, previous: [2, 1]}" in file.read_text()
    registry.move(Move("iris", "challenger", "1", expect=None))
    assert "previous: [2, 1]}, challenger: 1}" in file.read_text()


def test_going_back_forgets_what_was_left(file: Path) -> None:
    registry = FileRegistry(str(file))
    for version in ("2", "3"):
        registry.move(Move("iris", "champion", version))
    back = registry.move(Move("iris", "champion", "2", back=True))
    assert back.models["iris"].aliases["champion"] == Alias("2", ("1",), back=True)
    text = file.read_text()
    file.write_text(text.replace("champion: {version: 2", "champion: {version: 3"))
    assert file.read_text() != text
    by_hand = registry.read().models["iris"].aliases["champion"]
    assert (by_hand.version, by_hand.back) == ("3", False)  # a person moves it forward
    back = registry.move(Move("iris", "champion", "1", back=True))
    assert back.models["iris"].aliases["champion"] == Alias("1", back=True)
    assert back == registry.read()


def test_at_most_ten_earlier_versions_are_kept(file: Path) -> None:
    registry = FileRegistry(str(file))
    for i in range(12):
        snapshot = registry.move(Move("iris", "champion", "23"[i % 2]))
    assert snapshot.models["iris"].aliases["champion"].previous == tuple("2323232323")


def test_the_same_version_again_writes_nothing(file: Path) -> None:
    registry = FileRegistry(str(file))
    registry.move(Move("iris", "champion", "2", forced=True))
    assert "champion: {version: 2, previous: 1, forced: true}" in file.read_text()
    before = file.stat()
    registry.move(Move("iris", "champion", "2"))
    assert file.stat().st_ino == before.st_ino
    assert registry.move(Move("iris", "champion", "3")).models["iris"].aliases["champion"] == Alias(
        "3", ("2", "1")
    )


def test_the_users_own_keys_of_an_alias_stay(file: Path) -> None:
    written = "champion: {version: 1, last_good: 1, x-why: asked for}  # do not touch"
    file.write_text(THREE.replace("champion: 1}", f"\n      {written}\n    }}").replace("  #", " #"))
    FileRegistry(str(file)).move(Move("iris", "champion", "2"))
    assert "{version: 2, last_good: 1, x-why: asked for, previous: 1} # do not touch" in file.read_text()


def test_an_expectation_that_fails_writes_nothing(file: Path) -> None:
    registry = FileRegistry(str(file))
    cases: list[tuple[dict[str, Any], str | None]] = [({"expect": "2"}, "1"), ({"expect": None}, "1")]
    for conditions, actual in cases:
        with pytest.raises(PreconditionFailed) as error:
            registry.move(Move("iris", "champion", "3", **conditions))
        assert error.value.actual == actual
    with pytest.raises(PreconditionFailed, match="does not exist") as error:
        registry.move(Move("iris", "new", "3", expect="1"))
    assert error.value.actual is None
    assert file.read_text() == THREE


def test_what_is_not_there_cannot_be_moved(file: Path) -> None:
    registry = FileRegistry(str(file))
    attempts: list[tuple[Callable[[], object], str]] = [
        (lambda: registry.move(Move("irs", "champion", "1")), "MODEL_NOT_FOUND"),
        (lambda: registry.move(Move("iris", "champion", "9")), "VERSION_NOT_FOUND"),
        (lambda: registry.delete_alias("iris", "nobody"), "ALIAS_NOT_FOUND"),
        (lambda: registry.delete_alias("irs", "champion"), "MODEL_NOT_FOUND"),
    ]
    for attempt, code in attempts:
        with pytest.raises(NotInRegistry) as error:
            attempt()
        assert error.value.code == code
    assert file.read_text() == THREE


def test_an_alias_is_deleted(file: Path) -> None:
    registry = FileRegistry(str(file))
    assert registry.delete_alias("iris", "champion").models["iris"].aliases == {}
    assert file.read_text() == THREE.replace("{champion: 1}", "{}")


def test_json_stays_json(tmp_path: Path) -> None:
    file = tmp_path / "registry.json"
    value = {
        "models": {"iris": {"versions": {"1": {"source": "a"}, "2": {"source": "b"}}, "aliases": {"c": 1}}}
    }
    file.write_text(json.dumps(value, indent=4))
    FileRegistry(str(file)).move(Move("iris", "c", "2"))
    value["models"]["iris"]["aliases"] = {"c": {"version": "2", "previous": "1"}}  # type: ignore[dict-item]
    assert file.read_text() == json.dumps(value, indent=4) + "\n"


def test_comments_are_lost_only_with_a_warning(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text(
        "models:\n  a: &a {versions: {1: {source: x}, 2: {source: x}}, aliases: {c: 1}}\n  b: *a  # same\n"
    )
    with caplog.at_level(logging.WARNING):
        snapshot = FileRegistry(str(file)).move(Move("b", "c", "2"))
    assert [m.aliases["c"].version for m in snapshot.models.values()] == ["1", "2"]
    assert "without comments" in caplog.text


def test_a_read_only_file_is_not_written(file: Path) -> None:
    file.chmod(0o444)
    registry = FileRegistry(str(file))
    assert not registry.writable
    with pytest.raises(RegistryReadOnly, match="is read-only here: change it where it comes from"):
        registry.delete_alias("iris", "champion")
    file.chmod(0o644)
    assert registry.writable


def test_the_remains_of_dead_writers_are_removed(file: Path) -> None:
    remains = file.with_name(".registry.yaml.123.tmp")
    remains.write_text("half")
    FileRegistry(str(file)).move(Move("iris", "champion", "2"))
    assert not remains.exists()
    assert not list(file.parent.glob("*.tmp"))


def test_an_invalid_file_is_not_written(file: Path) -> None:
    file.write_text(THREE + "oops: 1\n")
    with pytest.raises(RegistryInvalid, match="oops: unknown key"):
        FileRegistry(str(file)).move(Move("iris", "champion", "2"))


# -- versions


def test_the_first_version_makes_the_registry(tmp_path: Path) -> None:
    registry = FileRegistry(
        str(tmp_path / "new" / "registry.yaml"),
        create=True,
        now=lambda: datetime(2026, 11, 21, 20, tzinfo=UTC),
    )
    package = make_package(tmp_path / "package")
    version = add(registry, package, alias="champion", tags={"git": "abc"})
    stored = tmp_path / "new" / "models" / "iris" / "1"
    assert version == Version("iris", "1", str(stored), digest(package), "2026-11-21T20:00:00Z")
    assert version.tags == {"git": "abc"}
    assert digest(stored) == digest(package)
    snapshot = FileRegistry(registry.target).read()
    assert snapshot.models["iris"].versions == {"1": version}
    assert snapshot.models["iris"].aliases == {"champion": Alias("1")}
    (package / "data" / "weights").write_text("edited later")
    assert digest(stored) == version.digest


def test_without_leave_a_missing_registry_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(RegistryUnavailable, match="does not exist"):
        add(FileRegistry(str(tmp_path / "registry.yaml")), make_package(tmp_path / "package"))
    assert not (tmp_path / "models").exists()


def test_the_same_content_is_the_same_version(tmp_path: Path) -> None:
    registry = FileRegistry(str(tmp_path / "registry.json"), create=True)
    one, two = make_package(tmp_path / "a", "one"), make_package(tmp_path / "b", "two")
    assert add(registry, one).version == "1"
    assert add(registry, two, alias="champion").version == "2"
    assert add(registry, one, alias="champion").version == "1"
    assert registry.read().models["iris"].aliases["champion"] == Alias("1", ("2",))
    assert sorted(os.listdir(tmp_path / "models" / "iris")) == ["1", "2"]
    assert os.listdir(tmp_path / "models") == ["iris"]


def test_a_number_is_never_used_twice(tmp_path: Path) -> None:
    registry = FileRegistry(str(tmp_path / "registry.yaml"), create=True)
    add(registry, make_package(tmp_path / "a", "one"))
    (tmp_path / "models" / "iris" / "7").mkdir()  # files without an entry: of a crash, or of an entry removed
    assert add(registry, make_package(tmp_path / "b", "two")).version == "8"
    assert (tmp_path / "models" / "iris" / "7").is_dir()


@pytest.mark.parametrize(
    "name", ["..", ".hidden", "a b", "ключ", "50%", "a\\b", "n" * 255, "ü" * 255, 'con*?<>|"']
)
def test_any_name_has_a_directory_of_its_own(name: str, tmp_path: Path) -> None:
    registry = FileRegistry(str(tmp_path / "registry.yaml"), create=True)
    version = add(registry, make_package(tmp_path / "package"), name)
    assert FileRegistry(registry.target).read().models[name].versions["1"] == version
    assert Path(version.source).parents[1] == tmp_path / "models"
    assert digest(version.source) == version.digest


def test_a_package_is_what_its_digest_says(tmp_path: Path) -> None:
    package = make_package(tmp_path / "package")
    was = digest(package)
    (package / "data" / "weights").write_text("changed")
    registry = FileRegistry(str(tmp_path / "registry.yaml"), create=True)
    with pytest.raises(RegistryError, match="changed while it was copied"):
        registry.add_version("iris", str(package), was)
    assert not (tmp_path / "registry.yaml").exists()
    assert os.listdir(tmp_path / "models") == []


def test_a_link_that_leaves_the_package_is_refused(tmp_path: Path) -> None:
    package = make_package(tmp_path / "package")
    was = digest(package)
    (package / "data" / "secret").symlink_to("/etc/passwd")
    with pytest.raises(RegistryError, match="data/secret: is a link that leaves the package"):
        FileRegistry(str(tmp_path / "registry.yaml"), create=True).add_version("iris", str(package), was)


# -- several processes


def push_many(target: str, packages: list[str], barrier: Any) -> None:
    registry = FileRegistry(target, create=True)
    barrier.wait()
    for package in packages:
        add(registry, Path(package))


def test_two_processes_push_at_once_and_both_succeed(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    sets = [[str(make_package(tmp_path / f"{i}{j}", f"{i}{j}")) for j in range(5)] for i in range(2)]
    target = str(tmp_path / "registry.yaml")
    processes = [spawn.Process(target=push_many, args=(target, packages, barrier)) for packages in sets]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    versions = FileRegistry(target).read().models["iris"].versions
    assert set(versions) == {str(i) for i in range(1, 11)}
    assert {digest(v.source) for v in versions.values()} == {digest(p) for packages in sets for p in packages}
    assert all(digest(v.source) == v.digest for v in versions.values())


def race(target: str, version: str, barrier: Any, results: Any) -> None:
    registry = FileRegistry(target)
    barrier.wait()
    try:
        registry.move(Move("iris", "champion", version, expect="1"))
        results.put(version)
    except PreconditionFailed:
        results.put(None)


def test_of_two_who_expect_the_same_one_wins(file: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(2), spawn.Queue()
    processes = [spawn.Process(target=race, args=(str(file), version, barrier, results)) for version in "23"]
    for process in processes:
        process.start()
    answers = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    winner = FileRegistry(str(file)).read().models["iris"].aliases["champion"].version
    assert sorted(answers, key=str) == sorted([None, winner], key=str)


def killed_at(script: str, *arguments: str) -> None:
    """Runs Python that prints a line when it has come to the point, and kills it there."""
    child = subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "here\n"
    child.send_signal(signal.SIGKILL)
    child.wait(30)
    child.stdout.close()


BEFORE_THE_ENTRY = """
import signal, sys
from gateway.registries.file import FileRegistry
from loaders.package import digest

def now():  # called when the files are in place, before the entry is written
    print("here", flush=True)
    signal.pause()

FileRegistry(sys.argv[1], now=now).add_version("iris", sys.argv[2], digest(sys.argv[2]), alias="champion")
"""

WHILE_COPYING = """
import signal, sys
from pathlib import Path
from gateway.staging import Staging

staged = Staging(Path(sys.argv[1]))
(staged.path / "half").write_text("half")
print("here", flush=True)
signal.pause()
"""


def test_a_push_killed_before_its_entry_leaves_a_valid_registry(tmp_path: Path) -> None:
    file = tmp_path / "registry.yaml"
    registry = FileRegistry(str(file), create=True)
    add(registry, make_package(tmp_path / "a", "one"), alias="champion")
    before = file.read_bytes()
    package = make_package(tmp_path / "b", "two")
    killed_at(BEFORE_THE_ENTRY, str(file), str(package))
    assert file.read_bytes() == before
    assert sorted(os.listdir(tmp_path / "models" / "iris")) == ["1", "2"]  # files, and nobody who names them
    assert add(registry, package, alias="champion").version == "3"
    versions = registry.read().models["iris"].versions
    assert all(digest(version.source) == version.digest for version in versions.values())


def test_what_a_killed_push_was_copying_is_swept_away_once_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = FileRegistry(str(tmp_path / "registry.yaml"), create=True)
    add(registry, make_package(tmp_path / "a", "one"))
    killed_at(WHILE_COPYING, str(tmp_path / "models"))
    assert any(name.startswith(PREFIX) for name in os.listdir(tmp_path / "models"))
    add(registry, make_package(tmp_path / "b", "two"))
    assert any(name.startswith(PREFIX) for name in os.listdir(tmp_path / "models"))
    monkeypatch.setattr("gateway.registries.file.STALE_SECONDS", 1e-6)
    add(registry, make_package(tmp_path / "c", "three"))
    assert os.listdir(tmp_path / "models") == ["iris"]
