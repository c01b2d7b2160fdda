"""The registry document: from the text of a YAML or JSON file to models, versions and aliases.

Every registry that reads such a document uses this module. It reports every problem with its place. Must not
know a file system: `base` is the base of relative sources, a directory or a URL.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os.path
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal

import orjson

from gateway import yamltext
from gateway.names import InvalidReference, check_alias, check_name, check_version, did_you_mean
from gateway.registries import jsontext, yamledit
from gateway.registries.base import (
    BACK,
    MAX_PREVIOUS,
    Alias,
    Entries,
    Model,
    RegistryInvalid,
    Verdict,
    Version,
)
from loaders.spelling import counted

Form = Literal["yaml", "json"]
#: A path in a document (`models`, a name, and so on), and its new value; None: removed.
Change = tuple[Sequence[str], Any]

_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?\Z")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_EMPTY: Final[Mapping[Form, str]] = {"yaml": "models: {}", "json": '{"models": {}}'}
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def parse(content: bytes, form: Form, *, target: str, base: str) -> Mapping[str, Model]:
    """The models of a document. Raises RegistryInvalid with all its problems."""
    return Reader(form, target).read(content, base)


def _is_cut(text: bytes, before: bytes) -> bool:
    """Whether a text is the one before up to the middle of a line. YAML cut there may still be valid, with
    half a source. A person who deletes the last lines leaves whole ones. An empty text is refused as such."""
    whole = not text or len(text) >= len(before) or not before.endswith(b"\n")
    around = before[len(text) - 1 : len(text) + 1]
    return not whole and b"\n" not in around and before.startswith(text)


class Reader:
    """Reads a document again and again, in JSON without parsing again what did not change since. Not for two
    threads at once. `target` is what the document is called in errors.

    Meant for a thread next to the event loop's: no single step of it is long, because each model is checked
    and written to its entry as soon as it is read.
    """

    def __init__(self, form: Form, target: str) -> None:
        self._form = form
        self._target = target
        self._base: str | None = None
        self._entries = Entries({})
        #: YAML: the last valid text.
        self._text = b""
        #: JSON: by name, the length and the digest of the text of its value, and its entry.
        self._values: dict[str, tuple[int, bytes, bytes]] = {}

    def read(self, content: bytes, base: str) -> Entries:
        """The models, with relative sources at `base`. Raises RegistryInvalid with all problems.

        An alias that points to a missing version does not make the document invalid: the gateway keeps
        serving what it has and reports it. A document that had models until now is invalid without any,
        unless it says `models: {}`: it may have been cut. So is a YAML text that is the last one up to the
        middle of a line.
        """
        if base != self._base:
            self._values, self._base = {}, base
        problems: list[tuple[str, str]] = []
        checker = _Checker(problems, base)
        if self._form == "yaml" and _is_cut(content, self._text):
            line = content.count(b"\n") + 1
            problem = "it ends in the middle of this line, and the rest is as before: it may have been cut"
            problem += "; if it is whole, end it with a line break"
            raise RegistryInvalid(self._target, [(f"line {line}", problem)])
        try:
            entries = (self._json if self._form == "json" else self._yaml)(content, checker)
        except UnicodeDecodeError as error:
            raise RegistryInvalid(self._target, [("", f"not UTF-8, at byte {error.start}")]) from None
        except yamltext.InvalidText as error:
            told = [("", f"{yamltext.EMPTY}: write {_EMPTY[self._form]} if there are no models yet")]
            raise RegistryInvalid(self._target, told if error.empty else error.problems) from None
        if problems:
            raise RegistryInvalid(self._target, problems)
        before = self._entries.content
        if before and not entries and not checker.says_models:
            gone = f"is missing or has no value, and there were {counted(len(before), 'model')} until now"
            problem = f"{gone}: write models: {{}} if there are to be none"
            raise RegistryInvalid(self._target, [("models", problem)])
        kept = {name: old if (old := before.get(name)) == new else new for name, new in entries.items()}
        self._entries = Entries(kept, self._entries)
        if self._form == "yaml":
            self._text = content
        return self._entries

    def _yaml(self, content: bytes, checker: _Checker) -> dict[str, bytes]:
        text = content.decode("utf-8-sig")
        entries: dict[str, bytes] = {}

        def take(name: str, item: Any) -> None:
            entry = checker.entry(name, item)
            if entry is not None:
                entries[name] = entry

        try:
            top = yamltext.plain(text, "models", take)
        except yamltext.NotPlain:
            checker.problems.clear()
            top = yamltext.data(yamltext.parse(text), typed=False, problems=checker.problems)
            return checker.document(top)
        if entries or checker.problems:
            top["models"] = None
        return checker.document(top) | entries

    def _json(self, content: bytes, checker: _Checker) -> dict[str, bytes]:
        text = content.decode("utf-8-sig")
        if not text or text.isspace():
            raise yamltext.InvalidText([("", yamltext.EMPTY)])
        try:
            return self._members(jsontext.Scanner(text, _DECODER.raw_decode), checker)
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}, column {error.colno}"
            raise yamltext.InvalidText([(place, f"not JSON: {error.msg}")]) from None
        except RecursionError:
            raise yamltext.InvalidText([("", "nested too deep")]) from None

    def _members(self, scanner: jsontext.Scanner, checker: _Checker) -> dict[str, bytes]:
        if not scanner.begins("{"):
            value = scanner.value()
            scanner.end()
            return checker.document(_as_text(value, "", checker.problems))
        top: dict[str, Any] = {}
        entries: dict[str, bytes] = {}
        known: dict[str, tuple[int, bytes, bytes]] = {}
        for key in scanner.members():
            if key in top:
                checker.problem(key, "is given twice")
            top[key] = None
            if key != "models" or not scanner.begins("{"):
                top[key] = _as_text(scanner.value(), key, checker.problems)
                continue
            top[key] = {}  # its members are read here
            for name in scanner.members():
                if name in entries:
                    checker.problem(f"models.{name}", "is given twice")
                found = self._member(name, scanner, checker)
                if found is not None:
                    known[name] = found
                    entries[name] = found[2]
        scanner.end()
        checker.document(top)
        self._values = known
        return entries

    def _member(
        self, name: str, scanner: jsontext.Scanner, checker: _Checker
    ) -> tuple[int, bytes, bytes] | None:
        """One model's value, read only if it is not what it was. An object ends where its text does: what
        begins with the same characters is the same."""
        start = scanner.at
        found = self._values.get(name)
        if found is not None and _digest(scanner.text[start : start + found[0]].encode()) == found[1]:
            scanner.at = start + found[0]
            return found
        before = len(checker.problems)
        value = _as_text(scanner.value(), f"models.{name}", checker.problems)
        entry = checker.entry(name, value)
        if entry is None or len(checker.problems) > before:
            return None
        raw = scanner.text[start : scanner.at].encode()
        return scanner.at - start, _digest(raw), entry

    # Writing.

    def changed(self, content: bytes | None, base: str, changes: Sequence[Change]) -> tuple[bytes, bool]:
        """A valid document (None: one that does not exist yet) with changes of one model put in, and whether
        what else is in it was kept. Where it can be, only that model's part of the text is looked at."""
        edited = None
        if content is not None and self._form == "json":
            edited = self._changed_json(content, base, changes)
        return edited if edited is not None else _changed_whole(content, changes, self._form)

    def _changed_json(
        self, content: bytes, base: str, changes: Sequence[Change]
    ) -> tuple[bytes, bool] | None:
        if base != self._base:
            return None
        text = content.decode("utf-8-sig")
        wanted = changes[0][0][1]
        checker = _Checker([], base)
        scanner = jsontext.Scanner(text, _DECODER.raw_decode)
        behind: int | None = None  # where the last model ends
        for key in scanner.members():
            if key != "models" or not scanner.begins("{"):
                scanner.value()
                continue
            for name in scanner.members():
                start = scanner.at
                if self._member(name, scanner, checker) is None:
                    return None
                if name == wanted:
                    value = json.loads(text[start : scanner.at])
                    return _spliced(text, start, scanner.at, "", value, changes), True
                behind = scanner.at
        if behind is None:
            return None
        indent = _indent(text)
        between = ", " if indent is None else f",\n{indent * 2}"
        return _spliced(
            text, behind, behind, f"{between}{json.dumps(wanted, ensure_ascii=False)}: ", {}, changes
        ), True


