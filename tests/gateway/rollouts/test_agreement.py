"""Agreement: equal answers agree in every form, different ones do not, and few requests are never a pass."""

from __future__ import annotations

import datetime
import json
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.rollouts import agreement
from gateway.rollouts.agreement import (
    COLUMNS_KEPT,
    TOLERANCE,
    Agreement,
    Compared,
    Outcome,
    bounds,
    compare,
    unanswered,
)
from loaders.batch import Batch, Columns, Opaque, Tensors, Value

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.datetimes()
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)
DTYPES = ("f8", "f4", "f2", "c16", "i8", "u1", "?", "M8[ns]", "m8[s]", "U3", "S3")


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    kind, rows = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    if kind == 0:
        return Value(draw(TREES))
    if kind == 1:
        return Value(draw(st.lists(TREES, min_size=rows, max_size=rows)), rows)
    if kind == 2:
        shape = (rows, *draw(st.lists(st.integers(0, 3), max_size=2)))
        return Tensors({"": _array(draw, shape)}, draw(st.sampled_from([rows, None])))
    columns: dict[str | int, Any] = {
        f"c{number}": _array(draw, (rows,)) for number in range(draw(st.integers(1, 3)))
    }
    return Columns(columns, rows)


def _array(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    size = math.prod(shape)
    dtype = draw(st.sampled_from([*DTYPES, "O", "gaps"]))
    if dtype == "O":
        filled = np.empty(size, object)
        for at in range(size):
            filled[at] = draw(TREES)
        return filled.reshape(shape)
    raw = draw(st.binary(min_size=size * 16, max_size=size * 16))
    if dtype == "gaps":
        values = np.frombuffer(raw, np.int64)[:size].reshape(shape)
        return np.ma.MaskedArray(values, mask=values % 2 == 0)
    if dtype in ("U3", "S3"):
        return np.array([f"{byte:x}" for byte in raw[:size]], dtype).reshape(shape)
    if dtype == "?":
        return np.array([byte % 2 == 0 for byte in raw[:size]], dtype).reshape(shape)
    return np.frombuffer(raw, dtype)[:size].reshape(shape)


@given(batches())
@settings(max_examples=200, deadline=None)
def test_a_version_agrees_with_itself(batch: Batch) -> None:
    found = compare(batch, batch, 0.0)
    assert found.agrees
    assert found.exact
    assert found.share == 1.0
    assert not any(column.differ or column.flips or column.near for column in found.columns.values())


@given(batches(), batches())
@settings(max_examples=200, deadline=None)
def test_any_two_answers_can_be_compared_and_the_counts_add_up(one: Batch, other: Batch) -> None:
    found = compare(one, other)
    assert 0 <= found.agreed <= found.rows
    for column in found.columns.values():
        assert column.exact + column.near + column.differ == column.values
        assert 0 <= column.flips <= column.differ
        assert column.spread.sum() <= column.values
    agreement = Agreement(0.9, 1)
    agreement.add(found, "hash")
    json.dumps(agreement.verdict().evidence, allow_nan=False)


@given(
    st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=5),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
)
def test_more_tolerance_never_makes_numbers_disagree(numbers: list[float], less: float, more: float) -> None:
    less, more = sorted((less, more))
    reference = Tensors({"": np.array(numbers)}, len(numbers))
    answer = Tensors({"": np.array(numbers) * 1.01}, len(numbers))
    assert compare(answer, reference, less).agreed <= compare(answer, reference, more).agreed


@pytest.mark.parametrize(
    ("answer", "reference", "agrees"),
    [
        ([1.0], [1.0], True),
        ([1.005], [1.0], True),
        ([1.02], [1.0], False),
        ([0.0], [1e-12], True),
        ([float("nan")], [float("nan")], True),
        ([float("nan")], [1.0], False),
        ([float("inf")], [float("inf")], True),
        ([float("inf")], [1e300], False),
        ([-1e308], [1e308], False),
        ([2], [2], True),
        ([2], [3], False),
        ([1000], [1001], False),
        ([2.0], [2], True),
        ([True], [1], False),
        (["yes"], ["yes"], True),
        (["yes"], ["no"], False),
        (["1"], [1], False),
        ([None], [None], True),
        ([None], [0.0], False),
        ([10**400], [1.0], False),
        ([{"a": 1, "b": 2.0}], [{"a": 1}], True),
        ([{"a": 1}], [{"a": 1, "b": 2.0}], False),
        ([{"a": 1}], [[1]], False),
        ([[1, 2]], [[1, 2, 3]], False),
        ([b"x"], [b"x"], True),
        ([datetime.date(2026, 1, 1)], [datetime.datetime(2026, 1, 1)], False),
        ([Opaque("lock")], [Opaque("lock")], True),
        ([np.array([1.0, 2.0])], [np.array([1.0, 2.001])], True),
        ([np.array([1.0])], [np.array([1.0, 2.0])], False),
        ([np.array([1.0])], [1.0], False),
    ],
)
def test_values_in_lists(answer: list[Any], reference: list[Any], agrees: bool) -> None:
    assert compare(Value(answer, 1), Value(reference, 1)).agrees is agrees


