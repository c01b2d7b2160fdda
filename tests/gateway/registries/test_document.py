from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.registries.base import Alias, Model, RegistryInvalid
from gateway.registries.document import Form, Reader, located, parse

DIGEST = "sha256:" + "ab" * 32


def read(text: str, form: Literal["yaml", "json"] = "yaml") -> dict[str, Model]:
    return parse(text.encode(), form, target="registry.yaml", base="/srv")


def problems(text: str, form: Literal["yaml", "json"] = "yaml") -> list[tuple[str, str]]:
    with pytest.raises(RegistryInvalid) as error:
        read(text, form)
    return error.value.problems


def test_the_example_of_the_contract() -> None:
    models = read(f"""
version: 1
x-owner: team A
models:
  iris:
    versions:
      1: {{source: models/iris/1, digest: "{DIGEST}", created: 2026-11-21T20:00:00Z, tags: {{git: abc}}}}
      2: {{source: s3://bucket/iris/2, x-note: [any, thing]}}
    aliases: {{champion: 1, challenger: {{version: 2, previous: 1, last_good: 1}}}}
    rollout: {{gate: none, steps: [10, 50]}}
""")
    iris = models["iris"]
    assert iris.versions["1"].source == "/srv/models/iris/1"
    assert iris.versions["1"].digest == DIGEST
    assert iris.versions["1"].created == "2026-11-21T20:00:00Z"
    assert iris.versions["1"].tags == {"git": "abc"}
    assert iris.versions["2"].source == "s3://bucket/iris/2"
    assert iris.aliases == {"champion": Alias("1"), "challenger": Alias("2", ("1",), "1")}
    assert iris.rollout == {"gate": "none", "steps": ["10", "50"]}
    latest = iris.latest()
    assert latest is not None
    assert latest.version == "2"


def test_json_means_the_same_as_yaml() -> None:
    value = {
        "version": 1,
        "models": {
            "iris": {
                "versions": {"1": {"source": "a", "tags": {"n": 1.5, "b": True, "none": None}}},
                "aliases": {"no": 1, "c": {"version": "1", "previous": [3, 2], "forced": True}},
                "rollout": None,
            }
        },
    }
    models = read(json.dumps(value), "json")
    assert models == read(json.dumps(value))
    assert models["iris"].versions["1"].tags == {"n": "1.5", "b": "true", "none": ""}
    assert models["iris"].aliases == {"no": Alias("1"), "c": Alias("1", ("3", "2"), forced=True)}


def test_scalars_are_text() -> None:
    models = read("models: {no: {versions: {1: {source: 5}}, aliases: {no: 1, on: '1'}}}")
    assert models["no"].versions["1"].source == "/srv/5"
    assert set(models["no"].aliases) == {"no", "on"}


def test_an_alias_to_a_missing_version_does_not_make_the_document_invalid() -> None:
    assert read("models: {a: {aliases: {champion: 7}}}")["a"].aliases == {"champion": Alias("7")}


@pytest.mark.parametrize(
    "text", ["version: 1", "models:", "models: {a: }", "models: {a: {versions: , aliases: ~}}"]
)
def test_what_is_absent_is_empty(text: str) -> None:
    assert all(not model.versions and not model.aliases for model in read(text).values())


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_a_document_that_was_cut_before_its_models_does_not_delete_them(form: Form) -> None:
    whole = b'{"version": 1, "models": {"a": {}, "b": {}}}'
    for cut in (b'{"version": 1}', b'{"version": 1, "models": null}'):
        reader = Reader(form, "the registry")
        assert reader.read(cut, "/srv") == {}  # it has never had models
        assert set(reader.read(whole, "/srv")) == {"a", "b"}
        with pytest.raises(RegistryInvalid, match="there were 2 models until now"):
            reader.read(cut, "/srv")
        assert set(reader.read(whole, "/srv")) == {"a", "b"}
        assert reader.read(b'{"version": 1, "models": {}}', "/srv") == {}


