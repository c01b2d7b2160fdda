"""Signatures: MLflow's JSON both ways, inference, comparison."""

from __future__ import annotations

import datetime
import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from loaders.compatibility import compatible
from loaders.inferred import infer_signature
from loaders.signature import (
    AnyType,
    Array,
    ColSpec,
    Map,
    Object,
    ParamSpec,
    Property,
    Scalar,
    Signature,
    SignatureError,
    TensorSpec,
)
from tests.conftest import needs

# --- strategies

names = st.text(min_size=1, max_size=8)
types = st.recursive(
    st.sampled_from(list(Scalar)) | st.just(AnyType()),
    lambda inner: (
        inner.map(Array)
        | inner.map(Map)
        | st.dictionaries(names, st.tuples(inner, st.booleans()), min_size=1, max_size=3).map(
            lambda fields: Object(tuple(Property(n, t, r) for n, (t, r) in fields.items()))
        )
    ),
    max_leaves=6,
)
columns = st.lists(
    st.tuples(names, types, st.booleans()), min_size=1, max_size=4, unique_by=lambda c: c[0]
).map(lambda specs: tuple(ColSpec(kind, name, required) for name, kind, required in specs))
unnamed = st.lists(types, min_size=1, max_size=3).map(lambda kinds: tuple(ColSpec(kind) for kind in kinds))
dtypes = st.sampled_from(
    ["float32", "float64", "int8", "uint8", "int64", "bool", "str", "bytes", "object", "float16"]
)
shapes = st.lists(st.integers(-1, 5), max_size=3).map(tuple)
tensors = st.lists(st.tuples(names, dtypes, shapes), min_size=1, max_size=3, unique_by=lambda t: t[0]).map(
    lambda specs: tuple(TensorSpec(np.dtype(dtype), shape, name) for name, dtype, shape in specs)
)
params = st.lists(
    st.sampled_from(
        [
            ParamSpec("a", Scalar.long, 1),
            ParamSpec("b", Scalar.double, [1.5], (-1,)),
            ParamSpec("c", Scalar.datetime, datetime.datetime(2024, 1, 2, 3)),
            ParamSpec("d", Scalar.datetime, datetime.date(2024, 1, 2)),
            ParamSpec("e", Object((Property("x", Scalar.long),)), {"x": 1}),
            ParamSpec("f", Scalar.string, None),
            ParamSpec("g", Scalar.boolean, True),
        ]
    ),
    unique_by=lambda p: p.name,
    min_size=1,
).map(tuple)
schemas = columns | unnamed | tensors
signatures = st.builds(Signature, schemas, st.none() | schemas, st.none() | params)


# --- JSON


@given(signatures)
def test_a_signature_survives_its_json(signature: Signature) -> None:
    written = signature.to_json()
    assert Signature.from_json(written) == signature
    assert Signature.from_json(json.loads(json.dumps(written))) == signature
    assert all(value is None or isinstance(value, str) for value in written.values())
    assert str(signature)


@pytest.mark.all
def test_mlflow_reads_what_we_write_and_we_what_it_writes() -> None:
    models = needs("mlflow.models")

    @given(signatures)
    def check(signature: Signature) -> None:
        theirs = models.ModelSignature.from_dict(signature.to_json())
        assert (
            Signature.from_json(theirs.to_dict() if not _null_date(signature) else signature.to_json())
            == signature
        )

    check()


def _null_date(signature: Signature) -> bool:
    return any(p.type is Scalar.datetime and p.default is None for p in signature.params or ())


def test_old_files_are_read() -> None:
    old = {
        "inputs": '[{"name": "a", "type": "long"},'
        ' {"type": "sparkml_vector", "name": "v", "required": null}]',
        "outputs": '[{"type": "tensor", "tensor-spec": {"dtype": "int64", "shape": [-1]}}]',
        "params": '[{"name": "t", "dtype": "double", "default": 1, "shape": null}]',
    }
    signature = Signature.from_json(old)
    assert signature.inputs == (ColSpec(Scalar.long, "a"), ColSpec(Array(Scalar.double), "v"))
    assert signature.params is not None
    assert signature.params[0].default == 1.0
    assert isinstance(signature.params[0].default, float)


