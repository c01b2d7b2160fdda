"""What every registry does, whatever it is made of. One maker for each entry of the plugin table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.artifacts.cache import Artifacts
from gateway.names import Reference, parse_reference
from gateway.registries import REGISTRIES, default_target, open_registry
from gateway.registries.base import (
    Alias,
    Model,
    Move,
    NotInRegistry,
    Observation,
    PreconditionFailed,
    Registry,
    RegistryError,
    RegistryUnavailable,
    Snapshot,
    Verdict,
    Version,
)
from gateway.registries.resolution import resolve
from loaders.package import digest


def in_a_file(request: pytest.FixtureRequest, directory: Path) -> str:
    return str(directory / "registry.yaml")


def at_a_server(request: pytest.FixtureRequest, directory: Path) -> str:
    server = request.getfixturevalue("mlflow_server")
    for name in ("iris", "other"):
        server.remove(name)
    url: str = server.url
    return url


MAKERS: dict[str, Callable[[pytest.FixtureRequest, Path], str]] = {"file": in_a_file, "mlflow": at_a_server}
"""A plugin's name → the target of an empty registry."""
NOWHERE = {"file": "/nowhere/registry.yaml", "mlflow": "http://127.0.0.1:1"}
READ_ONLY = {"remote"}
KINDS = [pytest.param(kind, marks=[pytest.mark.all] * (kind == "mlflow")) for kind in sorted(MAKERS)]


@pytest.fixture(params=KINDS)
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    opened = open_registry(MAKERS[request.param](request, tmp_path), create=True)
    yield opened
    opened.close()


@pytest.fixture
def packages(tmp_path: Path) -> list[str]:
    made = []
    for content in ("one", "two", "three"):
        directory = tmp_path / content
        directory.mkdir()
        (directory / "MLmodel").write_text(f"flavors: {{python_function: {{loader_module: {content}}}}}\n")
        made.append(str(directory))
    return made


def test_each_plugin_has_a_maker() -> None:
    assert MAKERS.keys() | READ_ONLY == REGISTRIES.keys()


@pytest.mark.parametrize("kind", sorted(NOWHERE))
def test_nothing_there_is_unavailable(kind: str) -> None:
    with pytest.raises(RegistryUnavailable):
        open_registry(NOWHERE[kind]).read()


def test_it_says_what_it_is(registry: Registry) -> None:
    assert registry.identity
    assert registry.target
    assert registry.poll_interval > 0


def test_versions_count_up_and_are_found_again(
    registry: Registry, packages: list[str], tmp_path: Path
) -> None:
    added = [registry.add_version("iris", package, digest(package)) for package in packages]
    assert [version.version for version in added] == ["1", "2", "3"]
    assert dict(registry.read().models["iris"].versions) == {version.version: version for version in added}
    cache = Artifacts(tmp_path / "cache", 10**9)
    assert all(version.digest == digest(cache.fetch(version).path) for version in added)
    assert registry.writable


def test_equal_content_is_one_version(registry: Registry, packages: list[str]) -> None:
    first = registry.add_version("iris", packages[0], digest(packages[0]), tags={"a": "b"})
    assert registry.add_version("iris", packages[0], digest(packages[0])) == first
    assert registry.add_version("other", packages[0], digest(packages[0])).version == "1"
    assert registry.read().models["iris"].versions["1"].tags.items() >= {("a", "b")}


def test_the_stamp_changes_with_the_content_and_only_then(registry: Registry, packages: list[str]) -> None:
    registry.add_version("iris", packages[0], digest(packages[0]), alias="champion")
    first = registry.read()
    assert registry.read().stamp == first.stamp
    registry.add_version("iris", packages[1], digest(packages[1]))
    assert registry.read().stamp != first.stamp


