"""What models of several kinds answer over a real socket to input that is easily misread."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

import gateway
from loaders.signature import ColSpec, Scalar, Signature, TensorSpec
from tests.support.served import Served, settings

TEXTS = ["good film", "bad film", "good play", "bad play"]
HOUSES = "colour,x\nred,1\n,2\nblue,3\nred,4\n,5\nblue,6\n"
PRICES = [10.0, 91.0, 44.0, 12.0, 95.0, 41.0]


def one_answer(rows: Any) -> Any:
    """A model of one's own that does not see rows."""
    return ["all of them"]


def free_graph() -> Any:
    """A graph that takes rows of any length."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    x, y = (helper.make_tensor_value_info(name, kind, ["n", "m"]) for name in "xy")
    body = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def houses() -> Any:
    table = pd.read_csv(io.StringIO(HOUSES))
    model = make_pipeline(
        make_column_transformer(
            (OneHotEncoder(handle_unknown="ignore"), ["colour"]), remainder="passthrough"
        ),
        LinearRegression(),
    )
    return model.fit(table, PRICES)


@pytest.fixture(scope="module", params=["inline", "process"])
def served(request: pytest.FixtureRequest, tmp_path_factory: Any, houses: Any) -> Iterator[Served]:
    directory: Path = tmp_path_factory.mktemp("values")
    registry = str(directory / "registry.yaml")
    table = pd.read_csv(io.StringIO(HOUSES))
    gateway.log_model(houses, name="houses", registry=registry, input_example=table, alias="champion")
    texts = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(TEXTS, [1, 0, 1, 0])
    gateway.log_model(texts, name="texts", registry=registry, input_example=np.array(TEXTS), alias="champion")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no signature
        gateway.log_model(texts, name="untyped", registry=registry, alias="champion")
    gateway.log_model(
        free_graph(),
        name="graph",
        registry=registry,
        signature=Signature((TensorSpec(np.dtype(np.float32), (-1, 3)),)),
        alias="champion",
    )
    as_table = Signature((ColSpec(Scalar.string, "text"),))
    gateway.log_model(texts, name="declared", registry=registry, signature=as_table, alias="champion")
    gateway.log_model(one_answer, name="own", registry=registry, signature=as_table, alias="champion")
    numbers = LinearRegression().fit(pd.DataFrame({"x": [1.0, 2.0]}), [1.0, 2.0])
    plain = Signature((ColSpec(Scalar.double, "x"),))
    gateway.log_model(numbers, name="numbers", registry=registry, signature=plain, alias="champion")
    with Served(settings(directory, isolation=request.param), registry) as running:
        yield running


def test_gaps_over_the_wire(served: Served, houses: Any) -> None:
    wanted = houses.predict(pd.DataFrame({"colour": ["red", np.nan, np.nan], "x": [1, 3, 5]})).tolist()
    split = {"columns": ["colour", "x"], "data": [["red", 1], [None, 3], [None, 5]]}
    reply = served.post("/predict/houses", {"dataframe_split": split})
    assert reply.json["predictions"] == pytest.approx(wanted)
    reply = served.post("/predict/houses", b"colour,x\nred,1\n,3\n,5\n", content_type="text/csv")
    assert reply.json["predictions"] == pytest.approx(wanted)
    one = served.post("/predict/houses", {"dataframe_records": [{"colour": None, "x": 3}]})
    assert one.json["predictions"] == pytest.approx(wanted[1:2])


TABLE = {"dataframe_split": {"columns": ["text"], "data": [["good film"], ["bad film"]]}}


def test_a_model_of_texts_refuses_a_table_and_says_what_to_send(served: Served) -> None:
    for name in ("untyped", "declared"):
        reply = served.post(f"/predict/{name}", TABLE)
        assert (reply.status, reply.code) == (422, "INVALID_INPUT")
        assert '{"inputs": ["…", "…"]}' in reply.json["message"]
        assert ("log it again" in reply.json["message"]) == (name == "declared")
    for name in ("untyped", "texts"):
        reply = served.post(f"/predict/{name}", {"inputs": ["good film", "bad film"]})
        assert reply.json["predictions"] == [1, 0]
    assert served.post("/predict/texts", TABLE).json["predictions"] == [1, 0]
    named = served.post("/predict/untyped", {"inputs": {"text": ["good film", "bad film"]}})
    assert (named.status, named.code) == (422, "INVALID_INPUT"), "it would answer the name"


def test_an_answer_for_all_texts_together_carries_a_warning(served: Served) -> None:
    reply = served.post("/predict/own", TABLE)
    assert reply.json["predictions"] == ["all of them"]
    assert "one answer for several rows" in reply.json["warnings"][0]
    single = served.post("/predict/own", {"dataframe_records": [{"text": "good film"}]})
    assert "warnings" not in single.json


def test_a_known_sentence_without_data_is_shown(served: Served) -> None:
    reply = served.post("/predict/numbers", {"dataframe_records": [{"x": None}]})
    assert (reply.status, reply.code) == (500, "PREDICTION_FAILED")
    assert reply.json["message"].endswith("raised ValueError: Input X contains NaN.")
    assert reply.json["hint"].startswith("the request has missing values in x, which not every model takes; ")


def test_a_graph_is_served_as_wide_as_it_is(served: Served) -> None:
    """Its signature came from an example of three values a row."""
    reply = served.post("/predict/graph", {"inputs": [[1.0, 2.0, 3.0, 4.0]]})
    assert (reply.status, reply.json["predictions"]) == (200, {"y": [[1.0, 2.0, 3.0, 4.0]]})
    [version] = [one for one in served.get("/models/graph").json["versions"] if one["version"] == "1"]
    assert "the model takes more than its signature says: tensor<float32>[-1, -1]" in str(version)
    # The metadata has the shape that the graph accepts.
    assert served.get("/v2/models/graph").json["inputs"][0]["shape"] == [-1, -1]
    view = served.get("/models/graph/versions/1").json
    assert view["signature"]["inputs"][0]["tensor-spec"]["shape"] == [-1, -1]
    assert "float32 [any, any]" in served.get("/models/graph/docs").body.decode()
