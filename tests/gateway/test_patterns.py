"""Which references a pattern covers: the rule of the README as a table."""

from __future__ import annotations

import pytest

from gateway.names import Reference, parse_reference, parse_short
from gateway.patterns import InvalidPattern, Patterns, parse

BARE = "iris"
CHAMPION = "iris@champion"
CHALLENGER = "iris@challenger"
TWO = "iris/2"
THREE = "iris/3"
LATEST = "iris/latest"
OTHER = "wine"
ALL = {BARE, CHAMPION, CHALLENGER, TWO, THREE, LATEST, OTHER}
OF_IRIS = ALL - {OTHER}


@pytest.mark.parametrize(
    ("pattern", "covered"),
    [
        ("iris", OF_IRIS),
        ("models:/iris", OF_IRIS),
        ("ir*", OF_IRIS),
        ("i[r]?s", OF_IRIS),
        ("*", ALL),
        ("Iris", set()),
        ("iri", set()),
        ("iris@champion", {BARE, CHAMPION}),
        ("iris@challenger", {CHALLENGER}),
        ("iris@ch*", {BARE, CHAMPION, CHALLENGER}),
        ("*@champion", {BARE, CHAMPION, OTHER}),
        ("*@*", {BARE, CHAMPION, CHALLENGER, OTHER}),
        ("iris/2", {TWO}),
        ("iris/versions/2", {TWO}),
        ("models:/iris/2", {TWO}),
        ("iris/latest", {LATEST}),
        ("iris/*", {TWO, THREE, LATEST}),
        ("*/*", {TWO, THREE, LATEST}),
    ],
)
def test_what_a_pattern_covers(pattern: str, covered: set[str]) -> None:
    patterns = Patterns([pattern], ["champion"])
    for _ in range(2):  # the second time from memory
        assert {text for text in ALL if patterns.covers(parse_short(text))} == covered
    assert patterns.touches("iris") == bool(covered & OF_IRIS)


@pytest.mark.parametrize(
    ("default_alias", "bare"),
    [(["champion"], True), (["champion", "prod"], False), (["prod"], False), ([], False)],
)
def test_a_bare_name_needs_every_alias_that_it_may_mean(default_alias: list[str], bare: bool) -> None:
    assert Patterns(["iris@champion"], default_alias).covers(Reference("iris")) == bare
    assert Patterns(["iris@*"], default_alias).covers(Reference("iris")) == bool(default_alias)


@pytest.mark.parametrize(
    ("pattern", "whole"),
    [
        ("iris", True), ("ir*", True), ("*", True), ("wine", False), ("iris@champion", False),
        ("iris@*", False), ("iris/2", False), ("iris/*", False),
    ],
)  # fmt: skip
def test_a_whole_model_needs_a_pattern_of_its_name_alone(pattern: str, whole: bool) -> None:
    assert Patterns([pattern], ["champion"]).covers_model("iris") == whole
    assert Patterns(["wine@champion", pattern], ["champion"]).covers_model("iris") == whole


@pytest.mark.parametrize("text", ["iris/versions/2", "models:/iris/versions/2", "iris/2"])
def test_the_form_of_a_path_is_a_reference(text: str) -> None:
    assert parse_short(text) == Reference("iris", version="2")


@pytest.mark.parametrize("text", ["models:/m-" + "0" * 32, "runs:/abc/model"])
def test_a_reference_without_a_name_needs_the_pattern_for_all(text: str) -> None:
    reference = parse_reference(text)
    assert not Patterns(["*@*", "*/*", "?*"], ["champion"]).covers(reference)
    assert Patterns(["iris", "*"]).covers(reference)


def test_names_compare_character_by_character() -> None:
    composed, apart = "caf\u00e9", "cafe\u0301"
    assert Patterns([composed]).covers(Reference(composed))
    assert not Patterns([composed]).covers(Reference(apart))
    assert not Patterns(["iris"]).covers(Reference("iris\u200b"))
    assert Patterns(["a?b"]).covers(Reference("a@b"))
    assert not Patterns([]).covers(Reference("iris"))


def test_what_is_remembered_is_bounded() -> None:
    patterns = Patterns(["iris"])
    for number in range(3000):
        assert not patterns.covers(Reference(f"name-{number}"))
    assert len(patterns._decided) <= 1024


@pytest.mark.parametrize(
    "text", ["", "@champion", "/2", "iris/", "iris/two", "iris/0", "a:b", "a\nb", "iris@a.b", "x/y/2"]
)
def test_what_is_not_a_pattern_is_refused(text: str) -> None:
    with pytest.raises(InvalidPattern):
        parse(text)
