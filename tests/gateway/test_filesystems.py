"""File systems that connect, and then say nothing: no call to them waits for ever."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from gateway import filesystems
from gateway.artifacts.base import Meter, Unreachable
from gateway.artifacts.sources import Sources
from gateway.registries import open_registry
from gateway.registries.base import RegistryUnavailable, Version

SOON = 0.2


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that takes connections and never says a word."""
    monkeypatch.setattr(filesystems, "CONNECT_SECONDS", SOON)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def test_a_registry_behind_a_silent_server_is_given_up(silent: str) -> None:
    registry = open_registry(f"ftp://{silent}/registry.yaml")
    with pytest.raises(RegistryUnavailable, match=rf"{silent}.*no connection within 0\.2 s"):
        registry.read()
    registry.close()


def test_files_behind_a_silent_server_are_given_up(silent: str) -> None:
    wanted = Version("m", "1", source=f"ftp://{silent}/m")
    with pytest.raises(Unreachable, match=r"no connection within 0\.2 s") as given_up:
        Sources().open(wanted)
    assert silent not in given_up.value.public


class Falling(MemoryFileSystem):  # type: ignore[misc]
    """A store without an event loop that answers until `go_on` is cleared. `ended` counts the answers."""

    protocol = "falling"
    go_on = threading.Event()
    ended = threading.Semaphore(0)

    @classmethod
    def _strip_protocol(cls, path: str) -> Any:
        return super()._strip_protocol(path.removeprefix("falling:"))

    def get_file(self, *args: Any, **options: Any) -> Any:
        assert Falling.go_on.wait(60)
        try:
            return super().get_file(*args, **options)
        finally:
            Falling.ended.release()


@pytest.fixture
def falling() -> Iterator[None]:
    fsspec.register_implementation("falling", Falling, clobber=True)
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/m/MLmodel", b"flavors: {}")
    Falling.go_on.set()
    yield
    Falling.go_on.set()
    memory.rm("/bucket", recursive=True)


def test_a_store_that_falls_silent_is_given_up(
    falling: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = Version("m", "1", source="falling://bucket/m")
    source = Sources(("falling://bucket/",)).open(wanted)
    files = source.files(wanted)
    Falling.go_on.clear()
    monkeypatch.setattr("gateway.artifacts.remote.download_seconds", lambda size: SOON)
    with pytest.raises(TimeoutError, match=r"no answer within 0\.2 s"):
        source.copy(wanted, files, tmp_path / "one", room=lambda size: None, meter=Meter(files))
    Falling.go_on.set()
    monkeypatch.undo()
    assert Falling.ended.acquire(timeout=60)  # two readers of a file in memory share one position
    source.copy(wanted, files, tmp_path / "two", room=lambda size: None, meter=Meter(files))
    assert (tmp_path / "two" / "MLmodel").read_bytes() == b"flavors: {}"


def test_calls_that_hang_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "_CALLS", threading.BoundedSemaphore(2))
    go_on, ended = threading.Event(), threading.Semaphore(0)

    def call() -> None:
        assert go_on.wait(60)
        ended.release()

    for _ in range(2):
        with pytest.raises(TimeoutError, match=r"no answer within 0\.01 s"):
            filesystems.within(0.01, call)
    with pytest.raises(TimeoutError, match="earlier calls have not ended"):
        filesystems.within(0.01, call)
    go_on.set()
    for _ in range(2):
        assert ended.acquire(timeout=60)
    assert filesystems.within(60, lambda: 5) == 5


def test_many_calls_that_are_well_wait_for_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "_CALLS", threading.BoundedSemaphore(2))
    with ThreadPoolExecutor(16) as callers:
        assert list(callers.map(lambda number: filesystems.within(60, lambda: number), range(64))) == [
            *range(64)
        ]


def test_a_thread_that_cannot_start_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "_CALLS", threading.BoundedSemaphore(1))

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError):
            filesystems.within(60, lambda: 5)
    assert filesystems.within(60, lambda: 5) == 5


def test_what_a_call_raises_is_raised() -> None:
    def late() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        filesystems.within(60, late)
    with pytest.raises(ZeroDivisionError):
        filesystems.within(60, lambda: 1 // 0)