@pytest.mark.parametrize(
    ("inputs", "place"),
    [
        ("{", "inputs"),
        ("[]", "inputs"),
        ("5", "inputs"),
        ("[" * 100_000, "inputs"),
        ('[{"type": "decimal"}]', "inputs[0].type"),
        ('[{"type": "array"}]', "inputs[0].items"),
        ('[{"type": "object", "properties": {}}]', "inputs[0].properties"),
        ('[{"type": "object", "properties": {"a": {"type": "x"}}}]', "inputs[0].a.type"),
        ('[{"type": "long", "name": "a"}, {"type": "long", "name": "a"}]', "inputs"),
        ('[{"type": "long", "name": "a"}, {"type": "long"}]', "inputs"),
        ('[{"type": "long", "required": false}]', "inputs"),
        ('[{"type": "long", "name": 1.5}]', "inputs[0].name"),
        ('[{"type": "long", "name": "a", "required": "no"}]', "inputs[0].required"),
        ('[{"type": "tensor"}]', "inputs[0].tensor-spec"),
        (
            '[{"type": "tensor", "tensor-spec": {"dtype": "i4,f8", "shape": [-1]}}]',
            "inputs[0].tensor-spec.dtype",
        ),
        (
            '[{"type": "tensor", "tensor-spec": {"dtype": "bfloat17", "shape": [-1]}}]',
            "inputs[0].tensor-spec.dtype",
        ),
        (
            '[{"type": "tensor", "tensor-spec": {"dtype": "int8", "shape": [-2]}}]',
            "inputs[0].tensor-spec.shape",
        ),
        ('[{"type": "tensor", "tensor-spec": {"dtype": "int8", "shape": []}}, {"type": "long"}]', "inputs"),
        (
            json.dumps(
                [
                    {
                        "type": "array",
                        "items": json.loads('{"type":"array","items":' * 40 + '{"type":"long"}' + "}" * 40),
                    }
                ]
            ),
            None,
        ),
    ],
)
def test_what_is_no_signature_is_refused_with_its_place(inputs: str, place: str | None) -> None:
    with pytest.raises(SignatureError) as refused:
        Signature.from_json({"inputs": inputs})
    if place is not None:
        assert refused.value.place == place


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda i: (
            st.lists(i, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "type",
                        "name",
                        "items",
                        "properties",
                        "tensor-spec",
                        "dtype",
                        "shape",
                        "required",
                        "default",
                    ]
                ),
                i,
                max_size=4,
            )
        ),
    )
)
def test_any_json_is_a_signature_or_refused(data: Any) -> None:
    for key in ("inputs", "outputs", "params"):
        try:
            signature = Signature.from_json({key: data})
        except SignatureError:
            continue
        assert Signature.from_json(signature.to_json()) == signature


# --- inference


def cols(*specs: tuple[Any, ...]) -> tuple[ColSpec, ...]:
    return tuple(ColSpec(*spec) for spec in specs)


INFERENCE: list[tuple[Any, Any]] = [
    (pd.DataFrame({"a": [1], "b": [1.5]}), cols((Scalar.long, "a"), (Scalar.double, "b"))),
    (pd.DataFrame([[1, 2.5]]), cols((Scalar.long, 0), (Scalar.double, 1))),
    (pd.DataFrame({"a": pd.array([1, None], dtype="Int64")}), cols((Scalar.long, "a", False))),
    (pd.DataFrame({"a": pd.array([True, None], dtype="boolean")}), cols((Scalar.boolean, "a", False))),
    (pd.DataFrame({"a": pd.Series([True, None], dtype=object)}), cols((Scalar.boolean, "a", False))),
    (pd.DataFrame({"a": [1.5, None]}), cols((Scalar.double, "a", False))),
    (pd.DataFrame({"a": ["x", None]}), cols((Scalar.string, "a", False))),
    (pd.DataFrame({"a": pd.Categorical(["x", "y"])}), cols((Scalar.string, "a"))),
    (pd.DataFrame({"a": pd.to_datetime(["2024-01-01"])}), cols((Scalar.datetime, "a"))),
    (pd.DataFrame({"a": [datetime.date(2024, 1, 1)]}), cols((Scalar.datetime, "a"))),
    (
        pd.DataFrame({"a": np.array([1], np.int8), "b": np.array([1], np.uint32)}),
        cols((Scalar.integer, "a"), (Scalar.long, "b")),
    ),
    (pd.DataFrame({"a": [b"x"], "b": [[1.5]]}), cols((Scalar.binary, "a"), (Array(Scalar.double), "b"))),
    (pd.DataFrame({"a": pd.Series([], dtype=object)}), cols((Scalar.string, "a"))),
    (pd.Series([1.5], name="s"), cols((Scalar.double, "s"))),
    (np.zeros((3, 4), np.float32), (TensorSpec(np.dtype(np.float32), (-1, 4)),)),
    (scipy.sparse.csr_matrix(np.eye(3)), (TensorSpec(np.dtype(np.float64), (-1, 3)),)),
    (
        {"a": np.zeros((2, 2)), "b": np.array(["xyz"])},
        (TensorSpec(np.dtype(np.float64), (-1, 2), "a"), TensorSpec(np.dtype(str), (-1,), "b")),
    ),
    ({"a": 1, "b": None}, cols((Scalar.long, "a"), (AnyType(), "b", False))),
    (
        [{"a": 1}, {"a": 2, "b": {"c": [1.5]}}],
        cols((Scalar.long, "a"), (Object((Property("c", Array(Scalar.double)),)), "b", False)),
    ),
    (["a"], cols((Scalar.string,))),
    ([], cols((Scalar.string,))),
    ([[1], []], cols((Array(Scalar.long),))),
    (5, cols((Scalar.long,))),
    (np.float32(1), cols((Scalar.float,))),
]

