"""Garbage collection in the store of a registry file: finds directories that no version uses, and removes
them.

A push copies into `.incoming-…`, renames the copy to `NAME/NUMBER`, and then writes the entry. A push that is
killed in between leaves a directory, and so does a deleted entry. Knows directories and times. The registry
says what its versions use, and holds its lock meanwhile. Never follows a link, and never touches a directory
that a push cannot have made.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from gateway.staging import PREFIX, Staging, changed, is_held

_NUMBER = re.compile(r"[1-9][0-9]{0,17}")
#: Matches `file:` URLs with any number of slashes.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/*(?=/)")
INTERRUPTED = "an interrupted push"
UNREFERRED = "no version uses it"


@dataclass(frozen=True, slots=True)
class Garbage:
    """A directory that no version uses. `bytes`: the size of its files. `age`: the seconds since its last
    change. `reason`: why it is not used."""

    path: Path
    bytes: int
    age: float
    reason: str


def find(store: Path, sources: Iterable[str], texts: Sequence[str], now: float) -> list[Garbage]:
    """The garbage of `store`, sorted by path.

    Keeps a directory that one of `sources` (paths or URIs) names, contains, or is in; one that is named in
    `texts`, the other documents that may use this store; and one that a running push holds.
    """
    kept = _kept(store, sources)
    found = []
    for name in sorted(_directories(store)):
        if name.startswith(PREFIX):
            if not is_held(store / name):
                found.append(_garbage(store / name, INTERRUPTED, now))
            continue
        numbers = [number for number in _directories(store / name) if _NUMBER.fullmatch(number)]
        for number in sorted(numbers, key=int):
            path = store / name / number
            if not kept.isdisjoint({(), (name,), (name, number)}):
                continue
            if number == max(numbers, key=int) and not any(path.iterdir()):
                continue  # left by `set_aside`, so that the number is not used again
            # Also as `NAME//1`, `NAME/./1` and, in JSON, `NAME\/1`: it is safer to keep too much.
            named = re.compile(rf"{re.escape(name)}[\\/.]+{number}(?![0-9])")
            if not any(named.search(text) for text in texts):
                found.append(_garbage(path, UNREFERRED, now))
    return found


def set_aside(store: Path, found: Iterable[Garbage]) -> Iterator[Staging]:
    """Renames garbage one by one. Closing a yielded directory removes it, which may take long.

    A number is never used twice: the directory of a model's highest number stays, empty.
    """
    for garbage in found:
        staged = Staging(store)
        yield staged  # before the next line, so that this one is closed too if that fails
        try:
            os.rename(garbage.path, staged.path / "garbage")
        except FileNotFoundError:
            continue  # a push has removed it meanwhile
        if garbage.reason == UNREFERRED:
            above = garbage.path.parent
            others = [int(number) for number in os.listdir(above) if _NUMBER.fullmatch(number)]
            if int(garbage.path.name) > max(others, default=0):
                os.mkdir(garbage.path)


def _kept(store: Path, sources: Iterable[str]) -> set[tuple[str, ...]]:
    """The places of the sources in the store: at most NAME and NUMBER of each."""
    roots = {str(store), os.path.realpath(store)}
    kept = set()
    for source in sources:
        texts = {source, unquote(source)}
        places = texts | {_SCHEME.split(text)[-1] for text in texts}
        texts |= {os.path.realpath(place) for place in places if os.path.isabs(place)}
        for text in texts:
            for root in roots:
                for match in re.finditer(re.escape(root) + r"(?=/|\Z)", text):
                    parts = [part for part in text[match.end() :].split("/") if part not in ("", ".")]
                    kept.add(tuple(parts[:2]))
    return kept


def _directories(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def _garbage(path: Path, reason: str, now: float) -> Garbage:
    size = 0
    for directory, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(FileNotFoundError):  # another process is removing it
                status = os.lstat(os.path.join(directory, name))
                size += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return Garbage(path, size, max(0.0, now - changed(path)), reason)
