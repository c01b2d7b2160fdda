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

    def held(package: str, directory: str) -> None:
        begun.set()
        go.wait(60)
        link(package, directory)

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
    package = scaled(tmp_path / "p", 2)
    await (await bench.started(package)).close()
    (process,) = bench.pack.processes
    os.rename(package.path, tmp_path / "damaged")
    assert await answered_by(await bench.started(scaled(tmp_path / "p", 5)), 3) == [15]
    assert len(os.listdir(process.linked.directory)) == 2


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
