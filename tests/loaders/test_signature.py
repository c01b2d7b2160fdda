"""Signatures and MLflow's JSON, both ways."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.signature import (
    Array,
    ColSpec,
    Scalar,
    Signature,
    SignatureError,
)
from tests.conftest import needs
from tests.support.memory import at_most
from tests.support.signatures import signatures


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
def test_an_invalid_signature_is_refused_with_its_place(inputs: str, place: str | None) -> None:
    with pytest.raises(SignatureError) as refused:
        Signature.from_json({"inputs": inputs})
    if place is not None:
        assert refused.value.place == place


@pytest.mark.parametrize("item", ["[],", "0,", '{"":0},'])
def test_a_signature_that_is_huge_once_it_is_read_is_refused_unread(item: str) -> None:
    text = f"[{item * 1_000_000}0]"
    with at_most(1), pytest.raises(SignatureError, match="inputs: is too large"):
        Signature.from_json({"inputs": text})


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
