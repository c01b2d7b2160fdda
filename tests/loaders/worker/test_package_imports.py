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


def test_a_forbidden_name_stays_forbidden_after_a_turn(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "helper", None)
    with Imports(code).turn():
        import helper

        assert helper.VALUE == 1
    assert sys.modules["helper"] is None
