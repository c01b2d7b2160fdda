"""Scikit-learn estimators are given arrays where a frame would only be slower, and frames elsewhere."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    VotingClassifier,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, StandardScaler, TargetEncoder
from sklearn.svm import SVC

from loaders import load_model, save_model
from loaders.batch import Columns
from loaders.enforcement import RawInput, enforce
from loaders.flavors import sklearn
from loaders.flavors.failures import Unsuitable
from loaders.flavors.sklearn import Estimator

FRAME, TARGET = load_iris(return_X_y=True, as_frame=True)
NAMES = list(FRAME.columns)


class Centred(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """A stranger's step: looks at the frame's columns."""

    def fit(self, frame: Any, target: Any = None) -> Centred:
        self.fitted_ = True
        return self

    def transform(self, frame: pd.DataFrame) -> Any:
        return frame[NAMES] - 1.0


def doubled(frame: Any) -> Any:
    return frame * 2


ARRAYS = [
    LogisticRegression(max_iter=500),
    LinearRegression(),
    RandomForestClassifier(5, random_state=0),
    KNeighborsClassifier(),
    SVC(),
    make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
    make_pipeline(MinMaxScaler((0, 2)), "passthrough", LogisticRegression(max_iter=500)),
]
FRAMES = [
    make_pipeline(make_column_transformer((StandardScaler(), NAMES[:2])), LogisticRegression(max_iter=500)),
    make_pipeline(Centred(), LogisticRegression(max_iter=500)),
    make_pipeline(FunctionTransformer(doubled), LogisticRegression(max_iter=500)),
    make_pipeline(StandardScaler().set_output(transform="pandas"), LogisticRegression(max_iter=500)),
    GridSearchCV(LogisticRegression(max_iter=500), {"C": [1.0]}, cv=2),
    VotingClassifier([("a", LogisticRegression(max_iter=500)), ("b", KNeighborsClassifier())]),
]


def name(model: Any) -> str:
    return str(model).partition("(")[0]


def table(frame: pd.DataFrame) -> Columns:
    return Columns({column: frame[column].to_numpy() for column in frame}, len(frame))


def asked_with(estimator: Estimator, batch: Columns) -> list[type]:
    """Returns the kinds of input that the framework received for this batch."""
    given: list[type] = []

    def spy(ask: Any) -> Any:
        return lambda data: given.append(type(data)) or ask(data)

    estimator._predict = spy(estimator._predict)
    if hasattr(estimator, "_predict_array"):
        estimator._predict_array = spy(estimator._predict_array)
    estimator.predict(batch, {})
    return given


@pytest.mark.parametrize("model", [*ARRAYS, *FRAMES], ids=name)
def test_an_answer_is_what_the_model_gives_for_a_frame(model: Any) -> None:
    estimator = Estimator(model.fit(FRAME, TARGET), "predict")
    for rows in (1, 7):
        part = FRAME.iloc[45 : 45 + rows]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            answer = estimator.predict(table(part), {})
        expected = model.predict(part)
        assert answer.dtype == expected.dtype
        np.testing.assert_allclose(answer, expected, rtol=1e-12)
    assert list(model.feature_names_in_ if hasattr(model, "feature_names_in_") else NAMES) == NAMES


@pytest.mark.parametrize("model", ARRAYS, ids=name)
def test_estimators_that_only_check_names_get_arrays(model: Any) -> None:
    assert asked_with(Estimator(model.fit(FRAME, TARGET), "predict"), table(FRAME.head(3))) == [np.ndarray]


@pytest.mark.parametrize("model", FRAMES, ids=name)
def test_what_may_look_at_columns_gets_frames(model: Any) -> None:
    assert asked_with(Estimator(model.fit(FRAME, TARGET), "predict"), table(FRAME.head(3))) == [pd.DataFrame]


def test_other_columns_than_those_it_was_fitted_on_come_as_a_frame() -> None:
    model = LogisticRegression(max_iter=500).fit(FRAME, TARGET)
    turned = table(FRAME[NAMES[::-1]].head(2))
    with pytest.raises(ValueError, match="same order"):
        Estimator(model, "predict").predict(turned, {})
    gaps = table(FRAME.head(2))
    gaps.arrays[NAMES[0]] = np.ma.MaskedArray([1, 2], mask=[True, False])
    with pytest.raises(ValueError, match=r"NaN|missing"):
        Estimator(model, "predict").predict(gaps, {})


def test_a_model_fitted_without_names_gets_frames_as_in_mlflow() -> None:
    model = LogisticRegression(max_iter=500).fit(FRAME.to_numpy(), TARGET)
    with pytest.warns(UserWarning, match="has feature names"):
        assert asked_with(Estimator(model, "predict"), table(FRAME.head(2))) == [pd.DataFrame]


@pytest.mark.parametrize("kinds", [("i4", "f8"), ("f4", "i8"), ("f4", "f4"), ("i8", "i8"), ("?", "f8")])
def test_mixed_columns_become_the_number_type_that_pandas_gives_them(kinds: tuple[str, str]) -> None:
    model = LinearRegression().fit(pd.DataFrame({"a": [1.0, 2, 3], "b": [2.0, 1, 0]}), [1.0, 2, 3])
    batch = Columns({n: np.array([0, 1, 1]).astype(kind) for n, kind in zip("ab", kinds, strict=True)}, 3)
    answer = Estimator(model, "predict").predict(batch, {})
    expected = model.predict(pd.DataFrame(batch.arrays))
    assert answer.dtype == expected.dtype
    np.testing.assert_allclose(answer, expected, rtol=1e-12)


def test_an_encoder_tells_large_integers_apart_next_to_a_column_of_floats() -> None:
    ids = np.tile(2**60 + np.arange(4), 25)
    frame = pd.DataFrame({"id": ids, "x": np.linspace(0.0, 1.0, len(ids))})
    model = make_pipeline(TargetEncoder(), LinearRegression()).fit(frame, (ids - 2**60) * 10.0)
    answer = Estimator(model, "predict").predict(table(frame.head(4)), {})
    np.testing.assert_allclose(answer, [0.0, 10.0, 20.0, 30.0], atol=1.0)


def _texts() -> Any:
    texts, labels = ["good day", "bad day", "good night", "bad night"], [1, 0, 1, 0]
    return make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts, labels)


@pytest.mark.parametrize(
    "sent",
    [
        [1, 2],
        None,
        "hello",
        True,
        [],
        [None, "a"],
        [["a", "b"]],
        [["a"], [1]],
        [[[]]],
        [{"a": "x"}],
        {"a": 1},
    ],
)
def test_input_that_is_not_a_list_of_texts_is_refused_with_the_form_that_works(sent: Any) -> None:
    estimator = Estimator(_texts(), "predict")
    batch = enforce(None, RawInput("inputs", sent)).batch
    with pytest.raises(Unsuitable, match=r'takes a list.*send \{"inputs": \["…", "…"\]\}'):
        estimator.predict(batch, {})
    assert estimator.predict(enforce(None, RawInput("inputs", ["good day"])).batch, {}).tolist() == [1]


def test_a_model_of_lists_of_words_gets_them() -> None:
    words = [["good", "day"], ["bad", "day"]]
    model = make_pipeline(TfidfVectorizer(analyzer=list), LogisticRegression()).fit(words, [1, 0])
    batch = enforce(None, RawInput("inputs", words)).batch
    assert Estimator(model, "predict").predict(batch, {}).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("model", "example", "other"),
    [
        (_texts(), ["good day", "bad night"], ["bad", "a bad day", "good"]),
        (LinearRegression().fit([[1.0, 2.0], [3.0, 5.0]], [1, 2]), [[1.0, 2.0], [3.0, 4.5]], [[7.25, 8.5]]),
    ],
)
def test_a_list_as_example_is_the_array_it_makes(tmp_path: Any, model: Any, example: Any, other: Any) -> None:
    package = save_model(model, tmp_path / "m", input_example=example)
    assert json.loads((package.path / "serving_input_example.json").read_text()) == {"inputs": example}
    loaded = load_model(package.path)
    assert loaded.predict(example).tolist() == model.predict(example).tolist()
    enforced = enforce(loaded.signature, RawInput("inputs", other))
    assert loaded.run(enforced.batch, {}).arrays[""].tolist() == model.predict(other).tolist()


def test_of_a_class_with_plain_state_one_is_compared_on_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sklearn, "_SAME", set())
    Estimator(LogisticRegression(max_iter=500).fit(FRAME, TARGET), "predict")
    Estimator(RandomForestClassifier(2).fit(FRAME, TARGET), "predict")

    def compared(estimator: Estimator, names: list[str]) -> bool:
        raise AssertionError("it was compared again")

    monkeypatch.setattr(Estimator, "_same_of_arrays", compared)
    other = Estimator(LogisticRegression(C=0.1, max_iter=500).fit(FRAME, TARGET), "predict")
    assert asked_with(other, table(FRAME.head(2))) == [np.ndarray]
    # Another method, another class, and state that is more than numbers and texts are compared.
    for model, method in (
        (LogisticRegression(max_iter=500), "predict_proba"),
        (LinearRegression(), "predict"),
        (RandomForestClassifier(2), "predict"),
        (make_pipeline(LogisticRegression(max_iter=500)), "predict"),
    ):
        model.fit(FRAME, TARGET)
        with pytest.raises(AssertionError, match="compared again"):
            Estimator(model, method)


def test_a_class_that_may_read_columns_is_compared_for_each_fit() -> None:
    """The same class reads numbers alike from an array, and its own categories only from a frame."""
    numbers = HistGradientBoostingClassifier(max_iter=2).fit(FRAME, TARGET)
    assert asked_with(Estimator(numbers, "predict"), table(FRAME.head(2))) == [np.ndarray]
    frame = pd.DataFrame({"kind": pd.Categorical(["a", "b"] * 20), "x": np.arange(40.0)})
    kinds = HistGradientBoostingClassifier(max_iter=2, categorical_features="from_dtype")
    estimator = Estimator(kinds.fit(frame, [0, 1] * 20), "predict")
    assert estimator._names is None
