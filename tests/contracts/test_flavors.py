"""One test for each numbered sentence of `loaders/flavors/base.py`, over the table of flavors."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

import loaders
from loaders import batch as batches
from loaders import flavors, package
from loaders.enforcement import RawInput, enforce
from loaders.flavors.base import Flavor
from tests.conftest import needs
from tests.support import blocked
from tests.support.flavors import SAMPLES, Sample, formatted

ROOT = Path(loaders.__file__).parents[1]
NAMES = list(flavors.FLAVORS)


MARKED = [pytest.param(s, marks=pytest.mark.all if s.needs else (), id=str(s)) for s in SAMPLES]


@pytest.fixture(params=MARKED)
def sample(request: pytest.FixtureRequest) -> Sample:
    found: Sample = request.param
    for module in found.needs:
        needs(module)
    return found


class Saved:
    """A sample saved once for all the tests that look at it."""

    def __init__(self, sample: Sample, directory: Path) -> None:
        self.live = sample.make(directory)
        self.path = directory / "package"
        flavor = sample.flavor if sample.flavor == "loader" else None
        self.package = loaders.save_model(
            self.live,
            self.path,
            input_example=sample.data[:3],
            flavor=flavor,
            **formatted(sample.options, directory),
        )
        enforced = enforce(self.package.signature, RawInput("python", sample.data))
        self.batch = enforced.batch

    def loaded(self) -> Any:
        return loaders.open_model(self.package, {})


_SAVED: dict[str, Saved] = {}


@pytest.fixture
def saved(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    if sample.name not in _SAVED:
        _SAVED[sample.name] = Saved(sample, tmp_path_factory.mktemp(sample.name))
    return _SAVED[sample.name]


def python(code: str, *arguments: str) -> str:
    """The output of a fresh interpreter that sees the product."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_blocked(names: list[str], jobs: list[dict[str, Any]]) -> Any:
    """What `blocked.py` prints."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    task = json.dumps({"block": names, "jobs": jobs})
    done = subprocess.run(
        [sys.executable, blocked.__file__, task],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def values(answer: Any) -> Any:
    """Any framework's answer as a list of arrays."""
    if isinstance(answer, dict):
        return [np.asarray(item) for item in answer.values()]
    return [np.asarray(answer)]


def assert_same(left: Any, right: Any) -> None:
    ours, theirs = values(left), values(right)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.reshape(other.shape), other, rtol=1e-6, atol=1e-6)


def test_every_flavor_has_a_sample() -> None:
    """But for the last resort, which saves nothing: mlflow itself does."""
    assert {sample.flavor for sample in SAMPLES} == set(NAMES) - {"mlflow"}


@pytest.mark.all
def test_the_last_resort_loads_through_mlflow_s_own_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader of mlflow's that no flavor here knows: mlflow finds and runs it, as its own servers do."""
    mlflow = pytest.importorskip("mlflow")
    loader = ModuleType("mlflow.unheard_of")
    vars(loader)["_load_pyfunc"] = lambda path: SimpleNamespace(predict=lambda data: data["x"] * 2)
    monkeypatch.setitem(sys.modules, "mlflow.unheard_of", loader)
    assert mlflow.__version__
    content = {"flavors": {"python_function": {"loader_module": "mlflow.unheard_of"}}}
    (tmp_path / "MLmodel").write_text(json.dumps(content), encoding="utf-8")
    assert flavors.find(package.read(tmp_path)).name == "mlflow"
    assert list(loaders.load_model(tmp_path).predict(pd.DataFrame({"x": [1, 2]}))) == [2, 4]


@pytest.mark.parametrize("name", NAMES)
def test_1_a_flavor_has_the_attributes_and_inherits_nothing(name: str) -> None:
    flavor = flavors.get(name)
    assert flavor.name == name
    assert type(flavor).__mro__ == (type(flavor), object)
    assert all(isinstance(module, str) for module in flavor.loader_modules)
    for attribute in [*Flavor.__annotations__, "accepts", "save", "load"]:
        assert hasattr(flavor, attribute), attribute


