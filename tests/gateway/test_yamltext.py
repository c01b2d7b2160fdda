from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import yamltext
from gateway.yamltext import InvalidText, data, parse
from loaders import yamltext as in_packages


def read(text: str, *, typed: bool = False) -> Any:
    return data(parse(text), typed=typed)


def test_scalars_are_text_or_typed() -> None:
    text = "{a: no, b: 1.10, c: 2026-11-21, d: ~, e: 'null', f: 1:30, g: true, h: -7, i: 1e3, j: , k: 1_000}"
    assert read(text) == {
        "a": "no", "b": "1.10", "c": "2026-11-21", "d": None, "e": "null", "f": "1:30", "g": "true",
        "h": "-7", "i": "1e3", "j": None, "k": "1_000",
    }  # fmt: skip
    assert read(text, typed=True) == {
        "a": "no", "b": 1.1, "c": "2026-11-21", "d": None, "e": "null", "f": "1:30", "g": True,
        "h": -7, "i": 1000.0, "j": None, "k": "1_000",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("", "", "empty"),
        ("# nothing\n", "", "empty"),
        ("a: 1\n---\nb: 2\n", "", "document"),
        ("a: [1", "line 2, column 1", "expected"),
        ("a: &x [*x]", "a[0]", "itself"),
        ("a: *x", "line 1", "not defined"),
        ("? [1]\n: 2", "line 1", "not a scalar"),
        ("[" * 70 + "]" * 70, "line 1", "deeper"),
        ("- " * 70 + "a", "line 1", "deeper"),
        ("a: {b: 1, b: 2}", "a.b", "twice"),
        ("1: a\n'1': b", "1", "twice"),
        ("a: \x00", "", "not YAML"),
    ],
)
def test_what_is_refused(text: str, place: str, problem: str) -> None:
    with pytest.raises(InvalidText) as error:
        read(text)
    assert any(place in where and problem in what for where, what in error.value.problems), (
        error.value.problems
    )


def test_both_readers_of_yaml_have_the_same_limits() -> None:
    assert (yamltext.MAX_DEPTH, yamltext.MAX_REPEATED) == (in_packages.MAX_DEPTH, in_packages.MAX_NODES)


def test_nesting_without_end_is_refused() -> None:
    """Whether the parser's own limit or ours comes first differs between versions of libyaml."""
    with pytest.raises(InvalidText):
        read("[" * 100_000)


def test_anchors_are_read_but_cannot_explode() -> None:
    assert read("a: &x {b: 1}\nc: *x") == {"a": {"b": "1"}, "c": {"b": "1"}}
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    with pytest.raises(InvalidText, match="repeat into more than"):
        read(bomb)
    deep = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 100))
    with pytest.raises(InvalidText, match="deeper"):
        read(deep)


def test_all_that_comes_twice_is_collected() -> None:
    problems: list[tuple[str, str]] = []
    assert data(parse("{a: 1, a: 2, b: {c: 1, c: 2}}"), typed=False, problems=problems) == {
        "a": "1",
        "b": {"c": "1"},
    }
    assert [place for place, _ in problems] == ["a", "b.c"]


@given(st.text(alphabet="ab1:{}[],-&*? \n'\"#|>!%~", max_size=40))
def test_no_text_raises_anything_else(text: str) -> None:
    try:
        read(text)
        read(text, typed=True)
    except InvalidText:
        pass
