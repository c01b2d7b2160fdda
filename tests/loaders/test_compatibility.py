"""Which signatures may replace another without a caller noticing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given

from loaders.compatibility import compatible
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
    TensorSpec,
)
from tests.support.signatures import signatures


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
