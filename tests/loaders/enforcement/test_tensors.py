"""Enforcement of tensor signatures."""

from __future__ import annotations

import tracemalloc
from importlib import import_module
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.batch import Tensors
from loaders.enforcement import CsvTable, InvalidInput, RawInput, enforce
from loaders.enforcement.whole import Whole, tensors
from loaders.schema import Array, ColSpec, Scalar
from loaders.signature import (
    Signature,
    TensorSpec,
)
from tests.support.asking import cast, places
from tests.support.frames import same

#: The package's name `strict` is the function.
STRICT = import_module("loaders.enforcement.strict")
IMAGE = Signature((TensorSpec(np.dtype(np.float32), (-1, 2)),))
PAIR = Signature((TensorSpec(np.dtype(np.float32), (-1, 2), "a"), TensorSpec(np.dtype(np.int64), (-1,), "b")))


@pytest.mark.parametrize("shape", [(-1, 0), (0, -1), (-1, 2, 0)])
@pytest.mark.parametrize("octets", [b"", b"\0" * 8])
def test_octets_for_a_tensor_without_values_are_refused(shape: tuple[int, ...], octets: bytes) -> None:
    with pytest.raises(InvalidInput) as raised:
        tensors(Signature((TensorSpec(np.dtype(np.float64), shape),)), Whole("octets", octets))
    assert [violation.path for violation in raised.value.violations] == ["body"]


@pytest.mark.parametrize(
    ("form", "data"),
    [
        ("inputs", [[1, 2.5]]),
        ("instances", [[1, 2.5]]),
        ("dataframe_split", {"data": [[1, 2.5]]}),
        ("dataframe_split", {"columns": ["p", "q"], "data": [[1, 2.5]]}),
        ("dataframe_split", {"data": [[[1, 2.5]]]}),
        ("dataframe_records", [{"p": 1, "q": 2.5}]),
        ("csv", CsvTable(["p", "q"], [["1"], ["2.5"]])),
        ("python", np.array([[1, 2.5]], np.float32)),
        ("python", np.array([[1, 2.5]], np.float64)),
        ("python", np.array([[1, 2.5]], object)),
        ("python", [[1, 2.5]]),
        ("python", [np.array([1, 2.5], np.float32)]),
        ("python", pd.DataFrame({"p": [1], "q": [2.5]})),
        ("python", pd.DataFrame({"p": [[1, 2.5]]})),
        ("python", pd.DataFrame({"p": [np.array([1, 2.5])]})),
        ("python", scipy.sparse.csr_matrix(np.array([[1, 2.5]], np.float32))),
    ],
)
def test_a_tensor_from_every_form(form: Any, data: Any) -> None:
    batch = cast(IMAGE, form, data)
    assert isinstance(batch, Tensors)
    assert batch.rows == 1
    assert batch.arrays[""].dtype == np.float32
    assert batch.arrays[""].tolist() == [[1.0, 2.5]]


@pytest.mark.parametrize(
    ("form", "data"),
    [
        ("inputs", {"b": [7], "a": [[1, 2.5]]}),
        ("instances", {"b": [7], "a": [[1, 2.5]]}),
        ("instances", [{"b": 7, "a": [1, 2.5]}]),
        ("dataframe_split", {"columns": ["b", "a"], "data": [[7, [1, 2.5]]]}),
        ("dataframe_records", [{"b": 7, "a": [1, 2.5]}]),
        ("python", {"b": np.array([7]), "a": np.array([[1, 2.5]], np.float32)}),
        ("python", {"b": [7], "a": [[1, 2.5]]}),
        ("python", pd.DataFrame({"b": [7], "a": [[1, 2.5]]})),
    ],
)
def test_named_tensors_from_every_form(form: Any, data: Any) -> None:
    batch = cast(PAIR, form, data)
    assert isinstance(batch, Tensors)
    assert list(batch.arrays) == ["a", "b"]
    assert batch.arrays["a"].tolist() == [[1.0, 2.5]]
    assert batch.arrays["b"].tolist() == [7]
    assert batch.arrays["b"].dtype == np.int64
    assert batch.rows == 1


