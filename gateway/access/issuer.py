"""JWTs of one issuer: verifies them, and keeps the issuer's keys current.

PyJWT verifies; this module decides what is accepted: RS, ES and EdDSA with a key of the issuer, `exp`
present, issuer and audience equal. Keys are read in the background; a key that is not known yet is looked for
at once, at most once in `LOOK_AGAIN` seconds. Needs the extra `jwt`. Must not know a request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import httpx
import jwt
import orjson

from gateway.access.keptkeys import KeptKeys
from gateway.backoff import pause

if TYPE_CHECKING:
    from gateway.credentials import Jwt

#: The algorithms by the type of key that they need.
ALGORITHMS: Final = {
    "RSA": ("RS256", "RS384", "RS512"),
    "P-256": ("ES256",),
    "P-384": ("ES384",),
    "P-521": ("ES512",),
    "OKP": ("EdDSA",),
}
SMALLEST_RSA: Final = 2048
#: A longer token is refused unread, in bytes.
MAX_TOKEN: Final = 16 << 10
MAX_KEYS: Final = 100
#: So many keys are tried for a token that names none.
MAX_TRIED: Final = 8
#: A document with keys has at most this many bytes.
MAX_DOCUMENT: Final = 1 << 20
#: Allowed difference between the issuer's clock and this one, in seconds.
LEEWAY: Final = 30.0
#: How often the keys are read: from a URL, from a file; and how soon after an unknown key, in seconds.
URL_INTERVAL: Final = 300.0
FILE_INTERVAL: Final = 0.5
LOOK_AGAIN: Final = 5.0
FETCH_SECONDS: Final = 5.0
_LONGEST_NAME: Final = 256

_log = logging.getLogger("gateway.credentials")


class Refused(Exception):
    """The token is not valid; the message says why, in words that a client may see."""


class UnknownKey(Refused):
    """No key of the issuer fits the token: one that is not known yet may."""


@dataclass(frozen=True, slots=True)
class Claims:
    """What a valid token says. `until`: in unix seconds."""

    subject: str
    teams: tuple[str, ...]
    until: float


@dataclass(frozen=True, slots=True)
class Key:
    """A public key of the issuer, with what it may be used for."""

    kid: str | None
    algorithms: tuple[str, ...]
    key: Any
    source: bytes


class Issuer:
    """`changed` is called when the keys are others than before. `files` reads and writes files. `state_dir`:
    where keys of a URL are kept. Those of the last run are the first ones, until others are read; the disk is
    read when it is made."""

    def __init__(
        self,
        settings: Jwt,
        *,
        changed: Callable[[], None] = lambda: None,
        state_dir: Path | None = None,
        files: Executor | None = None,
    ) -> None:
        self._settings = settings
        self._files = files
        self._changed = changed
        self._keys: tuple[Key, ...] = ()
        self._is_url = "://" in settings.jwks
        self._stamp: object = None
        self._looked = -LOOK_AGAIN
        self._reading: asyncio.Task[bool] | None = None
        self._kept: KeptKeys | None = None
        if self._is_url and urlsplit(settings.jwks).scheme != "https":
            _log.warning("the keys of %s come over plain HTTP: use https", settings.issuer)
        if self._is_url and state_dir is not None:
            self._kept = KeptKeys(state_dir, (settings.issuer, settings.jwks), MAX_DOCUMENT)
            self._recall(self._kept.read())

    def _recall(self, document: bytes | None) -> None:
        if document is not None:
            try:
                self._keys = keys_of(document)
            except ValueError as error:
                _log.warning("the kept keys of %s cannot be used: %s", self._settings.issuer, error)
            else:
                _log.info(
                    "the keys of %s are those of the last run: %d", self._settings.issuer, len(self._keys)
                )

    def verify(self, token: bytes) -> Claims:
        """Raises Refused, and UnknownKey where a key may be missing here."""
        if len(token) > MAX_TOKEN:
            raise Refused("the token is too long")
        try:
            head = jwt.get_unverified_header(token)
        except jwt.PyJWTError:
            raise Refused("the token is not known") from None
        keys = self._for(head)
        if not keys:
            raise UnknownKey("no key of the issuer fits the token")
        for key in keys:
            try:
                return self._claims(
                    jwt.decode(
                        token,
                        key.key,
                        algorithms=list(key.algorithms),
                        audience=self._settings.audience,
                        issuer=self._settings.issuer,
                        leeway=LEEWAY,
                        options={"require": ["exp", "iss", "aud"]},
                    )
                )
            except jwt.ExpiredSignatureError:
                raise Refused("the token has expired") from None
            except jwt.InvalidAudienceError:
                raise Refused("the token is for another audience") from None
            except jwt.InvalidIssuerError:
                raise Refused("the token is from another issuer") from None
            except jwt.MissingRequiredClaimError as error:
                raise Refused(f"the token has no claim {error.claim}") from None
            except jwt.ImmatureSignatureError:
                raise Refused("the token is not valid yet") from None
            except (jwt.InvalidSignatureError, jwt.InvalidKeyError, jwt.InvalidAlgorithmError):
                continue  # without a kid, another key may fit
            except (jwt.PyJWTError, ValueError, TypeError, OverflowError):
                raise Refused("the token is not valid") from None
        raise Refused("the token's signature is not valid")

    def _for(self, head: dict[str, Any]) -> list[Key]:
        """The keys that may have signed a token. Only `alg` and `kid` of its header count: nothing in it says
        where a key is found."""
        algorithm, kid = head.get("alg"), head.get("kid")
        if not any(algorithm in names for names in ALGORITHMS.values()):
            raise Refused("the token's algorithm is not accepted")
        if kid is not None and not isinstance(kid, str):
            raise Refused("the token is not valid")
        fitting = [key for key in self._keys if algorithm in key.algorithms and kid in (None, key.kid)]
        return fitting[:MAX_TRIED]

    def _claims(self, claims: dict[str, Any]) -> Claims:
        subject = claims.get(self._settings.subject)
        valid = isinstance(subject, str) and subject.isprintable()  # it is written to logs
        if not valid or not subject or len(subject) > _LONGEST_NAME:
            raise Refused(f"the token has no claim {self._settings.subject}, or it is not printable text")
        given = claims.get(self._settings.teams)
        teams = [given] if isinstance(given, str) else given if isinstance(given, list) else []
        return Claims(subject, tuple(t for t in teams if isinstance(t, str)), float(claims["exp"]) + LEEWAY)

    # Keys ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keeps the keys current until it is cancelled. While they cannot be read, the last ones stay."""
        failures = 0
        while True:
            failures = 0 if await self.look() else failures + 1
            wait = pause(failures) if failures else URL_INTERVAL if self._is_url else FILE_INTERVAL
            await asyncio.sleep(wait)

    async def look_for_a_new_key(self) -> bool:
        """Reads the keys now, for a token with an unknown key. Returns whether they were read; False without
        a read if the last one was a moment ago."""
        if self._reading is None and time.monotonic() - self._looked < LOOK_AGAIN:
            return False
        return await self.look()

    async def look(self) -> bool:
        """Reads the keys, once for all who call meanwhile. Returns True if they were read."""
        if self._reading is None:
            self._reading = asyncio.get_running_loop().create_task(self._look())
            self._reading.add_done_callback(self._read_ended)
        return await asyncio.shield(self._reading)

    def _read_ended(self, task: asyncio.Task[bool]) -> None:
        self._reading = None

    async def _look(self) -> bool:
        self._looked = time.monotonic()
        try:
            on_disk = partial(asyncio.get_running_loop().run_in_executor, self._files)
            document = await (self._from_url() if self._is_url else on_disk(self._from_file))
            if document is None:
                return True
            keys = keys_of(document)
            if self._kept is not None:
                await on_disk(self._kept.write, document)
        except (OSError, ValueError, httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            reason = str(error) or type(error).__name__
            _log.error(
                "cannot read the keys of %s: %s; %d stay", self._settings.issuer, reason, len(self._keys)
            )
            return False
        if [key.source for key in keys] != [key.source for key in self._keys]:
            self._keys = keys
            _log.info("read the keys of %s: %d", self._settings.issuer, len(keys))
            self._changed()
        return True

    def _from_file(self) -> bytes | None:
        """None: the file has not changed."""
        file = Path(self._settings.jwks)
        status = file.stat()
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp == self._stamp:
            return None
        if status.st_size > MAX_DOCUMENT:
            raise ValueError(f"the file is larger than {MAX_DOCUMENT >> 20} MiB")
        content = file.read_bytes()
        self._stamp = stamp
        return content

    async def _from_url(self) -> bytes:
        async with (
            asyncio.timeout(FETCH_SECONDS),
            httpx.AsyncClient(timeout=FETCH_SECONDS, follow_redirects=False) as client,
            client.stream("GET", self._settings.jwks, headers={"accept": "application/json"}) as answer,
        ):
            if answer.status_code != 200:
                raise ValueError(f"the answer has the status {answer.status_code}")
            content = b""
            async for piece in answer.aiter_bytes():
                content += piece
                if len(content) > MAX_DOCUMENT:
                    raise ValueError(f"the answer is larger than {MAX_DOCUMENT >> 20} MiB")
            return content


def keys_of(document: bytes) -> tuple[Key, ...]:
    """The usable public keys of a JSON Web Key Set; others are left out. Raises ValueError where there are
    none."""
    content = orjson.loads(document)
    entries = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(entries, list) or len(entries) > MAX_KEYS:
        raise ValueError(f"it is not a JSON Web Key Set with at most {MAX_KEYS} keys")
    keys = [key for entry in entries if (key := _key(entry)) is not None]
    if not keys:
        raise ValueError("it has no public key for RS, ES or EdDSA")
    return tuple(keys)


def _key(entry: Any) -> Key | None:
    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig" or "d" in entry:
        return None
    kind, kid, only = entry.get("kty"), entry.get("kid"), entry.get("alg")
    algorithms: Sequence[str] = ALGORITHMS.get(str(entry.get("crv") if kind == "EC" else kind), ())
    if only is not None:
        algorithms = [name for name in algorithms if name == only]
    if not algorithms or not (kid is None or isinstance(kid, str)):
        return None
    try:
        key = jwt.PyJWK(entry, algorithms[0]).key
    except (jwt.PyJWTError, ValueError, TypeError, LookupError, AttributeError):
        return None
    if kind == "RSA" and key.key_size < SMALLEST_RSA:
        return None
    return Key(kid, tuple(algorithms), key, orjson.dumps(entry, option=orjson.OPT_SORT_KEYS))
