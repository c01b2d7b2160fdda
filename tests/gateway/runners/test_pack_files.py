"""The files of a pack: linked or copied apart from the event loop, readable for the pack, and removed."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from gateway.runners import places
from gateway.runners.base import RunnerCrashed
from tests.support.controlled import turns
from tests.support.packs import PackBench, answered_by, scaled
from tests.support.processes import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="model processes need Linux")


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
    for directory, _, _ in os.walk(process.directory):
        if not directory.endswith("__pycache__"):  # the model's own
            assert stat.S_IMODE(os.stat(directory).st_mode) == 0o755


@pytest.mark.anyio
async def test_a_load_whose_files_cannot_be_copied_leaves_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: PackBench
) -> None:
    await bench.started(scaled(tmp_path / "first", 1))
    (process,) = bench.pack.processes
    kept = os.listdir(process.directory)

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    runner = await bench.started(scaled(tmp_path / "second", 2))
    assert runner.isolation == "process"
    assert await answered_by(runner, 3) == [6]
    assert os.listdir(process.directory) == kept


@pytest.mark.parametrize("cancellations", [1, 2])
@pytest.mark.anyio
async def test_a_load_that_is_given_up_while_files_are_copied_leaves_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: PackBench, cancellations: int
) -> None:
    await bench.started(scaled(tmp_path / "first", 1))
    (process,) = bench.pack.processes
    kept = os.listdir(process.directory)
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()
    link = places.link

    def held(package: str, directory: str) -> None:
        begun.set()
        go.wait(60)
        link(package, directory)
        ended.set()

    monkeypatch.setattr(places, "link", held)
    loading = asyncio.ensure_future(process.load(bench.runner(scaled(tmp_path / "second", 2)), 7))
    await asyncio.to_thread(begun.wait, 60)
    for _ in range(cancellations):
        assert not loading.done()
        loading.cancel()
        await asyncio.sleep(0)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await loading
    await asyncio.to_thread(ended.wait, 60)
    await until(lambda: os.listdir(process.directory) == kept)


@pytest.mark.anyio
async def test_the_files_of_models_that_left_are_removed_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: PackBench
) -> None:
    first = await bench.started(scaled(tmp_path / "first", 1))
    (process,) = bench.pack.processes
    kept = os.listdir(process.directory)
    others = [await bench.started(scaled(tmp_path / str(number), number)) for number in (2, 3)]
    removed: list[int] = []
    remove = places._remove_all

    def counted(directories: list[str]) -> None:
        remove(directories)
        removed.append(len(directories))

    monkeypatch.setattr(places, "_remove_all", counted)
    for runner in others:
        await runner.close()
    await until(lambda: os.listdir(process.directory) == kept)
    await until(lambda: removed == [2])
    assert await answered_by(first, 3) == [3]


@pytest.mark.anyio
async def test_a_model_that_leaves_as_its_process_ends_has_no_links_to_remove_later(
    tmp_path: Path, bench: PackBench
) -> None:
    runner = await bench.started(scaled(tmp_path / "1", 1))
    process = bench.pack._process
    assert process is not None
    closing = asyncio.ensure_future(runner.close())
    await turns(2)
    assert process.worker.busy
    process.worker.kill(RunnerCrashed("a test ends it"))
    await closing
    assert process._unlinking is None
