"""A model loads and answers in a process of each Python that it may have, with libraries of that time.

The environments are built by the real uv from the index of this machine.
"""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from gateway import environments
from gateway.environments.interpreters import Minor, named
from gateway.environments.lock import Wanted
from gateway.runners.environments import elsewhere
from gateway.settings import Settings
from loaders.batch import Columns
from tests.support.hostile import write_package
from tests.support.processes import Processes, run

pytestmark = [pytest.mark.all, pytest.mark.skipif(sys.platform != "linux", reason="processes need Linux")]

#: The oldest numpy and pandas that have wheels for each Python: what packages of its first year had.
OLDEST = {
    (3, 8): ("numpy==1.17.3", "pandas==1.0.5"),
    (3, 9): ("numpy==1.19.3", "pandas==1.1.5"),
    (3, 10): ("numpy==1.21.3", "pandas==1.3.5"),
    (3, 11): ("numpy==1.23.5", "pandas==1.5.3"),
    (3, 12): ("numpy==1.26.0", "pandas==2.1.1"),
    (3, 13): ("numpy==2.1.0", "pandas==2.2.3"),
}
SEEN = """
facts = {"python": [sys.version_info[1]] * 2, "y": data["a"] * 2, "t": data["t"].str.upper()}
return pd.DataFrame(facts)
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("minor", OLDEST, ids=named)
def test_a_model_answers_on_each_python_with_the_libraries_of_its_time(
    minor: Minor, settings: Settings, tmp_path: Path
) -> None:
    store = environments.store(settings, {k: v for k, v in os.environ.items() if k != "UV_OFFLINE"})
    wanted = Wanted(OLDEST[minor], created=datetime(2026, 11, 1, tzinfo=UTC), python=minor, exact=True)
    built = store.build(store.resolve(wanted))
    package = write_package(tmp_path / "p", at_import="import pandas as pd", at_predict=SEEN)
    there = elsewhere(built.python, built.lock.packages, "fork")
    table = Columns({"a": np.array([1.5, 2.5]), "t": np.array(["ä", "b"], dtype=object)}, 2)

    async def work(h: Processes) -> None:
        runner = await h.started(package, environment=there)
        answer = await runner.predict(table, {})
        assert isinstance(answer, Columns)
        assert answer.arrays["python"].tolist() == [minor[1]] * 2
        assert answer.arrays["y"].tolist() == [3.0, 5.0]
        assert answer.arrays["t"].tolist() == ["Ä", "B"]
        assert runner.measured_bytes, "its memory is measured on every Python"

    run(tmp_path / "tmp", work)