# MLflow takes integers with gaps for doubles, which loses them, and refuses the other two.
OURS_ALONE: list[tuple[Any, Any]] = [
    (pd.DataFrame({"a": pd.Series([2**53 + 1, None], dtype=object)}), cols((Scalar.long, "a", False))),
    (pd.Series([1.5, None]), cols((Scalar.double,))),
    (np.array(1.5), (TensorSpec(np.dtype(np.float64), ()),)),
]


@pytest.mark.parametrize(("data", "expected"), INFERENCE + OURS_ALONE)
def test_inference(data: Any, expected: Any) -> None:
    assert infer_signature(data).inputs == expected
    assert infer_signature(None, data).outputs == expected


@pytest.mark.all
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("data", [data for data, _ in INFERENCE])
def test_inference_is_mlflows(data: Any) -> None:
    models = needs("mlflow.models")
    assert Signature.from_json(models.infer_signature(data).to_dict()) == infer_signature(data)


@pytest.mark.parametrize(
    "data",
    [
        pd.DataFrame({"a": pd.to_timedelta([1])}),
        pd.DataFrame({"a": [1 + 2j]}),
        pd.DataFrame({"a": np.array([1], np.uint64)}),
        pd.DataFrame({"a": [1, "x"]}, dtype=object),
        pd.DataFrame([[1, 2]], columns=["a", "a"]),
        pd.DataFrame([[1]], columns=[(1, 2)]),
        {1: 2},
        [1, "a"],
        object(),
        np.zeros(2, dtype=[("x", int)]),
    ],
)
def test_what_no_signature_describes_is_refused(data: Any) -> None:
    with pytest.raises(SignatureError):
        infer_signature(data)


def test_params_are_inferred() -> None:
    given = {
        "a": 1,
        "b": 1.5,
        "c": "x",
        "d": [1, 2],
        "e": [1, 2.5],
        "f": datetime.datetime(2024, 1, 1),
        "g": {"z": 1},
        "h": True,
    }
    inferred = infer_signature(None, None, given).params
    assert inferred is not None
    assert [(p.name, str(p.type), p.shape) for p in inferred] == [
        ("a", "long", None),
        ("b", "double", None),
        ("c", "string", None),
        ("d", "long", (-1,)),
        ("e", "double", (-1,)),
        ("f", "datetime", None),
        ("g", "object<z: long>", None),
        ("h", "boolean", None),
    ]
    for bad in ({"a": None}, {"a": [[1]]}, {"a": []}, {"a": {}}, {"a": b"x"}):
        with pytest.raises(SignatureError):
            infer_signature(None, None, bad)


# --- comparison


def column(kind: Any, name: str = "a", required: bool = True) -> Signature:
    return Signature((ColSpec(kind, name, required),))


def output(*specs: ColSpec) -> Signature:
    return Signature(None, specs)


def tensor(dtype: Any, *shape: int) -> Signature:
    return Signature((TensorSpec(np.dtype(dtype), shape),))


