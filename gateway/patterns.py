"""Patterns of model references: which models a credential may use.

A pattern is a model reference with `*`, `?` and `[…]` in any part: `iris`, `fraud-*@champion`, `iris/2`. Case
counts, and names compare character by character. Knows the grammar of references; must not know which models
exist, so that a refusal says nothing about them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from gateway.names import Reference

#: So many decisions are remembered for each credential.
KEPT: Final = 1024

_ALIAS = re.compile(r"[\w*?\[\]!-]{1,255}\Z")
_VERSION = re.compile(r"(?:[1-9][0-9]{0,17}|latest|\*)\Z")
_LONGEST: Final = 1024


class InvalidPattern(ValueError):
    """The text is not a pattern of model references; the message says why."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A parsed pattern: of names, and of aliases or versions where it has one."""

    name: str
    alias: str | None = None
    version: str | None = None


def parse(text: str) -> Pattern:
    """Parses NAME, NAME@ALIAS, NAME/VERSION or NAME/versions/VERSION, with `models:/` in front or not. Raises
    InvalidPattern."""
    rest = text.removeprefix("models:/")
    name, at, alias = rest.rpartition("@")
    if at and "/" not in alias:
        if not _ALIAS.match(alias):
            raise InvalidPattern(f"{text!r}: {alias!r} is not a pattern of aliases")
        return Pattern(_name(name, text), alias=alias)
    name, slash, version = rest.partition("/")
    if not slash:
        return Pattern(_name(name, text))
    version = version.removeprefix("versions/")
    if not _VERSION.match(version):
        raise InvalidPattern(f"{text!r}: {version!r} is not a version; write a number, latest or *")
    return Pattern(_name(name, text), version=version)


def _name(name: str, text: str) -> str:
    if not name or len(name) > _LONGEST:
        raise InvalidPattern(f"{text[:80]!r} is not a pattern of model names; write NAME, fraud-* or *")
    if any(c in "/:" or ord(c) < 32 or ord(c) == 127 for c in name):
        raise InvalidPattern(f"{text!r} contains a character that no model's name has")
    return name


class Patterns:
    """The patterns of one credential. `default_alias`: the aliases that a bare NAME may mean.

    How a pattern decides about a request:

    | pattern | covers |
    |---|---|
    | `NAME` | the model by any reference: bare, by alias, by version, as latest |
    | `NAME@ALIAS` | the reference NAME@ALIAS; a bare NAME if the pattern covers every default alias |
    | `NAME/VERSION` | the reference NAME/VERSION alone; `NAME/*` every version and latest |
    | `*` | also references without a name: `models:/m-…` and `runs:/…` |

    An alias gives no right to the version that it points to, and a version none to its aliases.
    """

    __slots__ = ("_decided", "_last", "_patterns", "default_alias", "everything", "texts")

    def __init__(self, texts: Sequence[str], default_alias: Sequence[str] = ()) -> None:
        self.texts = tuple(texts)
        self._patterns = [parse(text) for text in texts]
        self.default_alias = tuple(default_alias)
        self._decided: dict[Reference, bool] = {}
        #: The last reference and its decision: the checks of one request ask for the same object.
        self._last: tuple[Reference | None, bool] = (None, False)
        #: Whether all models are covered, those without a name included.
        self.everything = Pattern("*") in self._patterns

    def __repr__(self) -> str:
        return f"<Patterns {', '.join(self.texts) or 'none'}>"

    def covers(self, reference: Reference) -> bool:
        """Returns True if the credential may use the model by this reference."""
        if self.everything:
            return True
        last, decision = self._last
        if last is reference:
            return decision
        decided = self._decided.get(reference)
        if decided is None:
            decided = any(self._decides(pattern, reference) for pattern in self._patterns)
            if len(self._decided) >= KEPT:
                self._decided.clear()
            self._decided[reference] = decided
        self._last = reference, decided
        return decided

    def covers_model(self, name: str) -> bool:
        """Returns True if the credential may use all versions and aliases of the model."""
        return self.everything or any(
            pattern.alias is None and pattern.version is None and fnmatchcase(name, pattern.name)
            for pattern in self._patterns
        )

    def touches(self, name: str) -> bool:
        """Whether any pattern is about the model of this name, by whatever alias or version."""
        return self.everything or any(fnmatchcase(name, pattern.name) for pattern in self._patterns)

    def _decides(self, pattern: Pattern, reference: Reference) -> bool:
        if not reference.name or not fnmatchcase(reference.name, pattern.name):
            return False
        if pattern.alias is not None:
            if reference.version is not None or reference.latest:
                return False
            meant = self.default_alias if reference.alias is None else (reference.alias,)
            return bool(meant) and all(fnmatchcase(alias, pattern.alias) for alias in meant)
        if pattern.version is not None:
            version = "latest" if reference.latest else reference.version
            return version is not None and fnmatchcase(version, pattern.version)
        return True
