"""What an operator can ask of a running gateway: views and verbs, without a protocol.

Views return plain JSON-ready dicts with the fields of CONTRACT §8; verbs return (status, body) where
HTTP's status says which of several good ends it was. All of it runs on the event loop; what blocks goes
through `io`. Raises Problem.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from gateway.errors import Problem, pathless
from gateway.names import Reference, check_version
from gateway.policy import Canary
from gateway.registries.base import (
    ANYWHERE,
    Model,
    Registry,
    RegistryError,
    Snapshot,
    Version,
    find_alias,
    resolve,
)
from gateway.registries.document import dump
from gateway.rollouts.preload import Preload
from gateway.rollouts.records import PROMOTE
from gateway.serving.ledger import State
from gateway.serving.servable import Phase, Servable, Status
from loaders import recorded
from loaders.package import Package, PackageError

if TYPE_CHECKING:
    from gateway.artifacts.packages import Fetched, Prepared
    from gateway.registries.watcher import Watch
    from gateway.rollouts.alias import Alias, Attempt
    from gateway.rollouts.aliases import Aliases
    from gateway.rollouts.promotions import Moved, Promotions
    from gateway.serving.manager import Manager

T = TypeVar("T")

#: How long `?wait=true` waits, in seconds.
LONGEST_WAIT = 600.0
SHOWN_HISTORY = 20
#: So many aliases have series before they are used.
SHOWN_ALIASES = 1000


class Described(NamedTuple):
    """A version under the alias that named it, and its verified files."""

    version: Version
    alias: str | None
    prepared: Prepared


class Operations:
    """`prepare` gets a version's verified files without loading it; `fetching` is the progress of downloads;
    `preload` is what readiness waits for."""

    def __init__(
        self,
        aliases: Aliases,
        manager: Manager,
        promotions: Promotions,
        watch: Watch,
        registry: Registry,
        io: Executor,
        *,
        prepare: Callable[[Version], Awaitable[Prepared]],
        fetching: Mapping[Version, Fetched],
        preload: Preload,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._aliases = aliases
        self._manager = manager
        self.promotions = promotions
        self._watch = watch
        self._registry = registry
        self._io = io
        self._prepare = prepare
        self._fetching = fetching
        self._preload = preload
        self._wall = wall
        self._clock = clock
        self._document: tuple[bytes, str] | None = None

    # Views.

    def models(self) -> dict[str, Any]:
        models = self._aliases.snapshot.models.values()
        held = {servable.version: servable for servable in self._manager}
        return {
            "models": [self._summary(model, held) for model in models],
            "writable": self._registry.writable,
        }

    async def model(self, name: str) -> dict[str, Any]:
        await self._known(Reference(name))
        model = self._model(name)
        aliases = {alias: self.rollout(name, alias) for alias in model.aliases}
        held = {servable.version: servable for servable in self._manager}
        return {**self._summary(model, held), "rollouts": aliases, "writable": self._registry.writable}

    async def version(
        self, name: str, number: str, *, example: bool = False, runner: bool = False
    ) -> dict[str, Any]:
        """One version, with what its verified files say. `example`: with its saved input, which may be real
        data; `runner`: with its processes."""
        await self._known(Reference(name, version=check_version(number)))
        version = resolve(self._aliases.snapshot, Reference(name, version=number))
        servable = self._manager.find(version)
        view = {"name": name, **self._state(version, servable), "writable": self._registry.writable}
        view["aliases"] = [a for a, entry in self._model(name).aliases.items() if entry.version == number]
        prepared = await self._verified(version, servable)
        if prepared is None:
            return view | {"signature": None, "environment": None}
        package = prepared.package
        signature = package.signature
        view["flavor"] = sorted(package.flavors)
        view["signature"] = None if signature is None else _plain_signature(signature.to_json())
        view["environment"] = _environment(prepared)
        view["metadata"] = package.metadata
        if runner and servable is not None and servable.runner is not None:
            view["runner"] = servable.runner.status()
        if example:
            view["input_example"] = await self._blocking(_example, package)
            view["example_answer"] = await self._blocking(_example_answer, package)
        return view

    async def described(self, reference: Reference) -> Described:
        """The version that answers for a reference now, with what its files say: they are fetched if they
        are not here. Raises Problem."""
        await self._known(reference)
        version, found = self._meant(reference)
        servable = self._manager.find(version)
        prepared = None if servable is None else servable.prepared
        alias = None if found is None else found.alias
        return Described(version, alias, prepared or await self._prepare(version))

    async def readiness(self, reference: Reference) -> tuple[Version, str | None]:
        """Whether the next request for a reference can be answered: its version, and None, or why it cannot.
        What is not loaded can be, unless its load failed. Raises Problem for what does not exist."""
        await self._known(reference)
        version, found = self._meant(reference)
        refusal = None if found is None or found.serving is not None else found.refusal
        if refusal is not None and found is not None and found.last_good in (None, found.desired):
            return version, refusal.message
        failure = self._manager.failure(version)
        return version, None if failure is None or self._manager.is_ready(version) else failure.message

    def _meant(self, reference: Reference) -> tuple[Version, Alias | None]:
        target = self._aliases.target(reference)
        found = target.alias
        version = target.version or (None if found is None else found.serving or found.desired)
        if version is None:
            raise Problem("ALIAS_NOT_FOUND", f"{reference} points to no version")
        return version, found

    def rollouts(self) -> dict[str, Any]:
        """Every alias of the registry, and what was tried with aliases that do not exist (any more)."""
        models = self._aliases.snapshot.models.values()
        views = [self.rollout(model.name, alias) for model in models for alias in model.aliases]
        gone = [self.rollout(found.name, found.alias) for found in self._aliases if found.phase == "deleted"]
        return {"rollouts": views + gone + [_attempted(attempt) for attempt in self._aliases.attempts()]}

    async def document(self) -> tuple[bytes, str]:
        """This registry as a document, with absolute sources, and its entity tag: JSON, which is YAML."""
        snapshot = self._aliases.snapshot
        if self._document is None or self._document[1] != snapshot.stamp:
            self._document = (await self._blocking(dump, snapshot.models.values()), snapshot.stamp)
        return self._document

    def rollout_in_full(self, name: str, alias: str) -> dict[str, Any]:
        """One alias with its policy, and with its rollout: the step, what the guards have seen, and what
        happened so far."""
        view = self.rollout(name, alias)
        model = self._aliases.snapshot.models.get(name)
        if model is not None:
            view["policy"] = self._aliases.gates.policy(model).model_dump(exclude_none=True)
        found = self._aliases.find(name, alias)
        course = self._aliases.conductor.course(name, alias)
        live = None if found is None else found.rollout
        if live is not None:
            course = live.course
        if course is not None and course.changes:
            view["rollout"] = {
                "version": course.version,
                "compared_with": course.service,
                "phase": course.phase.value if live is None else live.shown,
                "reason": course.reason,
                "step": None if live is None else live.step_view(),
                "evidence": course.changes[-1].get("evidence") if live is None else live.evidence(),
                "changes": list(course.changes),
            }
        return view

    def rollout_phases(self) -> dict[tuple[str, str], str]:
        """The rollouts under way, by model and alias."""
        return {
            (found.name, found.alias): found.rollout.course.phase.value
            for found in self._aliases
            if found.rollout is not None
        }

    def direct(self, name: str, alias: str, verb: str) -> dict[str, Any]:
        """`pause`, `resume`, `finish` or `abort` a rollout under way. What a person orders is done at once;
        the view is that of the moment."""
        find_alias(self._aliases.snapshot, name, alias)
        self._aliases.conductor.say(self._aliases.open(name, alias), verb)
        return self.rollout_in_full(name, alias)

    def rollout(self, name: str, alias: str) -> dict[str, Any]:
        found = self._aliases.view(name, alias)
        if found is None:
            attempt = self._aliases.attempt(name, alias)
            if attempt is None:
                find_alias(self._aliases.snapshot, name, alias)
            assert attempt is not None
            return _attempted(attempt)
        return {
            "name": name,
            "alias": alias,
            "desired": _number(found.desired),
            "serving": _number(found.serving),
            "last_good": _number(found.last_good),
            "phase": found.phase,
            "error": found.error,
            "since": None if found.phase == "unloaded" else _iso(found.since),
            "diverged": found.diverged,
            "unproven": found.unproven,
            "verdict": None if found.verdict is None else found.verdict.to_json(),
            "trial": None
            if (trial := self.promotions.trials.get((name, alias))) is None
            else trial.to_json(),
            "history": [_served(served) for served in found.history[-SHOWN_HISTORY:]],
        }

    def alias_states(self) -> dict[tuple[str, str], tuple[str | None, bool]]:
        """(version in service, whether it differs from the desired one), by model and alias: of every alias
        in use here, and of others up to `SHOWN_ALIASES`."""
        shown = {(found.name, found.alias): found for found in self._aliases}
        for model in islice(self._aliases.snapshot.models.values(), SHOWN_ALIASES):
            for alias in model.aliases:
                found = self._aliases.view(model.name, alias)
                if found is not None and len(shown) < SHOWN_ALIASES:
                    shown.setdefault((model.name, alias), found)
        return {key: (_number(found.serving), found.diverged) for key, found in shown.items()}

    def memory(self) -> dict[str, float | None]:
        ledger = self._manager.ledger
        shared = {"shared": ledger.shared}  # part of what is resident
        return {
            "limit_bytes": ledger.limit,
            **shared,
            **{state.value: ledger.bytes_in(state) for state in State},
        }

    def ready(self) -> tuple[bool, dict[str, Any]]:
        """Whether it may take traffic: a snapshot was seen, and what must be preloaded is loaded."""
        failed = {text: reason for text, reason in self._preload.pending.items() if reason}
        detail = {
            "ready": self._watch.seen and self._preload.done,
            "registry": self._watch.status(),
            "preload_pending": list(self._preload.pending),
            "preload_errors": failed,
            "memory": self.memory(),
        }
        return bool(detail["ready"]), detail

    # Verbs on aliases.

    async def promote(
        self,
        name: str,
        alias: str,
        version: str,
        *,
        expect: str | None = ANYWHERE,
        force: bool = False,
        wait: bool = False,
        dry_run: bool = False,
        canary: list[float] | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Runs the gates, then moves the alias in the registry: 202, or 200 with `wait` once it is served
        here; 202 too when its first step begins. A refusal leaves the registry as it is. `canary`: the steps
        of this move, else as the policy says."""
        steps = None
        if canary is not None:
            try:
                steps = tuple(Canary(steps=canary).steps)
                if not steps:
                    raise ValueError
            except ValueError:
                message = "canary is no list of steps: percentages between 0 and 100 that rise"
                raise Problem("INVALID_INPUT", message, hint='{"canary": [5, 25, 50]}') from None
        moving = self.promotions.promote(
            name, alias, version, expect=expect, force=force, dry_run=dry_run, steps=steps
        )
        async with moving as moved:
            return await self._shown(moved, wait)

    async def rollback(
        self, name: str, alias: str, to: str | None = None, *, wait: bool = False
    ) -> tuple[int, dict[str, Any]]:
        """Back to what served before; again: further back."""
        async with self.promotions.rollback(name, alias, to) as moved:
            return await self._shown(moved, wait)

    async def delete_alias(self, name: str, alias: str) -> dict[str, Any]:
        await self.promotions.delete_alias(name, alias)
        return {"name": name, "alias": alias, "deleted": True}

    async def _shown(self, moved: Moved, wait: bool) -> tuple[int, dict[str, Any]]:
        """What came of a move. Its version is loaded, so that it takes no time to serve it."""
        move = moved.move
        told: dict[str, Any] = {"forced_past": list(moved.overruled)} if moved.overruled else {}
        told["checks"] = [{"check": check, "seconds": seconds} for check, seconds in moved.checks]
        if not moved.written:
            view = {"name": move.name, "alias": move.alias, "version": move.version}
            return 200, view | {"previous": moved.previous, "dry_run": True, "accepted": True} | told
        found = self._aliases.open(move.name, move.alias, PROMOTE)
        if moved.unchanged:
            self._aliases.clear_error(found)
        try:
            await self._aliases.served(found, moved.target, LONGEST_WAIT if wait else 1.0)
        except Problem:
            if wait:
                raise
        in_full = found.rollout is not None
        view = (self.rollout_in_full if in_full else self.rollout)(move.name, move.alias)
        return (200 if wait and not in_full else 202), view | told

    # Verbs on versions.

    async def load(self, reference: Reference, *, wait: bool = True) -> tuple[int, dict[str, Any]]:
        """Loads what a reference means, as a request would; a failure before is forgotten."""
        await self._known(reference)
        target = self._aliases.target(reference)
        version = target.version
        if version is None and target.alias is not None:
            if target.alias.desired is not None:
                self._manager.retry(target.alias.desired)
            if not wait:
                self._aliases.begin(target.alias)
                return 202, self.rollout(target.alias.name, target.alias.alias)
            version = await self._aliases.settle(target.alias, LONGEST_WAIT)
        assert version is not None
        self._manager.retry(version)
        lease = self._manager.lease(version)
        try:
            if wait:
                await self._manager.ready(lease, LONGEST_WAIT)
            return (200 if wait else 202), {"name": version.name, **self._state(version, lease.servable)}
        finally:
            lease.release()

    async def unload(self, reference: Reference, *, wait: bool = True) -> tuple[int, dict[str, Any]]:
        """Evicts once leases have ended; the next request loads again."""
        target = self._aliases.target(reference)
        found = target.alias
        version = target.version or (None if found is None else found.serving or found.desired)
        if version is None:
            return 200, {"name": reference.name, "state": Status.UNLOADED.value}
        servable = self._manager.retire(version, "unloaded")
        if servable is not None and wait:
            try:
                async with asyncio.timeout(LONGEST_WAIT):
                    await servable.gone.wait()
            except TimeoutError:
                raise Problem("DEADLINE_EXCEEDED", f"{version} still answers requests") from None
        return (200 if wait else 202), {"name": version.name, **self._state(version, servable)}

    async def refresh(self) -> dict[str, Any]:
        """Looks at the registry now."""
        await self._watch.look()
        return self._watch.status()

    async def preloading(self) -> None:
        """Loads what readiness waits for."""
        await self._preload.run(self._for_patterns, self.load)

    async def _for_patterns(self) -> Snapshot:
        """What patterns are matched against: all names of the registry. Raises Problem."""
        if not self._registry.partial:
            if not self._watch.seen:
                raise Problem("REGISTRY_UNAVAILABLE", "the registry was not read yet")
            return self._aliases.snapshot
        try:
            return await self._blocking(self._registry.listing)
        except RegistryError as error:
            raise Problem("REGISTRY_UNAVAILABLE", pathless(str(error))) from None

    async def hint(self, reference: Reference) -> None:
        """Somebody says that something happened to a model: if it is in use, the registry is asked now."""
        if reference.name in self._aliases.snapshot.models:
            with contextlib.suppress(Problem):  # the next poll asks again
                await self._watch.ask(reference)

    # Parts of the above.

    async def _known(self, reference: Reference) -> None:
        """Asks the registry for what the last snapshot lacks."""
        await self._watch.ensure(reference, self._aliases.snapshot)

    def _summary(self, model: Model, held: Mapping[Version, Servable]) -> dict[str, Any]:
        versions = sorted(model.versions.values(), key=lambda version: int(version.version))
        return {
            "name": model.name,
            "aliases": {alias: entry.version for alias, entry in model.aliases.items()},
            "versions": [self._state(version, held.get(version)) for version in versions],
        }

    async def _verified(self, version: Version, servable: Servable | None) -> Prepared | None:
        """What is known of a version's files once they are verified; a remote one that is not loaded is not
        fetched for a view."""
        if servable is not None and servable.prepared is not None:
            return servable.prepared
        if "://" in version.source:
            return None
        try:
            return await self._prepare(version)  # of a refused version too: its facts say what would help
        except Problem as problem:
            if self._manager.failure(version) is None:
                self._manager.failed(version, problem)
            return None

    def _state(self, version: Version, servable: Servable | None) -> dict[str, Any]:
        failure = self._manager.failure(version)
        view: dict[str, Any] = {"version": version.version, "state": Status.UNLOADED.value, "reason": None}
        view |= {"bytes": None, "last_used": None}
        fetched = self._fetching.get(version) if self._fetching else None
        if servable is None and failure is not None:
            view |= {"state": Status.FAILED.value, "reason": failure.message}
        elif servable is not None:
            ledger = self._manager.ledger
            account = ledger.find(servable)
            view["state"] = servable.status.value
            if servable.status is Status.LOADING:
                view |= self._loading(servable, fetched)
            if account is not None:
                view["last_used"] = _iso(self._wall() - (self._clock() - account.last_used))
            view["warnings"] = list(servable.warnings)
        elif fetched is not None:  # for an alias's gates, before there is anything to load
            view |= {"state": Status.LOADING.value, "reason": _fetching(fetched)}
        view |= self._manager.view(version)
        if fetched is not None:
            view["fetch"] = {"bytes": fetched.bytes, "total": fetched.total}
        view |= {"digest": version.digest, "created": version.created, "tags": dict(version.tags)}
        return view

    def _loading(self, servable: Servable, fetched: Fetched | None) -> dict[str, Any]:
        """How far a load is. `expected_seconds`: how long these files took last time, None for new ones."""
        if fetched is not None:
            return {"reason": _fetching(fetched)}
        if servable.began is None:
            if servable.building is not None and servable.phase is Phase.BUILDING:
                return {"reason": f"building its environment: {servable.building}"}
            return {"reason": servable.phase.value}
        seconds = round(self._clock() - servable.began, 1)
        before = None if servable.prepared is None else servable.prepared.load_seconds
        known = "" if before is None else f" of about {before:.1f} s"
        load = {"phase": servable.phase.value, "seconds": seconds, "expected_seconds": before}
        return {"reason": f"{servable.phase.value} {seconds} s{known}", "load": load}

    def _model(self, name: str) -> Model:
        model = self._aliases.snapshot.models.get(name)
        if model is None:
            resolve(self._aliases.snapshot, Reference(name))
            raise Problem("MODEL_NOT_FOUND", f"there is no model {name!r} in the registry")
        return model

    async def _blocking(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._io, function, *args)