def test_an_alias_moves_back_and_goes(registry: Registry, packages: list[str]) -> None:
    for package in packages:
        registry.add_version("iris", package, digest(package))

    def stands() -> Alias | None:
        return registry.read().models["iris"].aliases.get("champion")

    registry.move(Move("iris", "champion", "1", expect=None))
    assert stands() == Alias("1")
    registry.move(Move("iris", "champion", "2", expect="1", forced=True))
    assert stands() == Alias("2", ("1",), forced=True)
    registry.move(Move("iris", "champion", "3"))
    assert stands() == Alias("3", ("2", "1"))
    registry.move(Move("iris", "champion", "1", back=True))
    assert stands() == Alias("1", back=True)  # every gateway must know that it goes back
    registry.move(Move("iris", "champion", "3"))
    assert stands() == Alias("3", ("1",))
    registry.move(Move("iris", "champion", "2", serving="1"))  # 3 was superseded while it was tried
    assert stands() == Alias("2", ("1",), last_good="1")
    assert "champion" not in registry.delete_alias("iris", "champion").models["iris"].aliases


def test_a_write_answers_with_the_new_content(registry: Registry, packages: list[str]) -> None:
    registry.add_version("iris", packages[0], digest(packages[0]))
    assert registry.move(Move("iris", "champion", "1")) == registry.read()


def test_preconditions_hold(registry: Registry, packages: list[str]) -> None:
    registry.add_version("iris", packages[0], digest(packages[0]), alias="champion")
    registry.add_version("iris", packages[1], digest(packages[1]))
    for conditions in ({"expect": "2"}, {"expect": None}):
        with pytest.raises(PreconditionFailed) as error:
            registry.move(Move("iris", "champion", "2", **conditions))  # type: ignore[arg-type]
        assert error.value.actual == "1"
    assert registry.read().models["iris"].aliases["champion"] == Alias("1")


def test_a_version_that_was_only_tried_does_not_become_a_previous_one(
    registry: Registry, packages: list[str]
) -> None:
    for package in packages:
        registry.add_version("iris", package, digest(package))
    for number in "12":
        registry.move(Move("iris", "champion", number))
    registry.record(Observation("iris", "champion", "2", "1"))  # a gateway tries 2, and 1 serves
    moved = registry.move(Move("iris", "champion", "3")).models["iris"].aliases["champion"]
    assert (moved.previous, moved.served) == (("1",), "1")


def test_what_is_not_there_is_said(registry: Registry, packages: list[str]) -> None:
    registry.add_version("iris", packages[0], digest(packages[0]))
    for name, version, code in (("no", "1", "MODEL_NOT_FOUND"), ("iris", "9", "VERSION_NOT_FOUND")):
        with pytest.raises(NotInRegistry) as error:
            registry.move(Move(name, "champion", version))
        assert error.value.code == code
    with pytest.raises(NotInRegistry) as error:
        registry.delete_alias("iris", "champion")
    assert error.value.code == "ALIAS_NOT_FOUND"


# -- which registry is meant


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("s3://bucket/registry", "is not a registry"),
        ("nothing://x/registry.yaml", "cannot be read here"),
        ("sqlite:///mlflow.db", "is not a registry"),
        ("databricks", "not supported"),
        ("databricks://profile", "not supported"),
        ("databricks-uc", "not supported"),
        ("mlflow+http://", "is not an MLflow server"),
    ],
)
def test_what_cannot_be_opened_is_said(target: str, complaint: str) -> None:
    with pytest.raises(RegistryError, match=complaint):
        open_registry(target)


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("https://host/x", "MLflowRegistry"),
        ("http://user:secret@host:5000", "MLflowRegistry"),
        ("mlflow+https://host/registry.yaml", "MLflowRegistry"),
        ("https://host/registry.yaml", "RemoteRegistry"),
        ("http://host/a/registry.JSON?x=y", "RemoteRegistry"),
        ("memory://bucket/registry.yml", "RemoteRegistry"),
        ("file:///registry.yaml", "FileRegistry"),
        ("a:b.yaml", "FileRegistry"),
    ],
)
def test_the_form_of_a_target_says_what_it_is(target: str, kind: str) -> None:
    opened = open_registry(target)
    assert type(opened).__name__ == kind
    assert "secret" not in opened.target + opened.identity


