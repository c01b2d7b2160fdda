"""Gaps reach a model as its pandas makes them: every type, every form of a body, against pandas itself.

The right column is always what `pd.read_csv` or `pd.DataFrame` of this pandas makes of the same data.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder

import loaders
from gateway.http import bodies
from loaders import batch as batches
from loaders.enforcement import RawInput, enforce
from loaders.schema import Array, Type
from loaders.signature import AnyType, ColSpec, Scalar, Signature
from loaders.worker import wire
from tests.conftest import needs

FORMS = ("split", "records", "inputs", "instances", "csv", "arrow", "python", "bare words")


def read_csv(text: str, **options: Any) -> Any:
    return pd.read_csv(io.StringIO(text), **options)["c"]


#: A type, two of its values as JSON has them, as Python has them, and the column that pandas makes of
#: the first, a gap, and the second.
TYPES: dict[str, tuple[Type, list[Any], list[Any], Callable[[], Any]]] = {
    "text": (
        Scalar.string,
        ["red", "dark blue"],
        ["red", "dark blue"],
        lambda: read_csv("c,x\nred,\n,1\ndark blue,"),
    ),
    "double": (Scalar.double, [1.5, 2.0], [1.5, 2.0], lambda: read_csv("c,x\n1.5,\n,1\n2.0,")),
    "float": (
        Scalar.float,
        [1.5, 2.0],
        [1.5, 2.0],
        lambda: read_csv("c,x\n1.5,\n,1\n2.0,", dtype={"c": np.float32}),
    ),
    "long": (Scalar.long, [1, 2], [1, 2], lambda: read_csv("c,x\n1,\n,1\n2,")),
    "integer": (Scalar.integer, [1, 2], [1, 2], lambda: read_csv("c,x\n1,\n,1\n2,")),
    "boolean": (Scalar.boolean, [True, False], [True, False], lambda: read_csv("c,x\nTrue,\n,1\nFalse,")),
    "datetime": (
        Scalar.datetime,
        ["2024-01-02T03:04:05", "2024-02-01"],
        [pd.Timestamp("2024-01-02T03:04:05"), pd.Timestamp("2024-02-01")],
        lambda: read_csv("c,x\n2024-01-02T03:04:05,\n,1\n2024-02-01T00:00:00,", parse_dates=["c"]).dt.as_unit(
            "ns"
        ),
    ),
    "binary": (
        Scalar.binary,
        [base64.b64encode(b"\x00a").decode(), base64.b64encode(b"b").decode()],
        [b"\x00a", b"b"],
        lambda: pd.DataFrame({"c": [b"\x00a", None, b"b"]})["c"],
    ),
    "nested": (
        Array(Scalar.long),
        [[1, 2], [3]],
        [[1, 2], [3]],
        lambda: pd.DataFrame({"c": [[1, 2], None, [3]]})["c"],
    ),
    "any": (AnyType(), ["red", "blue"], ["red", "blue"], lambda: read_csv("c,x\nred,\n,1\nblue,")),
}
#: Which rows of the three are sent. A type that numbers without gaps keep is told from them alone.
ROWS = {"value, gap, value": [0, 1, 2], "gap first": [1, 0], "gap alone": [1], "no gap": [0, 2]}


#: What a form cannot hold: a bare word in nested data is a number, CSV holds scalars, 64 bits stay 64 bits.
IMPOSSIBLE = {
    *(("nested", form) for form in ("bare words", "csv")),
    *(("any", form) for form in ("bare words", "csv")),
    *(("integer", form) for form in ("arrow", "python")),
}
CASES = [(name, form) for name in TYPES for form in FORMS if (name, form) not in IMPOSSIBLE]


def raw(form: str, kind: Type, cells: list[Any], live: list[Any]) -> RawInput:
    """The column as a body of a form has it, read as the server reads it."""
    x = [1.0] * len(cells)
    if form == "split":
        return RawInput(
            "dataframe_split", {"columns": ["c", "x"], "data": [*map(list, zip(cells, x, strict=True))]}
        )
    if form in ("records", "instances"):
        rows = [{"c": cell, "x": 1.0} for cell in cells]
        return RawInput("dataframe_records" if form == "records" else "instances", rows)
    if form == "inputs":
        if isinstance(kind, Array):
            return RawInput("inputs", [{"c": cell, "x": 1.0} for cell in cells])
        return RawInput("inputs", {"c": cells, "x": x})
    if form == "bare words":
        rows = [[np.nan if cell is None else cell, 1.0] for cell in cells]
        return RawInput("dataframe_split", {"columns": ["c", "x"], "data": rows})
    if form == "csv":
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["c", "x"])
        writer.writerows([["" if cell is None else cell, 1.0] for cell in cells])
        return bodies.parse_csv(text.getvalue().encode()).raw
    if form == "arrow":
        needs("pyarrow")
        import pyarrow as pa

        return RawInput("arrow", pa.table({"c": pa.array(live), "x": x}))
    return RawInput("python", pd.DataFrame({"c": pd.Series(live, dtype=None), "x": x}))


def given(enforced: Any) -> Any:
    """The frame that a model in another process is given."""
    pieces = wire.encode({"batch": enforced.batch})
    frame = np.frombuffer(b"".join(bytes(piece) for piece in pieces), np.uint8)
    header = int.from_bytes(frame[4:8].tobytes(), "little")
    return batches.native(wire.decode(frame[16:], header)["batch"])


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("name", "form"), CASES)
@pytest.mark.filterwarnings("ignore:Mismatched null-like values")
def test_a_column_is_what_pandas_makes(name: str, form: str, rows: list[int]) -> None:
    kind, cells, live, pandas = TYPES[name]
    cells, live = [cells[0], None, cells[1]], [live[0], None, live[1]]
    whole = pandas()
    wanted = whole.iloc[rows].reset_index(drop=True)
    if 1 not in rows and name in ("long", "integer", "boolean"):
        wanted = wanted.astype({"long": np.int64, "integer": np.int32, "boolean": np.bool_}[name])
    if name == "any" and rows == [1]:
        wanted = pd.DataFrame({"c": [None]})["c"]
    if form in ("arrow", "python") and rows == [1] and name not in ("text", "any"):
        live, rows = live[:2], [0, 1]
        cells = cells[:2]
        wanted = whole.iloc[rows].reset_index(drop=True)
    signature = Signature((ColSpec(kind, "c", required=False), ColSpec(Scalar.double, "x")))
    sent = raw(form, kind, [cells[i] for i in rows], [live[i] for i in rows])
    for enforcement in ("strict", "warn"):
        enforced = enforce(signature, sent, None, enforcement)  # type: ignore[arg-type]
        pd.testing.assert_series_equal(given(enforced)["c"], wanted)


@pytest.mark.parametrize("form", ["split", "records", "csv", "python"])
def test_without_a_signature_too(form: str) -> None:
    for kind, cells, live, pandas in (TYPES["text"], TYPES["double"], TYPES["long"]):
        sent = raw(form, kind, [cells[0], None, cells[1]], [live[0], None, live[1]])
        pd.testing.assert_series_equal(given(enforce(None, sent))["c"], pandas())
    booleans = raw("csv", Scalar.boolean, [True, None, False], [])
    pd.testing.assert_series_equal(given(enforce(None, booleans))["c"], TYPES["boolean"][3]())


def test_integers_that_a_double_cannot_hold_stay_exact() -> None:
    signature = Signature((ColSpec(Scalar.long, "c", required=False),))
    large = 2**53 + 1
    wide = enforce(signature, RawInput("inputs", {"c": [large, None]})).batch
    assert batches.native(wide)["c"].tolist() == [large, pd.NA]
    narrow = enforce(signature, RawInput("inputs", {"c": [1, None]})).batch
    assert batches.layout(wide) != batches.layout(narrow)  # who shares a batch must not change a column


def test_text_and_other_objects_are_never_one_batch() -> None:
    text = enforce(None, RawInput("dataframe_records", [{"c": "a"}])).batch
    lists = enforce(None, RawInput("dataframe_records", [{"c": [1]}])).batch
    assert batches.layout(text) != batches.layout(lists)


TRAINING = "\n".join(
    (
        "colour,size,flag,count,x",
        "red,S,True,1,1",
        ",L,False,2,2",
        "blue,,,,3",
        "red,S,True,3,4",
        ",,,2,5",
        "blue,L,False,,9",
    )
)
TARGET = [10.0, 91.0, 44.0, 12.0, 95.0, 41.0]


def encoder(*columns: str) -> Any:
    return make_column_transformer((OneHotEncoder(handle_unknown="ignore"), list(columns)), remainder="drop")


PIPELINES = {
    "one-hot": lambda: make_pipeline(encoder("colour"), LinearRegression()),
    "one-hot booleans": lambda: make_pipeline(encoder("flag"), LinearRegression()),
    "one-hot numbers": lambda: make_pipeline(encoder("count"), LinearRegression()),
    "ordinal": lambda: make_pipeline(
        make_column_transformer(
            (
                OrdinalEncoder(
                    handle_unknown="use_encoded_value", unknown_value=-1, encoded_missing_value=-2
                ),
                ["colour", "size"],
            ),
            remainder="drop",
        ),
        LinearRegression(),
    ),
    "imputed text": lambda: make_pipeline(
        make_column_transformer(
            (
                make_pipeline(SimpleImputer(strategy="most_frequent", add_indicator=True), OneHotEncoder()),
                ["colour", "size"],
            ),
            remainder="drop",
        ),
        LinearRegression(),
    ),
    "constant": lambda: make_pipeline(
        make_column_transformer(
            (
                make_pipeline(SimpleImputer(strategy="constant", fill_value="none"), OneHotEncoder()),
                ["colour"],
            ),
            remainder="drop",
        ),
        LinearRegression(),
    ),
    "imputed numbers": lambda: make_pipeline(
        make_column_transformer((SimpleImputer(add_indicator=True), ["count", "x"]), remainder="drop"),
        LinearRegression(),
    ),
    "passed on": lambda: make_pipeline(
        make_column_transformer(("passthrough", ["count", "x"])), HistGradientBoostingRegressor()
    ),
}


def cells(column: Any) -> list[Any]:
    """As JSON has them."""
    return [None if pd.isna(cell) else cell for cell in column.astype(object)]


@pytest.mark.parametrize("pipeline", PIPELINES.values(), ids=PIPELINES)
def test_a_pipeline_answers_as_its_library(pipeline: Callable[[], Any], tmp_path: Path) -> None:
    table = pd.read_csv(io.StringIO(TRAINING))
    model = pipeline().fit(table, TARGET)
    loaders.save_model(model, tmp_path / "m", input_example=table)
    served = loaders.load_model(tmp_path / "m")
    rows = [list(row) for row in zip(*(cells(table[name]) for name in table), strict=True)]
    names = list(table)
    sent = [
        RawInput("dataframe_split", {"columns": names, "data": rows}),
        RawInput("dataframe_records", [dict(zip(names, row, strict=True)) for row in rows]),
        RawInput("inputs", {name: cells(table[name]) for name in names}),
        bodies.parse_csv(TRAINING.encode()).raw,
        RawInput("python", table),
        *[RawInput("dataframe_split", {"columns": names, "data": [row]}) for row in rows],
    ]
    answers = [served.run(enforce(served.signature, raw, None).batch, {}) for raw in sent]
    arrays = [answer.arrays[""] for answer in answers if isinstance(answer, batches.Tensors)]
    wanted = model.predict(table)
    for array in arrays[:5]:
        np.testing.assert_allclose(array, wanted)
    np.testing.assert_allclose(np.concatenate(arrays[5:]), wanted)


def test_an_encoder_that_was_fitted_on_none_is_given_none(tmp_path: Path) -> None:
    """Older pandas leaves None in objects that were made from records."""
    table = pd.DataFrame({"colour": pd.Series(["red", None, "blue"], dtype=object), "x": [1.0, 2.0, 3.0]})
    model = make_pipeline(encoder("colour"), LinearRegression()).fit(table, [10.0, 90.0, 40.0])
    loaders.save_model(model, tmp_path / "m", input_example=table)
    served = loaders.load_model(tmp_path / "m")
    np.testing.assert_allclose(served.predict(table), model.predict(table))
    one = enforce(served.signature, RawInput("dataframe_records", [{"colour": None, "x": 2.0}]))
    np.testing.assert_allclose(served.run(one.batch, {}).arrays[""], [90.0])  # type: ignore[union-attr]


def test_sparse_columns_and_decimals_are_numbers() -> None:
    signature = Signature((ColSpec(Scalar.double, "a"), ColSpec(Scalar.double, "b")))
    sparse = pd.DataFrame({"a": [1.0, 2.0], "b": pd.arrays.SparseArray([0.0, 1.0])})
    given = batches.native(enforce(signature, RawInput("python", sparse)).batch)
    assert given["b"].tolist() == [0.0, 1.0]
    money = pd.DataFrame({"price": [Decimal("1.5"), Decimal(2)]})
    price = Signature((ColSpec(Scalar.double, "price"),))
    assert batches.native(enforce(price, RawInput("python", money)).batch)["price"].tolist() == [1.5, 2.0]


def test_an_answer_with_two_columns_of_one_name_loses_none() -> None:
    with pytest.raises(ValueError, match="two columns named 'a'"):
        batches.from_result(pd.DataFrame([[1, 2]], columns=["a", "a"]), 1)
