"""The recorded answer of a package: its form, and what counts as another answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders import package, recorded
from loaders.batch import Batch, Columns, Tensors, Value
from tests.support.hostile import write_package

TABLE = Columns({"label": np.array(["a", "b"], object), "price": np.array([1.0, np.nan])}, 2)
DAYS = Columns({"day": np.array(["2026-01-02", "NaT"], "datetime64[ns]")}, 2)


def array(*values: Any, dtype: str = "float64") -> Tensors:
    return Tensors({"": np.array(values, dtype)}, len(values))


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        (TABLE, [{"label": "a", "price": 1.0}, {"label": "b", "price": None}]),
        (DAYS, [{"day": "2026-01-02T00:00:00"}, {"day": None}]),
        (array(1, 2, dtype="int64"), [1, 2]),
        (Tensors({"p": np.ones((1, 2)), "l": np.array([3])}, 1), {"p": [[1.0, 1.0]], "l": [3]}),
        (
            Value([{"team": "a", "sure": True, "raw": b"\x00"}], 1),
            [{"team": "a", "sure": True, "raw": "AA=="}],
        ),
    ],
)
def test_an_answer_is_recorded_as_it_is_sent_and_found_again(
    tmp_path: Path, answer: Batch, form: Any
) -> None:
    assert recorded.form(answer) == form
    saved = write_package(tmp_path / "p")
    assert recorded.read(saved) is None
    assert recorded.write(saved.path, recorded.form(answer))
    assert recorded.differences(recorded.read(saved), answer) == []


@pytest.mark.parametrize(
    ("was", "now", "places"),
    [
        ([9.69, 93.71, 93.71], array(9.69, 43.81, 43.81), ["predictions[1]"]),
        ([93.71], array(93.7100001), []),
        ([93.71], array(93.7101), ["predictions[0]"]),
        ([93.71], array(93.7101, dtype="float32"), []),
        ([1e-9, 2e-9], array(1e-9, 3e-9), ["predictions[1]"]),
        ([0.5, 1e-12], array(0.5, 2e-12), []),
        ([1, 0], array(True, False, dtype="bool"), ["predictions[0]"]),
        ([1.0], array(1, dtype="int64"), []),
        ([1, 2], array(1, dtype="int64"), ["predictions"]),
        ([1], array(1, 2, dtype="int64"), ["predictions"]),
        (["a"], Value(["b"], 1), ["predictions[0]"]),
        (
            [{"label": "a", "price": 2.0}, {"label": "c", "price": 3.0}],
            TABLE,
            ["predictions[0].price", "predictions[1].label"],
        ),
        ([{"label": "a"}], Columns({"other": np.array(["a"], object)}, 1), None),
        ([None], array(np.nan), []),
        ({"p": [1.0]}, Tensors({"p": np.array([1.5])}, 1), ["predictions.p[0]"]),
    ],
)
def test_what_differs_is_named_once_a_field(was: Any, now: Batch, places: list[str] | None) -> None:
    found = [difference.place for difference in recorded.differences(was, now)]
    assert found == (["predictions[0].label", "predictions[0].other"] if places is None else places)


@pytest.mark.parametrize(
    "answer",
    [
        Columns({}, 2_000_000_000),
        Tensors({"": np.broadcast_to(np.zeros(1), (1_000_000_000,))}, 1_000_000_000),
        Tensors({"": np.empty((2_000_000_000, 0))}, 2_000_000_000),
        Value([[0] * 1000] * 1_000_000),
    ],
    ids=["rows without columns", "a long array", "an array without values", "a nested list"],
)
def test_an_answer_of_another_size_is_never_written_out(answer: Batch) -> None:
    assert [d.place for d in recorded.differences([1.0, 2.0], answer)] == ["predictions"]


def test_the_warning_names_fields_and_shows_no_data() -> None:
    found = recorded.differences([{"secret": "Ada"}], Value([{"secret": "Bob"}], 1))
    text = recorded.told(found)
    assert "predictions[0].secret" in text
    assert "Ada" not in text
    assert "Bob" not in text


@pytest.mark.parametrize(
    "content", ["", "[1]", "{}", "[" * 100_000, '{"predictions": [' + "1," * 600_000 + "1]}"]
)
def test_a_file_that_is_none_is_said(tmp_path: Path, content: str) -> None:
    saved = write_package(tmp_path / "p")
    (saved.path / recorded.FILE).write_text(content)
    with pytest.raises(recorded.Unreadable, match=recorded.FILE):
        recorded.read(saved)


def test_a_link_out_of_the_package_is_not_followed(tmp_path: Path) -> None:
    saved = write_package(tmp_path / "p")
    (tmp_path / "outside.json").write_text('{"predictions": [1]}')
    (saved.path / recorded.FILE).symlink_to(tmp_path / "outside.json")
    with pytest.raises(recorded.Unreadable):
        recorded.read(package.read(saved.path))


def test_a_long_answer_is_not_recorded(tmp_path: Path) -> None:
    assert not recorded.write(tmp_path, ["a" * 1000] * 1100)
    assert list(tmp_path.iterdir()) == []
