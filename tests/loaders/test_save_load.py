"""Saving a live model, loading it, asking it: what Python users call."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.linear_model import LogisticRegression

import loaders
from loaders import batch as batches
from loaders import model, package
from loaders.enforcement import InvalidInput
from loaders.flavors import UnknownFlavor
from tests.contracts.test_flavors import in_blocked, python

TRAIN = pd.DataFrame({"a": [1.0, 2.0, 3.0, 4.0], "b": [0.0, 1.0, 0.0, 1.0]})
LABELS = [0, 0, 1, 1]


@pytest.fixture
def classifier() -> LogisticRegression:
    return LogisticRegression().fit(TRAIN, LABELS)


def doubled(frame: Any) -> Any:
    return frame["a"].to_numpy() * 2


def shouted(texts: list[str]) -> list[str]:
    return [text.upper() + "!" for text in texts]


class Powered:
    """Takes params and a context, and remembers that it was set up."""

    def load_context(self, context: Any) -> None:
        self.base = context.model_config["base"]

    def predict(self, context: Any, model_input: Any, params: Any = None) -> Any:
        assert context.model_config["base"] == self.base
        return [float(value) ** params["power"] + self.base for value in model_input["a"]]


# --- save


def test_flavor_signature_and_example_are_inferred(tmp_path: Path, classifier: LogisticRegression) -> None:
    saved = loaders.save_model(
        classifier, tmp_path / "m", input_example=TRAIN[:2], metadata={"team": "a"}, params={"t": 0.5}
    )
    assert saved.loader_module == "mlflow.sklearn"
    assert str(saved.signature) == "inputs: a: double, b: double\noutputs: long\nparams: t: double = 0.5"
    loaded = loaders.load_model(tmp_path / "m")
    np.testing.assert_array_equal(loaded.predict(TRAIN), classifier.predict(TRAIN))
    pd.testing.assert_frame_equal(loaded.input_example, TRAIN[:2])
    assert loaded.metadata == {"team": "a"}
    assert loaded.signature == saved.signature
    assert loaded.environment == []
    assert "m" in repr(loaded)
    assert {file.name for file in (tmp_path / "m").iterdir()} == {
        "MLmodel",
        "conda.yaml",
        "example_answer.json",
        "input_example.json",
        "model.pkl",
        "python_env.yaml",
        "requirements.txt",
        "serving_input_example.json",
    }
    assert "mlflow" not in (tmp_path / "m" / "requirements.txt").read_text()


def test_an_example_may_bring_params(tmp_path: Path) -> None:
    loaders.save_model(
        Powered(),
        tmp_path / "m",
        input_example=(TRAIN, {"power": 3}),
        params={"power": 2},
        model_config={"base": 1},
    )
    loaded = loaders.load_model(tmp_path / "m")
    assert loaded.package.example_input()[1] == {"power": 3}
    assert loaded.predict(TRAIN[:2]) == [2.0, 5.0]
    assert loaded.predict(TRAIN[:2], params={"power": 3}) == [2.0, 9.0]


def test_a_given_signature_is_kept_and_the_example_must_fit_it(
    tmp_path: Path, classifier: LogisticRegression
) -> None:
    given = loaders.infer_signature(TRAIN, classifier.predict(TRAIN))
    saved = loaders.save_model(
        classifier, tmp_path / "m", signature=given, input_example=TRAIN, params={"t": 1}
    )
    assert saved.signature is not None
    assert (saved.signature.inputs, saved.signature.outputs) == (given.inputs, given.outputs)
    assert saved.signature.params is not None
    with pytest.raises(InvalidInput):
        loaders.save_model(classifier, tmp_path / "other", signature=given, input_example=TRAIN[["a"]])
    assert not (tmp_path / "other").exists()


def test_a_model_that_does_not_answer_its_example_is_refused_with_advice(tmp_path: Path) -> None:
    def failing(frame: Any) -> Any:
        raise AttributeError("'int' object has no attribute 'lower'")

    wanted = r"does not answer its input_example: AttributeError: 'int' object.*numpy\.array"
    with pytest.raises(ValueError, match=wanted) as raised:
        loaders.save_model(failing, tmp_path / "m", input_example=["good day", "bad night"])
    assert isinstance(raised.value.__cause__, AttributeError)
    assert not (tmp_path / "m").exists()


def first_only(data: Any) -> Any:
    return np.zeros(1)


@pytest.mark.parametrize(
    ("function", "rows", "warned"),
    [(first_only, 2, True), (first_only, 1, False), (doubled, 2, False)],
)
def test_an_answer_of_other_rows_than_the_example_is_warned_of(
    tmp_path: Path, function: Any, rows: int, warned: bool
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaders.save_model(function, tmp_path / "m", input_example=TRAIN[:rows])
    said = [str(one.message) for one in caught if "rows" in str(one.message)]
    assert [text.partition(":")[0] for text in said] == [
        "the model answers its input_example of 2 rows with 1 row"
    ] * warned


def test_without_example_and_signature_there_is_none(tmp_path: Path, classifier: LogisticRegression) -> None:
    assert loaders.save_model(classifier, tmp_path / "m").signature is None
    loaded = loaders.load_model(tmp_path / "m")
    assert loaded.input_example is None
    np.testing.assert_array_equal(loaded.predict(TRAIN), classifier.predict(TRAIN))


def test_requirements_are_inferred_or_as_given(tmp_path: Path, classifier: LogisticRegression) -> None:
    loaders.save_model(classifier, tmp_path / "inferred", input_example=TRAIN)
    lines = (tmp_path / "inferred" / "requirements.txt").read_text().splitlines()
    assert {line.partition("==")[0] for line in lines} >= {"scikit-learn", "cloudpickle", "pandas"}
    assert all("==" in line for line in lines)
    loaders.save_model(classifier, tmp_path / "given", requirements=["scikit-learn>1", "numpy"])
    lines = (tmp_path / "given" / "requirements.txt").read_text().splitlines()
    assert lines[0] == "scikit-learn>1"
    assert lines[1].startswith("numpy==")


def test_a_directory_that_holds_something_is_not_touched(
    tmp_path: Path, classifier: LogisticRegression
) -> None:
    (tmp_path / "m").mkdir()
    loaders.save_model(classifier, tmp_path / "m")
    before = package.digest(tmp_path / "m")
    with pytest.raises(FileExistsError):
        loaders.save_model(classifier, tmp_path / "m")
    with pytest.raises(FileExistsError):
        loaders.save_model(classifier, tmp_path / "m" / "MLmodel")
    assert package.digest(tmp_path / "m") == before


def test_what_cannot_be_saved_leaves_nothing_behind(tmp_path: Path) -> None:
    def broken(frame: Any) -> Any:
        raise RuntimeError("no answer")

    with pytest.raises(ValueError, match="no answer"):
        loaders.save_model(broken, tmp_path / "m", input_example=TRAIN)
    with pytest.raises(UnknownFlavor, match="no predict method"):
        loaders.save_model(object(), tmp_path / "m")
    with pytest.raises(package.PackageError, match="YAML"):
        loaders.save_model(doubled, tmp_path / "m", metadata={"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_code_is_saved_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "coded.py").write_text(
        "import mlflow\n\n\nclass Coded(mlflow.pyfunc.PythonModel):\n"
        "    def predict(self, context, model_input, params=None):\n        return model_input['a'] * 3\n\n\n"
        "mlflow.models.set_model(Coded())\n"
    )
    saved = loaders.save_model(tmp_path / "coded.py", tmp_path / "m")
    request = {"form": "dataframe_records", "data": [{"a": 2}]}
    (answer,) = in_blocked(["mlflow"], [{"package": str(saved.path), "requests": [request]}])
    assert answer == [[{"a": 6}]]


# --- load and ask


def test_predict_enforces_as_the_server_does(tmp_path: Path, classifier: LogisticRegression) -> None:
    loaders.save_model(classifier, tmp_path / "m", input_example=TRAIN)
    loaded = loaders.load_model(tmp_path / "m")
    with pytest.raises(InvalidInput) as raised:
        loaded.predict([{"a": "x", "b": None}, {"a": 1.0, "b": "y"}])
    assert [violation.path for violation in raised.value.violations] == ["data[0].a", "data[1].b"]
    with pytest.warns(UserWarning, match="extra"):
        answer = loaded.predict(TRAIN.assign(extra=1))
    np.testing.assert_array_equal(answer, classifier.predict(TRAIN))
    assert loaded.predict(TRAIN[["b", "a"]]).tolist() == classifier.predict(TRAIN).tolist(), (
        "columns are put in order"
    )
    assert loaded.predict({"a": [1.0], "b": [0.0]}).tolist() == [0]
    lenient = loaders.load_model(tmp_path / "m", enforcement="mlflow")
    assert lenient.predict(TRAIN).tolist() == classifier.predict(TRAIN).tolist()


def test_a_hint_of_a_list_is_given_a_list(tmp_path: Path) -> None:
    loaders.save_model(shouted, tmp_path / "m", input_example=["a", "b"])
    assert loaders.load_model(tmp_path / "m").predict(["c"]) == ["C!"]


def test_configuration_is_overridden_shallowly_and_only_where_declared(tmp_path: Path) -> None:
    config = {"base": 1, "deep": {"a": 1, "b": 2}}
    saved = loaders.save_model(Powered(), tmp_path / "m", params={"power": 1}, model_config=config)
    assert model.configured(saved, {"deep": {"a": 9}, "new": 1, "base": 2}) == (
        {"base": 2, "deep": {"a": 9}},
        ["new"],
    )
    with pytest.warns(UserWarning, match="new"):
        loaded = loaders.load_model(tmp_path / "m", model_config={"base": 100, "new": 1})
    assert loaded.predict(TRAIN[:1]) == [101.0]
    assert loaders.load_model(tmp_path / "m").predict(TRAIN[:1]) == [2.0]


def test_run_answers_a_batch_with_a_batch(tmp_path: Path, classifier: LogisticRegression) -> None:
    saved = loaders.save_model(classifier, tmp_path / "m", input_example=TRAIN)
    loaded = loaders.open_model(saved, {})
    table = batches.Columns({name: TRAIN[name].to_numpy() for name in TRAIN}, len(TRAIN))
    answer = loaded.run(table, {})
    assert isinstance(answer, batches.Tensors)
    assert answer.rows == len(TRAIN)


# --- what a package says that is not known is refused


@pytest.mark.parametrize(
    ("flavor", "key", "value"),
    [
        ("python_function", "loader_module", "invented.loader"),
        ("python_function", "loader_module", "os"),
        ("python_function", "predict_fn", "__class__"),
        ("python_function", "predict_fn", "fit"),
        ("sklearn", "serialization_format", "dill"),
    ],
)
def test_unknown_values_are_refused(
    tmp_path: Path, classifier: LogisticRegression, flavor: str, key: str, value: str
) -> None:
    loaders.save_model(classifier, tmp_path / "m")
    raw = yaml.safe_load((tmp_path / "m" / "MLmodel").read_text())
    raw["flavors"][flavor][key] = value
    (tmp_path / "m" / "MLmodel").write_text(yaml.safe_dump(raw))
    with pytest.raises(package.PackageError) as raised:
        loaders.load_model(tmp_path / "m")
    assert key in raised.value.place


def test_an_unknown_compression_is_refused(tmp_path: Path) -> None:
    loaders.save_model(doubled, tmp_path / "m")
    raw = yaml.safe_load((tmp_path / "m" / "MLmodel").read_text())
    raw["flavors"]["python_function"]["python_model_compression"] = "zip"
    (tmp_path / "m" / "MLmodel").write_text(yaml.safe_dump(raw))
    with pytest.raises(package.PackageError, match="compression"):
        loaders.load_model(tmp_path / "m")


# --- code that packages bring


def write_module(directory: Path, shift: int) -> Path:
    directory.mkdir()
    (directory / "shared_name.py").write_text(
        "class Shifted:\n    def predict(self, model_input):\n        import shared_late\n\n"
        "        return (model_input['a'] + shared_late.SHIFT).tolist()\n"
    )
    (directory / "shared_late.py").write_text(f"SHIFT = {shift}\n")
    return directory


def save_shifted(directory: Path, shift: int) -> package.Package:
    """A package whose class lives in a module it ships, and imports another one when asked."""
    modules = write_module(directory / f"modules{shift}", shift)
    sys.path.insert(0, str(modules))
    try:
        import shared_name  # type: ignore[import-not-found]

        return loaders.save_model(
            shared_name.Shifted(),
            directory / f"package{shift}",
            code_paths=[modules / "shared_name.py", modules / "shared_late.py"],
        )
    finally:
        sys.path.remove(str(modules))
        sys.modules.pop("shared_name", None)


def test_two_packages_in_one_process_have_their_own_modules_of_one_name(tmp_path: Path) -> None:
    packages = [save_shifted(tmp_path, shift) for shift in (1, 20)]
    path, modules = list(sys.path), set(sys.modules)
    one, twenty = (loaders.open_model(saved, {}) for saved in packages)
    for _ in range(2):
        assert one.predict(TRAIN) == [2.0, 3.0, 4.0, 5.0]
        assert twenty.predict(TRAIN) == [21.0, 22.0, 23.0, 24.0]
    assert sys.path == path
    assert not {name for name in set(sys.modules) - modules if name.startswith("shared")}
    one.close()
    assert twenty.predict(TRAIN[:1]) == [21.0]
    assert sys.path == path


def test_a_module_that_was_imported_before_is_put_aside_and_back(tmp_path: Path) -> None:
    saved = save_shifted(tmp_path, 5)
    other = write_module(tmp_path / "other", 1000)
    sys.path.insert(0, str(other))
    try:
        import shared_late  # type: ignore[import-not-found]

        assert loaders.open_model(saved, {}).predict(TRAIN[:1]) == [6.0]
        assert sys.modules["shared_late"] is shared_late
        assert shared_late.SHIFT == 1000
    finally:
        sys.path.remove(str(other))
        sys.modules.pop("shared_late", None)


def test_in_a_private_process_the_modules_stay_until_the_model_is_closed(tmp_path: Path) -> None:
    saved = save_shifted(tmp_path, 7)
    path = list(sys.path)
    loaded = loaders.open_model(saved, {}, private=True)
    assert loaded.predict(TRAIN[:1]) == [8.0]
    assert "shared_late" in sys.modules
    assert sys.path[0] == str(saved.path / "code")
    loaded.close()
    assert "shared_late" not in sys.modules
    assert sys.path == path


def test_a_package_cannot_replace_the_standard_library_or_this_project(tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    (modules / "loaders").mkdir(parents=True)
    (modules / "loaders" / "__init__.py").write_text("raise RuntimeError('taken over')")
    (modules / "json.py").write_text("raise RuntimeError('taken over')")
    saved = loaders.save_model(doubled, tmp_path / "m", code_paths=[modules / "loaders", modules / "json.py"])
    loaded = loaders.open_model(saved, {})
    assert loaded.predict(TRAIN[:1]).tolist() == [2.0]
    assert loaded.predict(TRAIN[:1]).tolist() == [2.0]
    assert json.loads("1") == 1


NEIGHBOUR = """
from sklearn.base import BaseEstimator, TransformerMixin
import second