@pytest.mark.parametrize(
    ("signature", "form", "data", "paths"),
    [
        (IMAGE, "inputs", [[1, 2], [3]], ["inputs[1]"]),
        (IMAGE, "inputs", [[1, 2, 3]], ["inputs"]),
        (IMAGE, "inputs", [1, 2], ["inputs"]),
        (IMAGE, "inputs", [[[1], [2]]], ["inputs"]),
        (IMAGE, "inputs", [[1, [2]]], ["inputs[0][1]"]),
        (IMAGE, "inputs", [], ["inputs"]),
        (IMAGE, "inputs", 5, ["inputs"]),
        (IMAGE, "inputs", None, ["inputs"]),
        (IMAGE, "inputs", {"a": [[1, 2]]}, ["inputs"]),
        (IMAGE, "inputs", [[1, "2"], [True, 1e39]], ["inputs[0][1]", "inputs[1][0]", "inputs[1][1]"]),
        (IMAGE, "instances", [{"a": 1}], ["instances"]),
        (IMAGE, "dataframe_split", {"data": [[1, 2, 3]]}, ["dataframe_split"]),
        (IMAGE, "dataframe_split", {"data": [[1, "x"]]}, ["dataframe_split.data[0][1]"]),
        (IMAGE, "csv", CsvTable(["p", "q"], [["1"], ["x"]]), ["csv.data[0].q"]),
        (IMAGE, "python", np.array([[0.1, 1]]), ["data[0][0]"]),
        (IMAGE, "python", np.array([[True, False]]), ["data"]),
        (IMAGE, "python", np.ones(2, np.float32), ["data"]),
        (IMAGE, "python", "text", ["data"]),
        (PAIR, "inputs", {"a": [[1, 2]]}, ["inputs.b"]),
        (PAIR, "inputs", {"a": [[1, 2]], "b": [1.5]}, ["inputs.b[0]"]),
        (PAIR, "inputs", {"a": [[1, 2]], "b": [True]}, ["inputs.b[0]"]),
        (PAIR, "inputs", [{"a": [1, 2], "b": 1}], ["inputs"]),
        (PAIR, "inputs", [[1, 2]], ["inputs"]),
        (PAIR, "instances", [{"a": [1, 2], "b": 1}, {"a": [1, 2]}], ["instances[1].b"]),
        (PAIR, "instances", [{"a": [1, 2], "b": 1}, 5], ["instances[1]"]),
        (PAIR, "instances", {"a": [[1, 2]], "b": [1, 2]}, ["instances"]),
        (PAIR, "dataframe_records", [], ["dataframe_records"]),
        (PAIR, "dataframe_records", [{"a": [1, 2]}], ["dataframe_records.b"]),
        (PAIR, "dataframe_records", [{"a": [1, 2, 3], "b": 1}], ["dataframe_records[0].a"]),
    ],
)
def test_tensors_that_do_not_fit(signature: Signature, form: Any, data: Any, paths: list[str]) -> None:
    assert places(signature, form, data) == paths


def test_rows_of_tensors_are_known_only_where_the_first_axis_is_free_and_shared() -> None:
    assert cast(PAIR, "inputs", {"a": [[1, 2]], "b": [1, 2]}).rows is None
    fixed = Signature((TensorSpec(np.dtype(np.float32), (1, 2)),))
    assert cast(fixed, "inputs", [[1, 2]]).rows is None
    scalar = Signature((TensorSpec(np.dtype(np.float32), ()),))
    assert cast(scalar, "inputs", 5).rows is None
    assert cast(scalar, "inputs", 5).arrays[""].shape == ()


@pytest.mark.parametrize(
    ("dtype", "data", "wanted"),
    [
        ("uint8", [0, 255], True),
        ("uint8", [256], False),
        ("uint8", [-1], False),
        ("uint8", [1.0], False),
        ("uint64", [2**64 - 1], True),
        ("uint64", [2**64], False),
        ("int64", [2**63], False),
        ("int64", [None], False),
        ("float64", [1, None], True),
        ("float32", [1e39], False),
        ("float16", [1.5, 7], True),
        ("float16", [70000], False),
        ("bool", [True], True),
        ("bool", [1], False),
        ("str", ["a", "é"], True),
        ("str", [5], False),
        ("str", [None], False),
        ("bytes", ["aé"], True),
        ("bytes", [5], False),
        ("object", [1, "a", None, [2]], True),
        ("datetime64[ns]", ["2024-01-01", "2024-01-01T01:00:00Z"], True),
        ("datetime64[D]", ["2024-01-01"], True),
        ("datetime64[D]", ["2024-01-01T01:00"], False),
        ("datetime64[ns]", [5], False),
        ("complex128", [1, 2.5], True),
        ("complex128", ["1j"], False),
    ],
)
def test_leaves_of_every_dtype(dtype: str, data: list[Any], wanted: bool) -> None:
    signature = Signature((TensorSpec(np.dtype(dtype), (-1,)),))
    if wanted:
        array = cast(signature, "inputs", data).arrays[""]
        assert array.dtype.kind == np.dtype(dtype).kind
        assert len(array) == len(data)
    else:
        assert len(places(signature, "inputs", data)) == 1


def test_ragged_arrays_pass_where_a_later_dimension_is_free() -> None:
    signature = Signature((TensorSpec(np.dtype(np.float64), (-1, -1)),))
    ragged = np.empty(2, object)
    ragged[:] = [np.array([1.0]), [2.0, 3.0]]
    batch = cast(signature, "python", ragged)
    assert [part.tolist() for part in batch.arrays[""]] == [[1.0], [2.0, 3.0]]
    ragged[1] = ["x"]
    assert places(signature, "python", ragged) == ["data[1][0]"]
    assert places(signature, "inputs", [[1.0], [2.0, 3.0]]) == ["inputs[1]"]


