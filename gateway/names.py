"""Model references: parses every form in which a user names a model.

Knows the grammar; must not know which models exist. Source of the grammar: MLflow's `models:/` and `runs:/`
URIs (split at the last `@`; one segment `m-<32 hex>` is a model id; `latest` in upper or lower case).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from urllib.parse import quote, unquote_to_bytes

from gateway.errors import Problem

_MODEL_ID = re.compile(r"m-[0-9a-f]{32}\Z")
_ALIAS = re.compile(r"[\w-]{1,255}\Z")
_VERSION = re.compile(r"[1-9][0-9]{0,17}\Z")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


class InvalidReference(Problem, ValueError):
    """The text is not a model reference; the message says why. A client gets status 400."""

    def __init__(self, message: str) -> None:
        Problem.__init__(self, "INVALID_REFERENCE", message)


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed reference.

    It has exactly one of these forms: `name` alone (the default alias), `name` with `alias`, `version` or
    `latest`; `model_id`; `run_id` with `path`; `uri`, the place of a model directory.
    """

    name: str = ""
    alias: str | None = None
    version: str | None = None
    latest: bool = False
    model_id: str | None = None
    run_id: str | None = None
    path: str | None = None
    uri: str | None = None

    def __str__(self) -> str:
        if self.uri is not None:
            return self.uri
        if self.model_id is not None:
            return f"models:/{self.model_id}"
        if self.run_id is not None:
            return f"runs:/{self.run_id}/{self.path}"
        if self.alias is not None:
            return f"models:/{self.name}@{self.alias}"
        if self.version is not None:
            return f"models:/{self.name}/{self.version}"
        return f"models:/{self.name}/latest" if self.latest else f"models:/{self.name}"

    @property
    def is_bare(self) -> bool:
        """Returns True if it is a name alone."""
        return bool(self.name) and self == Reference(self.name)


def parse_reference(text: str) -> Reference:
    """Parses a `models:/` or `runs:/` URI, the forms that clients may use. Raises InvalidReference."""
    if text.startswith("models:/"):
        rest = text.removeprefix("models:/")
        if rest.startswith("/"):
            raise InvalidReference(f"{_shown(text)}: write models:/NAME, with one slash")
        if _MODEL_ID.match(rest):
            return Reference(model_id=rest)
        name, at, alias = rest.rpartition("@")
        if at and "/" not in alias:
            return Reference(check_name(name), alias=check_alias(alias))
        name, slash, version = rest.partition("/")
        if not slash:
            return Reference(check_name(name))
        if version.lower() == "latest":
            return Reference(check_name(name), latest=True)
        # The form of a URL path is a reference too.
        return Reference(check_name(name), version=check_version(version.removeprefix("versions/")))
    if text.startswith("runs:/"):
        run_id, slash, path = text.removeprefix("runs:/").partition("/")
        if not (run_id and slash and path):
            raise InvalidReference(f"{_shown(text)}: write runs:/RUN_ID/PATH")
        return Reference(run_id=run_id, path=path)
    raise InvalidReference(
        f"{_shown(text)} is not a model reference; write models:/NAME@ALIAS or models:/NAME/VERSION"
    )


def parse_uri(text: str) -> Reference:
    """Parses any form, also the place of a directory. For the command line and Python, never for clients."""
    if text.startswith(("models:/", "runs:/")):
        return parse_reference(text)
    if not text:
        raise InvalidReference("the reference is empty; write models:/NAME@ALIAS or a directory")
    return Reference(uri=text)


def parse_short(text: str) -> Reference:
    """Parses the command line's forms: NAME, NAME@ALIAS, NAME/VERSION, NAME/versions/VERSION, or a `models:/`
    URI."""
    if text.startswith("/"):
        raise InvalidReference(f"{_shown(text)} is not a model reference; write NAME@ALIAS or NAME/VERSION")
    return parse_reference(text if _SCHEME.match(text) else f"models:/{text}")


def parse_path(raw: bytes) -> Reference:
    """Parses what follows `/predict/` in a raw URL path: NAME, NAME@ALIAS or NAME/versions/VERSION.

    Splits the raw path on the last literal `@` and then percent-decodes, so that `%40` belongs to the name.
    Raises InvalidReference, and NOT_FOUND for a path with more parts: it is not a route.
    """
    name, marker, version = raw.partition(b"/versions/")
    if b"/" in name + version:
        hint = "a version is named NAME/versions/VERSION in a path, and an alias NAME@ALIAS"
        raise Problem("NOT_FOUND", "there is nothing at this path", hint=hint)
    if marker:
        if b"@" in raw:
            raise InvalidReference("the path names an alias and a version: give only one")
        return Reference(check_name(_decoded(name)), version=check_version(_decoded(version)))
    name, at, alias = raw.rpartition(b"@")
    if at:
        return Reference(check_name(_decoded(name)), alias=check_alias(_decoded(alias)))
    return Reference(check_name(_decoded(raw)))


def url_path(reference: Reference) -> str:
    """The same reference as a URL path segment (inverse of `parse_path`)."""
    name = quote(reference.name, safe="")
    if reference.version is not None:
        return f"{name}/versions/{reference.version}"
    return name if reference.alias is None else f"{name}@{quote(reference.alias, safe='')}"


def check_name(name: str) -> str:
    """Returns a valid model name: text without `/`, `:` and control characters. Raises InvalidReference."""
    if not name:
        raise InvalidReference("the model's name is empty")
    if len(name) > 255:
        raise InvalidReference("the model's name is longer than 255 characters")
    for character in name:
        if character in "/:" or ord(character) < 32 or ord(character) == 127:
            raise InvalidReference(f"the model's name {_shown(name)} contains {character!r}: not allowed")
    return name


def check_alias(alias: str) -> str:
    """Returns a valid alias: letters, digits, `_` and `-`. As in MLflow, `latest`, `v1`, `v2`, … are
    reserved. Raises InvalidReference."""
    if not _ALIAS.match(alias):
        raise InvalidReference(
            f"{_shown(alias)} is not an alias: use letters, digits, _ and -, at most 255 characters"
        )
    if alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise InvalidReference(f"the alias {_shown(alias)} is reserved: latest and v1, v2, … name versions")
    return alias


def check_version(version: str) -> str:
    """Returns a valid version: a positive decimal integer without sign or leading zero. Raises
    InvalidReference."""
    if not version.isascii() or not _VERSION.match(version):
        raise InvalidReference(
            f"{_shown(version)} is not a version: write a positive whole number, such as 3"
        )
    return version


def near(word: str, known: Iterable[str]) -> str | None:
    """The known name that is most like a word; None where none is like it."""
    found = difflib.get_close_matches(word, known, n=1)
    return found[0] if found else None


def is_pattern(text: str) -> bool:
    """Whether a text stands for all names that fit it (`fraud-*`), and not for one name."""
    return any(character in text for character in "*?[")


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """A hint with the known names that are most similar to an unknown word; None if none is similar."""
    found = difflib.get_close_matches(word, known, n=3)
    return f"did you mean {' or '.join(found)}?" if found else None


def did_you_mean_of_many(word: str, known: Iterable[str]) -> str | None:
    """The same for any number of names: only names with the same first letter are compared, 200 of the first
    5,000 at most."""
    alike = (name for name in islice(known, 5000) if name[:1].lower() == word[:1].lower())
    return did_you_mean(word, islice(alike, 200))


def _decoded(raw: bytes) -> str:
    try:
        return unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise InvalidReference("the reference in the path is not UTF-8") from None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
