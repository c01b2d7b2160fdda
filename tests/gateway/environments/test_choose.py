"""Where a package runs: the policy, and what happens where the right environment cannot be had."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gateway.environments.check import Installed
from gateway.environments.choose import Chooser, NoEnvironment, Runtime
from gateway.environments.lock import LockError, Wanted
from gateway.environments.uv import UvError
from gateway.settings import Settings
from tests.gateway.environments.test_check import HERE, by_value
from tests.gateway.environments.test_lock import made
from tests.support.packages import described


class Shelf:
    """Environments that are there at once, or the failure to have them."""

    def __init__(self, built: Any = None, failure: Exception | None = None, pythons: bool = False) -> None:
        self.pythons = pythons
        self.built = built
        self.failure = failure
        self.builds = 0

    def has_python(self, minor: Any) -> bool:
        return self.pythons

    def resolved(self, wanted: Wanted) -> None:
        return None

    def resolve(self, wanted: Wanted, say: Any) -> Any:
        if self.failure is not None:
            raise self.failure
        return made(numpy="1")

    def find(self, lock: Any) -> None:
        return None

    def build(self, lock: Any, say: Any) -> Any:
        self.builds += 1
        say("installing 1 packages")
        return self.built


class Whole:
    key, python, path = "k" * 32, "/environments/k/bin/python", Path("/environments/k")
    lock = made(numpy="1")


def chosen(
    package: Any, shelf: Any = None, *, served: bool = False, forced: bool = False, **values: Any
) -> Runtime:
    settings = Settings.model_validate(values)
    with ThreadPoolExecutor(1) as threads:
        chooser = Chooser(settings, shelf or Shelf(Whole()), threads, lambda: Installed("3.11.7", HERE))
        needs = chooser.examine(package)
        return asyncio.run(
            chooser.runtime(
                "iris", "models:/iris/1", needs, served=served, forced=forced, say=lambda step: None
            )
        )


@pytest.fixture
def fitting(tmp_path: Path) -> Any:
    return described(tmp_path / "fitting", requirements="scikit-learn==1.9.0", python="3.11.2")


@pytest.fixture
def old(tmp_path: Path) -> Any:
    return described(tmp_path / "old")


@pytest.fixture
def code(tmp_path: Path) -> Any:
    return described(
        tmp_path / "code", loader="mlflow.pyfunc.model", requirements="cloudpickle",
        function={"python_model": "python_model.pkl"}, files={"python_model.pkl": by_value()},
    )  # fmt: skip


AWAY = UvError("index away", "the package index does not answer")


def test_auto_takes_this_interpreter_where_it_fits(fitting: Any) -> None:
    shelf = Shelf(Whole())
    runtime = chosen(fitting, shelf)
    assert (runtime.kind, runtime.python, runtime.mismatch) == ("same", None, None)
    assert shelf.builds == 0


def test_auto_takes_the_package_s_own_where_it_does_not(old: Any) -> None:
    runtime = chosen(old)
    assert (runtime.kind, runtime.python, runtime.mismatch) == ("own", Whole.python, None)


def test_own_takes_its_own_even_where_this_one_fits(fitting: Any) -> None:
    assert chosen(fitting, environment="own").kind == "own"


def test_same_tries_and_warns(old: Any) -> None:
    runtime = chosen(old, environment="same")
    assert runtime.kind == "same"
    assert runtime.mismatch is not None
    assert "1.0.2" in runtime.mismatch
    assert "1.9.1" in runtime.mismatch


@pytest.mark.parametrize("values", [{"environment": "same"}, {"environments": {"fallback": "same"}}])
@pytest.mark.parametrize("forced", [False, True])
def test_byte_code_of_another_python_is_never_executed(
    code: Any, values: dict[str, Any], forced: bool
) -> None:
    with pytest.raises(NoEnvironment) as refused:
        chosen(code, Shelf(failure=AWAY), served=True, forced=forced, **values)
    assert "3.8.18" in str(refused.value)
    assert "3.11.7" in str(refused.value)
    assert "uv python install 3.8" in refused.value.hint


@pytest.mark.parametrize(
    ("fallback", "served", "forced", "runs"),
    [
        ("served", True, False, True),
        ("served", False, False, False),
        ("served", False, True, True),
        ("same", False, False, True),
        ("refuse", True, False, False),
        ("refuse", True, True, True),
    ],
)
def test_without_its_own_environment_a_version_runs_here_or_is_refused(
    old: Any, fallback: str, served: bool, forced: bool, runs: bool
) -> None:
    values = {"environments": {"fallback": fallback}}
    if runs:
        runtime = chosen(old, Shelf(failure=AWAY), served=served, forced=forced, **values)
        assert runtime.kind == "same"
        assert runtime.mismatch
        return
    with pytest.raises(NoEnvironment) as refused:
        chosen(old, Shelf(failure=AWAY), served=served, forced=forced, **values)
    assert "1.0.2" in str(refused.value)
    assert "1.9.1" in str(refused.value)
    assert "does not answer" in str(refused.value)
    assert "gateway env build models:/iris/1" in refused.value.hint


@pytest.mark.parametrize("there", [False, True])
def test_a_python_that_is_missing_is_named_with_what_installs_it(old: Any, there: bool) -> None:
    failure = LockError("there are no usable wheels for this Python")
    with pytest.raises(NoEnvironment) as refused:
        chosen(old, Shelf(failure=failure, pythons=there))
    assert refused.value.hint.startswith("uv python install 3.8") is not there


def test_own_is_not_exchanged_for_this_interpreter(old: Any) -> None:
    with pytest.raises(NoEnvironment):
        chosen(old, Shelf(failure=LockError("no wheels")), served=True, environment="own")


def test_with_build_never_nothing_is_built(old: Any) -> None:
    shelf = Shelf(Whole())
    with pytest.raises(NoEnvironment, match="build is never"):
        chosen(old, shelf, environments={"build": "never"})
    assert shelf.builds == 0


def test_where_formats_are_restricted_only_listed_locks_are_built(old: Any) -> None:
    with pytest.raises(NoEnvironment, match="lists no lock"):
        chosen(old, unsafe_formats="refuse")
    with pytest.raises(NoEnvironment, match="is not listed"):
        chosen(old, unsafe_formats="refuse", environments={"allowed": ["other"]})
    key = made(numpy="1").key
    assert chosen(old, unsafe_formats="refuse", environments={"allowed": [key]}).kind == "own"


def test_a_model_s_own_setting_wins(old: Any) -> None:
    assert chosen(old, models={"iris": {"environment": "same"}}).kind == "same"


def test_an_environment_that_does_not_exist_is_an_error_of_the_settings() -> None:
    with pytest.raises(ValueError, match="'shiny' is not an environment; known: auto, same, own"):
        Settings.model_validate({"models": {"iris": {"environment": "shiny"}}})
    with pytest.raises(ValueError, match="own is a policy"):
        Settings.model_validate({"environments": {"named": {"own": {"python": "/x"}}}})


def test_a_named_environment_is_compared_too(old: Any) -> None:
    import sys

    values = {"environment": "mine", "environments": {"named": {"mine": {"python": sys.executable}}}}
    runtime = chosen(old, **values)
    assert (runtime.kind, runtime.python) == ("named", sys.executable)
    assert runtime.mismatch
    values["environments"]["named"]["mine"]["python"] = "/nowhere/python"  # type: ignore[index]
    with pytest.raises(NoEnvironment, match="does not run"):
        chosen(old, **values)


def test_what_is_installed_in_a_named_environment_counts_without_a_restart(
    fitting: Any, tmp_path: Path
) -> None:
    python, listed = tmp_path / "python", tmp_path / "listed"
    python.write_text(f"#!/bin/sh\ncat {listed}\n")
    python.chmod(0o755)
    named = {"environment": "mine", "environments": {"named": {"mine": {"python": str(python)}}}}

    async def chosen_twice() -> list[str | None]:
        found = []
        for installed in ({}, HERE):
            listed.write_text(json.dumps(["3.11.7", list(installed.items())]))
            runtime = await chooser.runtime(
                "iris", "models:/iris/1", needs, served=False, forced=False, say=lambda step: None
            )
            found.append(runtime.mismatch)
        return found

    with ThreadPoolExecutor(1) as threads:
        chooser = Chooser(Settings.model_validate(named), Shelf(), threads)  # type: ignore[arg-type]
        needs = chooser.examine(fitting)
        before, after = asyncio.run(chosen_twice())
    assert before is not None
    assert "scikit-learn" in before
    assert after is None