def _spliced(text: str, start: int, end: int, before: str, value: Any, changes: Sequence[Change]) -> bytes:
    """The text with a model's value, changed, from `start` to `end`, and `before` before it."""
    for path, item in changes:
        value = yamledit.put(value, path[2:], item)
    indent = _indent(text)
    written = json.dumps(value, indent=indent, ensure_ascii=False)
    if indent is not None:
        written = written.replace("\n", "\n" + indent * 2)  # in a string, a line break is escaped
    return (text[:start] + before + written + text[end:].removesuffix("\n") + "\n").encode()


def _changed_whole(content: bytes | None, changes: Sequence[Change], form: Form) -> tuple[bytes, bool]:
    if form == "json":
        text = "" if content is None else content.decode("utf-8-sig")
        value: Any = {"version": 1} if content is None else json.loads(text)
        for path, item in changes:
            value = yamledit.put(value, path, item)
        indent = "  " if content is None else _indent(text)
        return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode(), True
    content = b"version: 1\n" if content is None else content
    new, kept = yamledit.changed(content.decode("utf-8-sig"), changes)
    return (codecs.BOM_UTF8 if content.startswith(codecs.BOM_UTF8) else b"") + new.encode(), kept


def _indent(text: str) -> str | None:
    """What a level of a JSON text is indented by; None where it is all in one line."""
    found = re.match(r"\s*\{[^\S\n]*\n([ \t]+)", text)
    return found[1] if found else None


