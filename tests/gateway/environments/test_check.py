"""The check of a package against a place: one rule, one row; and what is read from a package to make it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from gateway.environments import check as checks
from gateway.environments import facts, pickles
from gateway.environments.check import Installed, Verdict
from gateway.environments.lock import LockError
from tests.support.packages import described

HERE = {"scikit-learn": "1.9.1", "numpy": "2.4.0", "pandas": "3.1.0", "cloudpickle": "3.1.2"}


def found(package: Any, python: str = "3.11.7", **versions: str | None) -> checks.Check:
    given = {name.replace("_", "-"): version for name, version in versions.items()}
    place = {name: version for name, version in {**HERE, **given}.items() if version is not None}
    return checks.check(facts.read(package), Installed(python, place))


def by_value() -> bytes:
    """A model as people write them in a notebook: its code travels in the pickle."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(
        "class Model:\n    def predict(self, x):\n        import json\n        return json.dumps(x)\n", scope
    )
    data: bytes = cloudpickle.dumps(scope["Model"]())
    return data


@pytest.mark.parametrize(
    ("wanted", "here", "verdict"),
    [
        ("1.9.1", "1.9.1", Verdict.SAME),
        ("1.9.0", "1.9.1", Verdict.SAME),
        ("1.8.2", "1.9.1", Verdict.DIFFERS),
        ("1.0.2", None, Verdict.MISSING),
    ],
)
def test_a_framework_must_be_equal_in_its_unit(
    wanted: str, here: str | None, verdict: Verdict, tmp_path: Path
) -> None:
    package = described(tmp_path, requirements=f"mlflow\nscikit-learn=={wanted}\n", python="3.11.2")
    result = found(package, scikit_learn=here)
    assert result.verdict is verdict
    assert result.satisfied is (verdict <= Verdict.COMPATIBLE)
    if not result.satisfied:
        [reason] = result.reasons
        assert wanted in reason
        assert here is None or here in reason


@pytest.mark.parametrize(
    "lines", ["scikit-learn==1.8.2\nscikit-learn\n", "scikit-learn<1.9\nScikit_Learn>=1\n"]
)
def test_all_lines_about_a_library_count(lines: str, tmp_path: Path) -> None:
    result = found(described(tmp_path, requirements=lines, python="3.11.2"))
    assert result.verdict is Verdict.DIFFERS


@pytest.mark.parametrize("variable", ["python_version", "python_full_version"])
def test_a_marker_is_about_the_python_there(variable: str, tmp_path: Path) -> None:
    lines = f"scikit-learn==1.8.2; {variable} >= '3.13'\nscikit-learn==1.9.1; {variable} < '3.13'\n"
    package = described(tmp_path, requirements=lines, python="3.11.2")
    assert found(package, python="3.12.4").satisfied
    assert not found(package, python="3.13.1").satisfied


def test_the_version_that_the_flavor_names_counts_without_requirements(tmp_path: Path) -> None:
    package = described(tmp_path, requirements=None, flavors={"sklearn": {"sklearn_version": "1.0.2"}})
    assert found(package).verdict is Verdict.DIFFERS


def test_a_version_has_a_bound(tmp_path: Path) -> None:
    flavors = {"sklearn": {"sklearn_version": "1" * 5_000_000}}
    result = found(described(tmp_path, requirements=None, flavors=flavors, python="3." + "1" * 5_000_000))
    assert not result.satisfied
    assert len(result.sentence) < 1_000


def test_any_supported_python_does_without_byte_code(tmp_path: Path) -> None:
    package = described(tmp_path, requirements="scikit-learn==1.9.1", python="3.8.18")
    assert found(package).verdict is Verdict.COMPATIBLE
    assert found(package, python="3.14.0").verdict is Verdict.DIFFERS


