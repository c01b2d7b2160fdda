"""Model files without an `MLmodel`, over the table of their endings: written by the real libraries, loaded,
asked, and compared with the live model; and what is no model file."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

import gateway
import loaders
from gateway.registries.base import RegistryError
from gateway.registries.listed import ListedModels
from loaders import bare, package, scan
from loaders.bare import ENDINGS
from loaders.schema import AnyType, ColSpec, Scalar, TensorSpec
from tests.conftest import needs
from tests.support.running import Running, running

X = pd.DataFrame(np.random.default_rng(0).normal(size=(60, 3)), columns=["a", "b", "c"])
Y = (X["a"] + X["b"] > 0).astype(int)
NAMED = tuple(ColSpec(Scalar.double, name) for name in "abc")
WIDTH = (TensorSpec(np.dtype(np.float64), (-1, 3)),)
ROWS = X.head(4)


class Bare(NamedTuple):
    """A kind of bare file. `make` writes the file and returns the live answers to `ROWS`."""

    file: str
    make: Callable[[Path], Any]
    inputs: Any
    flavor: str
    needs: tuple[str, ...] = ()


def _sklearn(dump: Callable[[Any, Path], Any], *, names: bool = True) -> Callable[[Path], Any]:
    def make(file: Path) -> Any:
        data = X if names else X.to_numpy()
        model = LogisticRegression().fit(data, Y)
        dump(model, file)
        return model.predict(ROWS if names else ROWS.to_numpy())

    return make


def _pickled(model: Any, file: Path) -> None:
    file.write_bytes(pickle.dumps(model))


def _skops(model: Any, file: Path) -> None:
    import skops.io

    skops.io.dump(model, file)


def _xgboost(written: str = "", *, names: bool = True) -> Callable[[Path], Any]:
    def make(file: Path) -> Any:
        import xgboost

        data, rows = (X, ROWS) if names else (X.to_numpy(), ROWS.to_numpy())
        model = xgboost.XGBClassifier(n_estimators=3, n_jobs=1).fit(data, Y)
        model.save_model(file.with_suffix(written or file.suffix))
        if written:
            file.with_suffix(written).rename(file)
        return model.predict_proba(rows)[:, 1]

    return make


def _lightgbm(*, names: bool = True) -> Callable[[Path], Any]:
    def make(file: Path) -> Any:
        import lightgbm

        data, rows = (X, ROWS) if names else (X.to_numpy(), ROWS.to_numpy())
        model = lightgbm.LGBMClassifier(n_estimators=3, min_child_samples=2, verbose=-1, n_jobs=1)
        booster = model.fit(data, Y).booster_
        booster.save_model(str(file))
        return booster.predict(rows)

    return make


def _catboost(form: str) -> Callable[[Path], Any]:
    def make(file: Path) -> Any:
        import catboost

        model = catboost.CatBoostClassifier(
            iterations=3, verbose=0, allow_writing_files=False, thread_count=1
        )
        model.fit(X, Y).save_model(str(file), format=form)
        return model.predict(ROWS)

    return make


def _onnx(file: Path) -> Any:
    import onnx
    from onnx import TensorProto, helper

    taken = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])
    given = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "negated", [taken], [given])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(file))
    return -ROWS.to_numpy().astype(np.float32)


def _pt2(file: Path) -> Any:
    import torch

    class Doubled(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return 2 * x

    free = torch.export.Dim("n")
    program = torch.export.export(Doubled(), (torch.ones(2, 3),), dynamic_shapes=({0: free},))
    torch.export.save(program, file)
    return 2 * ROWS.to_numpy().astype(np.float32)


FLOATS = (TensorSpec(np.dtype(np.float32), (-1, 3), "x"),)
TABLE = (
    Bare("named.joblib", _sklearn(joblib.dump), NAMED, "sklearn"),
    Bare("arrays.joblib", _sklearn(joblib.dump, names=False), WIDTH, "sklearn"),
    Bare("pickled.pkl", _sklearn(_pickled), NAMED, "sklearn"),
    Bare("dumped.pkl", _sklearn(joblib.dump), NAMED, "sklearn"),
    Bare("safe.skops", _sklearn(_skops), NAMED, "sklearn", ("skops",)),
    Bare("graph.onnx", _onnx, FLOATS, "onnx", ("onnx", "onnxruntime")),
    Bare("boosted.json", _xgboost(), NAMED, "xgboost", ("xgboost",)),
    Bare("arrays.json", _xgboost(names=False), WIDTH, "xgboost", ("xgboost",)),
    Bare("boosted.ubj", _xgboost(), NAMED, "xgboost", ("xgboost",)),
    Bare("binary.bst", _xgboost(".ubj"), NAMED, "xgboost", ("xgboost",)),
    Bare("text.bst", _xgboost(".json"), NAMED, "xgboost", ("xgboost",)),
    Bare("light.txt", _lightgbm(), NAMED, "lightgbm", ("lightgbm",)),
    Bare("light.bst", _lightgbm(), NAMED, "lightgbm", ("lightgbm",)),
    Bare("arrays.txt", _lightgbm(names=False), WIDTH, "lightgbm", ("lightgbm",)),
    Bare("cat.cbm", _catboost("cbm"), NAMED, "catboost", ("catboost",)),
    Bare("cat.json", _catboost("json"), NAMED, "catboost", ("catboost",)),
    Bare("program.pt2", _pt2, FLOATS, "pytorch", ("torch",)),
)
MARKED = [
    pytest.param(one, marks=pytest.mark.all if one.needs else (), id=one.file.replace(".", "-"))
    for one in TABLE
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Bare], tuple[Path, Any]]:
    place = tmp_path_factory.mktemp("bare")
    made: dict[str, Any] = {}

    def file(kind: Bare) -> tuple[Path, Any]:
        for module in kind.needs:
            needs(module)
        if kind.file not in made:
            made[kind.file] = kind.make(place / kind.file)
        return place / kind.file, made[kind.file]

    return file


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Serves a registry whose sources are the bare files that tests put into it."""
    place = tmp_path_factory.mktemp("served")
    (place / "registry.yaml").write_text("version: 1\nmodels: {}\n")
    with running(place, "--registry", "registry.yaml") as server:
        yield server


