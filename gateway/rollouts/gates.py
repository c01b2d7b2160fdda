"""The gates of a move: may this version answer for this alias?

There is one set of gates, in this order: the version is registered; no gateway has refused it for this alias;
its files are available and match the digest; its format is allowed; it accepts the inputs of the version in
service; it loads, warms up and answers its example, as its output schema says if the version in service
does. The reconciler, promotions through a gateway and
promotions on the command line all run `Gates.check`.

Knows versions, packages and the manager that loads them. Must not write anything or move an alias.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from gateway.errors import Detail, Problem
from gateway.registries.base import Model, Version
from gateway.rollout_settings import RolloutPolicy
from gateway.rollouts.records import Record, not_registered
from loaders.compatibility import compatible

if TYPE_CHECKING:
    from gateway.artifacts.packages import Prepared
    from gateway.serving.manager import Lease, Manager
    from loaders.signature import Signature

log = logging.getLogger("gateway.rollouts")


@dataclass(slots=True)
class Trial:
    """One run of the gates. `checks`: the finished checks with their seconds. `now`: the running check.
    `told` is called when a check ends. `order`: what a person said meanwhile, `pause`, `resume` or `finish`;
    `aborted` is set by `abort`."""

    version: str
    checks: list[tuple[str, float]] = field(default_factory=list)
    now: str | None = None
    told: Callable[[str, float], None] = lambda check, seconds: None
    dry_run: bool = False
    order: str | None = None
    aborted: asyncio.Event = field(default_factory=asyncio.Event)

    def say(self, verb: str) -> None:
        """A person's order, which comes before the alias moves."""
        if verb == "abort":
            self.aborted.set()
        else:
            self.order = verb

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        self.now = name
        try:
            yield
        except Problem:
            name += ": refused"
            raise
        finally:
            self.now = None
            self.checks.append((name, round(time.monotonic() - began, 3)))
            self.told(*self.checks[-1])

    def to_json(self) -> dict[str, Any]:
        checks = [{"check": check, "seconds": seconds} for check, seconds in self.checks]
        return {"version": self.version, "now": self.now, "checks": checks}


@dataclass(slots=True)
class Passed:
    """A version that passed the gates. `lease` keeps it loaded until it is released. `overruled`: the reasons
    against it that the operator overruled."""

    lease: Lease
    overruled: tuple[str, ...] = ()


def _give_up(checking: asyncio.Task[Passed]) -> None:
    """Ends a check for which no caller waits any more."""
    if not checking.cancelled() and checking.exception() is None:
        checking.result().lease.release()


