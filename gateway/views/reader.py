"""Makes the views from the live parts: aliases, manager, registry watcher. Changes nothing.

The control routes, the V1 and V2 routes and the gauges use `Views`. It must not know protocols.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeVar

from gateway.errors import Problem
from gateway.names import Reference, check_version
from gateway.quantities import utc
from gateway.registries.base import Model, Registry, Version
from gateway.registries.document import dump
from gateway.registries.resolution import find_alias, resolve
from gateway.rollouts.alias import number
from gateway.serving.ledger import AccountState
from gateway.serving.servable import Servable, Status
from gateway.views import contents, progress
from gateway.views.contents import Described
from gateway.views.paging import AT_ONCE, Listed, Names, Page
from gateway.views.shapes import (
    ABSENT,
    Absent,
    CourseView,
    DryRunView,
    ModelView,
    ReadinessView,
    RolloutView,
    VersionView,
)
from gateway.views.troubles import troubles

if TYPE_CHECKING:
    from gateway.artifacts.packages import Fetched, Prepared
    from gateway.peers import Peers
    from gateway.registries.watcher import Watch
    from gateway.rollouts.alias import LiveAlias
    from gateway.rollouts.aliases import Aliases
    from gateway.rollouts.gates import Trial
    from gateway.rollouts.preload import Preload
    from gateway.rollouts.promotions import Moved
    from gateway.serving.manager import Manager
    from gateway.views.troubles import Trouble

T = TypeVar("T")

EVERYTHING = Page()
#: Maximum number of unused aliases that have metric series.
SHOWN_ALIASES = 1000


class Views:
    """`trials`: the promotions that are being checked, by model and alias. `prepare`: gets a version's
    verified files without loading it. `fetching`: the progress of downloads. `preload`: the versions that
    readiness waits for. `peers`: the other gateways, if there are any. Every method runs on the event loop;
    blocking calls go through `io`. Raises Problem."""

    def __init__(
        self,
        aliases: Aliases,
        manager: Manager,
        watch: Watch,
        registry: Registry,
        io: Executor,
        *,
        trials: Mapping[tuple[str, str], Trial],
        prepare: Callable[[Version], Awaitable[Prepared]],
        fetching: Mapping[Version, Fetched],
        preload: Preload,
        peers: Peers | None = None,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._aliases = aliases
        self._manager = manager
        self._watch = watch
        self._registry = registry
        self._io = io
        self._trials = trials
        self._prepare = prepare
        self._fetching = fetching
        self._preload = preload
        self._peers = peers
        self._wall = wall
        self._clock = clock
        self._document: tuple[bytes, str] | None = None
        self._names = Names()

    # Models and versions.

    async def names(self, page: Page = EVERYTHING) -> Listed:
        """Returns the names of the registry's models on a page."""
        snapshot = self._aliases.snapshot
        return await self._blocking(self._names.page, snapshot.models, snapshot.stamp, page)

    async def models(self, listed: Listed) -> AsyncIterator[list[ModelView]]:
        """Yields the models of these names in parts, so that the event loop can do other work in between."""
        for start in range(0, len(listed.items), AT_ONCE):
            models = self._aliases.snapshot.models
            part = listed.items[start : start + AT_ONCE]
            yield [self._model(models[name]) for name in part if name in models]
            await asyncio.sleep(0)

    @property
    def writable(self) -> bool:
        """Returns True if the registry can be written."""
        return self._registry.writable

    def loaded(self) -> list[VersionView]:
        """Returns every version in memory, with its name."""
        return [replace(self.state(one.version, one), name=one.version.name) for one in self._manager]

    def troubles(self, reads: Callable[[str], bool] | None = None) -> list[Trouble]:
        """Returns the current troubles of the models that a caller may see."""
        return troubles(self._aliases, self._manager, reads)

    async def model(self, name: str) -> ModelView:
        """Returns a model with the rollouts of its aliases."""
        await self._ask_for(Reference(name))
        model = self._registered(name)
        return replace(
            self._model(model),
            rollouts={alias: self.rollout(name, alias) for alias in model.aliases},
            writable=self._registry.writable,
        )

    async def version(self, name: str, number: str, *, in_full: bool = False) -> VersionView:
        """Returns a version with the facts from its verified files. `in_full`: with its processes and its
        saved example, which may be real data."""
        await self._ask_for(Reference(name, version=check_version(number)))
        version = resolve(self._aliases.snapshot, Reference(name, version=number))
        aliases = self._registered(name).aliases
        servable = self._manager.find(version)
        view = replace(
            self.state(version, servable),
            name=name,
            writable=self._registry.writable,
            aliases=[alias for alias, entry in aliases.items() if entry.version == number],
            signature=None,
            environment=None,
        )
        prepared = await self._verified(version, servable)
        if prepared is None:
            return view
        package = prepared.package
        view = replace(
            view,
            signature=contents.signature(prepared.signature),
            environment=prepared.environment(),
            flavor=sorted(package.flavors),
            metadata=package.metadata,
        )
        if not in_full:
            return view
        runner = None if servable is None else servable.runner
        return replace(
            view,
            runner=ABSENT if runner is None else runner.status(),
            input_example=await self._blocking(contents.example, package),
            example_answer=await self._blocking(contents.example_answer, package),
        )

    def state(self, version: Version, servable: Servable | None) -> VersionView:
        """Returns the state of a version in this gateway. `servable`: None if nothing holds the version."""
        failure = self._manager.failure(version)
        state, reason, last_used = Status.UNLOADED, None, None
        hint: str | Absent | None = ABSENT
        load: Mapping[str, Any] | Absent = ABSENT
        fetched = self._fetching.get(version) if self._fetching else None
        if servable is None and failure is not None:
            state, reason, hint = Status.FAILED, failure.message, failure.hint
        elif servable is not None:
            account = self._manager.ledger.find(servable)
            state = servable.status
            if state is Status.LOADING:
                reason, load = progress.loading(servable, fetched, self._clock())
            if account is not None:
                last_used = utc(self._wall() - (self._clock() - account.last_used))
        elif fetched is not None:  # for an alias's gates, before anything is loaded
            state, reason = Status.LOADING, progress.fetching(fetched)
        return VersionView(
            version=version.version,
            state=state.value,
            reason=reason,
            hint=hint,
            last_used=last_used,
            environment=_runtime(servable),
            warnings=ABSENT if servable is None else list(servable.warnings),
            load=load,
            fetch=ABSENT if fetched is None else {"bytes": fetched.bytes, "total": fetched.total},
            digest=version.digest,
            created=version.created,
            tags=dict(version.tags),
            **self._held(version),
        )

    def _held(self, version: Version) -> dict[str, Any]:
        """Returns what a version has in memory: its bytes, where it runs and why, whether one of its
        processes is stuck, its last minute, and its last failed request. For a version not in memory: why it
        was evicted."""
        held = self._manager.held(version)
        if not held:
            gone = self._manager.eviction(version)
            if gone is None:
                return {}
            ago = round(self._clock() - gone.at, 1)
            return {"evicted": {"seconds_ago": ago, "for": gone.asking, "why": gone.why}}
        servable, ledger = held[-1], self._manager.ledger
        found: dict[str, Any] = {
            "bytes": sum(ledger[one].bytes for one in held if one in ledger),
            "recent": servable.recent.view(),
        }
        if servable.recent.last_error is not None:
            at, kind = servable.recent.last_error
            found["last_error"] = {"at": at, "kind": kind, "total": servable.recent.total_errors}
        if (runner := servable.runner) is not None:
            found["stuck"] = runner.stuck
            found["placement"] = {"isolation": runner.isolation, "reason": runner.placement}
        return found

    def _model(self, model: Model) -> ModelView:
        versions = sorted(model.versions.values(), key=lambda version: int(version.version))
        held = [(version, self._manager.held(version)) for version in versions]
        return ModelView(
            model.name,
            {alias: entry.version for alias, entry in model.aliases.items()},
            tuple(self.state(version, lives[-1] if lives else None) for version, lives in held),
        )

    async def described(self, reference: Reference) -> Described:
        """Returns the version that a reference means now, with its files. Downloads missing files."""
        await self._ask_for(reference)
        version, found = self._meant(reference)
        servable = self._manager.find(version)
        prepared = None if servable is None else servable.prepared
        alias = None if found is None else found.alias
        return Described(version, alias, prepared or await self._prepare(version))

    async def _verified(self, version: Version, servable: Servable | None) -> Prepared | None:
        """Returns the verified files of a version. Does not download a remote version that is not loaded;
        then returns None."""
        if servable is not None and servable.prepared is not None:
            return servable.prepared
        if "://" in version.source:
            return None
        try:
            return await self._prepare(version)  # also for a refused version: its facts explain the refusal
        except Problem as problem:
            if self._manager.failure(version) is None:
                self._manager.failed(version, problem)
            return None

    # Rollouts.

    async def rollouts(self, page: Page = EVERYTHING) -> AsyncIterator[list[RolloutView]]:
        """Yields every alias of the registry, and attempts with aliases that do not exist (any more), in
        parts, ordered by model and alias. `page.after`: NAME@ALIAS. Ignores `page.limit`: the caller counts
        the aliases."""
        name, _, after = (page.after or "").rpartition("@")
        start = replace(page, after=None, limit=None)
        listed, others = (await self.names(start)).items, self._others(page)
        ordered = listed[bisect_left(listed, name) :]
        if more := [one for one in others if one >= name]:
            ordered = await self._blocking(_united, ordered, more)
        for place in range(0, len(ordered), AT_ONCE):
            models = self._aliases.snapshot.models
            views = []
            for one in ordered[place : place + AT_ONCE]:
                aliases = set(models[one].aliases) if one in models else set()
                known = sorted(aliases | others.get(one, {}).keys())
                views += [
                    self.rollout(one, alias) if alias in aliases else others[one][alias]
                    for alias in known
                    if one != name or alias > after
                ]
            yield views
            await asyncio.sleep(0)

    def _others(self, page: Page) -> dict[str, dict[str, RolloutView]]:
        """Returns the views of aliases that do not exist (any more), by model and alias."""
        found = [self.rollout(one.name, one.alias) for one in self._aliases if one.phase == "deleted"]
        found += [RolloutView.of_attempt(attempt) for attempt in self._aliases.attempts()]
        by_name: dict[str, dict[str, RolloutView]] = {}
        for view in found:
            if page.takes(view.name):
                by_name.setdefault(view.name, {})[view.alias] = view
        return by_name

    def rollout(self, name: str, alias: str) -> RolloutView:
        found = self._aliases.view(name, alias)
        if found is not None:
            view = RolloutView.of(found, self._trials.get((name, alias)))
            view = replace(view, phase=self._phase(found))
            return view if self._peers is None else replace(view, peers=self._peers.versions_of(name, alias))
        attempt = self._aliases.attempt(name, alias)
        if attempt is None:
            find_alias(self._aliases.snapshot, name, alias)  # raises: there is no such alias
            raise Problem("ALIAS_NOT_FOUND", f"{name} has no alias {alias}")
        return RolloutView.of_attempt(attempt)

    def sharing(self, *, addresses: bool) -> dict[str, Any]:
        """Returns how verdicts reach other gateways, and which peers there are. `addresses`: with the address
        of each."""
        if self._registry.writable:
            how = "the registry: every gateway reads them there"
        elif self._peers is not None:
            how = "peers: the registry cannot be written from here"
        else:
            how = "nothing: the registry cannot be written from here and there are no peers, so each gateway "
            how += "decides by itself"
        shown: dict[str, Any] = {"verdicts_shared_by": how}
        return shown if self._peers is None else {**shown, "peers": self._peers.to_json(addresses=addresses)}

    def _phase(self, found: LiveAlias) -> str:
        """Returns the phase of an alias, in more detail than the reconciler needs."""
        goal = found.goal
        if found.phase == "loading" and goal is not None:
            return progress.before_rollout(self._manager.find(goal), fetched=goal in self._fetching)
        if found.phase == "rolled_back" and self._aliases.conductor.phase(found) == "aborted":
            return "aborted"  # by a person
        return found.phase

    def pointed(self, name: str, alias: str) -> str | None:
        """The version that the registry says of an alias, None if there is none."""
        model = self._aliases.snapshot.models.get(name)
        entry = None if model is None else model.aliases.get(alias)
        return None if entry is None else entry.version

    def state_of(self, reference: Reference) -> str:
        """The state of the version that a reference means now."""
        version, _ = self._meant(reference)
        return self.state(version, self._manager.find(version)).state

    def rollout_in_full(self, name: str, alias: str) -> RolloutView:
        """Returns an alias with its policy and its current or last rollout."""
        view = self.rollout(name, alias)
        model = self._aliases.snapshot.models.get(name)
        policy: Mapping[str, Any] | Absent = ABSENT
        wrong: str | Absent = ABSENT
        if model is not None:
            policy = self._aliases.gates.policy(model).model_dump(exclude_none=True)
            wrong = self._aliases.gates.policy_error(model) or ABSENT
        found = self._aliases.find(name, alias)
        live = None if found is None else found.rollout
        course = self._aliases.conductor.course(name, alias) if live is None else live.course
        shown: CourseView | Absent = ABSENT
        if course is not None and course.changes:
            shown = CourseView(
                course.version,
                course.service,
                course.phase.value if live is None else live.shown,
                course.reason,
                None if live is None else live.step_view(),
                course.evidence if live is None else live.evidence(),
                list(course.changes),
            )
        earlier = () if course is None else course.earlier
        return replace(
            view,
            policy=policy,
            policy_error=wrong,
            rollout=shown,
            earlier_rollouts=[CourseView.earlier(kept) for kept in reversed(earlier)],
        )

    def moved(self, moved: Moved) -> RolloutView | DryRunView:
        """Returns the result of a promotion or rollback: the current state of the alias."""
        move = moved.move
        checks = [{"check": check, "seconds": seconds} for check, seconds in moved.checks]
        overruled = list(moved.overruled) or ABSENT
        if not moved.written:
            return DryRunView(
                move.name, move.alias, move.version, moved.previous, checks, moved.environment, overruled,
                ABSENT if moved.replay is None else moved.replay.to_json(),
            )  # fmt: skip
        found = self._aliases.find(move.name, move.alias)
        under_way = found is not None and found.rollout is not None
        view = (self.rollout_in_full if under_way else self.rollout)(move.name, move.alias)
        return replace(view, forced_past=overruled, checks=checks, environment=moved.environment)

    def rollout_phases(self) -> dict[tuple[str, str], str]:
        """Returns the phases of the rollouts under way, and of the last ones, by model and alias."""
        phases = {(found.name, found.alias): self._aliases.conductor.phase(found) for found in self._aliases}
        return {key: phase for key, phase in phases.items() if phase is not None}

    def alias_states(self) -> Iterator[tuple[tuple[str, str], tuple[str | None, bool]]]:
        """Yields (model, alias), and (version in service, whether it differs from the desired one), for every
        alias in use here, and for others up to `SHOWN_ALIASES`. The event loop may do other work in
        between."""
        used = list(self._aliases)
        keys = {(found.name, found.alias) for found in used}
        models = list(islice(self._aliases.snapshot.models.values(), SHOWN_ALIASES))
        unused = ((model.name, alias) for model in models for alias in model.aliases)
        more = max(0, SHOWN_ALIASES - len(used))
        others = islice((key for key in unused if key not in keys), more)
        for found in chain(used, (self._aliases.view(*key) for key in others)):
            if found is not None:
                yield (found.name, found.alias), (number(found.serving), found.diverged)

    # The gateway.

    def ready(self) -> ReadinessView:
        failed = {text: reason for text, reason in self._preload.pending.items() if reason}
        return ReadinessView(
            self._watch.seen and self._preload.done,
            self._watch.status(),
            list(self._preload.pending),
            failed,
            dict(self._preload.unmatched),
            dict(self._preload.unused.sentences),
            self.memory(),
        )

    async def readiness(self, reference: Reference) -> tuple[Version, str | None]:
        """Returns the version of a reference, and None if the next request can be answered, else the reason
        why not. A version that is not loaded can be, unless its load failed. Raises Problem if it does not
        exist."""
        await self._ask_for(reference)
        version, found = self._meant(reference)
        refusal = None if found is None or found.serving is not None else found.refusal
        if refusal is not None and found is not None and found.last_good in (None, found.desired):
            return version, refusal.message
        failure = self._manager.failure(version)
        return version, None if failure is None or self._manager.is_ready(version) else failure.message

    def memory(self) -> dict[str, float | None]:
        ledger = self._manager.ledger
        return {
            "limit_bytes": ledger.limit,
            "shared": ledger.shared,  # part of the resident bytes
            "uncounted": ledger.uncounted,  # in addition to all others
            **{state.value: ledger.bytes_in(state) for state in AccountState},
        }

    def follows(self, name: str) -> bool:
        """Returns True if the registry snapshot has a model of this name."""
        return name in self._aliases.snapshot.models

    async def document(self) -> tuple[bytes, str]:
        """Returns this registry as a JSON document (valid YAML) with absolute sources, and its entity tag."""
        snapshot = self._aliases.snapshot
        if self._document is None or self._document[1] != snapshot.stamp:
            self._document = (await self._blocking(dump, snapshot.models.values()), snapshot.stamp)
        return self._document

    # Parts of the above.

    async def _ask_for(self, reference: Reference) -> None:
        """Queries the registry for a reference that is not in the last snapshot."""
        await self._watch.ensure(reference, self._aliases.snapshot)

    def _meant(self, reference: Reference) -> tuple[Version, LiveAlias | None]:
        version, found = self._aliases.meant(reference)
        if version is None:
            raise Problem("ALIAS_NOT_FOUND", f"{reference} points to no version")
        return version, found

    def _registered(self, name: str) -> Model:
        model = self._aliases.snapshot.models.get(name)
        if model is None:
            resolve(self._aliases.snapshot, Reference(name))
            raise Problem("MODEL_NOT_FOUND", f"there is no model {name!r} in the registry")
        return model

    async def _blocking(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._io, function, *args)


def _united(names: Iterable[str], more: Iterable[str]) -> list[str]:
    return sorted({*names, *more})


def _runtime(servable: Servable | None) -> Mapping[str, Any] | Absent:
    """Returns where a servable runs, once that is known."""
    prepared = None if servable is None else servable.prepared
    return ABSENT if prepared is None or prepared.runtime is None else prepared.runtime.to_json()