@pytest.mark.parametrize(("python", "blocked"), [("3.11.2", False), ("3.12.1", True), (None, True)])
def test_byte_code_needs_its_own_python(python: str | None, blocked: bool, tmp_path: Path) -> None:
    package = described(
        tmp_path, loader="mlflow.pyfunc.model", requirements="cloudpickle\npandas==3.1.0", python=python,
        function={"python_model": "python_model.pkl"}, files={"python_model.pkl": by_value()},
    )  # fmt: skip
    result = found(package)
    assert result.byte_code is blocked
    assert result.satisfied is not blocked
    assert any("byte code" in reason for reason in result.reasons) is blocked


@pytest.mark.parametrize("key", ["python_model", "model_path"])
def test_byte_code_is_found_whatever_the_name_of_its_file(key: str, tmp_path: Path) -> None:
    loader = {"python_model": "mlflow.pyfunc.model", "model_path": "mlflow.sklearn"}[key]
    package = described(
        tmp_path, loader=loader, requirements="cloudpickle\npandas==3.1.0\nscikit-learn==1.9.1",
        python="3.12.1", function={key: "model.bin"}, files={"model.bin": by_value()},
    )  # fmt: skip
    assert facts.read(package).byte_code == ("model.bin",)
    assert found(package).byte_code


def test_reading_a_pickle_executes_nothing(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "touched",))

    (tmp_path / "trap.pkl").write_bytes(pickle.dumps(Trap()))
    named = pickles.read(tmp_path / "trap.pkl")
    assert any(module.startswith("pathlib") for module, _ in named.globals)
    assert not (tmp_path / "touched").exists()


def test_a_compressed_pickle_is_read(tmp_path: Path) -> None:
    import lzma

    (tmp_path / "model.pkl.xz").write_bytes(lzma.compress(by_value()))
    assert pickles.read(tmp_path / "model.pkl.xz").byte_code


def test_a_pickle_that_cannot_be_read_to_its_end_is_taken_for_the_worse(tmp_path: Path) -> None:
    whole = by_value()
    (tmp_path / "cut.pkl").write_bytes(b"\xff" + whole)
    named = pickles.read(tmp_path / "cut.pkl")
    assert not named.whole
    assert named.byte_code
    (tmp_path / "plain.pkl").write_bytes(b"\xff" + pickle.dumps([1, 2]))
    assert not pickles.read(tmp_path / "plain.pkl").byte_code


def test_pandas_counts_where_text_is_given(tmp_path: Path) -> None:
    lines = "scikit-learn==1.9.1\npandas==2.2.3\n"
    assert found(described(tmp_path / "a", requirements=lines)).satisfied
    text = found(described(tmp_path / "b", requirements=lines, columns="string"))
    assert text.verdict is Verdict.DIFFERS
    assert "pandas" in text.reasons[0]


def test_pandas_that_is_not_named_is_that_of_the_package_s_day(tmp_path: Path) -> None:
    lines = "scikit-learn==1.9.1\n"
    old = described(tmp_path / "a", requirements=lines, columns="string", created="2022-11-01 12:00:00")
    assert "1.x" in found(old).reasons[0]
    new = described(tmp_path / "b", requirements=lines, columns="string", created="2026-05-01 12:00:00")
    assert found(new).satisfied
    bounded = described(
        tmp_path / "c", requirements=lines, columns="string", created="2026-03-20 12:00:00",
        mlflow_version="3.10.1",
    )  # fmt: skip
    assert "2.x" in found(bounded).reasons[0]


def test_a_later_onnxruntime_reads_earlier_graphs(tmp_path: Path) -> None:
    package = described(tmp_path, loader="mlflow.onnx", requirements="onnxruntime==1.13.1\nonnx==1.12.0")
    assert found(package, onnxruntime="1.31.0").verdict is Verdict.COMPATIBLE
    assert found(package, onnxruntime="1.12.0").verdict is Verdict.DIFFERS
    assert found(package).verdict is Verdict.MISSING