class Gates:
    """`prepare` gets a version's package without loading it. `policy` gives a model's rollout policy and the
    error in it, if any."""

    def __init__(
        self,
        manager: Manager,
        *,
        prepare: Callable[[Version], Awaitable[Prepared]],
        policy: Callable[[Model], tuple[RolloutPolicy, str | None]] = lambda model: (RolloutPolicy(), None),
    ) -> None:
        self._manager = manager
        self._prepare = prepare
        self._policy = policy
        self._warned: set[str] = set()

    async def check(
        self,
        target: Version,
        record: Record,
        *,
        force: bool = False,
        prepare: Callable[[Version], Awaitable[Prepared]] | None = None,
        trial: Trial | None = None,
        dry_run: bool = False,
    ) -> Passed:
        """Takes a version through the gates; afterwards it is loaded and warm. `force` overrules an earlier
        verdict, an incompatible signature, an unavailable environment and an output that does not match its
        schema, nothing else. `prepare`: gets the package in another way. `trial` is kept up to date.
        `dry_run`: its load is not recorded. Raises Problem."""
        trial = trial or Trial(target.version)
        if not target.source:
            raise not_registered(target)
        verdict = record.verdict
        if verdict is not None and verdict.version == target.version and not force:
            message = f"{target} was {verdict.said} by another gateway: {verdict.reason}"
            raise Problem("ROLLOUT_REFUSED", message, hint=FORCE)
        self._manager.check(target)
        prepare = prepare or self._prepare
        with trial.check("files, digest and format"):
            try:
                prepared = await self._prepared(target, prepare)
            except Problem as problem:
                self._manager.failed(target, problem)
                raise
        with trial.check(f"signature, compared with {record.against or 'nothing'}"):
            reasons = await self._compare(target, prepared, record, prepare)
            if not force:
                _require_none(target, record, reasons)
        if force or self.policy(record.model).environment == "warn":
            prepared = replace(prepared, forced=True)
        with trial.check("load, warm-up and example"):
            loaded = self._manager.find(target) is not None
            lease = self._manager.lease(target, prepared, dry_run=dry_run)
            try:
                await self._manager.ready(lease)
                reasons += self._compare_loaded(target, record, prepared, lease.servable.prepared)
                if not force:
                    _require_none(target, record, reasons)
                    self._check_output(target, record, lease.servable.misfits)
            except BaseException:
                lease.release()
                if not loaded:
                    self._manager.retire_unused(target, "refused")
                raise
        return Passed(lease, tuple(reasons))

    async def check_unless(
        self, ends: asyncio.Event, target: Version, record: Record, **more: Any
    ) -> Passed | None:
        """The same as `check`, but returns None as soon as `ends` is set."""
        checking = asyncio.ensure_future(self.check(target, record, **more))
        ending = asyncio.ensure_future(ends.wait())
        try:
            await asyncio.wait({checking, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not checking.done():
                checking.cancel()
                await asyncio.wait({checking})
                if checking.cancelled() or checking.exception() is not None:
                    return None
            return checking.result()
        except asyncio.CancelledError:
            checking.add_done_callback(_give_up)
            raise
        finally:
            ending.cancel()
            if not checking.done():
                checking.cancel()

    def _compare_loaded(
        self, target: Version, record: Record, prepared: Prepared, loaded: Prepared | None
    ) -> list[str]:
        """The same for a version that states its signature only once it is loaded, as a bare model file
        does."""
        against = record.against
        if not _states_later(prepared) or loaded is None or not _is_compared(target, record):
            return []
        before = None if against is None else self._manager.find(against)
        if before is None or before.prepared is None:
            return []
        return refusals(self.policy(record.model), before.prepared.stated, loaded.stated)

    def _check_output(self, target: Version, record: Record, misfits: tuple[str, ...] | None) -> None:
        """Refuses a version whose answer to its own example is not what its output schema says, if that of
        the version in service is: callers rely on it. Raises Problem."""
        against = record.against
        if not misfits or against is None or against == target or target.version in record.served:
            return
        before = self._manager.find(against)
        if before is None or before.misfits != () or self.policy(record.model).gate == "none":
            return
        message = f"{target} does not answer its example as its output schema says: {'; '.join(misfits)}"
        details = [Detail("output", misfit) for misfit in misfits]
        raise Problem("ROLLOUT_REFUSED", message, details=details, hint=FORCE)

    async def _compare(
        self,
        target: Version,
        prepared: Prepared,
        record: Record,
        prepare: Callable[[Version], Awaitable[Prepared]],
    ) -> list[str]:
        """Why callers of the version in service would not be understood. A version that has answered under
        this alias before is not compared: the way back is always open."""
        against = record.against
        if against is None or _states_later(prepared) or not _is_compared(target, record):
            return []
        policy = self.policy(record.model)
        try:
            predecessor = (await self._prepared(against, prepare)).stated
        except Problem:
            return []  # its files are gone: there is nothing to compare with
        return refusals(policy, predecessor, prepared.stated)

    async def _prepared(
        self, version: Version, prepare: Callable[[Version], Awaitable[Prepared]]
    ) -> Prepared:
        servable = self._manager.find(version)
        if servable is not None and servable.prepared is not None:
            return servable.prepared
        return await prepare(version)

    def policy(self, model: Model) -> RolloutPolicy:
        """The policy that holds for a model. A wrong one in the registry is said once, and not used."""
        policy, wrong = self._policy(model)
        if wrong is not None and wrong not in self._warned:
            self._warned.add(wrong)
            log.warning("%s; the gateway's own policy is used", wrong)
        return policy

    def policy_error(self, model: Model) -> str | None:
        """The error in the registry's policy for a model; None if it is valid."""
        return self._policy(model)[1]


def _states_later(prepared: Prepared) -> bool:
    return prepared.package.bare is not None and prepared.accepted is None


def _is_compared(target: Version, record: Record) -> bool:
    against = record.against
    is_other = against is not None and against != target and bool(against.source)
    return is_other and target.version not in record.served


def _require_none(target: Version, record: Record, reasons: list[str]) -> None:
    """Raises ROLLOUT_REFUSED with the reasons, if there are any."""
    if reasons:
        message = f"{target} may not replace {record.against}: {'; '.join(reasons)}"
        details = [Detail("signature", reason) for reason in reasons]
        raise Problem("ROLLOUT_REFUSED", message, details=details, hint=FORCE)


FORCE = 'to move the alias anyway: --force, or {"force": true}'


def refusals(policy: RolloutPolicy, old: Signature | None, new: Signature | None) -> list[str]:
    """The reasons why `new` may not replace `old`; empty if it may. Pure."""
    if policy.gate == "none":
        return []
    return compatible(old, new)