TEXT = """\
models:
  a:
    versions:
      1: {source: /models/a/1}
      2:
        source: /models/a/2
    aliases: {champion: 2}
  b:
    versions:
      1:
        source: /models/b/1
"""


def test_a_text_that_was_cut_in_a_line_changes_nothing() -> None:
    """Every cut is refused or takes whole lines away: none gives another source."""
    reader = Reader("yaml", "the registry")
    whole = dict(reader.read(TEXT.encode(), "/srv"))
    taken = set()
    for length in range(1, len(TEXT) - 1):
        try:
            models = reader.read(TEXT[:length].encode(), "/srv")
        except RegistryInvalid:
            continue
        assert TEXT[length - 1] == "\n" or TEXT[length] == "\n"
        taken.add(length)
        for name, model in models.items():
            for number, version in model.versions.items():
                assert version == whole[name].versions[number]
        assert dict(reader.read(TEXT.encode(), "/srv")) == whole
    assert taken  # a person may delete the last lines
    with pytest.raises(RegistryInvalid, match="line 11: it ends in the middle of this line"):
        reader.read(TEXT[:-3].encode(), "/srv")
    # Another text may end anywhere, and so may one that never ended with a line.
    other = TEXT.replace("/models/b/1\n", "/models/c/1")
    assert reader.read(other.encode(), "/srv")["b"].versions["1"].source == "/models/c/1"
    assert reader.read(other.encode()[:-2], "/srv")["b"].versions["1"].source == "/models/c"


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("", "", "it is empty: write models: {} if there are no models yet"),
        ("models: 5", "models", "a number, where a mapping is expected"),
        ("models: {a: {aliases: {c: [1]}}}", "models.a.aliases.c", "a list, where a version is expected"),
        ("models:\n\ta: {}", "line 2, column 1", "a tab, a wrong indentation, and a bracket or quote"),
        ("models: {a: [", "line 2, column 1", "a tab, a wrong indentation, and a bracket or quote"),
        ("[]", "", "a list, where a mapping is expected"),
        ("version: 2", "version", "reads version 1"),
        ("modles: {}", "modles", "did you mean models?"),
        ("models: {a/b: {}}", "models.a/b", "not allowed"),
        ("models: {a: {verions: {}}}", "models.a.verions", "did you mean versions?"),
        (
            "models: {iris: {versions: {2: {sourc: x}}}}",
            "models.iris.versions.2.sourc",
            "did you mean source?",
        ),
        ("models: {iris: {versions: {2: {sourc: x}}}}", "models.iris.versions.2.source", "missing"),
        ("models: {a: {versions: {1.10: {source: x}}}}", "models.a.versions.1.10", "not a version"),
        ("models: {a: {versions: {01: {source: x}}}}", "models.a.versions.01", "not a version"),
        ("models: {a: {versions: {1: {source: x}, '1': {source: y}}}}", "models.a.versions.1", "twice"),
        ("models: {a: {versions: {1: x}}}", "models.a.versions.1", "text, where a mapping is expected"),
        ("models: {a: {versions: {1: {source: [x]}}}}", "models.a.versions.1.source", "a list, where text"),
        (
            "models: {a: {versions: {1: {source: x, digest: md5:1}}}}",
            "models.a.versions.1.digest",
            "not a digest",
        ),
        ("models: {a: {versions: {1: {source: x, tags: {a: [1]}}}}}", "models.a.versions.1.tags.a", "a list"),
        ("models: {a: {aliases: {latest: 1}}}", "models.a.aliases.latest", "reserved"),
        ("models: {a: {aliases: {a b: 1}}}", "models.a.aliases.a b", "not an alias"),
        ("models: {a: {aliases: {c: }}}", "models.a.aliases.c", "points nowhere"),
        ("models: {a: {aliases: {c: 1.0}}}", "models.a.aliases.c", "not a version"),
        ("models: {a: {aliases: {c: {previous: 1}}}}", "models.a.aliases.c.version", "missing"),
        (
            "models: {a: {aliases: {c: {version: 1, previous: [1, x]}}}}",
            "models.a.aliases.c.previous[1]",
            "not a version",
        ),
        (
            "models: {a: {aliases: {c: {version: 1, forced: yes}}}}",
            "models.a.aliases.c.forced",
            "true or false",
        ),
        ("models: {a: {rollout: direct}}", "models.a.rollout", "text, where a mapping is expected"),
        ("models: {a: {}, a: {}}", "models.a", "twice"),
    ],
)
def test_every_problem_has_its_place(text: str, place: str, problem: str) -> None:
    found = problems(text)
    assert any(where == place and problem in what for where, what in found), found


