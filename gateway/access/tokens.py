"""The file of tokens: who holds which, and what it may use. It holds digests, never a secret.

The file is a YAML or JSON list. It is read in a thread, and again when it changes. Knows the form of an
entry; must not know a request.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import secrets
import stat
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from gateway import yamltext
from gateway.access.principal import Principal
from gateway.names import near
from gateway.patterns import InvalidPattern, Patterns

#: What each token begins with, so that scanners for leaked secrets find it.
PREFIX: Final = "mgw_"
TOKEN_BYTES: Final = 32
MAX_FILE: Final = 16 << 20
KEYS: Final = ("name", "sha256", "team", "predict", "control", "until")

_DIGEST = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})\Z")
_LONGEST: Final = 128

_log = logging.getLogger("gateway.credentials")


class InvalidTokens(ValueError):
    """The file is not a list of tokens. `problems`: (place, what is wrong), all of them."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{place}: {what}" if place else what for place, what in problems))
        self.problems = problems


def new_token() -> str:
    """A new secret, for one holder."""
    return PREFIX + secrets.token_urlsafe(TOKEN_BYTES)


def digest(secret: bytes) -> bytes:
    """Returns what the file keeps of a token."""
    return hashlib.sha256(secret).digest()


def parse(text: str, default_alias: Sequence[str]) -> dict[bytes, Principal]:
    """The principals by the digest of their token. Raises InvalidTokens with every problem."""
    try:
        content = _content(text)
    except yamltext.InvalidText as error:
        if error.empty:
            return {}
        raise InvalidTokens(error.problems) from None
    if content is None:
        return {}
    if not isinstance(content, list):
        raise InvalidTokens([("", f"must be a list of tokens, each with {', '.join(KEYS)}")])
    problems: list[tuple[str, str]] = []
    found: dict[bytes, Principal] = {}
    names: set[str] = set()
    for number, entry in enumerate(content):
        place = f"[{number}]"
        if not isinstance(entry, dict):
            problems.append((place, "must be a mapping with name and sha256"))
            continue
        faults: list[tuple[str, str]] = []
        token = _digest(entry, place, faults)
        principal = _principal(entry, place, faults, default_alias)
        if principal is not None and principal.name in names:
            faults.append((f"{place}.name", f"{principal.name!r} is given twice"))
        if token in found:
            faults.append((f"{place}.sha256", "is given twice"))
        problems += faults
        if principal is not None and token is not None and not faults:
            names.add(principal.name)
            found[token] = principal
    if problems:
        raise InvalidTokens(problems)
    return found


def _content(text: str) -> Any:
    """The text as plain data, the fast way if it has nothing unusual. Raises InvalidText."""
    try:
        return yamltext.plain(text)
    except yamltext.NotPlain:
        return yamltext.data(yamltext.parse(text), typed=False)


def _digest(entry: Mapping[str, Any], place: str, faults: list[tuple[str, str]]) -> bytes | None:
    match = _DIGEST.match(given) if isinstance(given := entry.get("sha256"), str) else None
    if match is None:
        faults.append((f"{place}.sha256", "must be the SHA-256 of the token: 64 hexadecimal digits"))
        return None
    return bytes.fromhex(match[1])


def _principal(
    entry: Mapping[str, Any], place: str, faults: list[tuple[str, str]], default_alias: Sequence[str]
) -> Principal | None:
    for key in entry:
        if key not in KEYS and not key.startswith("x-"):
            meant = near(key, KEYS)
            faults.append(
                (f"{place}.{key}", f"unknown key, did you mean {meant}?" if meant else "unknown key")
            )
    name = _text(entry.get("name"), f"{place}.name", faults)
    team = "" if entry.get("team") is None else _text(entry["team"], f"{place}.team", faults)
    predict = _patterns(entry.get("predict"), f"{place}.predict", faults, default_alias)
    control = _patterns(entry.get("control"), f"{place}.control", faults, default_alias)
    until = _until(entry.get("until"), f"{place}.until", faults)
    if name is None or team is None or predict is None or control is None or until is None:
        return None
    return Principal(name, "token", team, predict, control, until)


def _text(value: Any, place: str, faults: list[tuple[str, str]]) -> str | None:
    if isinstance(value, str) and 0 < len(value) <= _LONGEST and value.isprintable():
        return value
    faults.append((place, f"must be printable text of at most {_LONGEST} characters"))
    return None


def _patterns(
    value: Any, place: str, faults: list[tuple[str, str]], default_alias: Sequence[str]
) -> Patterns | None:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        faults.append((place, "must be a list of patterns, such as [iris, fraud-*@champion]"))
        return None
    try:
        return Patterns(texts, default_alias)
    except InvalidPattern as error:
        faults.append((place, str(error)))
        return None


def _until(value: Any, place: str, faults: list[tuple[str, str]]) -> float | None:
    if value is None:
        return float("inf")
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        faults.append((place, "must be a date or a time, such as 2027-01-31 or 2027-01-31T09:00:00Z"))
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


class TokensFile:
    """The tokens in `file`, as it is now. A file that is missing holds none. A file that becomes invalid
    changes nothing: the tokens of its last valid content stay, and the log says what is wrong."""

    def __init__(self, file: Path, default_alias: Sequence[str]) -> None:
        self.file = file
        self._default_alias = default_alias
        self._stamp: tuple[int, int, int] | None = None
        self._told = ""
        self.by_digest: Mapping[bytes, Principal] = {}
        self._teams: tuple[Mapping[bytes, Principal], Sequence[tuple[str, Patterns]]] = ({}, ())

    @property
    def teams(self) -> Sequence[tuple[str, Patterns]]:
        """The teams with what their tokens may use, each once. Kept, because a file may hold many tokens."""
        tokens = self.by_digest  # a thread may read others meanwhile
        if self._teams[0] is not tokens:
            found = {(one.team, one.predict.texts): one for one in tokens.values() if one.team}
            self._teams = tokens, [(one.team, one.predict) for one in found.values()]
        return self._teams[1]

    def read(self) -> None:
        """Reads the file for the first time. Raises OSError, InvalidTokens."""
        stamp = self._look()
        self.by_digest = self._read()
        self._stamp = stamp

    def look(self) -> bool:
        """Reads the file if it has changed. Returns whether the tokens are others now. Blocks."""
        try:
            stamp = self._look()
            if stamp == self._stamp:
                return False
            found = self._read()
        except FileNotFoundError as error:
            stamp, found = None, {}
            self._tell(f"there is no {error.filename}: no token is valid")
        except (OSError, InvalidTokens) as error:
            if isinstance(error, InvalidTokens):
                self._stamp = stamp  # it is read again when it changes, and not at every look
            self._tell(f"cannot read {self.file}: {error}; the tokens stay as they were")
            return False
        else:
            self._told = ""
            _log.info("read the tokens in %s: %d", self.file, len(found))
        self._stamp = stamp
        changed = bool(found or self.by_digest)
        self.by_digest = found
        return changed

    def _look(self) -> tuple[int, int, int]:
        status = self.file.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE:
            raise OSError(errno.EINVAL, f"it is not a file of at most {MAX_FILE >> 20} MiB")
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> dict[bytes, Principal]:
        try:
            text = self.file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise InvalidTokens([("", "not UTF-8")]) from None
        return parse(text, self._default_alias)

    def _tell(self, what: str) -> None:
        if what != self._told:
            self._told = what
            _log.error("%s", what)
