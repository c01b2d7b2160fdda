from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.yamltext import InvalidText, block, changed, data, parse, put

WRITTEN_BY_HAND = """\
# the registry of team A
version: 1

models:
    # flowers
    iris:
        versions:
            1: {source: models/iris/1}   # the first
        aliases:
            champion: 1    # live

    # about fraud
    fraud:
        versions: {1: {source: "s3://b/1"}, 2: {source: b/2}}
        aliases: {champion: {version: 2, x-why: 'asked for'}}
"""


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
        ("? [1]\n: 2", "line 1", "no scalar"),
        ("[" * 60 + "]" * 60, "line 1", "deeper"),
        ("- " * 60 + "a", "line 1", "deeper"),
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


@pytest.mark.parametrize(
    ("path", "value", "before", "after"),
    [
        ("models.iris.aliases.champion", "2", "champion: 1    # live", "champion: 2    # live"),
        (
            "models.iris.aliases.champion",
            {"version": "2", "previous": ["1"]},
            "champion: 1 ",
            "champion: {version: 2, previous: [1]} ",
        ),
        (
            "models.iris.aliases.new",
            "1",
            "champion: 1    # live\n",
            "champion: 1    # live\n            new: 1\n",
        ),
        (
            "models.iris.versions.2",
            {"source": "models/iris/2", "created": "2026-01-01T00:00:00Z"},
            "# the first\n",
            '# the first\n            2: {source: models/iris/2, created: "2026-01-01T00:00:00Z"}\n',
        ),
        ("models.fraud.aliases.champion.version", "1", "{version: 2,", "{version: 1,"),
        ("models.fraud.aliases.new", "1", "'asked for'}}", "'asked for'}, new: 1}"),
        ("models.fraud.versions.2", None, ", 2: {source: b/2}}", "}"),
        ("models.fraud.versions.1", None, '{1: {source: "s3://b/1"}, 2', "{2"),
        (
            "models.iris.aliases.champion",
            None,
            "aliases:\n            champion: 1    # live\n",
            "aliases: {}\n",
        ),
        ("models.iris.aliases.absent", None, "live", "live"),
        (
            "models.new.versions.1.source",
            "x",
            "'asked for'}}\n",
            "'asked for'}}\n    new:\n      versions:\n        1: {source: x}\n",
        ),
    ],
)
def test_an_edit_changes_its_lines_and_no_others(path: str, value: Any, before: str, after: str) -> None:
    assert WRITTEN_BY_HAND.count(before) == 1
    assert changed(WRITTEN_BY_HAND, [(path.split("."), value)]) == (
        WRITTEN_BY_HAND.replace(before, after),
        True,
    )


@pytest.mark.parametrize(
    ("text", "path", "value", "after"),
    [
        ("models:\n", "models.a.b.c", "1", "models:\n  a:\n    b: {c: 1}\n"),
        ("models: {}  # none yet\n", "models.a.b.c", "1", "models:  # none yet\n  a:\n    b: {c: 1}\n"),
        ("a:\n  b:\n", "a.b", "1", "a:\n  b: 1\n"),
        ("a:\n  b: 1", "a.c", "2", "a:\n  b: 1\n  c: 2"),
        ("a:\r\n  b: 1\r\nc: 2\r\n", "a.d", "3", "a:\r\n  b: 1\r\n  d: 3\r\nc: 2\r\n"),
        ("a:\n  b: 1\n  c: 2\n", "a.b", None, "a:\n  c: 2\n"),
        ("a:\n  b:\n    - 1\n    - 2\nc: 3\n", "a.b", ["4"], "a:\n  b:\n    [4]\nc: 3\n"),
        ("é:\n  ü: 1\n", "é.ü", "no", 'é:\n  ü: "no"\n'),
        (
            "a: {\n  b: 1,  # one\n  c: 2  # two\n}\n",
            "a.d",
            "3",
            "a: {\n  b: 1,  # one\n  c: 2, d: 3  # two\n}\n",
        ),
        ("'1': {a: x}\n", "1.a", "y z", "'1': {a: \"y z\"}\n"),
        ("a: 1\n", "b", True, "a: 1\nb: true\n"),
    ],
)
def test_edits_of_other_shapes(text: str, path: str, value: Any, after: str) -> None:
    assert changed(text, [(path.split("."), value)]) == (after, True)


def test_what_cannot_be_edited_is_written_anew_and_reads_as_wanted() -> None:
    text, kept = changed("a: &x {b: 1}\nc: *x  # the same\n", [(("c", "b"), "2")])
    assert not kept
    assert read(text) == {"a": {"b": "1"}, "c": {"b": "2"}}


words = st.text(st.characters(codec="utf-8"), max_size=8)
documents = st.recursive(
    words,
    lambda below: st.dictionaries(words, below, max_size=4) | st.lists(below, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(words, documents, min_size=1, max_size=4))
def test_what_is_written_reads_the_same(value: dict[str, Any]) -> None:
    assert read(block(value)) == value


@given(
    st.dictionaries(words, documents, min_size=1, max_size=4),
    st.lists(words, min_size=1, max_size=4),
    st.none() | documents,
)
def test_any_edit_reads_as_wanted(value: dict[str, Any], path: list[str], new: Any) -> None:
    wanted = put(value, path, new)
    if wanted:
        assert read(changed(block(value), [(path, new)])[0]) == wanted


@given(st.text(alphabet="ab1:{}[],-&*? \n'\"#|>!%~", max_size=40))
def test_no_text_raises_anything_else(text: str) -> None:
    try:
        read(text)
        read(text, typed=True)
    except InvalidText:
        pass