@pytest.mark.parametrize("rows", [1, 1000])
def test_numbers_in_lists_are_compared_together(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    whole = agreement._array
    monkeypatch.setattr(agreement, "_array", lambda *given: (calls.append(given), whole(*given))[1])
    said = [{"share": 0.5, "scores": [0.25] * 10, "team": "a"} for _ in range(rows)]
    other = [{**row, "scores": [*row["scores"][1:], 0.25 + 0.1 * (at % 2)]} for at, row in enumerate(said)]
    found = compare(Value(other, rows), Value(said, rows))
    assert (found.rows, found.agreed) == (rows, (rows + 1) // 2)
    assert found.columns[""].values == 12 * rows
    assert len(calls) == 1


def test_the_share_is_that_of_rows() -> None:
    reference = Columns({"label": np.array(["a", "b", "a", "b"], object), "score": np.ones(4)}, 4)
    answer = Columns(
        {"label": np.array(["a", "a", "a", "b"], object), "score": np.array([1, 1, 2, 1.001])}, 4
    )
    found = compare(answer, reference)
    assert (found.agreed, found.rows, found.share) == (2, 4, 0.5)
    assert not found.exact
    label, score = found.columns["label"], found.columns["score"]
    assert (label.flips, label.differ, label.exact) == (1, 1, 3)
    assert (score.flips, score.differ, score.near, score.exact) == (0, 1, 1, 2)


def test_a_small_probability_is_judged_with_the_others_of_its_row() -> None:
    reference = Tensors({"": np.array([[0.999, 0.001]])}, 1)
    assert compare(Tensors({"": np.array([[0.9985, 0.0015]])}, 1), reference).agrees
    assert not compare(Tensors({"": np.array([[0.9, 0.1]])}, 1), reference).agrees


def test_tensors_that_are_not_rows_agree_whole() -> None:
    reference = Tensors({"mask": np.zeros((2, 3)), "text": np.array(["a"])}, None)
    assert compare(reference, reference).rows == 1
    other = Tensors({"mask": np.eye(2, 3), "text": np.array(["a"])}, None)
    assert compare(other, reference).share == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        Value([1.0, 2.0]),
        Tensors({"": np.array([1.0])}, 1),
        Tensors({"": np.array([1.0, 2.0, 3.0])}, 3),
        Columns({"other": np.array([1.0, 2.0])}, 2),
        Value({"a": 1}),
    ],
)
def test_an_answer_of_another_form_does_not_agree(answer: Batch) -> None:
    found = compare(answer, Columns({"y": np.array([1.0, 2.0])}, 2))
    assert found.share == 0.0


def test_an_array_and_the_list_that_callers_get_for_it_agree() -> None:
    array, listed = Tensors({"": np.array([1.0, 2.0])}, 2), Value([1.0, 2.0], 2)
    assert compare(array, listed).agrees
    assert compare(listed, array).agrees


def test_columns_that_only_the_candidate_answers_are_ignored() -> None:
    reference = Columns({"y": np.array([1.0])}, 1)
    assert compare(Columns({"y": np.array([1.0]), "why": np.array(["x"])}, 1), reference).agrees


def test_gaps_agree_with_gaps_only() -> None:
    one = np.ma.MaskedArray([1, 2], mask=[True, False])
    other = np.ma.MaskedArray([9, 2], mask=[True, False])
    full = np.array([1, 2])
    reference = Columns({"y": one}, 2)
    assert compare(Columns({"y": other}, 2), reference).agrees
    assert compare(Columns({"y": full}, 2), reference).agreed == 1


def test_a_wide_answer_keeps_a_bounded_number_of_columns() -> None:
    wide = Columns({f"c{number}": np.ones(1) for number in range(COLUMNS_KEPT + 50)}, 1)
    found = compare(wide, wide)
    assert len(found.columns) == COLUMNS_KEPT + 1
    agreement = Agreement(0.9, 1)
    agreement.add(found)
    assert sum(column.values for column in found.columns.values()) == COLUMNS_KEPT + 50
    assert len(agreement.verdict().evidence["worst_columns"]) == 5


def test_quantiles_of_the_differences_are_those_of_the_numbers() -> None:
    reference = np.full(1000, 100.0)
    answer = reference * (1 + np.concatenate([np.zeros(500), np.full(450, 1e-4), np.full(50, 0.5)]))
    column = compare(Tensors({"": answer}, 1000), Tensors({"": reference}, 1000)).columns[""]
    assert column.quantile(0.5) == 0.0
    assert column.quantile(0.9) == pytest.approx(1e-4, rel=0.6)
    assert column.quantile(0.99) == pytest.approx(1 / 3, rel=0.6)
    assert column.largest == pytest.approx(1 / 3)


# Verdicts.


def row(agrees: bool) -> Compared:
    return Compared(1, int(agrees))


def of(shares: list[bool], wanted: float = 0.98, requests: int = 200) -> Agreement:
    agreement = Agreement(wanted, requests)
    for number, agrees in enumerate(shares):
        agreement.add(row(agrees), f"hash-{number}")
    return agreement


