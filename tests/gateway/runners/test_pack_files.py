"""The files of a pack: linked or copied apart from the event loop, readable for the pack, kept for the next
load, and removed."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from gateway.runners import linked
from tests.support.packs import PackBench, answered_by, scaled
from tests.support.processes import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="model processes need Linux")


def is_gone(directory: str) -> bool:
    return not os.path.exists(directory)


@pytest.mark.anyio
async def test_files_that_cannot_be_linked_are_not_copied_by_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: PackBench
) -> None:
    copiers: set[threading.Thread] = set()
    copy = shutil.copyfile

    def refused(*args: Any, **options: Any) -> None:
        raise OSError(errno.EXDEV, "another disk")

    def copied(*args: Any, **options: Any) -> Any:
        copiers.add(threading.current_thread())
        return copy(*args, **options)

    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(shutil, "copyfile", copied)
    runner = await bench.started(scaled(tmp_path / "p", 2))
    assert runner.isolation == "pack"
    assert await answered_by(runner, 3) == [6]
    assert copiers
    assert threading.main_thread() not in copiers


@pytest.mark.anyio
async def test_the_files_of_a_pack_can_be_read_by_its_user_whatever_the_umask(
    tmp_path: Path, bench: PackBench
) -> None:
    package = scaled(tmp_path / "p", 2)
    before = os.umask(0o077)
    try:
        await bench.started(package)
    finally:
        os.umask(before)
    (process,) = bench.pack.processes
    for directory, _, _ in os.walk(process.linked.directory):
        if not directory.endswith("__pycache__"):  # the model's own
            assert stat.S_IMODE(os.stat(directory).st_mode) == 0o755


@pytest.mark.anyio
async def test_a_load_whose_files_cannot_be_copied_leaves_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: PackBench
) -> None:
    await bench.started(scaled(tmp_path / "first", 1))
    (process,) = bench.pack.processes
    kept = os.listdir(process.linked.directory)

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    runner = await bench.started(scaled(tmp_path / "second", 2))
    assert runner.isolation == "process"
    assert await answered_by(runner, 3) == [6]
    assert os.listdir(process.linked.directory) == kept


@pytest.mark.parametrize("cancellations", [1, 2])
@pytest.mark.anyio
async def test_a_process_that_ends_while_files_are_copied_leaves_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: PackBench, cancellations: int
) -> None:
    await bench.started(scaled(tmp_path / "first", 1))
    (process,) = bench.pack.processes
    begun, go = threading.Event(), threading.Event()
    link = linked.link

    def held(package: str, directory: str) -> linked.Made:
        begun.set()
        go.wait(60)
        return link(package, directory)

    monkeypatch.setattr(linked, "link", held)
    loading = asyncio.ensure_future(process.load(bench.runner(scaled(tmp_path / "second", 2)), 7))
    await asyncio.to_thread(begun.wait, 60)
    for _ in range(cancellations):
        loading.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await loading
    ending = asyncio.ensure_future(process.end())
    await until(lambda: process.worker.gone)
    assert not is_gone(process.linked.directory)
    go.set()
    await ending
    assert is_gone(process.linked.directory)


@pytest.mark.anyio
async def test_a_model_that_comes_back_finds_its_files_linked(tmp_path: Path, bench: PackBench) -> None:
    package = scaled(tmp_path / "p", 2)
    (runner, first) = (await bench.started(package), await bench.started(scaled(tmp_path / "first", 1)))
    (process,) = bench.pack.processes
    before = os.stat(package.path / "MLmodel")
    await runner.close()
    again = await bench.started(package)
    assert os.stat(package.path / "MLmodel").st_ctime_ns == before.st_ctime_ns
    assert len(os.listdir(process.linked.directory)) == 2
    assert [await answered_by(one, 3) for one in (again, first)] == [[6], [3]]


@pytest.mark.anyio
async def test_a_package_that_was_fetched_again_is_linked_again(tmp_path: Path, bench: PackBench) -> None:
    """Also where the new directory gets the number of the old one."""
    package = scaled(tmp_path / "p", 2)
    await (await bench.started(package)).close()
    (process,) = bench.pack.processes
    numbers = set()
    for factor in (5, 7, 9):
        numbers.add(os.stat(package.path).st_ino)
        shutil.rmtree(package.path)
        runner = await bench.started(scaled(package.path, factor))
        assert await answered_by(runner, 3) == [3 * factor]
        await runner.close()
    assert len(os.listdir(process.linked.directory)) == 4


@pytest.mark.anyio
async def test_links_without_a_model_end_by_age_and_by_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: PackBench
) -> None:
    await bench.started(scaled(tmp_path / "0", 1))
    (process,) = bench.pack.processes
    for number in (1, 2, 3):
        await (await bench.started(scaled(tmp_path / str(number), number))).close()
    links = process.linked
    links.tend()
    assert repr(links) == "<Linked 4 packages, 3 unused>"
    one = max(unused.bytes for unused in links._unused.values())
    monkeypatch.setattr(linked, "KEPT_BYTES", 2 * one)
    links.tend()
    assert repr(links) == "<Linked 3 packages, 2 unused>"
    monkeypatch.setattr(linked, "KEPT_SECONDS", 0.0)
    links.tend()
    assert repr(links) == "<Linked 1 packages, 0 unused>"
    await until(lambda: len(os.listdir(links.directory)) == 1)


@pytest.mark.anyio
async def test_copies_go_with_their_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: PackBench
) -> None:
    def refused(*args: Any, **options: Any) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", refused)
    await bench.started(scaled(tmp_path / "stays", 1))
    (process,) = bench.pack.processes
    await (await bench.started(scaled(tmp_path / "goes", 2))).close()
    await until(lambda: len(os.listdir(process.linked.directory)) == 1)


@pytest.mark.anyio
async def test_links_that_failed_while_no_load_waited_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: PackBench
) -> None:
    await bench.started(scaled(tmp_path / "first", 1))
    (process,) = bench.pack.processes
    package = scaled(tmp_path / "p", 2)
    begun, go = threading.Event(), threading.Event()
    link = linked.link

    def full(package: str, directory: str) -> linked.Made:
        begun.set()
        go.wait(60)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(linked, "link", full)
    loading = asyncio.ensure_future(process.load(bench.runner(package), 7))
    await asyncio.to_thread(begun.wait, 60)
    loading.cancel()
    await asyncio.wait({loading})
    (unused,) = process.linked._unused.values()
    go.set()
    await asyncio.wait({unused.making})
    monkeypatch.setattr(linked, "link", link)
    runner = await bench.started(package)
    assert runner.isolation == "pack"
    assert await answered_by(runner, 3) == [6]


@pytest.mark.anyio
async def test_links_of_many_models_that_left_are_removed_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: PackBench
) -> None:
    monkeypatch.setattr(linked, "KEPT", 1)
    monkeypatch.setattr(linked, "_AT_ONCE", 2)
    removed: list[int] = []
    remove = linked._remove_all

    def counted(directories: list[str]) -> None:
        remove(directories)
        removed.append(len(directories))

    monkeypatch.setattr(linked, "_remove_all", counted)
    runners = [await bench.started(scaled(tmp_path / str(number), number)) for number in (1, 2, 3, 4)]
    (process,) = bench.pack.processes
    for runner in runners[1:]:
        await runner.close()
    await until(lambda: removed == [2])
    assert len(os.listdir(process.linked.directory)) == 2
    assert await answered_by(runners[0], 3) == [3]
    back = await bench.started(scaled(tmp_path / "again", 2))
    assert await answered_by(back, 3) == [6]


@pytest.mark.anyio
async def test_a_pack_that_crashes_leaves_no_files_behind(tmp_path: Path, bench: PackBench) -> None:
    await bench.started(scaled(tmp_path / "1", 1))
    (process,) = bench.pack.processes
    os.kill(process.worker.pid, signal.SIGKILL)
    await until(lambda: is_gone(process.linked.directory))