def test_extra_tensors_are_ignored_and_named() -> None:
    enforced = enforce(PAIR, RawInput("inputs", {"a": [[1, 2]], "b": [1], "z": "anything"}))
    assert enforced.warnings == ("ignored inputs that are not in the signature: z",)


TEXTS = TensorSpec(np.dtype(str), (-1,))
LONG = ["x" * 100_000, *["a"] * 5_000]


@pytest.mark.parametrize(
    ("specs", "form", "data"),
    [
        ((TEXTS,), "inputs", LONG),
        ((TEXTS,), "dataframe_split", {"data": [[text] for text in LONG]}),
        ((TensorSpec(np.dtype(str), (-1, 1)),), "inputs", [[text] for text in LONG]),
        ((TensorSpec(np.dtype(str), (-1, 2)),), "dataframe_records", [{"p": text, "q": ""} for text in LONG]),
        ((TensorSpec(np.dtype(str), (-1, 1), "t"),), "dataframe_records", [{"t": [text]} for text in LONG]),
        ((TensorSpec(np.dtype(str), (-1,), "t"),), "instances", [{"t": text} for text in LONG]),
        ((TensorSpec(np.dtype(bytes), (-1,)),), "inputs", LONG),
        ((ColSpec(Array(Scalar.string), "t"),), "dataframe_records", [{"t": LONG}]),
        ((ColSpec(Scalar.string, "t"),), "inputs", {"t": LONG}),
        ((TEXTS,), "tensors", {"t": np.array(LONG, dtype=object)}),
        (None, "inputs", LONG),
        (None, "inputs", {"t": LONG, "u": LONG}),
        (None, "instances", [{"t": text} for text in LONG]),
        (None, "tensors", {"t": np.array(LONG, dtype=object)}),
    ],
)
@pytest.mark.parametrize("mode", ["strict", "mlflow"])
def test_one_long_text_makes_no_room_for_all(specs: Any, form: Any, data: Any, mode: Any) -> None:
    """numpy gives each text of an array the room of the longest: 2 GB here, of 105 KB."""
    tracemalloc.start()
    try:
        enforce(None if specs is None else Signature(specs), RawInput(form, data), None, mode)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    except InvalidInput:  # a form that MLflow does not take
        assert mode == "mlflow"
    finally:
        tracemalloc.stop()


def test_texts_of_about_one_length_are_an_array_as_numpy_makes_it() -> None:
    data = ["x" * 1_000, *["a" * 300] * 1_000]
    assert cast(Signature((TEXTS,)), "inputs", data).arrays[""].dtype == np.dtype("<U1000")


cells = st.one_of(
    st.floats(),
    st.integers(-(2**70), 2**70),
    st.just(1e39),
    st.none() | st.booleans() | st.text(max_size=1) | st.lists(st.floats(), max_size=2),
)
numbers = st.floats(allow_nan=False) | st.integers(-5, 5)
few_rows = st.one_of(
    st.integers(0, 18).flatmap(
        lambda width: st.lists(st.lists(numbers, min_size=width, max_size=width), max_size=10)
    ),
    st.lists(st.lists(numbers | cells, max_size=3), max_size=3),
    st.lists(cells, max_size=3),
    cells,
    st.just({"": [[1.0, 2.0]]}),
)
matrices = st.builds(
    lambda dtype, shape, name: Signature((TensorSpec(np.dtype(dtype), shape, name),)),
    st.sampled_from(["<f8", "<f4", ">f8", "<f2", "<i8", "O"]),
    st.sampled_from([(-1, 2), (-1, -1), (-1, 0), (2, 2), (-1,), (-1, 2, -1)]),
    st.sampled_from([None, "a"]),
)


@settings(max_examples=500)
@given(matrices, st.sampled_from(["inputs", "instances", "python"]), few_rows)
def test_a_few_rows_are_read_as_without_a_fast_path(signature: Signature, form: Any, data: Any) -> None:
    def read() -> tuple[Any, list[str]]:
        try:
            return enforce(signature, RawInput(form, data)).batch, []
        except InvalidInput as error:
            return None, [str(violation) for violation in error.violations]

    found = read()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(STRICT, "_quick_rows", lambda *given: None)
        plain = read()
    assert found[1] == plain[1]
    assert same(found[0], plain[0])


def test_a_row_of_numbers_takes_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STRICT, "_tensors", lambda *given: pytest.fail("the general path"))
    for dtype in ("<f8", "<f4"):
        signature = Signature((TensorSpec(np.dtype(dtype), (-1, 2)),))
        batch = enforce(signature, RawInput("inputs", [[1, 2.5]])).batch
        assert same(batch, Tensors({"": np.array([[1, 2.5]], dtype)}, 1))