def test_the_table_covers_every_ending() -> None:
    assert {Path(one.file).suffix for one in TABLE} == set(ENDINGS)


@pytest.mark.parametrize("kind", MARKED)
def test_a_bare_file_answers_as_the_live_model_does(kind: Bare, written: Any) -> None:
    file, live = written(kind)
    model = loaders.load_model(file)
    assert model.package.bare == kind.file
    assert model.flavor.name == kind.flavor
    assert model.signature is not None
    assert model.signature.inputs == kind.inputs
    data: Any = ROWS if isinstance(kind.inputs[0], ColSpec) else ROWS.to_numpy().astype(kind.inputs[0].dtype)
    answer = model.predict(data)
    answer = answer["y"] if isinstance(answer, dict) else answer
    assert np.allclose(np.asarray(answer, dtype=float), np.asarray(live, dtype=float))


@pytest.mark.parametrize("kind", MARKED)
def test_a_bare_file_is_served_as_the_source_of_a_version(kind: Bare, written: Any, server: Running) -> None:
    file, live = written(kind)
    name = kind.file.replace(".", "-")
    entry = {"versions": {"1": {"source": str(file)}}, "aliases": {"champion": "1"}}
    document = {"version": 1, "models": {name: entry}}
    (server.directory / "registry.yaml").write_text(json.dumps(document))
    assert httpx.post(f"{server.url}/registry/refresh", headers=server.key, timeout=30).status_code == 200
    before = httpx.get(f"{server.url}/v2/models/{name}", timeout=60).json()
    assert before["inputs"] == []  # only its framework can read the file
    if isinstance(kind.inputs[0], ColSpec):
        body: Any = {"dataframe_records": ROWS.to_dict("records")}
    else:
        body = {"inputs": ROWS.to_numpy().tolist()}
    answer = httpx.post(f"{server.url}/predict/{name}", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    found = answer.json()["predictions"]
    found = found["y"] if isinstance(found, dict) else found
    assert np.allclose(np.asarray(found, dtype=float), np.asarray(live, dtype=float), atol=1e-6)
    inputs = httpx.get(f"{server.url}/v2/models/{name}", timeout=60).json()["inputs"]
    assert [one["name"] for one in inputs] == [spec.name or "input" for spec in kind.inputs]
    wrong = httpx.post(f"{server.url}/predict/{name}", json={"inputs": [["text", "text", "text"]]})
    assert wrong.status_code == 422
    view = httpx.get(f"{server.url}/models/{name}/versions/1", timeout=60).json()
    assert view["signature"]["inputs"]
    assert view["environment"]["runs_in"] == "same"
    assert any("without an MLmodel" in warning for warning in view["warnings"])
    assert kind.file in httpx.get(f"{server.url}/models/{name}/docs").text or view["signature"]


def test_a_file_named_on_the_command_line_is_loaded_before_the_server_is_ready(tmp_path: Path) -> None:
    (tmp_path / "mnt/models").mkdir(parents=True)
    _sklearn(joblib.dump)(tmp_path / "mnt/models/model.joblib")
    (tmp_path / "mnt/models/requirements.txt").write_text("scikit-learn\n")
    with running(tmp_path, "--name", "income", "mnt/models") as server:
        assert server.process.poll() is None
        for _ in range(600):
            if httpx.get(f"{server.url}/readyz").status_code == 200:
                break
        metadata = httpx.get(f"{server.url}/v2/models/income", timeout=60).json()
        assert [one["name"] for one in metadata["inputs"]] == ["a", "b", "c"]
        rows = {"instances": ROWS.to_numpy().tolist()}
        answer = httpx.post(f"{server.url}/v1/models/income:predict", json=rows, timeout=60)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("named", "name"),
    [
        ("iris.pkl", "iris"),
        ("iris/model.pkl", "iris"),
        ("iris/1/model.pkl", "iris"),
        ("iris", "iris"),
        ("other=iris/model.pkl", "other"),
        ("a=b.pkl", "a=b"),
    ],
)
def test_the_name_of_a_bare_file(
    named: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("iris.pkl", "iris/model.pkl", "iris/1/model.pkl", "a=b.pkl"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_bytes(pickle.dumps(1))
    listed = ListedModels([named])
    assert listed.names == [name] == listed.bare


def test_columns_of_categories_and_of_unknown_types() -> None:
    """A pipeline with an encoder takes text where the encoder knows text; a model that answers no made-up
    numbers takes any value."""
    from loaders.flavors.sklearn import Estimator

    data = pd.DataFrame({"city": ["rome", "oslo"] * 10, "size": np.arange(20.0)})
    target = [0, 1] * 10
    encoded = ColumnTransformer([("city", OneHotEncoder(), ["city"])], remainder="passthrough")
    pipeline = make_pipeline(encoded, LogisticRegression()).fit(data, target)
    stated = Estimator(pipeline, "predict").stated()
    assert stated is not None
    assert stated.inputs == (ColSpec(Scalar.string, "city"), ColSpec(Scalar.double, "size"))

    class OnlyText(LogisticRegression):  # type: ignore[misc]
        def predict(self, X: Any) -> Any:  # noqa: N803
            return [text.upper() for text in X["city"]]

    model = OnlyText().fit(data[["size"]], target)
    model.feature_names_in_ = np.array(["city"])
    stated = Estimator(model, "predict").stated()
    assert stated is not None
    assert stated.inputs == (ColSpec(AnyType(), "city", required=False),)


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("model.json", b'{"hello": 1}', "is not a model of XGBoost or CatBoost"),
        ("model.json", b"[1, 2", "is not a model of XGBoost or CatBoost"),
        ("model.txt", b"hello", "is not a model of LightGBM"),
        ("model.ubj", b"{}", "is not a model of XGBoost in UBJSON"),
        ("model.cbm", b"CBM", "is not a model of CatBoost"),
        ("model.skops", b"hello", "is not a skops file"),
        ("model.pt2", b"hello", "is not an exported program"),
        ("model.pkl", b"", "is empty"),
    ],
)
def test_a_file_of_another_kind_is_refused_before_it_is_loaded(
    file: str, content: bytes, problem: str, tmp_path: Path
) -> None:
    (tmp_path / file).write_bytes(content)
    for place in (tmp_path, tmp_path / file):
        with pytest.raises(package.PackageError, match=problem):
            package.read(place)
        with pytest.raises(RegistryError, match=problem):
            ListedModels([str(place)])


