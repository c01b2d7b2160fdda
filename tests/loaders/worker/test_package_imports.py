"""Turns of packages with modules of their own, while other threads of the process import."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from loaders.worker.imports import Imports

NAMES = [f"another_module_{number}" for number in range(2000)]


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("VALUE = 1\n")
    return tmp_path


@contextmanager
def _names_come_and_go() -> Iterator[None]:
    """Another thread adds modules and removes them, as imports that succeed and that fail do."""
    ended, began = threading.Event(), threading.Event()

    def run() -> None:
        while not ended.is_set():
            for name in NAMES:
                sys.modules[name] = ModuleType(name)
            for name in NAMES:
                del sys.modules[name]
            began.set()

    thread = threading.Thread(target=run)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        began.wait()
        yield
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        thread.join()


def test_a_turn_begins_and_ends_while_another_thread_imports(code: Path) -> None:
    imports = Imports(code)
    with _names_come_and_go():
        for _ in range(300):
            with imports.turn():
                import helper  # type: ignore[import-not-found]
            assert helper.VALUE == 1
            assert "helper" not in sys.modules
    assert str(code) not in sys.path


def test_an_import_finds_its_module_while_a_turn_of_another_thread_ends(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, left = threading.Event(), threading.Event()

    class Before:
        """The finder of a directory on the path: it is asked right before the directory with the module."""

        def find_spec(self, name: str, target: object = None) -> None:
            reached.set()
            assert left.wait(30)

    place = tmp_path / "place"
    place.mkdir()
    (place / "imported_late.py").write_text("VALUE = 2\n")
    monkeypatch.setitem(sys.path_importer_cache, "/before", Before())  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "path", [*sys.path, "/before", str(place)])
    found: list[bool] = []

    def run() -> None:
        try:
            import imported_late  # type: ignore[import-not-found]

            found.append(imported_late.VALUE == 2)
        except ImportError:
            found.append(False)

    thread = threading.Thread(target=run)
    with Imports(code).turn():
        thread.start()
        assert reached.wait(30)
    left.set()
    thread.join()
    monkeypatch.delitem(sys.modules, "imported_late", raising=False)
    assert found == [True]
    assert str(code) not in sys.path


def test_a_turn_that_cannot_begin_leaves_the_next_one_whole(
    code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def invalidate_caches(self) -> None:
            raise OSError("the finder of another library")

    imports = Imports(code)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "meta_path", [*sys.meta_path, Broken()])
        with pytest.raises(OSError, match="another library"), imports.turn():
            pass
    assert str(code) not in sys.path
    with imports.turn():
        import helper

        assert helper.VALUE == 1


def test_a_forbidden_name_stays_forbidden_after_a_turn(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "helper", None)
    with Imports(code).turn():
        import helper

        assert helper.VALUE == 1
    assert sys.modules["helper"] is None
