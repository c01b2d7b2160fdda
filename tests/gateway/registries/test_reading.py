"""A document read again and again, and edited in place: what that may never change, and what it costs."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway import yamltext
from gateway.registries import file as file_registry
from gateway.registries import yamledit
from gateway.registries.base import Entries, Model, RegistryInvalid
from gateway.registries.document import Form, Reader, _changed_whole, _Checker
from gateway.registries.file import FileRegistry
from gateway.registries.listed import Subset

BASE = "/srv"
LINES = [
    "models:", "  a: {versions: {1: {source: x}}, aliases: {c: 1}}", "  b:", "    versions:",
    "      1: {source: y}", "    aliases: {c: 1}  # live", "  'q': {}",
    "  \"d\": {versions: {1: {source: \"x", "  z\"}}}", "z\"}}}", "# c", "  # c", "      # c", "", "  - a",
    "  ? a", "  : {}", "    x-t: |", "     text", "  text", "    text", "version: 1", "x-a: {b: 1}", "x-b:",
    "---", "...", "%YAML 1.1", "  e: &x {}", "  f: *x", "    x-g: *x", "\t", "  \tg: {}",
    "  h: {versions: {1: {source: 'multi", "  line'}}}", " i: {}", "   j: {}", "    x-k: [1,", "  2]",
    "    3]", "  é: {}", "  }", "    x-b: >-", "  k: {}\r", "  l: {}\x85  m: {}", "  n: {}\u2028",
    "  o: {}\r  p: {}", "  <<: {}", "  .: {}", "  !!str r: {}", "  s : {}", "  t: {verions: 1}",
    "  u/v: {}", "  w: ~", "  x: {x-y: {", "    }}",
]  # fmt: skip


def read(content: bytes, form: Form, reader: Reader | None = None) -> Any:
    """The models, or what is wrong."""
    try:
        return dict((reader or Reader(form, "t")).read(content, BASE))
    except RegistryInvalid as error:
        return sorted(error.problems)


def read_whole(text: str) -> Any:
    """The same of YAML, through a tree."""
    problems: list[tuple[str, str]] = []
    try:
        value = yamltext.data(yamltext.parse(text), typed=False, problems=problems)
        entries = _Checker(problems, BASE).document(value)
    except yamltext.InvalidText as error:
        return sorted(error.problems)
    return sorted(problems) if problems else dict(Entries(entries))


@settings(deadline=None)
@example([""], [])
@example(["  ? a", "  : {}"], [])
@example(["  a: {versions: {1: {source: x", "  b: y}}}"], [])
@example(["  a: {versions: {1: {source: 'x", "  b: y'}}}"], [])
@example(["  a:", "  - b", "  c: {}"], [])
@example(["  a:", "    x-t: |", "     text", "  b: {}"], [])
@example(["  a: &x {}", "  b: *x"], [])
@example(["  a: {}", "...", "  b: {}"], [])
@example(["  a: {}", "---", "  b: {}"], [])
@example(["  l: {}\x85  m: {}", "  o: {}"], [])
@example(["  a: {}", " i: {}"], [])
@example(["  a: {}", "x-a: [1,", "  2]"], ["  b: {}"])
@given(st.lists(st.sampled_from(LINES), max_size=9), st.lists(st.sampled_from(LINES), max_size=9))
def test_the_fast_way_reads_as_the_slow_way_does(lines: list[str], others: list[str]) -> None:
    reader = Reader("yaml", "t")
    for text in ("\n".join([*start, *lines]) for start in (["models:"], [], ["models:", *others])):
        found, expected = read(text.encode(), "yaml", reader), read_whole(text)
        if isinstance(expected, list) and any(place.startswith("line") for place, _ in expected):
            assert isinstance(found, list)  # of several mistakes in its syntax, another may be said first
        elif expected == [("", "it is empty")]:
            assert found[0][1].startswith("it is empty: write models: {}")  # what a registry says in addition
        else:
            assert found == expected


@settings(deadline=None)
@given(st.text(st.sampled_from('{}[]",:ab1 \n-') | st.characters(codec="utf-8"), max_size=30))
def test_json_is_valid_if_the_library_accepts_it(text: str) -> None:
    found = read(text.encode(), "json")
    try:
        json.loads(text)
        valid = True
    except (json.JSONDecodeError, RecursionError):
        valid = False
    syntax = isinstance(found, list) and any("not JSON" in what or "empty" in what for _, what in found)
    assert valid is not syntax


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ('{"models": {"a": {} "b": {}}}', "line 1, column 21", "','"),
        ('{"models": {"a" {}}}', "line 1, column 17", "':'"),
        ('{"models": {\n"a": {},}}', "line 2, column 9", "property name"),
        ('{"models": {}} x', "line 1, column 16", "Extra data"),
        ('{"models": {"a": {"versions": {"1": {"source": ]}}}}}', "line 1, column 48", "Expecting value"),
        ('{"models": {}, "models": {}}', "models", "is given twice"),
        ('{"models": {"a": {"versions": {"1": {}, "1": {}}}}}', "models.a.versions.1", "is given twice"),
    ],
)
def test_errors_of_json_stand_where_they_are(text: str, place: str, problem: str) -> None:
    assert any(where == place and problem in what for where, what in read(text.encode(), "json"))


ENTRIES = [
    "{versions: {1: {source: a}, 2: {source: b}}, aliases: {champion: 1}}  # short\n",
    "\n    versions:  # long\n      1: {source: a}\n\n      # two\n      2: {source: b}\n    aliases:\n"
    "      champion: 1  # live\n",
    "\n    x-why: |\n      not this: 1\n    versions: {1: {source: a},\n      2: {source: 'b'}}\n"
    "    aliases: {}\n",
    '\r\n    aliases: {champion: {version: "2", previous: 1}}\r\n'
    "    versions: {1: {source: a}, 2: {source: b}}\r\n",
    "\n    versions:\n        '1':\n            source: a\n        2:\n            source: b\n",
    "\n    versions: {1: {source: a}, 2: {source: b}, 3: &x {source: c}}\n    x-d: *x\n",
]
HEADS = ["models:\n", "# of us\nversion: 1\nmodels: # all\n\n  # first\n", "\ufeffx-a: 1\nmodels:\r\n"]
TAILS = ["", "# end\n", "x-z: [1,\n2]\nx-y: 1\n"]
documents = st.builds(
    lambda head, entries, tail: head + "".join(f"  m{i}: {e}" for i, e in enumerate(entries)) + tail,
    st.sampled_from(HEADS),
    st.lists(st.sampled_from(ENTRIES), min_size=1, max_size=4),
    st.sampled_from(TAILS),
)
changes = st.sampled_from(
    [
        (("aliases", "champion"), "2"),
        (("aliases", "champion"), {"version": "2", "previous": ["1", "3"]}),
        (("aliases", "champion"), None),
        (("aliases", "new"), "1"),
        (("versions", "7"), {"source": "x y", "tags": {"a": "no"}}),
    ]
)


def edges(content: bytes, form: Form, name: str) -> tuple[bytes, bytes]:
    """The text before and after an existing model."""
    if form == "yaml":
        start = re.search(rb"(?m)^  %b:" % name.encode(), content)
        assert start is not None
        end = re.search(rb"(?m)^(?=  m\d:|# end|x-z)", content[start.end() :])
        return content[: start.start()], b"" if end is None else content[start.end() + end.start() :]
    text = content.decode()
    start = text.index(f'"{name}": ') + len(name) + 4
    end = json.JSONDecoder().raw_decode(text, start)[1]
    return text[:start].encode(), text[end:].encode()


def only_longer(before: bytes, after: bytes) -> bool:
    """Returns True if something was added and nothing removed."""
    start = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
    return after.endswith(before[start:])


@settings(deadline=None)
@given(
    documents,
    st.integers(0, 4),
    st.lists(changes, min_size=1, max_size=2),
    st.sampled_from([None, 1, 2, "\t"]),
)
def test_an_edit_means_the_same_as_a_rewrite_and_keeps_every_other_byte(
    text: str, number: int, wanted: list[Any], indent: Any
) -> None:
    whole = yamltext.data(yamltext.parse(text.removeprefix("\ufeff")), typed=False)
    name = f"m{number}"
    moves = [(("models", name, *path), value) for path, value in wanted]
    forms: list[tuple[Form, bytes]] = [
        ("yaml", text.encode()),
        ("json", json.dumps(whole, indent=indent).encode()),
    ]
    for form, content in forms:
        reader = Reader(form, "t")
        before = reader.read(content, BASE)
        new, kept = reader.changed(content, BASE, moves)
        after = reader.read(new, BASE)
        assert after == Reader(form, "t").read(_changed_whole(content, moves, form)[0], BASE)
        assert after == read_anew(before, whole, moves)
        if not kept or (form == "yaml" and "&x" in text):
            continue  # anchors: the whole text was looked at
        if form == "json":
            content += b"\n"  # a text ends with its last line
        if name not in before:
            assert only_longer(content, new)
            continue
        start, end = edges(content, form, name)
        assert new.startswith(start)
        assert new.endswith(end)


def read_anew(before: Mapping[str, Model], whole: Any, moves: list[Any]) -> dict[str, Model]:
    """Returns the document with the changes, made through plain data."""
    for path, value in moves:
        whole = yamledit.put(whole, path, yamledit._as_read(value))
    return dict(Reader("json", "t").read(json.dumps(whole).encode(), BASE))


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_what_did_not_change_is_not_made_again(form: Form) -> None:
    models = {f"m{i}": {"versions": {"1": {"source": "a"}}, "aliases": {"c": "1"}} for i in range(50)}
    text = json.dumps({"models": models}) if form == "json" else yamledit.block({"models": models})
    reader = Reader(form, "t")
    before = reader.read(text.encode(), BASE)
    first = before["m1"]
    second = before["m2"]
    after = reader.read(text.replace("a", "b").replace("b", "a", 10_000).encode(), BASE)
    assert all(after.content[name] is before.content[name] for name in before)
    models["m2"]["aliases"]["c"] = "2"
    text = json.dumps({"models": models}) if form == "json" else yamledit.block({"models": models})
    last = reader.read(text.encode(), BASE)
    assert [name for name in before if last.content[name] is not before.content[name]] == ["m2"]
    assert last["m1"] is first
    assert last["m2"] != second
    assert last["m2"].aliases["c"].version == "2"
    moved = reader.read(text.encode(), "/elsewhere")
    assert moved["m1"].versions["1"].source == "/elsewhere/a"


def test_a_large_registry_makes_no_models_that_are_not_requested() -> None:
    content = {f"m{i}": b'{"versions":{},"aliases":{}}' for i in range(25_000)}
    entries = Entries(content)
    assert len(entries) == sum(1 for model in entries.values() if model.aliases == {})
    assert len(entries._made) <= 10_000
    assert "m7" in entries
    assert "x" not in entries
    assert entries.get("x") is None


def bytes_read() -> int:
    """By this process, so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_poll_without_a_change_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "registry.yaml"
    path.write_text("models: {a: {}}\n" + "#" * 1_000_000)
    clock = Clock()
    registry = FileRegistry(str(path), clock=clock)

    def cost() -> int:
        before = bytes_read()
        registry.read()
        return bytes_read() - before

    cost()
    assert cost() > 1_000_000, "a file that was written just now may be written once more at the same time"
    monkeypatch.setattr(file_registry, "TRUSTED_SECONDS", 0.0)
    cost()
    assert cost() < 100_000
    clock.now += file_registry.REREAD_SECONDS + 1
    assert cost() > 1_000_000, "no file system is trusted for ever"
    assert cost() < 100_000
    with path.open("r+") as file:
        file.write("models: {b: {}}")
    assert set(registry.read().models) == {"b"}
    path.rename(tmp_path / "other")
    (tmp_path / "other").rename(path)
    assert set(registry.read().models) == {"b"}


def test_what_is_not_valid_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "registry.yaml"
    path.write_text("models: {a: {verions: {}}}\n")
    registry = FileRegistry(str(path))
    with pytest.raises(RegistryInvalid) as first:
        registry.read()
    with pytest.raises(RegistryInvalid) as second:
        registry.read()
    assert second.value.problems is first.value.problems
    path.write_text("models: {a: {}}\n")
    assert set(registry.read().models) == {"a"}


def test_a_subset_makes_no_models_of_the_others() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "registry.yaml")
        path.write_text(yamledit.block({"models": {f"m{i}": {"aliases": {"c": "1"}} for i in range(100)}}))
        registry = FileRegistry(str(path))
        some = Subset(registry, ["m1", "m7", "absent"]).read()
        assert set(some.models) == {"m1", "m7"}
        whole = registry.read()
        assert isinstance(whole.models, Entries)
        assert set(whole.models._made) == {"m1", "m7"}
        assert some.stamp != whole.stamp
