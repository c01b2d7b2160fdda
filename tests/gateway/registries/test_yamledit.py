"""YAML changed in place: what an edit keeps, and that the text reads as wanted after any edit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.registries.yamledit import block, changed, put
from gateway.yamltext import data, parse

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


def read(text: str) -> Any:
    return data(parse(text), typed=False)


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


def test_what_cannot_be_edited_is_rewritten_and_reads_as_wanted() -> None:
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


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("models:\n  a: {x: 1}\n  b: {x: 1}  # b\n# end\nz: 1\n", "a"),
        ("models:\n  a: {x: 1}\n  b: {x: 1}  # b\n# end\nz: 1\n", "b"),
        ("z: {models: 1}\nmodels:\n  a: {x: 1}\n  b: {x: 1}", "b"),
        ("models:\r\n  # first\r\n  a:\r\n    x: 1\r\n\r\n  b: {x: 1}\r\n", "a"),
        ("  models:\n     'a': {x: 1}\n     b: {x: 1}\n  z: 1\n", "a"),
        ("models: {a: {x: 1}, b: {x: 1}}\n", "a"),
        ("models:\n  ? a\n  : {x: 1}\n  b: {x: 1}\n", "a"),
        ("models:\n  a: {x: 1, y: &y 2}\n  b: {x: 1, y: *y}\n", "b"),
        ("--- {models: {a: {x: 1}}}\n", "a"),
        ("models:\n  b: {x: 1}\n  c: {x: 1}\n", "a"),
    ],
)
def test_an_edit_of_one_entry_means_what_an_edit_of_the_whole_means(text: str, name: str) -> None:
    for path, value in ((("models", name, "x"), "2"), (("models", name, "y", "z"), "3")):
        edited, kept = changed(text, [(path, value)])
        assert read(edited) == put(read(text), path, value)
        if kept and name in read(text)["models"]:
            lines = set(text.splitlines()) - set(edited.splitlines())
            assert len(lines) <= 1, "only the line of the entry may change"


def test_only_the_entry_that_changes_is_made_into_a_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []

    def counted(text: str) -> Any:
        parsed.append(text)
        return parse(text)

    monkeypatch.setattr("gateway.registries.yamledit.parse", counted)
    text = "# all\n" + block({"models": {f"m{i}": {"versions": {"1": {"source": "a"}}} for i in range(500)}})
    edited, kept = changed(text, [(("models", "m250", "versions", "2"), {"source": "b"})])
    assert kept
    assert read(edited)["models"]["m250"]["versions"]["2"] == {"source": "b"}
    assert max(map(len, parsed)) < 200
