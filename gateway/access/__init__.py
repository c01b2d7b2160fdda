"""Who may call: finds the principal of a request by its credential, and decides what it may do.

The one door to credentials. A credential is a token of the tokens file, a JWT of the issuer, or the admin
key, always in the header `Authorization: Bearer`. Knows headers as bytes; must not know a protocol, a route
or which models exist. Only the event loop uses it; files and keys are read elsewhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from gateway.access.audit import Audit
from gateway.access.keys import KEY_FILE, AdminKey, control_key
from gateway.access.limits import Limits
from gateway.access.principal import ADMIN, ANONYMOUS, NEEDED, Principal, refusal, shown, stranger
from gateway.access.sessions import Sessions
from gateway.access.teams import team_patterns, teams_of, tokens_file
from gateway.errors import Problem
from gateway.patterns import Patterns
from gateway.settings import SettingsError

if TYPE_CHECKING:
    from gateway.access.issuer import Claims, Issuer
    from gateway.names import Reference
    from gateway.settings import Settings

__all__ = ["ADMIN", "ANONYMOUS", "Access", "Principal", "control_key"]

#: How often the files of credentials are looked at, in seconds: a revoked token ends within a second.
LOOK_EVERY: Final = 0.5
AUDIT_FILE: Final = "audit.jsonl"
#: So many credentials are remembered by their digest.
KEPT: Final = 10_000
#: A longer credential is not looked at, in bytes.
LONGEST: Final = 16 << 10
_LONG: Final = 200


class Access:
    """`guarded`: credentials are configured, so that every request has a principal. Otherwise only control
    calls need one, and a request costs nothing. `files` reads files. Raises SettingsError for a file that
    cannot be used."""

    def __init__(
        self, settings: Settings, files: Executor | None = None, *, wall: Callable[[], float] = time.time
    ) -> None:
        access = settings.access
        self._files = files
        self._wall = wall
        self._admin = AdminKey(settings.admin_key_file or control_key(settings.state_dir))
        self._issuer: Issuer | None = None
        self._known: dict[bytes, Principal] = {}
        if self._admin.file is not None:
            self._admin.look()
        #: The admin key when `_known` and the sessions were filled.
        self._kept_under = self._admin.key
        self.audit = Audit(access.audit_file or settings.state_dir / AUDIT_FILE)
        #: Browsers that are signed in.
        self.sessions = Sessions(wall)
        self._limits = Limits(settings.limits)
        self._teams = team_patterns(settings)
        self.guarded = access.guarded
        self._unnamed = ANONYMOUS if access.anonymous_predicts else stranger(NEEDED)
        self._tokens = tokens_file(settings)
        if access.jwt is not None:
            try:
                from gateway.access.issuer import Issuer
            except ModuleNotFoundError as error:
                if (error.name or "").partition(".")[0] not in ("jwt", "cryptography"):
                    raise
                message = "JWTs need the extra jwt: pip install 'model-gateway[jwt]'"
                raise SettingsError([("access.jwt", message)]) from None
            self._issuer = Issuer(access.jwt, changed=self._forget, state_dir=settings.state_dir, files=files)

    # Who calls -----------------------------------------------------------------------------------

    def recall(self, headers: Mapping[bytes, bytes]) -> Principal | None:
        """The principal of a request, if its credential was seen before or it has none. None: `identify`
        finds it. `headers` are by lower-case name."""
        given = headers.get(b"authorization")
        if given is None:
            return self._unnamed
        found = self._known.get(_fingerprint(given))
        return found if found is not None and self._wall() < found.until else None

    async def identify(self, headers: Mapping[bytes, bytes]) -> Principal:
        """The principal of a request: a stranger if its credential is not valid. Waits only for the keys of
        an issuer, where one is missing."""
        given = headers.get(b"authorization")
        if given is None:
            return self._unnamed
        found = self._of(given)
        if found is None and self._issuer is not None and await self._issuer.look_for_a_new_key():
            found = self._of(given)
        if found is None:
            found = stranger("no key of the issuer fits the token")
        if found.known:
            while len(self._known) >= KEPT:
                del self._known[next(iter(self._known))]
            found = replace(found, quotas=self._limits.of(found.team, str(found)))
            self._known[_fingerprint(given)] = found
        self._forget_another_key()  # last: a thread may have read it after this one matched
        return found

    def verified(self, headers: Mapping[bytes, bytes]) -> Principal:
        """The principal of a request as its credential stands now, with the issuer's keys that are here."""
        if not self.guarded:
            return self.by_key(headers)
        return self.recall(headers) or self._of(headers[b"authorization"]) or stranger("it has ended")

    def by_key(self, headers: Mapping[bytes, bytes]) -> Principal:
        """The principal of a control call where only the admin key is a credential."""
        secret = _secret(headers.get(b"authorization", b""))
        found = ADMIN if secret and self._admin.matches(secret) else ANONYMOUS
        self._forget_another_key()
        return found

    def teams_of(self, model: str) -> frozenset[str]:
        """The teams whose patterns name a model. Models of different teams share no process. A team that may
        use all models does not count."""
        return teams_of(model, self._tokens, self._teams)

    def signed_in(self, cookies: bytes) -> Principal | None:
        """The principal of a browser that is signed in, by its Cookie header. Another admin key signs
        everybody out."""
        if not self.guarded and self._admin.file is not None:
            self._admin.look()
        self._forget_another_key()
        return self.sessions.find(cookies)

    def _forget_another_key(self) -> None:
        """Forgets everybody if the admin key changed, whichever call noticed it."""
        if self._kept_under != self._admin.key:
            self._kept_under = self._admin.key
            self._forget()

    def _forget(self) -> None:
        """Credentials may have ended: each is verified again, and browsers sign in again."""
        self._known.clear()
        self.sessions.clear()

    def _of(self, given: bytes) -> Principal | None:
        """The principal of an Authorization header; None: the issuer's key is missing here."""
        secret = _secret(given)
        if not secret:
            return stranger("send Authorization: Bearer with a token")
        if len(secret) > LONGEST:
            return stranger("the token is too long")
        if self._admin.matches(secret):
            return ADMIN
        if self._tokens is not None:
            # Looked up by digest: how long that takes says nothing about any secret.
            found = self._tokens.by_digest.get(hashlib.sha256(secret).digest())
            if found is not None:
                return found if self._wall() < found.until else stranger("the token has expired")
        if self._issuer is None or secret.count(b".") != 2:
            return stranger("the token is not known")
        return self._of_jwt(self._issuer, secret)

    def _of_jwt(self, issuer: Issuer, secret: bytes) -> Principal | None:
        from gateway.access.issuer import Refused, UnknownKey

        try:
            claims = issuer.verify(secret)
        except UnknownKey:
            return None
        except Refused as error:
            return stranger(str(error))
        return self._member(claims)

    def _member(self, claims: Claims) -> Principal:
        """The principal of a JWT: it may use what its teams may. Its first team in the settings counts for
        limits and metrics."""
        teams = [name for name in self._teams if name in claims.teams or name == "*"]
        named = [name for name in teams if name != "*"]
        predict, control = (
            Patterns(
                [text for name in teams for text in self._teams[name][kind].texts],
                self._teams[teams[0]][kind].default_alias if teams else (),
            )
            for kind in (0, 1)
        )
        team = named[0] if named else ""
        return Principal(claims.subject, "jwt", team, predict, control, claims.until)

    # What it may do ------------------------------------------------------------------------------

    def check_control(
        self, principal: Principal, reference: Reference | None, *, whole: bool = False
    ) -> None:
        """Raises UNAUTHENTICATED or FORBIDDEN where the principal may not control the model; None: the whole
        gateway. `whole`: a bare NAME means the model with all its versions, not its default alias."""
        if self.controls(principal, reference, whole=whole):
            return
        if self.guarded:
            what = "the whole gateway (the pattern *)" if reference is None else shown(reference)
            if whole and reference is not None and reference.is_bare:
                what = f"all of {what}: a pattern of the name alone is needed"
            raise refusal(principal, f"control {what}")
        if self._admin.file is None:
            raise Problem(
                "FORBIDDEN",
                "control calls are closed: there is no admin key, and the gateway could not write one",
                hint="set admin_key_file or make state_dir writable, then restart the gateway",
            )
        place = f"{KEY_FILE} in its state_dir" if self._admin.file.name == KEY_FILE else "its admin_key_file"
        raise Problem(
            "UNAUTHENTICATED",
            "this call needs the gateway's admin key",
            hint=f"send Authorization: Bearer KEY; the key is in the file {place}, and the command line "
            "reads it if it runs as the gateway's user",
        )

    def controls(self, principal: Principal, reference: Reference | None, *, whole: bool = False) -> bool:
        """Whether the principal may control the model, or the whole gateway. `whole`: see `check_control`."""
        if reference is None:
            return principal.control.everything
        if whole and reference.is_bare:
            return principal.control.covers_model(reference.name)
        return principal.control.covers(reference)

    # Background ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Follows the files and the issuer's keys until it is cancelled."""
        if not self.guarded:
            return
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            if self._issuer is not None:
                tasks.create_task(self._issuer.run())

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY)
            if await asyncio.get_running_loop().run_in_executor(self._files, self._look):
                self._forget()
            self._forget_another_key()

    def _look(self) -> bool:
        """Looks at the files. Returns whether the tokens are others now."""
        if self._admin.file is not None:
            self._admin.look()
        return self._tokens is not None and self._tokens.look()


def _fingerprint(given: bytes) -> bytes:
    """What is kept of a credential in memory. Which digest is the faster one depends on the length."""
    return (hashlib.blake2b if len(given) < _LONG else hashlib.sha256)(given).digest()


def _secret(given: bytes) -> bytes:
    """The credential in an Authorization header; empty if its scheme is not Bearer."""
    scheme, _, secret = given.partition(b" ")
    return secret.strip() if scheme.lower() == b"bearer" else b""
