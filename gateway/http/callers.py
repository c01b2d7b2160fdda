"""Who calls, over HTTP and gRPC: the request's record in front of `gateway.access`.

Every route asks here. Knows the record; what a credential allows is `gateway.access`'s affair.
"""

from __future__ import annotations

import time
from asyncio import CancelledError
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from gateway.access import ANONYMOUS, Access, Principal
from gateway.access.audit import DONE, Audited
from gateway.access.principal import check_predict, check_read, refusal, shown, stranger
from gateway.errors import Problem
from gateway.quantities import utc

if TYPE_CHECKING:
    from gateway.access.sessions import Sessions
    from gateway.names import Reference
    from gateway.record import RequestRecord
    from gateway.views import ReadinessView

T = TypeVar("T")

_LONGEST_CALL: Final = 400


class Callers:
    """Checks requests. `elsewhere`: control calls and views of the whole gateway have their own listener.

    Each check raises UNAUTHENTICATED without a valid credential, and FORBIDDEN with one that does not cover
    the model, whether or not that exists."""

    def __init__(self, access: Access, *, elsewhere: bool = False) -> None:
        self._access = access
        self._elsewhere = elsewhere
        #: Whether every request has a principal; else only control calls need one.
        self.guarded = access.guarded

    async def identify(self, record: RequestRecord) -> None:
        """Finds the principal of a request to a guarded gateway."""
        if record.twice == "Authorization":
            record.principal = stranger("the header Authorization came twice, with different values")
            return
        headers = record.headers
        record.principal = self._signed_in(record)
        if record.principal is not None:
            return
        record.principal = self._access.recall(headers) or await self._access.identify(headers)

    def principal(self, record: RequestRecord) -> Principal:
        """Returns the caller, also if only the admin key is a credential."""
        if record.principal is None:
            twice = record.twice == "Authorization"
            found = None if twice else self._signed_in(record)
            record.principal = found or (ANONYMOUS if twice else self._access.by_key(record.headers))
        return record.principal

    @property
    def sessions(self) -> Sessions:
        """The browsers that are signed in."""
        return self._access.sessions

    def from_here(self, record: RequestRecord) -> bool:
        """Whether a browser sends a request for a page of this gateway, or for its user alone, and no other
        page made it. A program other than a browser says nothing, and has our cookie only on purpose."""
        headers = record.headers
        site = headers.get(b"sec-fetch-site")
        if site is not None:
            return site in (b"same-origin", b"none")
        origin = headers.get(b"origin")
        return origin is None or origin.partition(b"://")[2] == headers.get(b"host")

    def _signed_in(self, record: RequestRecord) -> Principal | None:
        cookies = record.headers.get(b"cookie")
        if cookies is None or b"authorization" in record.headers or not self.from_here(record):
            return None
        return self._access.signed_in(cookies)

    def predict(self, record: RequestRecord, reference: Reference | None) -> None:
        """Checks a prediction. None: before the model is known, and before a body is read; then also raises
        OVERLOADED for a caller whose limits let no request pass now."""
        principal = record.principal
        if principal is not None:
            check_predict(principal, reference)
            if reference is None and principal.quotas:
                for quota in principal.quotas:
                    quota.check()

    def known(self, record: RequestRecord) -> None:
        """Checks that the caller has a valid credential, where one is needed: before a body is read."""
        principal = record.principal
        if principal is not None and not principal.known:
            raise refusal(principal, "do this")

    def read(self, record: RequestRecord, name: str) -> None:
        """Checks a view of a model."""
        if record.principal is not None:
            check_read(record.principal, name)

    def control(self, record: RequestRecord, reference: Reference | None, *, whole: bool = False) -> None:
        """Checks control of a model by this reference; None: of the whole gateway. `whole`: a bare NAME means
        the model with all its versions, not its default alias."""
        self.check_listener(record)
        self._access.check_control(self.principal(record), reference, whole=whole)

    @contextmanager
    def audited(
        self,
        record: RequestRecord,
        call: str,
        reference: Reference | None,
        standing: Callable[[], str | None] = lambda: None,
        *,
        whole: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """Checks control, and writes down the call that happens inside with how it ended. `standing`: how
        what is controlled stands; `whole`: see `control`. Yields a place for what the call asks. A call
        without a valid credential names no caller, and is not written down."""
        principal = self.principal(record)
        asked: dict[str, Any] = {}
        before, result = _quietly(standing), DONE
        try:
            self.control(record, reference, whole=whole)
            yield asked
        except Problem as problem:
            result = problem.code
            raise
        except BaseException as error:
            result = "CLIENT_LEFT" if isinstance(error, CancelledError) else "INTERNAL"
            raise
        finally:
            if principal.known:
                about = None if reference is None else shown(reference)
                audited = Audited(
                    *(utc(time.time()), str(principal), principal.team, call[:_LONGEST_CALL], about, asked),
                    *(before, _quietly(standing), result, record.shown_id),
                )
                self._access.audit.record(audited, reference)

    def calls(self, name: str, alias: str) -> list[dict[str, Any]]:
        """The last control calls about an alias."""
        return self._access.audit.calls(name, alias)

    def controls(self, record: RequestRecord, reference: Reference | None) -> bool:
        """Returns True if the caller may control the model; None: the whole gateway."""
        return self._access.controls(self.principal(record), reference)

    def operate(self, record: RequestRecord, *, always: bool = False) -> None:
        """Checks a view of the whole gateway. It needs control where credentials are configured (`always`:
        everywhere), but not on a listener of its own."""
        self.check_listener(record)
        if (self.guarded or always) and not record.administers:
            self.control(record, None)

    def still_operates(self, record: RequestRecord) -> bool:
        """Whether `operate` would still pass, for a view that goes on: the credential may have ended."""
        if record.administers:
            return True
        principal = self._signed_in(record) or self._access.verified(record.headers)
        return self._access.controls(principal, None)

    def check_listener(self, record: RequestRecord) -> None:
        """Raises NOT_FOUND where control calls, the console and peers have another listener."""
        if self._elsewhere and not record.administers:
            hint = "control calls and metrics have a listener of their own: the setting admin_listen"
            raise Problem("NOT_FOUND", "there is nothing at this path here", hint=hint)

    def readable(self, record: RequestRecord, items: Iterable[T], name: Callable[[T], str]) -> list[T]:
        """Those about models that the caller may read about. Raises UNAUTHENTICATED without a credential
        where one is needed."""
        principal = record.principal
        if principal is None or principal.reads_everything:
            return list(items)
        if not principal.known:
            check_predict(principal, None)
        return [item for item in items if principal.reads(name(item))]

    def reads(self, record: RequestRecord) -> Callable[[str], bool] | None:
        """Whether the caller may read about a model, by its name; None: about all of them. Raises
        UNAUTHENTICATED without a credential where one is needed."""
        principal = record.principal
        if principal is None or principal.reads_everything:
            return None
        if not principal.known:
            check_predict(principal, None)
        return principal.reads

    def readiness(self, record: RequestRecord, view: ReadinessView) -> ReadinessView:
        """Returns what the caller may see of the gateway's readiness."""
        if not self.controls(record, None):
            # Probes come from elsewhere, and need not know where the registry lies.
            registry = view.registry
            reason = "it cannot be read now; the log says why" if registry["error"] else None
            view = replace(view, registry={"age_seconds": registry["age_seconds"], "error": reason})
        return view if self.sees_all(record) else view.without_names()

    def sees_all(self, record: RequestRecord) -> bool:
        """Returns True if the caller may see the names of all models."""
        return record.principal is None or record.principal.reads_everything


def _quietly(standing: Callable[[], str | None]) -> str | None:
    try:
        return standing()
    except Problem:  # there is nothing that could stand anywhere
        return None


def discreet(problem: Problem, record: RequestRecord) -> Problem:
    """The problem without names of models that the caller may not know: what resembles an unknown name."""
    principal = record.principal
    if problem.code == "MODEL_NOT_FOUND" and principal is not None and not principal.reads_everything:
        problem.hint = None
    return problem
