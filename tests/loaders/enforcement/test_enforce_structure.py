"""Enforcement of structure: where faults are, which column is which, in every form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from loaders.batch import Columns
from loaders.enforcement import CsvTable, InvalidInput, RawInput, enforce
from loaders.signature import (
    Array,
    ColSpec,
    Map,
    ParamSpec,
    Scalar,
    Signature,
)
from tests.support.asking import cast, places

# --- faults

PEOPLE = Signature(
    (
        ColSpec(Scalar.long, "age"),
        ColSpec(Scalar.double, "height"),
        ColSpec(Scalar.string, "name", False),
    ),
    None,
    (ParamSpec("threshold", Scalar.double, 0.5),),
)


def test_all_faults_are_reported_at_once() -> None:
    rows = [["1", True, "a"], [2, 1.5, 5], [None, 1.5, "c"]]
    raw = RawInput("dataframe_split", {"columns": ["age", "height", "name"], "data": rows})
    with pytest.raises(InvalidInput) as refused:
        enforce(PEOPLE, raw, {"threshold": "high"})
    found = {(v.path, v.expected, v.got) for v in refused.value.violations}
    assert found == {
        ("params.threshold", "double", "string"),
        ("dataframe_split.data[0].age", "long", "string"),
        ("dataframe_split.data[2].age", "long", "null"),
        ("dataframe_split.data[0].height", "double", "boolean"),
        ("dataframe_split.data[1].name", "string", "long"),
    }
    assert refused.value.total == 5


def test_a_hundred_faults_are_kept_and_all_counted() -> None:
    raw = RawInput("inputs", {"age": ["x"] * 1000, "height": [1.5] * 1000})
    with pytest.raises(InvalidInput) as refused:
        enforce(PEOPLE, raw)
    assert len(refused.value.violations) == 100
    assert refused.value.total == 1000
    assert "999 more" in str(refused.value)


def test_counting_ends_at_ten_thousand() -> None:
    for raw in (
        RawInput("inputs", {"age": ["x"] * 30_000, "height": [1.5] * 30_000}),
        RawInput("inputs", {"age": [1] * 30_000, "height": [None, "x"] * 15_000}),
    ):
        with pytest.raises(InvalidInput) as refused:
            enforce(PEOPLE, raw)
        assert len(refused.value.violations) == 100
        assert refused.value.total == 10_000
        assert refused.value.count_text == "10,000 or more problems"
        assert str(refused.value).endswith(", and 9,999 or more others")


def test_what_was_counted_to_the_end_is_said_exactly() -> None:
    for count, text in ((1, "1 problem"), (2, "2 problems"), (1234, "1,234 problems")):
        with pytest.raises(InvalidInput) as refused:
            enforce(PEOPLE, RawInput("inputs", {"age": ["x"] * count, "height": [1.5] * count}))
        assert refused.value.count_text == text
        assert ("or more" in str(refused.value)) is False


def test_no_row_data_in_faults() -> None:
    secret = "s3cr3t"
    rows = [{"age": secret, "height": secret, "name": {secret[::-1]: 1}}]
    with pytest.raises(InvalidInput) as refused:
        enforce(PEOPLE, RawInput("instances", rows), {"threshold": secret})
    assert refused.value.total == 4
    assert secret not in str([str(violation) for violation in refused.value.violations])


def test_long_names_are_cut_in_paths() -> None:
    signature = Signature((ColSpec(Map(Scalar.long), "m"),))
    (path,) = places(signature, "instances", [{"m": {"n" * 10_000: "x"}}])
    assert len(path) < 120


@pytest.mark.parametrize(
    ("form", "data", "paths"),
    [
        ("dataframe_split", {"columns": ["height"], "data": [[1.5]]}, ["dataframe_split.age"]),
        ("dataframe_split", {"data": [[1, 1.5]]}, ["dataframe_split"]),
        ("dataframe_split", {"columns": ["age", "height"]}, ["dataframe_split.data"]),
        ("dataframe_split", {"columns": ["age", "height"], "data": 5}, ["dataframe_split.data"]),
        ("dataframe_split", {"columns": ["age", "age"], "data": [[1, 2]]}, ["dataframe_split.columns[1]"]),
        ("dataframe_split", {"columns": "age", "data": [[1]]}, ["dataframe_split.columns"]),
        ("dataframe_split", {"columns": ["age", 1.5], "data": [[1, 2]]}, ["dataframe_split.columns[1]"]),
        (
            "dataframe_split",
            {"columns": ["age", "height"], "data": [[1, 2], [1]]},
            ["dataframe_split.data[1]"],
        ),
        ("dataframe_split", {"columns": ["age", "height"], "data": [[1]]}, ["dataframe_split.data[0]"]),
        ("dataframe_split", {"columns": ["age", "height"], "data": [[1, 2], 3]}, ["dataframe_split.data[1]"]),
        ("dataframe_split", {"columns": ["age", "height"], "data": [1]}, ["dataframe_split.data[0]"]),
        (
            "dataframe_split",
            {"columns": ["age", "height"], "data": [[1, 2]], "rows": 1},
            ["dataframe_split.rows"],
        ),
        (
            "dataframe_split",
            {"columns": ["age", "height"], "data": [[1, 2]], "index": [1, 2]},
            ["dataframe_split.index"],
        ),
        (
            "dataframe_split",
            {"columns": ["age", "height"], "data": [[1, 2]], "index": [[1]]},
            ["dataframe_split.index"],
        ),
        ("dataframe_split", [], ["dataframe_split"]),
        ("dataframe_split", None, ["dataframe_split"]),
        ("dataframe_records", {"age": 1}, ["dataframe_records"]),
        ("dataframe_records", [], ["dataframe_records"]),
        ("dataframe_records", [{"age": 1, "height": 2}, 5], ["dataframe_records[1]"]),
        ("dataframe_records", [{"age": 1, "height": 2}, [1, 2]], ["dataframe_records[1]"]),
        ("dataframe_records", [{}], ["dataframe_records.age", "dataframe_records.height"]),
        ("dataframe_records", [{"age": 1, "height": 2}, {"height": 2}], ["dataframe_records[1].age"]),
        ("dataframe_records", [[1, 2]], ["dataframe_records"]),
        ("instances", [], ["instances"]),
        ("instances", [1, 2], ["instances"]),
        ("instances", None, ["instances"]),
        ("inputs", [], ["inputs"]),
        ("inputs", 5, ["inputs"]),
        ("inputs", "x", ["inputs"]),
        ("inputs", None, ["inputs"]),
        ("inputs", {}, ["inputs.age", "inputs.height"]),
        ("inputs", {"age": [1, 2], "height": [1.5]}, ["inputs.height"]),
        ("inputs", {"age": [1, 2], "height": 1.5}, ["inputs.age"]),
        ("inputs", {"age": [1, "x"], "height": [1.5, "y"]}, ["inputs.age[1]", "inputs.height[1]"]),
        ("inputs", {"age": "x", "height": None}, ["inputs.age"]),
        (
            "csv",
            CsvTable(["age", "height"], [["1", "x"], ["x", "y"]]),
            ["csv.data[1].age", "csv.data[0].height", "csv.data[1].height"],
        ),
        ("csv", CsvTable(["age"], [["1"]]), ["csv.height"]),
        ("csv", CsvTable(["age", "age"], [["1"], ["1"]]), ["csv.columns[1]"]),
        ("csv", CsvTable(["age", "height"], [["1"], []]), ["csv"]),
        ("python", pd.DataFrame({"age": ["1"], "height": [1.5]}), ["data.age[0]"]),
        ("python", pd.DataFrame({"age": [1.5, 2.5], "height": [1.5, 2.5]}), ["data.age"]),
        ("python", pd.DataFrame([[1, 2]], columns=["age", "age"]), ["data.columns[1]"]),
        ("python", pd.DataFrame([[1, 2.5]]), ["data.age", "data.height"]),
        ("python", {"age": [1, 2.5], "height": [1, 2]}, ["data.age[1]"]),
        ("python", np.ones((2, 2)), ["data"]),
        ("python", scipy.sparse.csr_matrix(np.eye(2)), ["data"]),
        ("python", None, ["data"]),
        ("python", object(), ["data"]),
    ],
)
def test_where_the_faults_are(form: Any, data: Any, paths: list[str]) -> None:
    assert places(PEOPLE, form, data) == paths


# --- structure


@pytest.mark.parametrize(
    ("form", "data"),
    [
        ("dataframe_split", {"columns": ["name", "height", "age"], "data": [["a", 1.5, 1]]}),
        ("dataframe_split", {"columns": ["name", "height", "age"], "data": [["a", 1.5, 1]], "index": [0]}),
        ("dataframe_records", [{"name": "a", "height": 1.5, "age": 1}]),
        ("inputs", {"name": ["a"], "height": [1.5], "age": [1]}),
        ("inputs", {"name": "a", "height": 1.5, "age": 1}),
        ("inputs", [{"name": "a", "height": 1.5, "age": 1}]),
        ("instances", [{"name": "a", "height": 1.5, "age": 1}]),
        ("instances", {"name": ["a"], "height": [1.5], "age": [1]}),
        ("csv", CsvTable(["name", "height", "age"], [["a"], ["1.5"], ["1"]])),
        ("python", pd.DataFrame({"name": ["a"], "height": [1.5], "age": [1]})),
        ("python", {"name": ["a"], "height": [1.5], "age": [1]}),
        ("python", {"name": np.array(["a"]), "height": np.array([1.5]), "age": np.array([1])}),
        ("python", {"name": "a", "height": 1.5, "age": 1}),
        ("python", [{"name": "a", "height": 1.5, "age": 1}]),
    ],
)
def test_columns_come_in_the_signatures_order_from_every_form(form: Any, data: Any) -> None:
    enforced = enforce(PEOPLE, RawInput(form, data))
    assert isinstance(enforced.batch, Columns)
    assert list(enforced.batch.arrays) == ["age", "height", "name"]
    assert [array.tolist() for array in enforced.batch.arrays.values()] == [[1], [1.5], ["a"]]
    assert [str(array.dtype) for array in enforced.batch.arrays.values()] == ["int64", "float64", "object"]
    assert enforced.batch.rows == 1
    assert enforced.batch.index is None
    assert enforced.params == {"threshold": 0.5}
    assert enforced.warnings == ()


@pytest.mark.parametrize(
    ("form", "data"),
    [
        ("dataframe_split", {"columns": ["z", "age", "height"], "data": [[0, 1, 1.5]]}),
        ("dataframe_records", [{"z": 0, "height": 1.5, "age": 1}]),
        ("inputs", {"z": [0], "height": [1.5], "age": [1]}),
        ("csv", CsvTable(["z", "height", "age"], [["a"], ["1.5"], ["1"]])),
        ("python", pd.DataFrame({"z": ["a"], "height": [1.5], "age": [1]})),
    ],
)
def test_extra_columns_are_ignored_and_named_and_missing_optional_ones_left_out(form: Any, data: Any) -> None:
    enforced = enforce(PEOPLE, RawInput(form, data), {"speed": 1})
    assert isinstance(enforced.batch, Columns)
    assert list(enforced.batch.arrays) == ["age", "height"]
    assert enforced.warnings == (
        "ignored columns that are not in the signature: z",
        "ignored params that are not in the signature: speed",
    )


def test_many_ignored_columns_are_cut() -> None:
    row = {"age": 1, "height": 1.5, **{f"z{i}": 0 for i in range(100)}}
    (warning,) = enforce(PEOPLE, RawInput("instances", [row])).warnings
    assert warning.endswith("z19 and 80 more")


def test_zero_rows_are_allowed_where_the_columns_are_named() -> None:
    for form, data in (
        ("dataframe_split", {"columns": ["age", "height"], "data": []}),
        ("inputs", {"age": [], "height": []}),
        ("csv", CsvTable(["age", "height"], [[], []])),
        ("python", pd.DataFrame({"age": np.array([], np.int64), "height": []})),
    ):
        batch = cast(PEOPLE, form, data)
        assert batch.rows == 0
        assert [str(array.dtype) for array in batch.arrays.values()] == ["int64", "float64"]


def test_the_index_of_a_frame_is_kept_only_if_it_differs_from_row_numbers() -> None:
    data = pd.DataFrame({"age": [1, 2], "height": [1.5, 2.5]})
    assert cast(PEOPLE, "python", data).index is None
    assert cast(PEOPLE, "python", data.set_index(pd.Index([5, 7]))).index.tolist() == [5, 7]
    assert cast(PEOPLE, "python", data.iloc[1:]).index.tolist() == [1]
    split = {"columns": ["age", "height"], "data": [[1, 1.5], [2, 2.5]]}
    assert cast(PEOPLE, "dataframe_split", {**split, "index": [0, 1]}).index is None
    assert cast(PEOPLE, "dataframe_split", {**split, "index": ["a", "b"]}).index.tolist() == ["a", "b"]
    assert cast(PEOPLE, "dataframe_split", {**split, "index": [7, 3]}).index.dtype == np.int64


def test_one_named_column_takes_a_plain_list() -> None:
    signature = Signature((ColSpec(Scalar.long, "a"),))
    for form in ("inputs", "instances", "python"):
        assert cast(signature, form, [1, 2]).arrays["a"].tolist() == [1, 2]
    assert places(signature, "inputs", [1, "x"]) == ["inputs[1]"]
    assert places(signature, "inputs", 5) == ["inputs"]
    assert cast(signature, "inputs", []).rows == 0
    assert places(signature, "instances", []) == ["instances"]
    assert cast(signature, "python", np.array([1, 2])).arrays["a"].tolist() == [1, 2]
    assert cast(signature, "python", pd.Series([1, 2], name="a")).arrays["a"].tolist() == [1, 2]
    assert places(signature, "python", pd.Series([1, 2], name="b")) == ["data.a"]


def test_with_a_nested_type_an_object_is_one_record() -> None:
    signature = Signature((ColSpec(Array(Scalar.double), "a"),))
    for data in ({"a": [1, 2]}, [1, 2]):
        batch = cast(signature, "inputs", data)
        assert batch.rows == 1
        assert batch.arrays["a"].tolist() == [[1.0, 2.0]]
    assert places(signature, "inputs", {"a": [1, "x"]}) == ["inputs.a[1]"]
    assert cast(signature, "inputs", [{"a": [1]}, {"a": [2, 3]}]).arrays["a"].tolist() == [[1.0], [2.0, 3.0]]


def test_unnamed_columns_are_counted() -> None:
    signature = Signature((ColSpec(Scalar.long), ColSpec(Scalar.string)))
    for form, data in (
        ("dataframe_split", {"data": [[1, "a"]]}),
        ("dataframe_records", [[1, "a"]]),
        ("inputs", [[1, "a"]]),
        ("instances", [[1, "a"]]),
        ("python", pd.DataFrame([[1, "a"]])),
    ):
        batch = cast(signature, form, data)
        assert list(batch.arrays) == [0, 1]
        assert [array.tolist() for array in batch.arrays.values()] == [[1], ["a"]]
    named = cast(signature, "dataframe_split", {"columns": ["x", "y", "z"], "data": [[1, "a", 0]]})
    assert list(named.arrays) == ["x", "y"]
    assert list(cast(signature, "csv", CsvTable(["x", "y"], [["1"], ["a"]])).arrays) == ["x", "y"]
    assert places(signature, "inputs", [[1]]) == ["inputs"]
    assert places(signature, "inputs", [["1", "a"]]) == ["inputs[0][0]"]
    assert places(signature, "inputs", {"x": [1], "y": ["a"]}) == ["inputs"]
    assert cast(signature, "instances", []).rows == 0
    single = Signature((ColSpec(Scalar.string),))
    assert cast(single, "inputs", "a").arrays[0].tolist() == ["a"]
    assert cast(single, "inputs", ["a", "b"]).arrays[0].tolist() == ["a", "b"]
    assert places(single, "inputs", 5) == ["inputs"]


def test_integer_names_are_found_under_their_text() -> None:
    signature = Signature((ColSpec(Scalar.long, 0), ColSpec(Scalar.string, 1)))
    for form, data in (
        ("dataframe_split", {"data": [[1, "a"]]}),
        ("dataframe_split", {"columns": [1, 0], "data": [["a", 1]]}),
        ("inputs", [[1, "a"]]),
        ("inputs", {"0": [1], "1": ["a"]}),
        ("instances", [{"0": 1, "1": "a"}]),
        ("csv", CsvTable(["0", "1"], [["1"], ["a"]])),
        ("python", pd.DataFrame([[1, "a"]])),
    ):
        enforced = enforce(signature, RawInput(form, data))  # type: ignore[arg-type]
        assert isinstance(enforced.batch, Columns)
        assert [array.tolist() for array in enforced.batch.arrays.values()] == [[1], ["a"]]
        assert list(enforced.batch.arrays) == [0, 1]
        assert enforced.warnings == ()


@pytest.mark.parametrize("mode", ["strict", "mlflow", "warn"])
@pytest.mark.parametrize("signature", [None, Signature(inputs=(ColSpec("double", "a"),))])
def test_names_with_equal_hashes_are_refused_before_they_are_compared(
    signature: Signature | None, mode: Any
) -> None:
    names = [k * (2**61 - 1) for k in range(1, 20_000)]  # each is compared with all before it
    split = {"columns": names, "data": [[0.0] * len(names)]}
    with pytest.raises(InvalidInput) as refused:
        enforce(signature, RawInput("dataframe_split", split), mode=mode)
    assert [str(one) for one in refused.value.violations] == [
        "dataframe_split.columns[0] is out of range (expected string)"
    ]