def _digest(piece: bytes) -> bytes:
    return hashlib.blake2b(piece, digest_size=16).digest()


class _Pairs(list[tuple[str, Any]]):
    """A JSON object before its keys were looked at."""


_DECODER = json.JSONDecoder(object_pairs_hook=_Pairs, parse_int=str, parse_float=str, parse_constant=str)


def _as_text(value: Any, place: str, problems: list[tuple[str, str]]) -> Any:
    """Returns the decoded value with every scalar as its text, and null as None."""
    if isinstance(value, _Pairs):
        mapping: dict[str, Any] = {}
        for key, item in value:
            if key in mapping:
                problems.append((f"{place}.{key}" if place else key, "is given twice"))
            if not isinstance(item, str):
                item = _as_text(item, f"{place}.{key}" if place else key, problems)
            mapping[key] = item
        return mapping
    if isinstance(value, list):
        return [_as_text(item, f"{place}[{i}]", problems) for i, item in enumerate(value)]
    return str(value).lower() if isinstance(value, bool) else value


class _Checker:
    """Checks one document; what is wrong goes to `problems`, and checking goes on."""

    def __init__(self, problems: list[tuple[str, str]], base: str) -> None:
        self.problems = problems
        self.says_models = False  # whether `models` has a value, which may be empty
        self._base = base

    def document(self, value: Any) -> dict[str, bytes]:
        """The entries of a document's models."""
        top = self._mapping(value, "", ("version", "models"))
        if (version := top.get("version")) not in (None, "1"):
            self.problem("version", f"{_shown(version)}: this gateway reads version 1")
        self.says_models = top.get("models") is not None
        entries: dict[str, bytes] = {}
        for name, item in self._mapping(top.get("models"), "models", None).items():
            entry = self.entry(name, item)
            if entry is not None:
                entries[name] = entry
        return entries

    def entry(self, name: str, value: Any) -> bytes | None:
        """One model as `Entries` keeps it; None where something is wrong with it."""
        before = len(self.problems)
        place = f"models.{name}"
        model = self._model(name, value, place) if self._named(check_name, name, place) else None
        if model is None or len(self.problems) > before:
            return None
        try:
            # A copy, because what orjson gives keeps the room of its buffer, six times as much.
            return bytes(memoryview(orjson.dumps(model.to_json())))
        except TypeError as error:  # nested deeper than it writes, or text that is none
            self.problem(place, str(error))
            return None

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
            self.problem(f"{place}.rollout", f"{_kind(rollout)}, where a mapping is expected")
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
            problem = f"{_shown(digest)} is not a digest: sha256: and 64 lower-case hex digits"
            self.problem(f"{place}.digest", problem)
        if not source:
            if entry.get("source") in (None, "") and isinstance(value, dict | None):
                self.problem(f"{place}.source", "missing; write where the model directory is")
            return None
        if "\0" in source:
            self.problem(f"{place}.source", "holds a null character")
            return None
        return Version(name, version, located(source, self._base), digest, created, tags)

    def _alias(self, value: Any, place: str) -> Alias | None:
        if not isinstance(value, dict):
            version = self._text(value, place, missing="points nowhere; write a version", wanted="a version")
            if version is None or not self._named(check_version, version, place):
                return None
            return Alias(version)
        entry = self._mapping(value, place, ("version", "previous", "last_good", "forced"))
        version = self._text(
            entry.get("version"), f"{place}.version", missing="missing; write a version", wanted="a version"
        )
        previous = entry.get("previous")
        listed = previous if isinstance(previous, list) else [] if previous is None else [previous]
        earlier: list[str] = []
        for i, item in enumerate(listed):
            where = f"{place}.previous[{i}]" if isinstance(previous, list) else f"{place}.previous"
            text = self._text(item, where, missing="names no version", wanted="a version")
            if text is not None and self._named(check_version, text, where):
                earlier.append(text)
        last_good = self._text(entry.get("last_good"), f"{place}.last_good")
        if last_good is not None:
            self._named(check_version, last_good, f"{place}.last_good")
        forced = entry.get("forced")
        if forced not in (None, "true", "false"):
            self.problem(f"{place}.forced", f"{_shown(forced)}: write true or false")
        if version is None or not self._named(check_version, version, f"{place}.version"):
            return None
        verdict = Verdict.from_json(value.get("x-verdict"))
        back = value.get(BACK) == version
        return Alias(version, tuple(earlier[:MAX_PREVIOUS]), last_good, forced == "true", verdict, back)

    def _mapping(self, value: Any, place: str, known: tuple[str, ...] | None) -> dict[str, Any]:
        """The entries of a mapping. With `known`: without its `x-` keys, and a problem for each other key
        that is not known. Without: the keys are the user's names."""
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.problem(place, f"{_kind(value)}, where a mapping is expected")
            return {}
        if known is None:
            return value
        for key in value:
            if key not in known and not key.startswith("x-"):
                self.problem(f"{place}.{key}" if place else key, unknown_key(key, known))
        return {key: item for key, item in value.items() if key in known}

    def _text(
        self, value: Any, place: str, *, missing: str | None = None, wanted: str = "text"
    ) -> str | None:
        if isinstance(value, str):
            return value
        if value is not None:
            self.problem(place, f"{_kind(value)}, where {wanted} is expected")
        elif missing is not None:
            self.problem(place, missing)
        return None

    def _named(self, check: Callable[[str], str], text: str, place: str) -> bool:
        try:
            check(text)
        except InvalidReference as error:
            self.problem(place, str(error))
            return False
        return True

    def problem(self, place: str, problem: str) -> None:
        self.problems.append((place, problem))