def test_all_problems_are_told_at_once() -> None:
    found = problems("""
version: 3
models:
  a: {versions: {1: {sourc: x}}, aliases: {latest: 1}}
  a/b: {}
  c: {versions: {1: {source: x}, 1: {source: y}}}
""")
    assert {place for place, _ in found} == {
        "version", "models.a.versions.1.sourc", "models.a.versions.1.source", "models.a.aliases.latest",
        "models.a/b", "models.c.versions.1",
    }  # fmt: skip


def test_json_problems_have_places_too() -> None:
    assert problems('{"models": {"a": {}, "a": {}}}', "json") == [("models.a", "is given twice")]
    assert problems('{"models": ', "json")[0][0] == "line 1, column 12"
    assert problems("[" * 100_000, "json")[0][1] == "nested too deep"
    assert problems(" ", "json")[0][1].startswith("it is empty: write {")


def test_a_file_that_is_not_text() -> None:
    with pytest.raises(RegistryInvalid, match="not UTF-8, at byte 2"):
        parse(b"a:\xff", "yaml", target="registry.yaml", base="/srv")


@pytest.mark.parametrize(
    ("source", "base", "expected"),
    [
        ("models/a/1", "/srv", "/srv/models/a/1"),
        ("../a", "/srv/x", "/srv/a"),
        ("/a/b", "/srv", "/a/b"),
        ("s3://b/c", "/srv", "s3://b/c"),
        ("file:///a", "/srv", "file:///a"),
        ("models/a", "https://host/team/", "https://host/team/models/a"),
    ],
)
def test_sources_begin_where_the_document_lies(source: str, base: str, expected: str) -> None:
    assert located(source, base) == expected


def test_an_alias_is_written_as_briefly_as_it_can_be() -> None:
    assert Alias("1").to_json() == "1"
    assert Alias("2", ("1",)).to_json() == {"version": "2", "previous": "1"}
    assert Alias("3", ("2", "1"), "1", True).to_json() == {
        "version": "3", "previous": ["2", "1"], "last_good": "1", "forced": True,
    }  # fmt: skip


keys = st.sampled_from(
    [
        "version",
        "models",
        "versions",
        "aliases",
        "rollout",
        "source",
        "digest",
        "tags",
        "previous",
        "1",
        "x-a",
        "a/b",
    ]
) | st.text(max_size=3)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(keys, below, max_size=4),
    max_leaves=25,
)


def problems_of(content: bytes, form: Literal["yaml", "json"]) -> list[tuple[str, str]] | None:
    """None for a valid document."""
    try:
        parse(content, form, target="t", base="/")
    except RegistryInvalid as error:
        return error.problems
    return None


@given(st.binary(max_size=60), st.sampled_from(["yaml", "json"]))
def test_no_bytes_raise_anything_else(content: bytes, form: Any) -> None:
    assert problems_of(content, form) != []


@given(anything)
def test_no_document_raises_anything_else(value: Any) -> None:
    document = {"models": {"a": value, "b": {"versions": value, "aliases": value}}}
    assert problems_of(json.dumps(document).encode(), "json") != []