def _environment(prepared: Prepared) -> dict[str, Any]:
    """What the package was made with, how this interpreter differs, and where it runs once it is loaded."""
    view: dict[str, Any] = {"python_version": prepared.package.python_function.get("python_version")}
    if prepared.needs is not None:
        view["python_version"] = prepared.needs.facts.python or None
        view |= prepared.needs.check.to_json()
    if prepared.runtime is not None:
        view |= prepared.runtime.to_json()
    return view


def _example(package: Package) -> dict[str, Any] | None:
    try:
        given, params = package.example_input()
    except PackageError:
        return None  # the version's warnings say so once it is loaded
    return None if given is None else {given.form: given.data, "params": params}


def _example_answer(package: Package) -> Any | None:
    try:
        return recorded.read(package)
    except recorded.Unreadable:
        return None  # the version's warnings say so once it is loaded


def _attempted(attempt: Attempt) -> dict[str, Any]:
    absent = dict.fromkeys(("desired", "serving", "last_good", "verdict", "trial"))
    facts = {"phase": attempt.phase, "error": attempt.error, "since": _iso(attempt.since)}
    flags = {"diverged": False, "unproven": False, "history": []}
    return {"name": attempt.name, "alias": attempt.alias} | absent | facts | flags


def _plain_signature(document: dict[str, Any]) -> dict[str, Any]:
    """MLflow keeps the parts of a signature as JSON within JSON; here they are what they say."""
    import json

    return {key: json.loads(part) if isinstance(part, str) else part for key, part in document.items()}


def _fetching(fetched: Fetched) -> str:
    total = "" if fetched.total is None else f"/{fetched.total / 1e6:.1f}"
    return f"fetching {fetched.bytes / 1e6:.1f}{total} MB"


def _served(served: Any) -> dict[str, Any]:
    return {
        "version": served.version,
        "from": _iso(served.started),
        "until": None if served.ended is None else _iso(served.ended),
        "moved_by": served.moved_by,
        "ended_because": served.reason,
    }


def _iso(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def _number(version: Version | None) -> str | None:
    return None if version is None else version.version
