"""A package is saved only if, in a fresh process, it answers as the object it was saved from."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import loaders
from loaders import proof, recorded, trial

FRAME = pd.DataFrame({"a": [1.0, 2.0, 3.0], "kind": pd.Categorical(["x", "y", "x"])})


class Forgets:
    """Its pickle holds less than the object."""

    def __init__(self) -> None:
        self.factor = 3.0

    def __getstate__(self) -> dict[str, float]:
        return {"factor": 1.0}

    def predict(self, model_input: Any) -> Any:
        return (model_input["a"] * self.factor).to_numpy()


def by_dtype(frame: Any) -> list[dict[str, Any]]:
    """Looks at what JSON does not keep."""
    return [{"a": a, "coded": str(frame["kind"].dtype) == "category"} for a in frame["a"]]


_CALLS = [0]


def counting(frame: Any) -> list[int]:
    _CALLS[0] += 1
    return _CALLS * len(frame)


def fits(frame: Any) -> Any:
    return frame["a"].to_numpy() * 2


@pytest.mark.parametrize(
    ("model", "place"),
    [(Forgets(), "predictions[0]"), (by_dtype, "predictions[0].coded")],
    ids=["state", "json"],
)
def test_a_package_that_answers_otherwise_is_refused_with_the_field(
    tmp_path: Path, model: Any, place: str
) -> None:
    with pytest.raises(proof.AnswersDiffer, match=r"the model answers .*, the package") as raised:
        loaders.save_model(model, tmp_path / "m", input_example=FRAME)
    assert raised.value.fields == [place]
    assert list(tmp_path.iterdir()) == []
    loaders.save_model(model, tmp_path / "m", input_example=FRAME, verify=False)
    assert not (tmp_path / "m" / recorded.FILE).exists()


def test_an_original_that_differs_from_itself_is_not_compared(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="two answers to its input_example differ"):
        loaders.save_model(counting, tmp_path / "m", input_example=FRAME)
    assert not (tmp_path / "m" / recorded.FILE).exists()


def test_the_answer_is_recorded_in_the_form_of_a_server(tmp_path: Path) -> None:
    loaders.save_model(fits, tmp_path / "m", input_example=FRAME)
    assert json.loads((tmp_path / "m" / recorded.FILE).read_text()) == {"predictions": [2.0, 4.0, 6.0]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert proof.changed(loaders.package.read(tmp_path / "m")) == []


def test_modules_that_code_paths_miss_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "src"
    source.mkdir()
    (source / "shown_model.py").write_text(
        "import hidden_helper\n\nclass Plus:\n    def predict(self, model_input):\n"
        "        return (model_input['a'] + hidden_helper.ONE).tolist()\n"
    )
    (source / "hidden_helper.py").write_text("ONE = 1\n")
    monkeypatch.syspath_prepend(source)
    monkeypatch.setenv("PYTHONPATH", str(source))
    import shown_model  # type: ignore[import-not-found]

    model = shown_model.Plus()
    try:
        for example in (FRAME[["a"]], None):
            with pytest.raises(trial.TrialFailed, match=r"hidden_helper.*code_paths"):
                loaders.save_model(
                    model,
                    tmp_path / "m",
                    input_example=example,
                    signature=loaders.infer_signature(FRAME[["a"]]),
                    code_paths=[source / "shown_model.py"],
                )
        both = [source / "shown_model.py", source / "hidden_helper.py"]
        loaders.save_model(model, tmp_path / "m", input_example=FRAME[["a"]], code_paths=both)
    finally:
        for name in ("shown_model", "hidden_helper"):
            sys.modules.pop(name, None)


def test_a_process_that_ends_is_said(tmp_path: Path) -> None:
    def dies(frame: Any) -> Any:
        import os

        os.kill(os.getpid(), 11)

    saved = loaders.save_model(dies, tmp_path / "m", signature=loaders.infer_signature(FRAME[["a"]]))
    example = loaders.save_model(fits, tmp_path / "e", input_example=FRAME[["a"]], verify=False)
    for file in example.path.glob("*input_example.json"):
        (saved.path / file.name).write_bytes(file.read_bytes())
    text = (saved.path / "MLmodel").read_text()
    info = "saved_input_example_info:\n  artifact_path: input_example.json\n  type: dataframe\n"
    (saved.path / "MLmodel").write_text(text + info)
    with pytest.raises(trial.TrialFailed, match="signal 11"):
        trial.answers(loaders.package.read(saved.path))


def test_a_load_that_answers_otherwise_warns_with_the_field(tmp_path: Path) -> None:
    from sklearn.linear_model import LinearRegression

    model = LinearRegression().fit(FRAME[["a"]], [1.0, 2.0, 4.0])
    loaders.save_model(model, tmp_path / "m", input_example=FRAME[["a"]])
    loaders.load_model(tmp_path / "m")
    file = tmp_path / "m" / recorded.FILE
    answer = json.loads(file.read_text())["predictions"]
    file.write_text(json.dumps({"predictions": [answer[0], answer[1] + 1, answer[2]]}))
    with pytest.warns(UserWarning, match=r"differs from the recorded one, at predictions\[1\]"):
        loaders.load_model(tmp_path / "m")
    assert len(proof.changed(loaders.package.read(tmp_path / "m"))) == 1


@pytest.mark.parametrize("name", ["xgboost", "lightgbm", "catboost", "statsmodels", "torch", "onnx"])
def test_every_framework_can_be_checked_by_itself(tmp_path: Path, name: str) -> None:
    """The original is compared, without a warning: both ways give the same answer."""
    from tests.support.flavors import SAMPLES

    pytest.importorskip(name)
    for sample in SAMPLES:
        if name in sample.needs or sample.flavor == name:
            live = sample.make(tmp_path)
            from loaders.enforcement import RawInput, enforce

            data = sample.data[:3]
            found = proof.ask(live, sample.flavor, {}, data, enforce(None, RawInput("python", data)))
            assert found.answer is not None, sample
            assert np.size(found.answer)
