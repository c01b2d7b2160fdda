"""Enforcement of params."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pytest

from loaders.enforcement import Enforced, RawInput, enforce
from loaders.signature import (
    Object,
    ParamSpec,
    Property,
    Scalar,
    Signature,
)
from tests.support.asking import places

POINT = Object((Property("x", Scalar.long), Property("y", Scalar.double, False)))
PARAMS = Signature(
    None,
    None,
    (
        ParamSpec("d", Scalar.double, 0.5),
        ParamSpec("i", Scalar.integer, 1),
        ParamSpec("s", Scalar.string, "a"),
        ParamSpec("b", Scalar.boolean, True),
        ParamSpec("t", Scalar.datetime, datetime.date(2024, 1, 1)),
        ParamSpec("l", Scalar.long, [1, 2], (-1,)),
        ParamSpec("o", POINT, {"x": 1}),
    ),
)


def given(**params: Any) -> Enforced:
    return enforce(PARAMS, RawInput("inputs", [1]), params)


def test_defaults_are_given_and_cannot_be_changed_by_the_model() -> None:
    first = given().params
    assert first == {
        "d": 0.5,
        "i": 1,
        "s": "a",
        "b": True,
        "t": datetime.date(2024, 1, 1),
        "l": [1, 2],
        "o": {"x": 1},
    }
    first["l"].append(3)
    first["o"]["x"] = 2
    assert given().params["l"] == [1, 2]
    assert given().params["o"] == {"x": 1}


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("d", 1, 1.0),
        ("d", 1.5, 1.5),
        ("d", None, None),
        ("d", np.float64(1.5), 1.5),
        ("i", 2**31, 2**31),
        ("i", np.int32(5), 5),
        ("s", "", ""),
        ("b", False, False),
        ("t", "2024-01-02", datetime.date(2024, 1, 2)),
        ("t", "2024-01-02T03:04:05", datetime.datetime(2024, 1, 2, 3, 4, 5)),
        ("t", "2024-01-02T03:04:05Z", datetime.datetime(2024, 1, 2, 3, 4, 5)),
        ("t", datetime.datetime(2024, 1, 2), datetime.datetime(2024, 1, 2)),
        ("t", np.datetime64("2024-01-02"), datetime.date(2024, 1, 2)),
        ("l", [], []),
        ("l", [1, None], [1, None]),
        ("l", np.array([1, 2]), [1, 2]),
        ("o", {"x": 1, "y": 2}, {"x": 1, "y": 2}),
        ("o", {"x": 1, "y": None}, {"x": 1, "y": None}),
    ],
)
def test_params_are_cast(name: str, value: Any, wanted: Any) -> None:
    found = given(**{name: value}).params[name]
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(
    ("name", "value", "path"),
    [
        ("d", "1", "params.d"),
        ("d", True, "params.d"),
        ("d", [1.5], "params.d"),
        ("d", 10**400, "params.d"),
        ("i", True, "params.i"),
        ("i", 1.0, "params.i"),
        ("i", 1.5, "params.i"),
        ("i", "1", "params.i"),
        ("s", 1, "params.s"),
        ("b", 1, "params.b"),
        ("b", "false", "params.b"),
        ("t", 5, "params.t"),
        ("t", "yesterday", "params.t"),
        ("l", 1, "params.l"),
        ("l", None, "params.l"),
        ("l", [1, 1.5], "params.l[1]"),
        ("l", [[1]], "params.l[0]"),
        ("o", 1, "params.o"),
        ("o", None, "params.o"),
        ("o", {}, "params.o.x"),
        ("o", {"x": 1, "z": 1}, "params.o.z"),
        ("o", {"x": 3.0}, "params.o.x"),
    ],
)
def test_params_that_do_not_fit(name: str, value: Any, path: str) -> None:
    assert places(PARAMS, "inputs", [1], {name: value}) == [path]


def test_params_without_a_schema() -> None:
    assert enforce(None, RawInput("inputs", [1]), {}).params == {}
    enforced = enforce(None, RawInput("inputs", [1]), {"a": 1})
    assert enforced.params == {}
    assert enforced.warnings == ("ignored params that are not in the signature: a",)
    assert places(None, "inputs", [1], 5) == ["params"]
    assert places(PARAMS, "inputs", [1], [5]) == ["params"]
