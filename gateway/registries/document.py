"""The registry document: from the text of a YAML or JSON file to models, versions and aliases.

Shared by every registry that reads such a document, wherever it lies. Reports every problem with its
place. Knows no file system: `base` is where relative sources begin, a directory or a URL.
"""

from __future__ import annotations

import difflib
import json
import os.path
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from gateway import yamltext
from gateway.names import InvalidReference, check_alias, check_name, check_version
from gateway.registries.base import MAX_PREVIOUS, Alias, Model, RegistryInvalid, Version

Form = Literal["yaml", "json"]

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def parse(content: bytes, form: Form, *, target: str, base: str) -> dict[str, Model]:
    """The models of a document. Raises RegistryInvalid with all its problems.

    An alias that points to a version which is not there is no problem of the document: whoever serves it
    keeps what it has and says so.
    """
    problems: list[tuple[str, str]] = []
    try:
        text = content.decode("utf-8-sig")
        value = _json(text, problems) if form == "json" else _yaml(text, problems)
    except UnicodeDecodeError as error:
        raise RegistryInvalid(target, [("", f"not UTF-8, at byte {error.start}")]) from None
    except yamltext.InvalidText as error:
        raise RegistryInvalid(target, error.problems) from None
    models = _Reader(problems, base).models(value)
    if problems:
        raise RegistryInvalid(target, problems)
    return models


def _yaml(text: str, problems: list[tuple[str, str]]) -> Any:
    return yamltext.data(yamltext.parse(text), typed=False, problems=problems)


