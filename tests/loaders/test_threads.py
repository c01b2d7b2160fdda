"""Several threads of one process that save and load models at the same time."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

import loaders
from loaders import pickling
from loaders.compat import standin
from loaders.flavors.sklearn import Estimator

THREADS = 3


class Lengths:
    """A model whose class only this file has. It warns."""

    def predict(self, texts: Any) -> Any:
        warnings.warn("a model that warns", UserWarning, stacklevel=1)
        return np.array([len(text) for text in texts])


@pytest.fixture(autouse=True)
def _switching() -> Iterator[None]:
    """Threads take turns very often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def in_threads(work: Callable[[int], None]) -> list[Exception]:
    """Runs `work` in threads, each with its number, and returns their exceptions."""
    failed: list[Exception] = []
    ready = threading.Barrier(THREADS)

    def run(number: int) -> None:
        ready.wait()
        try:
            work(number)
        except Exception as error:  # noqa: BLE001 - the test shows it
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


def test_loads_leave_the_filters_of_warnings_as_they_were() -> None:
    Estimator(Lengths(), "predict")  # imports scikit-learn, which adds filters
    with warnings.catch_warnings():  # the end of this block mends what a failure would leave behind
        filters, shown = [*warnings.filters], warnings.showwarning

        def load(number: int) -> None:
            for _ in range(100):
                Estimator(Lengths(), "predict")

        assert in_threads(load) == []
        assert [*warnings.filters] == filters
        assert warnings.showwarning is shown
        with pytest.raises(UserWarning, match="a model that warns"):
            Lengths().predict(["one"])


def test_a_class_of_the_author_is_saved_by_value_also_by_several_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickling, "_is_installed", lambda root, file: root != "tests")  # quicker

    def save(number: int) -> None:
        for _ in range(40):
            file = tmp_path / str(number)
            pickling.dump(Lengths(), file)
            assert b"_make_skeleton_class" in file.read_bytes()

    assert in_threads(save) == []
    assert cloudpickle.list_registry_pickle_by_value() == set()


def test_a_save_keeps_what_the_author_told_cloudpickle(tmp_path: Path) -> None:
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    try:
        pickling.dump(Lengths(), tmp_path / "model")
        assert __name__ in cloudpickle.list_registry_pickle_by_value()
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def test_a_save_does_not_change_the_umask_of_other_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = os.umask(0o027)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", None)
            saved = loaders.save_model(Lengths(), tmp_path / "m", verify=False)
    finally:
        os.umask(mask)
    assert saved.path.stat().st_mode & 0o777 == 0o750
    assert not [*saved.path.glob(".*")]


def test_a_stand_in_that_another_thread_puts_in_place_is_not_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)

    def find(name: str) -> Any:
        monkeypatch.setitem(sys.modules, "mlflow", standin.modules()["mlflow"])  # the turn of another model
        return find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert standin.absent()