def test_the_default_target_has_an_order(tmp_path: Path) -> None:
    environ = {"GATEWAY_REGISTRY": "b", "MLFLOW_REGISTRY_URI": "c", "MLFLOW_TRACKING_URI": "d"}
    (tmp_path / "registry.yaml").touch()
    expected = ["a", "b", "c", "d", str(tmp_path / "registry.yaml")]
    assert default_target(environ, "a", tmp_path) == expected[0]
    for i, name in enumerate(list(environ), 1):
        assert default_target(environ, None, tmp_path) == expected[i]
        environ[name] = ""
    assert default_target(environ, None, tmp_path) == expected[4]
    (tmp_path / "registry.yaml").unlink()
    with pytest.raises(RegistryError) as error:
        default_target({}, None, tmp_path)
    for name in ("--registry", *environ, "./registry.yaml"):
        assert name in str(error.value)


# -- what a reference means


def snapshot() -> Snapshot:
    versions = {str(i): Version("iris", str(i), f"/{i}") for i in (1, 2, 10)}
    aliases = {"champion": Alias("2"), "broken": Alias("7")}
    unnamed = Model("unnamed", {"2": Version("unnamed", "2", "/2")}, {})
    models = {"iris": Model("iris", versions, aliases), "empty": Model("empty", {}, {}), "unnamed": unnamed}
    return Snapshot(models, "s")


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("models:/iris", "2"),
        ("models:/iris@champion", "2"),
        ("models:/iris/1", "1"),
        ("models:/iris/latest", "10"),
    ],
)
def test_a_reference_means_a_version(text: str, version: str) -> None:
    assert resolve(snapshot(), parse_reference(text)).version == version


def test_default_aliases_fall_through() -> None:
    assert resolve(snapshot(), parse_reference("models:/iris"), ["nobody", "champion"]).version == "2"


@pytest.mark.parametrize(
    ("text", "code", "hint"),
    [
        ("models:/irsi", "MODEL_NOT_FOUND", "did you mean iris?"),
        ("models:/zebra", "MODEL_NOT_FOUND", None),
        ("models:/iris/3", "VERSION_NOT_FOUND", "versions of iris: 10, 2, 1"),
        ("models:/iris@nobody", "ALIAS_NOT_FOUND", "aliases of iris: broken, champion"),
        ("models:/iris@broken", "VERSION_NOT_FOUND", "versions of iris: 10, 2, 1"),
        ("models:/empty", "ALIAS_NOT_FOUND", "aliases of empty: none"),
        (
            "models:/unnamed@champion",
            "ALIAS_NOT_FOUND",
            "aliases of unnamed: none; name a version, such as unnamed/versions/2, or set one: "
            "`gateway promote unnamed@champion 2`",
        ),
        ("models:/empty/latest", "VERSION_NOT_FOUND", None),
    ],
)
def test_what_a_reference_does_not_find(text: str, code: str, hint: str | None) -> None:
    with pytest.raises(NotInRegistry) as error:
        resolve(snapshot(), parse_reference(text))
    assert (error.value.code, error.value.hint) == (code, hint)


def test_a_finding_is_there_for_every_reader_until_the_alias_moves(
    registry: Registry, packages: list[str]
) -> None:
    for package in packages[:2]:
        registry.add_version("iris", package, digest(package))
    registry.move(Move("iris", "champion", "2"))
    verdict = Verdict("2", "refused", "its outputs are tensors now", "2026-11-29T10:00:00Z")
    told = registry.record(Observation("iris", "champion", "2", "1", verdict))
    assert told is not None
    seen = registry.find(Reference("iris", alias="champion")).models["iris"].aliases["champion"]
    assert (seen.refused, seen.last_good) == (verdict, "1")
    registry.record(Observation("iris", "champion", "1", "2"))  # it does not point there
    assert registry.find(Reference("iris")).models["iris"].aliases["champion"] == seen
    moved = registry.move(Move("iris", "champion", "1")).models["iris"].aliases["champion"]
    assert (moved.refused, moved.previous) == (None, ())
