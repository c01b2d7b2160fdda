"""Moving an alias: promote and roll back, for a running gateway and for the command line without one.

Both run the same gates, write the same `Move` and use the same texts. The differences are arguments: how the
registry is queried, and what happens with the content that a write returns.

Knows references, gates and registries; must not know a protocol or a terminal.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from gateway.errors import Problem, pathless
from gateway.names import Reference, check_alias, check_name, check_version
from gateway.registries.base import (
    ANYWHERE,
    Move,
    PreconditionFailed,
    Registry,
    RegistryError,
    RegistryInvalid,
    RegistryReadOnly,
    Snapshot,
    Version,
)
from gateway.registries.resolution import find_alias, resolve
from gateway.rollouts.agreement import Outcome
from gateway.rollouts.gates import Trial
from gateway.rollouts.phases import ABORTED
from gateway.rollouts.records import PROMOTE, ROLLBACK

if TYPE_CHECKING:
    from gateway.artifacts.packages import Prepared
    from gateway.rollouts.aliases import Aliases
    from gateway.rollouts.gates import Passed
    from gateway.rollouts.records import Record
    from gateway.rollouts.replay import Report
    from gateway.serving.manager import Lease, Manager

T = TypeVar("T")

#: A loaded version begins to serve within these seconds, so that a caller who does not wait sees the result.
A_MOMENT = 1.0


@dataclass(frozen=True, slots=True)
class Moved:
    """A move that passed its gates. `previous`: the version the alias pointed to before (None: it did not
    exist). `overruled`: reasons against it that the operator overruled. `checks`: each with its seconds.
    `environment`: what the version was made with and where it runs here, None where it was not looked at.
    `unchanged`: it pointed there already. `written` False: a dry run. `replay`: what captured requests have
    shown in a dry run; None if a rollout would not replay any."""

    move: Move
    target: Version
    previous: str | None
    overruled: tuple[str, ...] = ()
    checks: tuple[tuple[str, float], ...] = ()
    environment: dict[str, Any] | None = None
    unchanged: bool = False
    written: bool = True
    replay: Report | None = None


class Promotions:
    """`ask` queries the registry about a reference now, so that the aliases know the answer. `take` receives
    the content that a write returned, and the writer. `quiet` gets a package without recording it. `told` is
    called for each finished check, with its seconds. `trials`: the running checks by model and alias."""

    def __init__(
        self,
        aliases: Aliases,
        manager: Manager,
        registry: Registry,
        io: Executor,
        *,
        ask: Callable[[Reference], Awaitable[object]],
        take: Callable[[Snapshot, str], None],
        quiet: Callable[[Version], Awaitable[Prepared]] | None = None,
        told: Callable[[str, float], None] = lambda check, seconds: None,
    ) -> None:
        self._aliases = aliases
        self._manager = manager
        self._registry = registry
        self._io = io
        self._ask = ask
        self._take = take
        self._quiet = quiet
        self._told = told
        self.trials: dict[tuple[str, str], Trial] = {}

    @asynccontextmanager
    async def promote(
        self,
        name: str,
        alias: str,
        version: str,
        *,
        expect: str | None = ANYWHERE,
        force: bool = False,
        dry_run: bool = False,
        steps: tuple[float, ...] | None = None,
        shadow: float | None = None,
    ) -> AsyncIterator[Moved]:
        """Runs the gates, then writes the registry. Inside the context the version is loaded and warm. A
        refusal leaves the registry unchanged. A version that the alias points to already passes the gates
        again, unless it serves or is on its way; in a dry run always. `steps` of the canary, and `shadow`,
        the share of copied requests: None for those of the policy. Raises Problem."""
        move = Move(check_name(name), check_alias(alias), check_version(version), expect)
        if not dry_run:
            await self._must_be_writable()
        await self._ask(Reference(name, version=version))
        snapshot = self._aliases.snapshot
        target = resolve(snapshot, Reference(name, version=version))
        model = snapshot.models[name]
        entry = model.aliases.get(alias)
        move.check(entry)
        if (wrong := self._aliases.gates.policy_error(model)) is not None:
            raise Problem("ROLLOUT_REFUSED", wrong, hint="correct the policy in the registry")
        again = entry is not None and entry.version == version and not entry.refused and entry.forced >= force
        if again and not dry_run and self._is_there(name, alias, target):
            found = self._aliases.find(name, alias)
            if found is not None and found.rollout is None and found.serving != target:  # it is on its way
                self._aliases.conductor.courses.plan(name, alias, version, steps, shadow)
            held = self._manager.find(target)
            prepared = None if held is None else held.prepared
            environment = None if prepared is None else prepared.environment()
            yield Moved(move, target, version, environment=environment, unchanged=True)
            return
        # A version that an operator has forced stays forced.
        forced = again and entry is not None and entry.forced
        moving = self._moved(
            move, target, force=force or forced, moved_by=PROMOTE, dry_run=dry_run,
            steps=steps, shadow=shadow, unchanged=again,
        )  # fmt: skip
        async with moving as moved:
            yield moved

    @asynccontextmanager
    async def rollback(self, name: str, alias: str, to: str | None = None) -> AsyncIterator[Moved]:
        """Back to the version that served before the present one; again: further back. It must load, and no
        signature stops it. Raises Problem."""
        check_name(name), check_alias(alias)
        await self._must_be_writable()
        await self._ask(Reference(name))
        entry = find_alias(self._aliases.snapshot, name, alias)
        if to is None:
            to = self._aliases.earlier(name, alias)
        if to is None:
            raise self._nothing_before(name, alias, entry.version)
        check_version(to)
        if to not in self._aliases.snapshot.models[name].versions:
            await self._ask(Reference(name, version=to))
        target = resolve(self._aliases.snapshot, Reference(name, version=to))
        # `expect`: a move that came while this version was checked is newer, and wins.
        move = Move(name, alias, to, entry.version, back=True)
        async with self._moved(move, target, force=True, moved_by=ROLLBACK) as moved:
            yield moved

    async def take_effect(self, moved: Moved, *, wait: float | None) -> bool:
        """Follows a move until its version serves, or gets its first step. Returns whether the alias serves
        it. The version is loaded, so this is usually quick. `wait`: the seconds that the caller waits; a
        refusal is then raised as a Problem. None: the caller does not wait."""
        move = moved.move
        found = self._aliases.open(move.name, move.alias, ROLLBACK if move.back else PROMOTE)
        if moved.unchanged:
            self._aliases.clear_error(found)
        try:
            await self._aliases.served(found, moved.target, A_MOMENT if wait is None else wait)
        except Problem:
            if wait is not None:
                raise
        return wait is not None and not found.in_steps

    async def direct(self, name: str, alias: str, verb: str) -> None:
        """Runs `pause`, `resume`, `finish` or `abort` at once: on the promotion whose version is checked now,
        or on the current rollout. If there is none, a move may just have been written: queries the registry
        first. Raises Problem."""
        trial = self.trials.get((name, alias))
        if trial is not None and not trial.dry_run:
            trial.say(verb)
            return
        found = self._aliases.find(name, alias)
        if found is None or (found.rollout is None and not self._aliases.orders.begins(found)):
            with contextlib.suppress(Problem):  # what is known must do
                await self._ask(Reference(name))
        find_alias(self._aliases.snapshot, name, alias)
        self._aliases.orders.give(self._aliases.open(name, alias), verb)

    async def delete_alias(self, name: str, alias: str) -> None:
        await self._must_be_writable()
        snapshot = await self._writing(lambda: self._registry.delete_alias(name, alias))
        self._take(snapshot, "delete")

    @asynccontextmanager
    async def _moved(
        self,
        move: Move,
        target: Version,
        *,
        force: bool,
        moved_by: str,
        dry_run: bool = False,
        steps: tuple[float, ...] | None = None,
        shadow: float | None = None,
        unchanged: bool = False,
    ) -> AsyncIterator[Moved]:
        name, alias = move.name, move.alias
        entry = self._aliases.snapshot.models[name].aliases.get(alias)
        # A move that comes while the version is checked is newer, and wins.
        anywhere = move.expect == ANYWHERE
        expect = entry.version if anywhere and entry is not None else move.expect
        again = entry is not None and entry.version == move.version
        record = self._aliases.record(name, alias, again=again)
        loaded = self._manager.find(target) is not None
        failed = self._manager.failure(target)
        self._manager.retry(target)
        trial = Trial(target.version, told=self._told, dry_run=dry_run)
        held = self._held(name, alias)
        try:
            with self._shown(name, alias, trial):
                passed = await self._passed(
                    target, record, trial, force=force, loaded=loaded,
                    prepare=self._quiet if dry_run else None,
                )  # fmt: skip
                replay = None
                if dry_run:
                    try:
                        named = steps is not None or shadow is not None
                        replay = await self._rehearsed(name, alias, target, record, trial, named=named)
                    except BaseException:
                        passed.lease.release()
                        self._unload_tried(target, loaded)
                        raise
        except Problem as problem:
            if dry_run and failed is None:
                self._manager.retry(target)
            if not dry_run:
                self._aliases.refuse(name, alias, target, problem)
            raise _refused(problem) from None
        finally:
            if held is not None:
                held.release()
        found = self._aliases.find(name, alias)
        serving = None if found is None or found.serving is None else found.serving.version
        move = Move(
            name, alias, move.version, expect, forced=bool(passed.overruled), back=move.back,
            last_good=move.version if move.back and move.version in record.served else record.good,
            serving=serving,
        )  # fmt: skip
        try:
            if not dry_run:
                with self._shown(name, alias, trial):
                    await self._write(move, trial, moved_by, steps, shadow, anywhere=anywhere)
            previous = None if entry is None else entry.version
            prepared = passed.lease.servable.prepared
            environment = None if prepared is None else prepared.environment()
            checks = tuple(trial.checks)
            yield Moved(
                move, target, previous, passed.overruled, checks, environment,
                unchanged=unchanged, written=not dry_run, replay=replay,
            )  # fmt: skip
        finally:
            passed.lease.release()
            if dry_run:
                self._unload_tried(target, loaded)

    def _unload_tried(self, target: Version, loaded: bool) -> None:
        """Unloads a version after a dry run, unless it was `loaded` before, or serves since."""
        if not loaded and all(found.serving != target for found in self._aliases):
            self._manager.retire_unused(target, "unloaded")

    @contextmanager
    def _shown(self, name: str, alias: str, trial: Trial) -> Iterator[None]:
        """Shows a check, or the write that follows it, so that orders reach it."""
        self.trials[name, alias] = trial
        try:
            yield
        finally:
            if self.trials.get((name, alias)) is trial:
                del self.trials[name, alias]

    async def _passed(
        self,
        target: Version,
        record: Record,
        trial: Trial,
        *,
        force: bool,
        loaded: bool,
        prepare: Callable[[Version], Awaitable[Prepared]] | None,
    ) -> Passed:
        """Runs the gates until a person aborts them. `loaded`: the version was loaded before. Raises
        Problem."""
        passed = await self._aliases.gates.check_unless(
            trial.aborted, target, record,
            force=force, prepare=prepare, trial=trial, dry_run=trial.dry_run,
        )  # fmt: skip
        if passed is not None and not trial.aborted.is_set():
            return passed
        if passed is not None:
            passed.lease.release()
        if not loaded:
            self._manager.retire_unused(target, "aborted")
        raise Problem("ROLLOUT_REFUSED", f"{target} was not promoted: {ABORTED}")

    async def _write(
        self,
        move: Move,
        trial: Trial,
        moved_by: str,
        steps: tuple[float, ...] | None,
        shadow: float | None,
        *,
        anywhere: bool,
    ) -> None:
        """Writes a move that passed its gates, with what a person has said meanwhile. `anywhere`: no caller
        said where the alias must point."""
        name, alias, order = move.name, move.alias, trial.order
        forget = self._aliases.conductor.courses.plan(name, alias, move.version, steps, shadow, order)
        with self._aliases.announced(name, alias, move.version, moved_by):
            try:
                snapshot = await self._writing(lambda: self._registry.move(move))
            except PreconditionFailed as failed:
                if anywhere and failed.actual == move.version:
                    return  # another promotion of the same version was faster
                forget()
                raise
            except BaseException:
                forget()
                raise
            self._take(snapshot, moved_by)
        late = "abort" if trial.aborted.is_set() else trial.order
        if late is not None and late != order:
            with contextlib.suppress(Problem):  # it has no steps
                self._aliases.orders.give(self._aliases.open(name, alias, moved_by), late)

    async def _rehearsed(
        self, name: str, alias: str, target: Version, record: Record, trial: Trial, *, named: bool
    ) -> Report | None:
        """Lets a version that passed the gates answer captured requests, as its rollout would. Raises Problem
        if the rollout would be refused."""
        conductor, found = self._aliases.conductor, self._aliases.view(name, alias)
        service = record.against
        if found is None or service is None:
            return None
        report = conductor.rehearsal(found, record.model, target, service, named=named)
        if report is None:
            return None
        signature = None
        if self._quiet is not None:
            with contextlib.suppress(Problem):  # its files are gone: the inputs are typed again
                signature = (await self._quiet(service)).stated
        with trial.check("captured requests"):
            await conductor.rehearse(report, signature)
            thin = report.outcome is Outcome.THIN and conductor.policy(record.model).thin == "refuse"
            if report.outcome is Outcome.FAILED or thin:
                message = f"{target} may not replace {service}: {report}"
                raise Problem("ROLLOUT_REFUSED", message, details=report.details())
        return report

    def _is_there(self, name: str, alias: str, target: Version) -> bool:
        """Returns whether the version that an alias points to serves, or is on its way and was not refused
        yet."""
        found = self._aliases.find(name, alias)
        if found is None:
            return False
        if found.rollout is not None:
            return True
        if found.serving == target:
            return self._manager.failure(target) is None
        running = found.task is not None and found.attempt is not None and not found.attempt.done()
        return running and found.refusal is None

    def _held(self, name: str, alias: str) -> Lease | None:
        """A lease that keeps the version in service loaded while another one is tried, so that it is not
        evicted for the trial. None if nothing is loaded."""
        found = self._aliases.find(name, alias)
        serving = None if found is None else found.serving
        if serving is None or not self._manager.is_ready(serving):
            return None
        return self._manager.lease(serving, pin=True)

    def _nothing_before(self, name: str, alias: str, current: str) -> Problem:
        others = sorted(self._aliases.record(name, alias).served - {current}, key=int)
        message = f"no version is known to have served at {name}@{alias} before version {current}"
        if others:
            message += f"; it has also served {', '.join(others)}, but later"
        return Problem("ROLLOUT_REFUSED", message, hint='name the version to go to: --to V, or {"to": "V"}')

    async def _must_be_writable(self) -> None:
        reason = await self._blocking(self._registry.why_not_writable)
        if reason is not None:
            raise RegistryReadOnly("the registry cannot be written from here", hint=reason)

    async def _writing(self, write: Callable[[], T]) -> T:
        try:
            return await self._blocking(write)
        except Problem:
            raise
        except RegistryError as error:
            hint = error.hint if isinstance(error, RegistryInvalid) else None
            raise Problem("REGISTRY_UNAVAILABLE", pathless(str(error)), hint=hint, retry_after=5) from None

    async def _blocking(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._io, function)


def _refused(problem: Problem) -> Problem:
    """Turns a failed load into a refusal of the move: the version in service stays, so the alias has no
    outage."""
    if problem.code not in ("MODEL_UNAVAILABLE", "ROLLOUT_REFUSED"):
        return problem.again()
    return Problem("ROLLOUT_REFUSED", problem.message, details=problem.details, hint=problem.hint)