@pytest.mark.parametrize(
    ("right", "wrong", "outcome"),
    [
        (0, 0, Outcome.THIN),
        (199, 0, Outcome.THIN),
        (200, 0, Outcome.PASSED),
        (196, 4, Outcome.PASSED),
        (195, 5, Outcome.FAILED),
        (0, 3, Outcome.FAILED),
        (19, 1, Outcome.THIN),
        (95, 5, Outcome.THIN),
        (60, 20, Outcome.FAILED),
    ],
)
def test_verdicts(right: int, wrong: int, outcome: Outcome) -> None:
    shares = [True] * right + [False] * wrong
    random.Random(1).shuffle(shares)
    assert of(shares).outcome is outcome


def test_equal_inputs_are_early_proof_only_once() -> None:
    for inputs, outcome in ((["a", "a", "a"], Outcome.THIN), (["a", "b", "a"], Outcome.FAILED)):
        agreement = Agreement(0.98, 200)
        for one in inputs:
            agreement.add(row(False), one, repeats=True)
        assert (agreement.outcome, agreement.differ) == (outcome, 3)
    assert str(agreement.verdict()).endswith("wanted 0.98; certain before 200 requests")
    for _ in range(197):  # the agreement itself counts every request
        agreement.add(row(False), "a", repeats=True)
    assert agreement.outcome is Outcome.FAILED


def test_above_a_number_of_inputs_no_further_one_is_early_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "INPUTS_KEPT", 1)
    found = Agreement(0.98, 200)
    for one in "abcdef":
        found.add(row(False), one, repeats=True)
    assert found.outcome is Outcome.THIN


def test_full_agreement_allows_no_difference() -> None:
    assert of([True] * 10, 1.0, 10).outcome is Outcome.PASSED
    assert of([True] * 9, 1.0, 10).outcome is Outcome.THIN
    assert of([True, False], 1.0, 10).outcome is Outcome.FAILED


def test_no_agreement_wanted_passes_with_enough_requests() -> None:
    assert of([False] * 10, 0.0, 10).outcome is Outcome.PASSED
    assert of([False] * 9, 0.0, 10).outcome is Outcome.THIN


def test_few_requests_rarely_fail_a_version_that_agrees_enough() -> None:
    draw, failed = random.Random(3), 0
    for _ in range(400):
        agreement = Agreement(0.98, 10_000)
        for _ in range(100):
            agreement.add(row(draw.random() < 0.98))
        failed += agreement.outcome is Outcome.FAILED
    assert failed <= 4  # at most 1 in 100, although it was asked after every request


def test_five_percent_wrong_fails() -> None:
    draw = random.Random(5)
    found = [of([draw.random() >= 0.05 for _ in range(200)]).outcome for _ in range(100)]
    assert found.count(Outcome.FAILED) >= 90
    assert Outcome.THIN not in found


def test_a_candidate_that_fails_does_not_agree() -> None:
    agreement = Agreement(0.98, 1)
    agreement.add(unanswered(Columns({}, 3)), "abc")
    verdict = agreement.verdict()
    assert verdict.outcome is Outcome.FAILED
    assert verdict.evidence["failed"] == 1
    assert verdict.evidence["rows"] == 3
    assert verdict.evidence["examples"] == ["abc"]
    assert (
        str(verdict) == "1 of 1 requests got another answer (1 of them none): agreement 0.0000, wanted 0.98"
    )


def test_the_evidence_counts_and_names_no_value() -> None:
    reference = Columns({"secret": np.array(["private"], object)}, 1)
    agreement = Agreement(0.5, 2)
    agreement.add(compare(Columns({"secret": np.array(["other"], object)}, 1), reference), "h1")
    agreement.add(compare(reference, reference), "h2")
    evidence = agreement.verdict().evidence
    assert (evidence["requests"], evidence["exact"], evidence["differ"]) == (2, 1, 1)
    assert evidence["label_flips"] == 1
    assert evidence["examples"] == ["h1"]
    assert list(evidence["worst_columns"]) == ["secret"]
    assert "private" not in json.dumps(evidence)
    assert "other" not in json.dumps({**evidence, "other_form": 0, "test": ""}).replace("other_form", "")


@given(st.integers(0, 500), st.integers(0, 500))
def test_bounds_enclose_the_mean_and_shrink_with_the_count(right: int, wrong: int) -> None:
    count = right + wrong
    if not count:
        return
    low, high = bounds(right / count, count)
    assert 0 <= low <= right / count + 1e-9
    assert right / count - 1e-9 <= high <= 1
    wider_low, wider_high = bounds(right / count, max(1, count // 2))
    assert wider_low <= low + 1e-9
    assert wider_high >= high - 1e-9


def test_bounds_of_full_agreement_are_those_of_the_binomial() -> None:
    low, high = bounds(1.0, 200, 0.05)
    assert low == pytest.approx(0.05 ** (1 / 200), abs=1e-6)
    assert high == 1.0


def test_the_default_tolerance_is_one_percent() -> None:
    assert TOLERANCE == 0.01
