"""Who calls: a principal, with what it may use. It is found once for each request.

Must not know how a credential is verified, nor a protocol.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gateway.errors import Problem
from gateway.patterns import Patterns

if TYPE_CHECKING:
    from gateway.access.limits import Quota
    from gateway.names import Reference

NEEDED: Final = "this gateway needs a credential"
_SHOWN: Final = 300

NOTHING: Final = Patterns(())
EVERYTHING: Final = Patterns(("*",))


@dataclass(frozen=True, slots=True, eq=False)
class Principal:
    """`name`: the token's name or the JWT's subject, unique together with `kind` (`token`, `jwt`, `admin`,
    `anonymous`, `stranger`). `team`: its team, empty if it has none. `predict`, `control`: the models that it
    may use, and those that it may control. `until`: when the credential ends, in unix seconds. `quotas`: the
    limits that count its requests. `fault`: why the credential is not valid; of a stranger only."""

    name: str
    kind: str
    team: str = ""
    predict: Patterns = NOTHING
    control: Patterns = NOTHING
    until: float = math.inf
    quotas: tuple[Quota, ...] = ()
    fault: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}" if self.kind in ("token", "jwt") else self.kind

    @property
    def known(self) -> bool:
        """Returns True if it showed a valid credential."""
        return self.kind not in ("anonymous", "stranger")

    def reads(self, name: str) -> bool:
        """Returns True if it may read about the model of this name."""
        return self.predict.touches(name) or self.control.touches(name)

    @property
    def reads_everything(self) -> bool:
        """Returns True if it may read about every model."""
        return self.predict.everything or self.control.everything


#: The holder of the admin key.
ADMIN: Final = Principal("admin", "admin", predict=EVERYTHING, control=EVERYTHING)
#: A caller without a credential, where predictions need none.
ANONYMOUS: Final = Principal("anonymous", "anonymous", predict=EVERYTHING)


def stranger(fault: str) -> Principal:
    """A caller without a valid credential, where one is needed."""
    return Principal("", "stranger", fault=fault)


def check_predict(principal: Principal, reference: Reference | None) -> None:
    """Raises UNAUTHENTICATED, or FORBIDDEN whether or not the model exists. None: the model is not known yet,
    and some model must be allowed."""
    if reference is None:
        if not principal.predict.texts:
            raise refusal(principal, "predict")
    elif not principal.predict.covers(reference):
        raise refusal(principal, f"predict with {shown(reference)}")


def check_read(principal: Principal, name: str) -> None:
    """The same for what is said about a model."""
    if not principal.reads(name):
        raise refusal(principal, f"read about models:/{name[:_SHOWN]}")


def refusal(principal: Principal, what: str) -> Problem:
    """401 without a valid credential, 403 with one. Says nothing that the caller did not send."""
    if principal.known:
        message = f"the credential of {principal.name!r} may not {what}"
        return Problem("FORBIDDEN", message, hint="ask the operator for a pattern that covers it")
    hint = "send the header Authorization: Bearer TOKEN, with a token that is valid here"
    return Problem("UNAUTHENTICATED", principal.fault or NEEDED, hint=hint)


def shown(reference: Reference) -> str:
    """A reference as the caller wrote it, cut."""
    return str(reference)[:_SHOWN]