def unknown_key(key: str, known: tuple[str, ...]) -> str:
    """Returns the message for an unknown key."""
    near = did_you_mean(key, known)
    if near is not None:
        return f"unknown key, {near}"
    return f"unknown key; known here: {', '.join(known)}"


def located(source: str, base: str) -> str:
    """A source as an absolute path or a URI; a relative one begins at `base`, a directory or a URL."""
    if _URI.match(source):
        return source
    if _URI.match(base):
        return source if os.path.isabs(source) else f"{base.rstrip('/')}/{source}"
    return os.path.normpath(os.path.join(base, source))


def dump(models: Iterable[Model]) -> bytes:
    """A document that says the same, in JSON. Credentials in the URL of a source stay here."""
    # Model by model: in one go, a large one would keep every other thread waiting.
    members = (orjson.dumps(model.name) + b": " + orjson.dumps(_shareable(model)) for model in models)
    return b'{"version": 1, "models": {' + b", ".join(members) + b"}}"


def _shareable(model: Model) -> dict[str, Any]:
    entry = model.to_json()
    for facts in entry["versions"].values():
        facts["source"] = re.sub(r"(://)[^/@]*@", r"\1", facts["source"])
    return entry


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else _kind(value)
    return repr(text if len(text) <= 80 else text[:77] + "...") if isinstance(value, str) else text


def _kind(value: Any) -> str:
    if isinstance(value, str):  # every scalar is read as its text
        return "a number" if _NUMBER.match(value) else "text"
    kinds: Mapping[type, str] = {dict: "a mapping", list: "a list", bool: "true or false"}
    return kinds.get(type(value), "nothing" if value is None else "a value")