class Plus:
    def predict(self, model_input):
        return (model_input["a"] + second.ONE).tolist()

class Centred(TransformerMixin, BaseEstimator):
    def fit(self, X, y=None):
        return self

    def transform(self, X):
        return X - X.mean()
"""

SCRIPT = """
import loaders, neighbour, pandas
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline

class Twice:
    def predict(self, model_input):
        return (model_input["a"] * 2).tolist()

X = pandas.DataFrame({"a": [1.0, 2.0, 3.0, 4.0], "b": [0.0, 1.0, 0.0, 1.0]})
loaders.save_model(Twice(), "twice")
loaders.save_model(neighbour.Plus(), "plus")
loaders.save_model(make_pipeline(neighbour.Centred(), LinearRegression()).fit(X, [0, 0, 1, 1]), "pipeline")
"""


def test_local_classes_load_where_their_module_is_not(tmp_path: Path) -> None:
    """A class of a script, one of a module next to it, and one deep inside a pipeline."""
    (tmp_path / "second.py").write_text("ONE = 1\n")
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(loaders.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert loaders.load_model(tmp_path / "twice").predict(TRAIN[:2]) == [2.0, 4.0]
    assert loaders.load_model(tmp_path / "plus").predict(TRAIN[:2]) == [2.0, 3.0]
    assert loaders.load_model(tmp_path / "pipeline").predict(TRAIN).shape == (4,)
    assert "neighbour" not in sys.modules


def test_classes_of_what_is_installed_anywhere_are_pickled_by_name(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "elsewhere_lib").mkdir(parents=True)
    (site / "elsewhere_lib" / "__init__.py").write_text(
        "class Plus:\n    def predict(self, model_input):\n        return (model_input['a'] + 1).tolist()\n"
    )
    (site / "elsewhere_lib-3.1.dist-info").mkdir()
    (site / "elsewhere_lib-3.1.dist-info" / "METADATA").write_text("Name: elsewhere-lib\nVersion: 3.1\n")
    (site / "elsewhere_lib-3.1.dist-info" / "top_level.txt").write_text("elsewhere_lib\n")
    sys.path.insert(0, str(site))
    try:
        import elsewhere_lib  # type: ignore[import-not-found]

        saved = loaders.save_model(elsewhere_lib.Plus(), tmp_path / "m")
    finally:
        sys.path.remove(str(site))
        sys.modules.pop("elsewhere_lib", None)
    assert "elsewhere-lib==3.1" in (saved.path / "requirements.txt").read_text().splitlines()
    with pytest.raises(ModuleNotFoundError):
        loaders.load_model(saved.path)


# --- the stand-in for mlflow


def coded(directory: Path, body: str, head: str = "import mlflow") -> str:
    directory.mkdir()
    (directory / "coded.py").write_text(
        f"{head}\n\n\nclass Coded(mlflow.pyfunc.PythonModel):\n"
        f"    def predict(self, context, model_input, params=None):\n        {body}\n\n\n"
        "mlflow.models.set_model(Coded())\n"
    )
    return str(loaders.save_model(directory / "coded.py", directory / "package", verify=False).path)


def test_what_needs_more_of_mlflow_is_refused_with_the_reason(tmp_path: Path) -> None:
    packages = [
        coded(tmp_path / "1", "return 1", "import mlflow, mlflow.sklearn"),
        coded(tmp_path / "2", "return 1", "import mlflow\nfrom mlflow import sklearn"),
        coded(tmp_path / "3", "return 1", "import mlflow\nmlflow.set_experiment('x')"),
        coded(tmp_path / "4", "import mlflow.tracking"),
        coded(tmp_path / "5", "return mlflow.start_run()"),
        coded(tmp_path / "6", "import not_installed_anywhere"),
    ]
    request = {"form": "dataframe_records", "data": [{"a": 2}]}
    answers = in_blocked(["mlflow"], [{"package": path, "requests": [request]} for path in packages])
    errors = [answer if isinstance(answer, dict) else answer[0] for answer in answers]
    for error, name in zip(
        errors[:5], ["sklearn", "mlflow", "set_experiment", "tracking", "start_run"], strict=True
    ):
        assert error["error"] == "MlflowNeeded"
        assert "install mlflow with pip install mlflow" in error["message"]
        assert name in error["message"]
    assert errors[5]["error"] == "ModuleNotFoundError"


def test_importing_this_package_costs_next_to_nothing() -> None:
    code = "import sys, loaders; print(sorted({'numpy', 'pandas', 'yaml', 'sklearn'} & set(sys.modules)))"
    assert python(code).strip() == "[]"
    with pytest.raises(AttributeError):
        _ = loaders.invented  # type: ignore[attr-defined]
