"""Made-up rows: typed, and with values that the model takes where it tells them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder

import loaders
from gateway.http.documents import openapi
from loaders import madeup
from loaders.enforcement import enforce
from loaders.schema import Array, ColSpec, Object, Property, Scalar, SignatureError, TensorSpec
from loaders.signature import Signature
from tests.support.memory import at_most
from tests.support.processes import Processes, run

FRAME = pd.DataFrame({"city": ["Bonn", "Rome"], "floor": [3, 4], "x": [0.5, 1.5]})


def signature(*columns: tuple[str, str]) -> Signature:
    inputs = ",".join(f'{{"name": "{name}", "type": "{kind}"}}' for name, kind in columns)
    return Signature.from_json({"inputs": f"[{inputs}]"})


@pytest.mark.parametrize(
    ("kind", "value", "taken"),
    [
        ("string", "Bonn", "Bonn"),
        ("string", 5, "a"),
        ("string", ["Bonn"], "a"),
        ("long", 3, 3),
        ("long", True, 1),
        ("double", 3, 3),
        ("boolean", False, False),
    ],
)
def test_what_a_model_knows_is_taken_where_it_is_of_the_column_s_type(
    kind: str, value: Any, taken: Any
) -> None:
    """The reports of a model process are not trusted."""
    row = madeup.row(signature(("c", kind)), {"c": value})
    assert row is not None
    assert row.data["data"] == [[taken]]


def test_a_hostile_process_changes_no_row() -> None:
    assert madeup.row(signature(("c", "string")), "no mapping") == madeup.row(signature(("c", "string")))  # type: ignore[arg-type]


FLOAT = np.dtype(np.float64)
LONG = Object(tuple(Property(f"p{number}", Array(Scalar.long)) for number in range(600)))


@pytest.mark.parametrize(
    "inputs",
    [
        tuple(TensorSpec(FLOAT, (2**20,), f"t{number}") for number in range(12)),
        (TensorSpec(FLOAT, (2**32, 2**32), "t"),),
        (TensorSpec(FLOAT, (2**62, 4), "t"),),
        (TensorSpec(FLOAT, (2**22, 0), "t"),),
        (TensorSpec(FLOAT, (0, 2**22), "t"),),
        tuple(ColSpec(LONG, f"c{number}") for number in range(1_000)),
    ],
    ids=["many tensors", "wraps to 0", "wraps to 0 again", "empty lists", "an empty list", "nested columns"],
)
def test_a_row_has_one_budget(inputs: Any) -> None:
    """A signature of a few bytes may ask for gigabytes."""
    with at_most(2):
        most = 10_000 if isinstance(inputs[0], ColSpec) else madeup.MOST_VALUES
        assert madeup.row(Signature(inputs), most=most) is None
        assert openapi.made_up(Signature(inputs)) == {}
        assert (
            openapi.v2_example(Signature(inputs)) is None
            or isinstance(inputs[0], ColSpec)
            or 0 in inputs[0].shape
        )


def test_a_document_has_smaller_rows_than_a_warm_up() -> None:
    picture = Signature((TensorSpec(FLOAT, (-1, 224, 224, 3)),))
    assert madeup.row(picture) is not None
    with at_most(2):
        assert openapi.made_up(picture) == {}
        small = tuple(TensorSpec(FLOAT, (9_000,), f"t{number}") for number in range(100))
        assert openapi.made_up(Signature(small)) == {}
        assert openapi.v2_example(Signature(small)) is None


@pytest.mark.parametrize("shape", [[1] * 65, [2**63]])
def test_a_shape_that_no_array_can_have_is_refused(shape: list[int]) -> None:
    spec = {"type": "tensor", "tensor-spec": {"dtype": "float64", "shape": shape}}
    with pytest.raises(SignatureError, match="shape"):
        Signature.from_json({"inputs": [spec]})


@pytest.mark.parametrize(
    "encode",
    [
        ColumnTransformer([("one", OneHotEncoder(), ["city"]), ("two", OrdinalEncoder(), ["floor"])]),
        ColumnTransformer(
            [("both", make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder()), ["city"])],
            remainder="passthrough",
        ),
        OneHotEncoder(),
    ],
    ids=["encoders", "pipeline", "alone"],
)
def test_a_pipeline_that_refuses_unknown_categories_answers_a_made_up_row(
    tmp_path: Path, encode: Any
) -> None:
    model = make_pipeline(encode, LinearRegression()).fit(FRAME, [1.0, 2.0])
    columns = signature(("city", "string"), ("floor", "long"), ("x", "double"))
    package = loaders.save_model(model, tmp_path / "model", signature=columns, verify=False)

    async def work(h: Processes) -> None:
        runner = await h.started(package)
        assert runner.known["city"] == "Bonn"
        row = madeup.row(package.signature, runner.known)
        assert row is not None
        answer = await runner.prewarm(enforce(package.signature, row, None, "strict").batch, {})
        assert np.asarray(next(iter(answer.arrays.values()))).shape[0] == 1  # type: ignore[union-attr]

    run(tmp_path / "tmp", work)