def test_xgboost_s_old_binary_format_is_not_read_by_new_ones(tmp_path: Path) -> None:
    package = described(
        tmp_path, loader="mlflow.xgboost", requirements="xgboost==3.1.0", function={"data": "model.xgb"},
        flavors={"xgboost": {"data": "model.xgb", "xgb_version": "3.1.0"}}, files={"model.xgb": b"binf\0\0"},
    )  # fmt: skip
    assert any("binary format" in reason for reason in found(package, xgboost="3.1.2").reasons)


def test_what_the_model_s_code_imports_must_be_there(tmp_path: Path) -> None:
    def custom(place: str, source: str) -> Any:
        return described(
            tmp_path / place, loader="own_loader", requirements="acme==1.2\npandas==3.1.0\nnumpy==2.4.0\n",
            function={"code": "code"}, files={"code/own_loader.py": source},
        )  # fmt: skip

    assert found(custom("a", "import acme\n")).verdict is Verdict.MISSING
    assert found(custom("b", "import json\n")).satisfied
    assert found(custom("c", "from acme.x import y\n"), acme="1.9").satisfied
    assert found(custom("d", "from acme.x import y\n"), acme="2.0").verdict is Verdict.DIFFERS


@pytest.mark.parametrize(
    ("source", "needed"),
    [
        ("import mlflow.pyfunc\nclass M(mlflow.pyfunc.PythonModel): pass\n", None),
        ("from mlflow.pyfunc import PythonModel\n", None),
        ("import mlflow\nmlflow.sklearn.load_model('x')\n", "mlflow.sklearn"),
        ("from mlflow.tracking import MlflowClient\n", "mlflow.tracking.MlflowClient"),
        ("import mlflow.spark\n", "mlflow.spark"),
        ("import json\n", None),
    ],
)
def test_mlflow_itself_is_needed_where_code_wants_more_than_the_stand_in(
    source: str, needed: str | None, tmp_path: Path
) -> None:
    package = described(
        tmp_path, loader="own_loader", function={"code": "code"}, files={"code/own_loader.py": source}
    )
    reason = facts.read(package).mlflow
    assert (reason is None) is (needed is None)
    assert needed is None or needed in str(reason)


def test_models_of_flavors_that_only_mlflow_knows_keep_it(tmp_path: Path) -> None:
    package = described(
        tmp_path, loader="mlflow.spacy", requirements="mlflow\nspacy==3.7.2\n", mlflow_version="2.9.2"
    )
    read = facts.read(package)
    assert read.flavor == "mlflow"
    wanted = facts.wanted(read, as_of=read.created)
    assert wanted.keeps_mlflow
    assert "mlflow==2.9.2" in wanted.requirements
    assert found(package).verdict is Verdict.MISSING


def test_what_a_package_wants_is_what_it_names_and_what_it_relied_on(tmp_path: Path) -> None:
    lines = "mlflow\ncloudpickle==2.2.0\nscikit-learn==1.0.2\n"
    read = facts.read(described(tmp_path, requirements=lines, mlflow_version="1.30.0"))
    wanted = facts.wanted(read, as_of=read.created)
    assert set(wanted.requirements) == {
        "cloudpickle==2.2.0", "scikit-learn==1.0.2", "numpy", "pandas", "setuptools",
    }  # fmt: skip
    assert wanted.mlflow == "1.30.0"
    assert not wanted.keeps_mlflow
    assert wanted.python == (3, 8)
    assert not wanted.exact


def test_a_refused_line_does_not_hide_the_others(tmp_path: Path) -> None:
    package = described(tmp_path, requirements="scikit-learn==1.0.2\n-i https://x/simple\n")
    assert found(package).verdict is Verdict.DIFFERS


def test_a_line_that_may_not_be_installed_is_said_when_an_environment_is_wanted(tmp_path: Path) -> None:
    read = facts.read(described(tmp_path, requirements="scikit-learn==1.0.2\n-i https://x/simple\n"))
    with pytest.raises(LockError, match="is an index option"):
        facts.wanted(read, as_of=None)