def test_a_directory_with_several_model_files_names_them(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(1))
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(1))
    with pytest.raises(package.PackageError, match=r"holds several model files: a\.pkl, b\.pkl"):
        package.read(tmp_path)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(1))
    assert package.read(tmp_path).bare == "model.pkl"
    (tmp_path / "model.joblib").write_bytes(pickle.dumps(1))
    with pytest.raises(package.PackageError, match="holds several"):
        package.read(tmp_path)


def test_a_named_link_counts_as_its_file(tmp_path: Path) -> None:
    """As caches of downloads have it: a link with the file's name to content under its digest."""
    from gateway.artifacts.cache import Artifacts
    from gateway.registries.base import Version

    _sklearn(_pickled)(tmp_path / "0123abcd")
    (tmp_path / "iris.pkl").symlink_to(tmp_path / "0123abcd")
    listed = ListedModels([str(tmp_path / "iris.pkl")])
    version: Version = listed.read().models["iris"].versions["1"]
    local = Artifacts(tmp_path / "cache", 1 << 30).fetch(version)
    assert package.read(local.path).bare == "iris.pkl"


def test_a_link_to_elsewhere_and_an_unreadable_mlmodel_are_not_bare_files(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "secret.pkl"
    inside.mkdir()
    outside.write_bytes(pickle.dumps(1))
    (inside / "model.pkl").symlink_to(outside)
    with pytest.raises(package.PackageError, match="leaves the package"):
        package.read(inside)
    (inside / "model.pkl").unlink()
    (inside / "model.pkl").write_bytes(pickle.dumps(1))
    (inside / "MLmodel").symlink_to(tmp_path / "nothing")
    with pytest.raises(package.PackageError, match="MLmodel"):
        package.read(inside)


def test_what_a_bare_file_executes_is_judged_as_that_of_a_package(tmp_path: Path) -> None:
    from gateway.artifacts.formats import Unsafe, judged
    from loaders import flavors

    _sklearn(_pickled)(tmp_path / "model.pkl")
    read = package.read(tmp_path)
    with pytest.raises(Unsafe, match="executes code"):
        judged(read, flavors.find(read), ())
    assert not scan.package(read).harmless
    (tmp_path / "model.pkl").unlink()
    (tmp_path / "model.txt").write_bytes(b"tree\nversion=v4\n")
    read = package.read(tmp_path)
    assert judged(read, flavors.find(read), ()) is read
    assert scan.package(read).harmless


@pytest.mark.all
def test_types_in_a_bare_skops_file_are_trusted_only_where_code_is_allowed(tmp_path: Path) -> None:
    from gateway.artifacts.formats import judged
    from loaders import flavors

    needs("skops")
    _sklearn(_skops)(tmp_path / "model.skops")
    read = package.read(tmp_path)
    assert not scan.package(read).harmless
    accepted = judged(read, flavors.find(read), ())
    assert accepted.flavors["sklearn"]["skops_trusted_types"] == []
    assert accepted.bare == "model.skops"


@pytest.mark.parametrize("file", ["model.joblib", "model.pkl"])
def test_a_truncated_file_is_an_error_of_the_load(file: str, tmp_path: Path) -> None:
    _sklearn(joblib.dump)(tmp_path / file)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    assert package.read(tmp_path).bare == file
    with pytest.raises(Exception, match=r".+"):
        loaders.load_model(tmp_path)


def test_one_file_is_pushed_without_what_lies_next_to_it(tmp_path: Path) -> None:
    _sklearn(joblib.dump)(tmp_path / "iris.joblib")
    (tmp_path / "private.txt").write_text("secret")
    registry = tmp_path / "registry.yaml"
    pushed = gateway.push(tmp_path / "iris.joblib", "iris", alias="champion", registry=registry)
    stored = tmp_path / "models/iris/1"
    assert [file.name for file in stored.iterdir()] == ["iris.joblib"], pushed
    model = gateway.load_model("models:/iris@champion", registry=registry)
    assert model.predict(ROWS).shape == (4,)
    shutil.rmtree(stored, ignore_errors=True)


def test_bare_endings_are_lower_and_upper_case() -> None:
    assert bare.is_bare(Path("MODEL.PKL"))
    assert not bare.is_bare(Path("model.pth"))
