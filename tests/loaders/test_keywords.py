"""Keywords of `save_model`: MLflow's names mean what they mean there, unknown ones are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import gateway
import loaders
from loaders import keywords

X = np.array([[0.0], [1.0], [2.0], [3.0]])


def save(path: Path, **options: Any) -> list[str]:
    loaders.save_model(LogisticRegression().fit(X, [0, 0, 1, 1]), path / "m", verify=False, **options)
    return (path / "m" / "requirements.txt").read_text().split()


@pytest.mark.parametrize("form", ["list", "file"])
def test_pip_requirements(tmp_path: Path, form: str) -> None:
    (tmp_path / "needs.txt").write_text("# ours\nscikit-learn>=1\n")
    given = ["scikit-learn>=1"] if form == "list" else str(tmp_path / "needs.txt")
    assert save(tmp_path, pip_requirements=given) == ["scikit-learn>=1"]


@pytest.mark.parametrize("form", ["mapping", "file"])
def test_conda_env(tmp_path: Path, form: str) -> None:
    text = "dependencies:\n- python=3.11\n- pip:\n  - scikit-learn>1\n"
    (tmp_path / "conda.yaml").write_text(text)
    mapping = {"dependencies": ["python=3.11", {"pip": ["scikit-learn>1"]}]}
    given = mapping if form == "mapping" else tmp_path / "conda.yaml"
    assert save(tmp_path, conda_env=given) == ["scikit-learn>1"]


def test_extra_requirements_are_added(tmp_path: Path) -> None:
    found = save(tmp_path, extra_pip_requirements=["tabulate>=0.9"])
    assert found[-1] == "tabulate>=0.9"
    assert any(line.startswith("scikit-learn==") for line in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_exmple": X}, "unknown keyword input_exmple: did you mean input_example"),
        ({"pip_requirement": []}, "did you mean pip_requirements"),
        ({"predict_func": "predict"}, "did you mean .*predict_fn"),
        ({"aliass": "a"}, "did you mean alias, a keyword of log_model?"),
        ({"regstry": "r"}, "did you mean registry, a keyword of log_model?"),
        ({"nam": "n"}, "did you mean name, a keyword of log_model?"),
        ({"tag": {}}, "did you mean tags, a keyword of log_model?"),
        ({"alias": "a"}, "unknown keyword alias: only log_model takes alias"),
        ({"code_paths": "mine"}, r"code_paths is a list of paths: write \['mine'\]"),
        (
            {"artifacts": {}},
            "In addition to the common keywords, sklearn models accept serialization_format",
        ),
        ({"requirements": [], "pip_requirements": []}, "pip_requirements is another name of requirements"),
        ({"requirements": [], "conda_env": {"dependencies": [{"pip": ["a"]}]}}, "give (only )?one of them"),
    ],
)
def test_what_is_unknown_or_given_twice_is_an_error(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        save(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_code_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="code_paths: nowhere does not exist"):
        save(tmp_path, code_paths=["nowhere"])
    assert list(tmp_path.iterdir()) == []


def test_a_conda_env_without_pip_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no pip part"):
        save(tmp_path, conda_env={"dependencies": ["scikit-learn"]})


def test_what_means_nothing_here_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="prompts has no meaning here"):
        save(tmp_path, prompts=["a"])


def test_what_is_so_in_any_case_needs_no_word(tmp_path: Path) -> None:
    save(tmp_path, await_registration_for=300)  # warnings are errors


def test_mlflows_words_for_the_model(tmp_path: Path) -> None:
    model, registry = LogisticRegression().fit(X, [0, 0, 1, 1]), tmp_path / "registry.yaml"
    logged = gateway.log_model(sk_model=model, name="iris", registry=registry, input_example=X, verify=False)
    assert logged.version == "1"
    with pytest.raises(TypeError, match="give the model once"):
        gateway.log_model(model, sk_model=model, name="iris", registry=registry)
    with pytest.raises(TypeError, match="give the model once"):
        gateway.log_model(name="iris", registry=registry)


class Theirs:
    """Has the attributes of MLflow's ModelSignature."""

    inputs = outputs = params = None

    def to_dict(self) -> dict[str, Any]:
        return {"inputs": '[{"type": "double", "name": "x"}]', "outputs": None, "params": None}


def test_a_signature_of_mlflow_says_what_it_says_there(tmp_path: Path) -> None:
    save(tmp_path, signature=Theirs())
    signature = loaders.load_model(tmp_path / "m").signature
    assert signature is not None
    assert [spec.name for spec in signature.inputs or ()] == ["x"]
    with pytest.raises(TypeError, match="signature is str"):
        loaders.save_model(LogisticRegression().fit(X, [0, 0, 1, 1]), tmp_path / "n", signature="x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "names",
    [
        {"registered_model_name": "iris"},
        {"name": "model", "registered_model_name": "iris"},
        {"artifact_path": "model", "registered_model_name": "iris"},
        {"artifact_path": "iris"},
    ],
    ids=str,
)
def test_mlflows_words_for_the_name(tmp_path: Path, names: dict[str, str]) -> None:
    model = LogisticRegression().fit(X, [0, 0, 1, 1])
    logged = gateway.log_model(
        model,
        registry=tmp_path / "registry.yaml",
        input_example=X,
        pyfunc_predict_fn="predict_proba",
        verify=False,
        **names,  # type: ignore[arg-type]
    )
    assert (logged.name, logged.version) == ("iris", "1")
    assert gateway.load_model("iris/1", tmp_path / "registry.yaml").predict(X).shape == (4, 2)
    with pytest.raises(TypeError, match="needs name"):
        gateway.log_model(model, registry=tmp_path / "registry.yaml")


def test_every_synonym_leads_to_something_that_is_taken() -> None:
    from loaders import flavors

    options = {name for flavor in flavors.FLAVORS for name in flavors.get(flavor).options}
    assert set(keywords.SYNONYMS.values()) <= options | set(keywords.OWN)


class Constant:
    """A model of one's own."""

    def predict(self, model_input: Any) -> Any:
        return model_input


@pytest.mark.parametrize("model", [Constant, LogisticRegression])
def test_a_class_in_place_of_its_object_is_refused(tmp_path: Path, model: Any) -> None:
    with pytest.raises(loaders.PackageError, match=f"{model.__name__} is a class: give an object of it"):
        loaders.save_model(model, tmp_path / "model")