def param(**options: Any) -> Signature:
    return Signature(None, None, (ParamSpec("p", **options),))


LONG, DOUBLE = ColSpec(Scalar.long, "a"), ColSpec(Scalar.double, "b")


@pytest.mark.parametrize(
    ("old", "new", "reasons"),
    [
        (None, column(Scalar.long), 0),
        (column(Scalar.long), None, 1),
        (column(Scalar.long), Signature(None, None), 1),
        (Signature(None, None), column(Scalar.long), 0),
        (column(Scalar.long), column(Scalar.long), 0),
        (column(Scalar.integer), column(Scalar.long), 0),
        (column(Scalar.integer), column(Scalar.double), 0),
        (column(Scalar.float), column(Scalar.double), 0),
        (column(Scalar.long), column(AnyType()), 0),
        (column(Scalar.long), column(Scalar.integer), 1),
        (column(Scalar.double), column(Scalar.long), 1),
        (column(Scalar.string), column(Scalar.double), 1),
        (column(Scalar.long), column(Scalar.long, required=False), 0),
        (column(Scalar.long, required=False), column(Scalar.long), 1),
        (column(Scalar.long), Signature((LONG, DOUBLE)), 1),
        (column(Scalar.long), Signature((LONG, ColSpec(Scalar.double, "b", False))), 0),
        (Signature((LONG, DOUBLE)), column(Scalar.long), 0),
        (column(Scalar.long), Signature((ColSpec(Scalar.long),)), 1),
        (column(Scalar.long), tensor("int64", -1), 1),
        (column(Array(Scalar.integer)), column(Array(Scalar.long)), 0),
        (column(Array(Scalar.long)), column(Array(Scalar.string)), 1),
        (column(Map(Scalar.long)), column(Map(Scalar.double)), 0),
        (
            column(Object((Property("x", Scalar.long),))),
            column(Object((Property("x", Scalar.double), Property("y", Scalar.long, False)))),
            0,
        ),
        (
            column(Object((Property("x", Scalar.long),))),
            column(Object((Property("x", Scalar.long), Property("y", Scalar.long)))),
            1,
        ),
        (
            column(Object((Property("x", Scalar.long), Property("y", Scalar.long)))),
            column(Object((Property("x", Scalar.long),))),
            1,
        ),
        (
            column(Object((Property("x", Scalar.long, False),))),
            column(Object((Property("x", Scalar.long),))),
            1,
        ),
        (column(Object((Property("x", Scalar.long),))), column(Map(Scalar.double)), 0),
        (tensor("float32", -1, 4), tensor("float32", -1, 4), 0),
        (tensor("float32", -1, 4), tensor("float32", -1, -1), 0),
        (tensor("float32", -1, -1), tensor("float32", -1, 4), 1),
        (tensor("float32", -1, 4), tensor("float32", -1, 5), 1),
        (tensor("float32", -1, 4), tensor("float64", -1, 4), 0),
        (tensor("float64", -1, 4), tensor("float32", -1, 4), 1),
        (tensor("float64", -1, 4), tensor("int64", -1), 2),
        (output(LONG), output(LONG, DOUBLE), 0),
        (output(LONG, DOUBLE), output(LONG), 1),
        (output(LONG), output(ColSpec(Scalar.double, "a")), 1),
        (output(LONG), output(ColSpec(Scalar.long, "z")), 1),
        (output(LONG), output(ColSpec(Scalar.long, "a", False)), 1),
        (output(LONG), column(Scalar.long), 1),
        (param(type=Scalar.long, default=1), param(type=Scalar.long, default=2), 0),
        (param(type=Scalar.long, default=1), param(type=Scalar.double, default=2.0), 0),
        (param(type=Scalar.double, default=1.0), param(type=Scalar.long, default=2), 1),
        (param(type=Scalar.long, default=1), param(type=Scalar.long, default=[2], shape=(-1,)), 1),
        (param(type=Scalar.long, default=1), Signature(None, None, None), 1),
        (Signature(None, None, None), param(type=Scalar.long, default=1), 0),
    ],
)
def test_compatible(old: Signature | None, new: Signature | None, reasons: int) -> None:
    found = compatible(old, new)
    assert len(found) == reasons, found


@given(signatures)
def test_a_signature_is_compatible_with_itself(signature: Signature) -> None:
    assert compatible(signature, Signature.from_json(signature.to_json())) == []
