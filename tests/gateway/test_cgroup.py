from __future__ import annotations

from pathlib import Path

import pytest

from gateway.cgroup import memory_total, memory_usages

GIB = 1024**3


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:       16777216 kB\nMemFree: 1 kB\n")
    return tmp_path / "proc"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "cgroup").mkdir()
    return tmp_path / "cgroup"


def limit(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{value}\n")


def test_without_a_group_it_is_the_machines(root: Path, proc: Path) -> None:
    assert memory_total(root, proc) == 16 * GIB


def test_version_2_in_a_container(root: Path, proc: Path) -> None:
    (proc / "self/cgroup").write_text("0::/\n")
    limit(root / "memory.max", 2 * GIB)
    assert memory_total(root, proc) == 2 * GIB


def test_version_2_takes_the_tightest_of_the_groups_above(root: Path, proc: Path) -> None:
    (proc / "self/cgroup").write_text("0::/pods/one/main\n")
    limit(root / "pods/one/main/memory.max", "max")
    limit(root / "pods/one/memory.max", 3 * GIB)
    limit(root / "pods/memory.max", 8 * GIB)
    assert memory_total(root, proc) == 3 * GIB


def test_version_1(root: Path, proc: Path) -> None:
    (proc / "self/cgroup").write_text("5:cpu,cpuacct:/a\n4:memory:/a/b\n")
    limit(root / "memory/a/b/memory.limit_in_bytes", GIB)
    limit(root / "memory/memory.limit_in_bytes", 9223372036854771712)
    assert memory_total(root, proc) == GIB


def test_version_1_whose_path_is_the_hosts(root: Path, proc: Path) -> None:
    (proc / "self/cgroup").write_text("4:memory:/docker/abc\n")
    limit(root / "memory/memory.limit_in_bytes", 4 * GIB)
    assert memory_total(root, proc) == 4 * GIB


def test_a_limit_above_the_machine_is_none(root: Path, proc: Path) -> None:
    limit(root / "memory.max", 64 * GIB)
    assert memory_total(root, proc) == 16 * GIB


def test_a_strange_path_is_not_followed(root: Path, proc: Path, tmp_path: Path) -> None:
    (proc / "self/cgroup").write_text("0::/../other\n0::nonsense\nnonsense\n")
    limit(tmp_path / "other/memory.max", 1)
    assert memory_total(root, proc) == 16 * GIB


def test_this_machine_has_some() -> None:
    assert memory_total() > 64 * 1024**2


def test_a_small_container_on_a_busy_machine_is_seen(tmp_path: Path) -> None:
    """The machine may be nearer to its limit: a body must fit into the container all the same."""
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable: 2000000 kB\n")
    (tmp_path / "self" / "cgroup").write_text("0::/\n")
    (tmp_path / "memory.max").write_text(str(10**9))
    (tmp_path / "memory.current").write_text(str(3 * 10**8))
    assert {(usage.used, usage.limit) for usage in memory_usages(tmp_path, tmp_path)} == {
        (14_000_000 * 1024, 16_000_000 * 1024),
        (3 * 10**8, 10**9),
    }