IMPORTS = """
import json, sys
from loaders import flavors
flavor = flavors.get(sys.argv[1])
made = {name.partition(".")[0] for name in sys.modules}
answers = [flavor.accepts(value) for value in (object(), 5, {}, "text")]
asked = {name.partition(".")[0] for name in sys.modules}
allowed = {"loaders", "numpy", "__main__", "sitecustomize"} | sys.stdlib_module_names
print(json.dumps([sorted(n for n in made - allowed if not n.startswith("_")), sorted(asked - made), answers]))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, list[Any]]:
    return {name: json.loads(python(IMPORTS, name)) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_2_making_it_imports_numpy_and_the_standard_library_alone(
    name: str, imported: dict[str, list[Any]]
) -> None:
    assert imported[name][0] == []


@pytest.mark.parametrize("name", NAMES)
def test_3_accepts_says_no_without_importing_anything(name: str, imported: dict[str, list[Any]]) -> None:
    _, newly_imported, answers = imported[name]
    assert newly_imported == []
    assert answers == [False] * 4


def test_3_accepts_says_yes_to_its_own(sample: Sample, saved: Saved) -> None:
    if sample.flavor == "loader":
        return  # its data is a path, so it is chosen by name
    assert flavors.for_model(saved.live).name == sample.flavor


@pytest.mark.all
@pytest.mark.filterwarnings("ignore")  # mlflow warns while it is imported
def test_4_mlflow_loads_what_it_saved_with_equal_predictions(sample: Sample, saved: Saved) -> None:
    mlflow = needs("mlflow")
    path = list(sys.path)
    try:
        theirs = mlflow.pyfunc.load_model(str(saved.path)).predict(sample.data)
    finally:
        sys.path[:] = path
    assert_same(saved.loaded().predict(sample.data), theirs)


def test_4_save_keeps_to_the_directory_and_names_what_loading_needs(sample: Sample, saved: Saved) -> None:
    assert saved.package.loader_module
    if sample.framework is not None:
        requirements = (saved.path / "requirements.txt").read_text()
        assert sample.framework[1] in requirements or f"{sample.framework[1]}-cpu" in requirements


def test_5_a_path_that_leaves_the_package_is_refused(sample: Sample, saved: Saved, tmp_path: Path) -> None:
    """Every entry that names a file, one by one, made to lead to a copy of that file outside."""
    shutil.copytree(saved.path, tmp_path / "inside")
    shutil.copytree(saved.path, tmp_path / "outside")
    raw = yaml.safe_load((saved.path / "MLmodel").read_text())
    changed = 0
    for name, entry in raw["flavors"].items():
        for key, value in entry.items():
            if not isinstance(value, str) or not (saved.path / value).exists():
                continue
            for other in (f"../outside/{value}", str(tmp_path / "outside" / value)):
                entry[key] = other
                if _leads(name, sample.flavor, key):
                    changed += 1
                    (tmp_path / "inside" / "MLmodel").write_text(yaml.safe_dump(raw))
                    with pytest.raises(package.PackageError):
                        loaders.load_model(tmp_path / "inside")
            entry[key] = value
    assert changed


def _leads(entry: str, flavor: str, key: str) -> bool:
    """Returns True if a key of an entry is followed, or repeats another key."""
    if entry == "python_function":
        return key in {"model_path", "data", "code", "python_model"}
    return key == "data" and flavor not in {"onnx", "pytorch"}


def test_5_what_is_wrong_with_a_file_is_raised(sample: Sample, saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved.path, tmp_path / "broken")
    files = [file for file in (tmp_path / "broken").rglob("*") if file.is_file() and _is_model(file)]
    main = max(files, key=lambda file: file.stat().st_size)
    main.write_bytes(b"\x00broken")
    with pytest.raises(Exception, match=r"(?s).+") as raised:
        loaders.load_model(tmp_path / "broken")
    assert not isinstance(raised.value, flavors.UnknownFlavor)


def _is_model(file: Path) -> bool:
    known = {".pkl", ".skops", ".onnx", ".txt", ".ubj", ".lgb", ".cb", ".statsmodels", ".pth", ".pt2"}
    others = {"requirements.txt", "pickle_module_info.txt", "factor.txt"}
    return file.suffix in known and file.name not in others


def test_6_the_answer_is_the_framework_s_and_the_batch_is_unchanged(sample: Sample, saved: Saved) -> None:
    arrays = saved.batch.arrays
    before = {name: array.copy() for name, array in arrays.items()}
    for array in arrays.values():
        array.flags.writeable = False
    answer = saved.loaded()._ask(saved.batch, {})
    assert_same(answer, sample.answer(saved.live, sample.data.copy()))
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, before[name])


def test_7_where_it_merges_a_row_s_answer_does_not_depend_on_the_others(sample: Sample, saved: Saved) -> None:
    model = saved.loaded()
    if not model.merges:
        assert sample.flavor in {"python", "loader", "statsmodels", "pytorch"}
        return
    rows = batches.split(saved.batch, [1] * (saved.batch.rows or 0))
    assert rows is not None
    alone = [model.run(row, {}) for row in rows]
    together = model.run(batches.concat(rows), {})
    assert together.rows == saved.batch.rows
    assert_same(together.arrays, batches.concat(alone).arrays)


def test_7_a_custom_model_merges_only_if_the_package_says_so(tmp_path: Path) -> None:
    def total(frame: Any) -> Any:
        return frame["a"] * 2

    assert not loaders.open_model(loaders.save_model(total, tmp_path / "silent"), {}).merges
    says = loaders.save_model(total, tmp_path / "says", metadata={"gateway.batch": True})
    assert loaders.open_model(says, {}).merges


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def test_8_data_means_that_loading_executes_nothing_of_the_package(
    sample: Sample, saved: Saved, tmp_path: Path
) -> None:
    flavor = flavors.get(sample.flavor)
    if flavor.trust == "code":
        return
    marker = tmp_path / "executed"
    target = tmp_path / "hostile"
    shutil.copytree(saved.path, target)
    (target / "code").mkdir()
    assert sample.framework is not None
    for module in ("numpy", "shipped", sample.framework[0]):
        (target / "code" / f"{module}.py").write_text(f"open({str(marker)!r}, 'w').close()")
    raw = yaml.safe_load((target / "MLmodel").read_text())
    raw["flavors"]["python_function"]["code"] = "code"
    if "model_class" in raw["flavors"].get(sample.flavor, {}):
        raw["flavors"][sample.flavor]["model_class"] = "shipped.Model"
    (target / "MLmodel").write_text(yaml.safe_dump(raw))
    for file in target.iterdir():
        if file.is_file() and _is_model(file):
            file.write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(Exception, match=r"(?s).+"):
        loaders.load_model(target)
    assert not marker.exists()


@pytest.mark.parametrize("name", NAMES)
def test_8_and_9_trust_is_one_of_two_words_and_the_memory_factor_a_guess(name: str) -> None:
    flavor = flavors.get(name)
    assert flavor.trust in ("code", "data")
    assert isinstance(flavor.memory_factor, float)
    assert 1 <= flavor.memory_factor <= 20


def test_10_without_its_framework_it_says_what_to_install(sample: Sample, saved: Saved) -> None:
    if sample.framework is None:
        return
    module, distribution = sample.framework
    (answer,) = in_blocked([module], [{"package": str(saved.path), "requests": []}])
    assert answer["error"] == "MissingFramework"
    assert f"pip install {distribution}" in answer["message"]


@pytest.mark.parametrize("name", NAMES)
def test_11_mlflow_s_names_are_offered_to_the_flavors_that_may_need_them(name: str) -> None:
    assert flavors.get(name).mlflow_names is (name in {"python", "loader"})
