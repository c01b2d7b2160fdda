"""The modes `warn` and `mlflow`."""

from __future__ import annotations

from typing import Any

import pytest

from loaders.batch import Columns
from loaders.enforcement import CsvTable, InvalidInput, RawInput, Violation, enforce
from loaders.signature import (
    Array,
    ColSpec,
    Map,
    ParamSpec,
    Scalar,
    Signature,
)
from loaders.spelling import counted
from tests.support.asking import cast, places


def test_the_mode_mlflow_casts_as_mlflow() -> None:
    signature = Signature(
        (ColSpec(Scalar.boolean, "b"), ColSpec(Scalar.integer, "i"), ColSpec(Scalar.long, "l"))
    )
    row = {"b": "false", "i": 2**31, "l": 1.7}
    batch = cast(signature, "dataframe_records", [row], mode="mlflow")
    assert {name: array.tolist() for name, array in batch.arrays.items()} == {
        "b": [True],
        "i": [-(2**31)],
        "l": [1],
    }
    assert places(signature, "inputs", {"b": [True], "i": [2**31], "l": [1]}, mode="mlflow") == [
        "inputs.i[0]"
    ]
    assert places(signature, "instances", [{"b": True, "i": 1}], mode="mlflow") == ["instances.l"]


def test_the_mode_mlflow_names_all_fields_of_a_refused_input() -> None:
    signature = Signature(
        (ColSpec(Scalar.double, "a"), ColSpec(Scalar.long, "b"), ColSpec(Scalar.datetime, "t"))
    )
    with pytest.raises(InvalidInput) as refused:
        cast(signature, "dataframe_records", [{"a": "x", "b": "y", "t": "2024-01-01"}], mode="mlflow")
    assert refused.value.violations == [
        Violation("dataframe_records[0].a", "has the wrong type", "double", "string"),
        Violation("dataframe_records[0].b", "has the wrong type", "long", "string"),
    ]
    assert refused.value.total == 2


@pytest.mark.parametrize("mode", ["strict", "warn", "mlflow"])
@pytest.mark.parametrize(("columns", "rows", "wrong"), [("ab", [[1, 2], [1]], 1), ("a", [[5.0, 6]], 0)])
def test_rows_by_position_of_another_length_are_counted(
    mode: Any, columns: str, rows: Any, wrong: int
) -> None:
    signature = Signature(tuple(ColSpec(Scalar.double, name) for name in columns))
    with pytest.raises(InvalidInput) as refused:
        enforce(signature, RawInput("instances", rows), None, mode, positional=True)
    expected, got = counted(len(columns), "value"), counted(len(rows[wrong]), "value")
    assert refused.value.violations == [
        Violation(f"instances[{wrong}]", "has the wrong number of values", expected, got)
    ]


def test_the_mode_warn_answers_as_mlflow_and_says_what_strict_would_refuse() -> None:
    signature = Signature((ColSpec(Scalar.long, "l"), ColSpec(Scalar.datetime, "t", False)))
    enforced = enforce(signature, RawInput("dataframe_records", [{"l": 1.7, "z": 0}]), None, "warn")
    assert isinstance(enforced.batch, Columns)
    assert enforced.batch.arrays["l"].tolist() == [1]
    assert enforced.warnings == (
        "ignored columns that are not in the signature: z",
        "strict would refuse: dataframe_records[0].l is not a whole number (expected long, got double)",
    )
    # What strict takes is taken, also where MLflow would not; what both refuse is refused.
    sane = enforce(signature, RawInput("csv", CsvTable(["l", "t"], [["1"], ["2024-01-01"]])), None, "warn")
    assert sane.warnings == ()
    assert places(signature, "dataframe_records", [{"l": "word"}], mode="warn") == ["dataframe_records[0].l"]
    assert places(signature, "dataframe_records", [{"l": 1.7}], {"p": 1}, mode="strict") == [
        "dataframe_records[0].l"
    ]
    with_params = Signature(signature.inputs, None, (ParamSpec("p", Scalar.long, 1),))
    assert places(with_params, "dataframe_records", [{"l": 1}], {"p": "x"}, mode="warn") == ["params.p"]


def test_input_is_never_changed() -> None:
    data = {"a": [1, 2], "o": {"p": [1]}}
    signature = Signature((ColSpec(Array(Scalar.double), "a"), ColSpec(Map(Array(Scalar.double)), "o")))
    for mode in ("strict", "warn", "mlflow"):
        try:
            enforce(signature, RawInput("inputs", data), None, mode)  # type: ignore[arg-type]
        except InvalidInput:
            assert mode == "mlflow"
        assert repr(data) == "{'a': [1, 2], 'o': {'p': [1]}}"