def _json(text: str, problems: list[tuple[str, str]]) -> Any:
    """JSON with every scalar as its text, null as None."""
    if not text.strip():
        raise yamltext.InvalidText([("", "it is empty")])

    def plain(value: Any, place: str) -> Any:
        if isinstance(value, _Pairs):
            mapping: dict[str, Any] = {}
            for key, item in value:
                below = f"{place}.{key}" if place else key
                if key in mapping:
                    problems.append((below, "comes twice"))
                mapping[key] = plain(item, below)
            return mapping
        if isinstance(value, list):
            return [plain(item, f"{place}[{i}]") for i, item in enumerate(value)]
        return str(value).lower() if isinstance(value, bool) else value

    try:
        value = plain(
            json.loads(text, object_pairs_hook=_Pairs, parse_int=str, parse_float=str, parse_constant=str), ""
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise yamltext.InvalidText([(place, f"not JSON: {error.msg}")]) from None
    except RecursionError:
        raise yamltext.InvalidText([("", "nested too deep")]) from None
    return value


class _Pairs(list[tuple[str, Any]]):
    """A JSON object before its keys were looked at."""


class _Reader:
    """Reads one document; what is wrong goes to `problems`, and reading goes on."""

    def __init__(self, problems: list[tuple[str, str]], base: str) -> None:
        self._problems = problems
        self._base = base

    def models(self, document: Any) -> dict[str, Model]:
        top = self._mapping(document, "", ("version", "models"))
        if (version := top.get("version")) not in (None, "1"):
            self._problem("version", f"{_shown(version)}: this gateway reads version 1")
        models: dict[str, Model] = {}
        for name, value in self._mapping(top.get("models"), "models", None).items():
            place = f"models.{name}"
            if self._named(check_name, name, place):
                models[name] = self._model(name, value, place)
        return models

    def _model(self, name: str, value: Any, place: str) -> Model:
        entry = self._mapping(value, place, ("versions", "aliases", "rollout"))
        versions: dict[str, Version] = {}
        for key, item in self._mapping(entry.get("versions"), f"{place}.versions", None).items():
            if not key.startswith("x-") and self._named(check_version, key, f"{place}.versions.{key}"):
                version = self._version(name, key, item, f"{place}.versions.{key}")
                if version is not None:
                    versions[key] = version
        aliases: dict[str, Alias] = {}
        for key, item in self._mapping(entry.get("aliases"), f"{place}.aliases", None).items():
            if self._named(check_alias, key, f"{place}.aliases.{key}"):
                alias = self._alias(item, f"{place}.aliases.{key}")
                if alias is not None:
                    aliases[key] = alias
        rollout = entry.get("rollout")
        if rollout is not None and not isinstance(rollout, dict):
            self._problem(f"{place}.rollout", f"{_kind(rollout)}, where a mapping belongs")
            rollout = None
        return Model(name, versions, aliases, rollout or {})

    def _version(self, name: str, version: str, value: Any, place: str) -> Version | None:
        entry = self._mapping(value, place, ("source", "digest", "created", "tags"))
        source = self._text(entry.get("source"), f"{place}.source")
        digest = self._text(entry.get("digest"), f"{place}.digest")
        created = self._text(entry.get("created"), f"{place}.created")
        tags: dict[str, str] = {}
        for key, item in self._mapping(entry.get("tags"), f"{place}.tags", None).items():
            tags[key] = "" if item is None else self._text(item, f"{place}.tags.{key}") or ""
        if digest is not None and not _DIGEST.match(digest):
            problem = f"{_shown(digest)} is no digest: sha256: and 64 lower-case hex digits"
            self._problem(f"{place}.digest", problem)
        if not source:
            if entry.get("source") in (None, "") and isinstance(value, dict | None):
                self._problem(f"{place}.source", "missing; write where the model directory is")
            return None
        if "\0" in source:
            self._problem(f"{place}.source", "holds a null character")
            return None
        return Version(name, version, located(source, self._base), digest, created, tags)

    def _alias(self, value: Any, place: str) -> Alias | None:
        if not isinstance(value, dict):
            version = self._text(value, place, missing="points nowhere; write a version")
            if version is None or not self._named(check_version, version, place):
                return None
            return Alias(version)
        entry = self._mapping(value, place, ("version", "previous", "last_good", "forced"))
        version = self._text(entry.get("version"), f"{place}.version", missing="missing; write a version")
        previous = entry.get("previous")
        listed = previous if isinstance(previous, list) else [] if previous is None else [previous]
        earlier: list[str] = []
        for i, item in enumerate(listed):
            where = f"{place}.previous[{i}]" if isinstance(previous, list) else f"{place}.previous"
            text = self._text(item, where, missing="names no version")
            if text is not None and self._named(check_version, text, where):
                earlier.append(text)
        last_good = self._text(entry.get("last_good"), f"{place}.last_good")
        if last_good is not None:
            self._named(check_version, last_good, f"{place}.last_good")
        forced = entry.get("forced")
        if forced not in (None, "true", "false"):
            self._problem(f"{place}.forced", f"{_shown(forced)}: write true or false")
        if version is None or not self._named(check_version, version, f"{place}.version"):
            return None
        return Alias(version, tuple(earlier[:MAX_PREVIOUS]), last_good, forced == "true")

    def _mapping(self, value: Any, place: str, known: tuple[str, ...] | None) -> dict[str, Any]:
        """The entries of a mapping. With `known`: without its `x-` keys, and a problem for each other key
        that is not known. Without: the keys are the user's names."""
        if value is None:
            return {}
        if not isinstance(value, dict):
            self._problem(place, f"{_kind(value)}, where a mapping belongs")
            return {}
        if known is None:
            return value
        for key in value:
            if key not in known and not key.startswith("x-"):
                self._problem(f"{place}.{key}" if place else key, unknown_key(key, known))
        return {key: item for key, item in value.items() if key in known}

    def _text(self, value: Any, place: str, *, missing: str | None = None) -> str | None:
        if isinstance(value, str):
            return value
        if value is not None:
            self._problem(place, f"{_kind(value)}, where text belongs")
        elif missing is not None:
            self._problem(place, missing)
        return None

    def _named(self, check: Callable[[str], str], text: str, place: str) -> bool:
        try:
            check(text)
        except InvalidReference as error:
            self._problem(place, str(error))
            return False
        return True

    def _problem(self, place: str, problem: str) -> None:
        self._problems.append((place, problem))


def unknown_key(key: str, known: tuple[str, ...]) -> str:
    """What to say of a key that is not known here."""
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        return f"unknown key, did you mean {near[0]}?"
    return f"unknown key; known here: {', '.join(known)}"


def located(source: str, base: str) -> str:
    """A source as an absolute path or a URI; a relative one begins at `base`, a directory or a URL."""
    if _URI.match(source):
        return source
    if _URI.match(base):
        return source if os.path.isabs(source) else f"{base.rstrip('/')}/{source}"
    return os.path.normpath(os.path.join(base, source))


def alias_value(alias: Alias) -> str | dict[str, Any]:
    """An alias as it stands in a document: the version alone where there is nothing else to say."""
    value: dict[str, Any] = {"version": alias.version}
    if alias.previous:
        value["previous"] = alias.previous[0] if len(alias.previous) == 1 else list(alias.previous)
    if alias.last_good is not None:
        value["last_good"] = alias.last_good
    if alias.forced:
        value["forced"] = True
    return alias.version if len(value) == 1 else value


def dump(models: Iterable[Model]) -> bytes:
    """A document that says the same, in JSON. Credentials in the URL of a source stay here."""
    content = {"version": 1, "models": {model.name: _entry(model) for model in models}}
    return json.dumps(content, ensure_ascii=False).encode()


def _entry(model: Model) -> dict[str, Any]:
    versions = {}
    for number, version in model.versions.items():
        facts: dict[str, Any] = {
            "source": re.sub(r"(://)[^/@]*@", r"\1", version.source),
            "digest": version.digest,
        }
        facts |= {"created": version.created, "tags": dict(version.tags) or None}
        versions[number] = {name: fact for name, fact in facts.items() if fact is not None}
    aliases = {alias: alias_value(entry) for alias, entry in model.aliases.items()}
    entry: dict[str, Any] = {"versions": versions, "aliases": aliases}
    return entry | ({"rollout": dict(model.rollout)} if model.rollout else {})


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else _kind(value)
    return repr(text if len(text) <= 80 else text[:77] + "...") if isinstance(value, str) else text


def _kind(value: Any) -> str:
    kinds: Mapping[type, str] = {dict: "a mapping", list: "a list", str: "text", bool: "true or false"}
    return kinds.get(type(value), "nothing" if value is None else "a value")
