"""Work done once in a zygote need not be repeated in its children."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import loaders

FIRST = """
import json
import sys
import pandas
import sklearn.linear_model
from loaders.worker.prewarm import predict_once
predict_once()
known = set(sys.modules)
import numpy
from loaders.batch import Columns
from loaders.model import open_model
from loaders.package import Package
model = open_model(Package.from_json(json.loads(sys.argv[1]), sys.argv[2]), {}, threads=1)
model.run(Columns({"x": numpy.array([0.0, 1.0])}, 2), {})
model.run(Columns({"x": numpy.array([0.0, 1.0]) > 0.5}, 2), {})
print(sorted(set(sys.modules) - known))
"""
NOTHING = """
import sys
from loaders.worker.prewarm import predict_once
predict_once()
print("sklearn" in sys.modules, "pandas" in sys.modules)
"""
POOLS = """
import os
import sys
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
import numpy
from loaders.worker import process
process.thread_pools()
modules = set(sys.modules)
if os.fork() == 0:
    process._limit_threads(2)
    found = sorted(set(sys.modules) - modules)
    import threadpoolctl
    print(found, [pool["num_threads"] for pool in threadpoolctl.threadpool_info()], flush=True)
    os._exit(0)
os.wait()
"""


def printed(program: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_a_load_and_a_prediction_after_it_import_nothing_more(tmp_path: Path) -> None:
    import pandas as pd
    from sklearn.linear_model import LogisticRegression

    frame = pd.DataFrame({"x": [0.0, 1.0]})
    package = loaders.save_model(
        LogisticRegression().fit(frame, [0, 1]), tmp_path / "m", input_example=frame, verify=False
    )
    assert printed(FIRST, json.dumps(package.to_json()), str(package.path)) == "[]"


def test_it_imports_no_framework_itself() -> None:
    assert printed(NOTHING) == "False False"


@pytest.mark.skipif(sys.platform != "linux", reason="zygotes need Linux")
def test_a_child_sets_the_threads_of_pools_that_its_zygote_found() -> None:
    """Finding them visits every library of the process, in memory that each child would copy."""
    imported, _, counts = printed(POOLS).partition("] ")
    assert imported == "["
    assert set(counts.strip("[]").split(", ")) == {"2"}
