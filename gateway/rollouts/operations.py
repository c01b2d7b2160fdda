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
from typing import TYPE_CHECKING, Any, Final, TypeVar

from cachetools import LRUCache

from gateway.errors import Problem, pathless
from gateway.names import InvalidReference, Reference, check_alias, check_name, check_version
from gateway.registries.base import (
    Model,
    NotInRegistry,
    PreconditionFailed,
    ReadOnly,
    Registry,
    RegistryError,
    RegistryReadOnly,
    Version,
    resolve,
)
from gateway.registries.document import dump
from gateway.rollouts.gates import PROMOTE, ROLLBACK, rollback_target
from gateway.serving.ledger import State
from gateway.serving.servable import Servable, Status
from loaders import recorded
from loaders.package import Package, PackageError

if TYPE_CHECKING:
    from gateway.artifacts.packages import Fetched, Prepared
    from gateway.registries.watcher import Watch
    from gateway.rollouts.aliases import Alias, Aliases
    from gateway.serving.manager import Lease, Manager

T = TypeVar("T")

#: `expect` was not given: the alias may stand anywhere. (None means: it must not exist.)
ANYWHERE: Final = "*"
#: How long `?wait=true` waits, in seconds.
LONGEST_WAIT = 600.0
SHOWN_HISTORY = 20


class Operations:
    """`prepare` has a version's verified files here, without loading it; `fetching` is what has come of those
    that are being fetched; `preload` is what readiness waits for."""

    def __init__(
        self,
        aliases: Aliases,
        manager: Manager,
        watch: Watch,
        registry: Registry,
        io: Executor,
        *,
        prepare: Callable[[Version], Awaitable[Prepared]],
        fetching: Mapping[Version, Fetched],
        preload: list[Reference],
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._aliases = aliases
        self._manager = manager
        self._watch = watch
        self._registry = registry
        self._io = io
        self._prepare = prepare
        self._fetching = fetching
        self._preload = preload
        self._preloaded = not preload
        self._wall = wall
        self._clock = clock
        self._document: tuple[bytes, str] | None = None
        #: Refused promotions of aliases that do not exist: there is nothing else to show them on.
        self._refused: LRUCache[tuple[str, str], dict[str, Any]] = LRUCache(1000)

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
        _checked(check_version, number)
        await self._known(Reference(name, version=number))
        version = self._version(name, number)
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
        view["environment"] = {
            "python_version": package.python_function.get("python_version"),
            "findings": list(prepared.findings),
        }
        view["metadata"] = package.metadata
        if runner and servable is not None and servable.runner is not None:
            view["runner"] = servable.runner.status()
        if example:
            view["input_example"] = await self._blocking(_example, package)
            view["example_answer"] = await self._blocking(_example_answer, package)
        return view

    def rollouts(self) -> dict[str, Any]:
        """Every alias of the registry that was asked for here, and every other as the registry has it."""
        models = self._aliases.snapshot.models.values()
        views = [self.rollout(model.name, alias) for model in models for alias in model.aliases]
        return {"rollouts": views}

    async def document(self) -> tuple[bytes, str]:
        """This registry as a document, with absolute sources, and its entity tag: JSON, which is YAML."""
        snapshot = self._aliases.snapshot
        if self._document is None or self._document[1] != snapshot.stamp:
            self._document = (await self._blocking(dump, snapshot.models.values()), snapshot.stamp)
        return self._document

    def rollout(self, name: str, alias: str) -> dict[str, Any]:
        found = self._aliases.find(name, alias)
        if found is None:
            entry = self._model(name).aliases.get(alias)
            if entry is None and (name, alias) in self._refused:
                return self._refused[name, alias]
            if entry is None:
                self._missing(Reference(name, alias=alias))
                raise Problem("ALIAS_NOT_FOUND", f"{name} has no alias {alias}")
            good, history = self._aliases.remembered(name, alias)
            return {
                "name": name,
                "alias": alias,
                "desired": entry.version,
                "serving": None,
                "last_good": good or entry.last_good,
                "phase": "unloaded",
                "error": None,
                "since": None,
                "diverged": False,
                "history": [_served(served) for served in history[-SHOWN_HISTORY:]],
            }
        return {
            "name": name,
            "alias": alias,
            "desired": _number(found.desired),
            "serving": _number(found.serving),
            "last_good": _number(found.last_good),
            "phase": found.phase,
            "error": found.error,
            "since": _iso(found.since),
            "diverged": found.diverged,
            "history": [_served(served) for served in found.history[-SHOWN_HISTORY:]],
        }

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
        waiting = [str(reference) for reference in self._preload] if not self._preloaded else []
        detail = {
            "ready": self._watch.seen and self._preloaded,
            "registry": self._watch.status(),
            "preload_pending": waiting,
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
    ) -> tuple[int, dict[str, Any]]:
        """Runs the gates, then moves the alias in the registry: 202, or 200 with `wait` once it is served
        here. A refusal leaves the registry untouched."""
        _checked(check_name, name)
        _checked(check_alias, alias)
        _checked(check_version, version)
        self._must_be_writable()
        await self._watch.ask(Reference(name, version=version))
        target = self._version(name, version)
        entry = self._model(name).aliases.get(alias)
        _check_expectation(name, alias, None if entry is None else entry.version, expect)
        found = None if entry is None else self._aliases.open(name, alias)
        if found is not None and entry is not None and entry.version == version and entry.forced >= force:
            if dry_run:
                return 200, {**self._named(name, alias, target), "dry_run": True, "accepted": True}
            self._aliases.clear_error(found)
            return await self._moved(found, target, wait)
        lease = await self._try_out(name, alias, found, target, force)
        try:
            if dry_run:
                return 200, {**self._named(name, alias, target), "dry_run": True, "accepted": True}
            await self._write_alias(name, alias, version, expect, forced=force, moved_by=PROMOTE)
            return await self._moved(self._aliases.open(name, alias, PROMOTE), target, wait)
        finally:
            lease.release()

    async def rollback(
        self, name: str, alias: str, to: str | None = None, *, wait: bool = False
    ) -> tuple[int, dict[str, Any]]:
        """Back to what was served before; again: further back. It must load, but no signature stops it."""
        self._must_be_writable()
        await self._watch.ask(Reference(name))
        found = self._follow(name, alias)
        entry = self._model(name).aliases[alias]
        if to is None:
            to = rollback_target(found.history, _number(found.desired)) or next(iter(entry.previous), None)
            if to is None:
                message = f"{name}@{alias} has served no other version before"
                raise Problem("ROLLOUT_REFUSED", message, hint='name the version to go to: {"to": V}')
        _checked(check_version, to)
        await self._known(Reference(name, version=to))
        target = self._version(name, to)
        lease = await self._try_out(name, alias, found, target, forced=True)
        try:
            # Whoever moved it while this was tried knows better.
            await self._write_alias(name, alias, to, entry.version, forced=True, moved_by=ROLLBACK)
            return await self._moved(self._aliases.open(name, alias), target, wait)
        finally:
            lease.release()

    async def delete_alias(self, name: str, alias: str) -> dict[str, Any]:
        self._must_be_writable()
        snapshot = await self._writing(lambda: self._registry.delete_alias(name, alias))
        self._watch.take(snapshot, "delete")
        return {"name": name, "alias": alias, "deleted": True}

    async def _try_out(
        self, name: str, alias: str, found: Alias | None, target: Version, forced: bool
    ) -> Lease:
        self._manager.retry(target)
        try:
            return await self._aliases.admit(found, target, forced=forced)
        except Problem as problem:
            if found is not None:
                self._aliases.refuse(found, target, problem)
            else:
                self._refused[name, alias] = _never_moved(name, alias, problem.message, self._wall())
            if problem.code in ("MODEL_UNAVAILABLE", "ROLLOUT_REFUSED"):
                raise Problem(
                    "ROLLOUT_REFUSED", problem.message, details=problem.details, hint=problem.hint
                ) from None
            raise

    async def _write_alias(
        self, name: str, alias: str, number: str, expect: str | None, *, forced: bool, moved_by: str
    ) -> None:
        def write() -> Any:
            return self._registry.set_alias(
                name,
                alias,
                number,
                expect=None if expect == ANYWHERE else expect,
                absent=expect is None,
                forced=forced,
                back=moved_by == ROLLBACK,
            )

        self._watch.take(await self._writing(write), moved_by)

    async def _moved(self, found: Alias, target: Version, wait: bool) -> tuple[int, dict[str, Any]]:
        # Without `wait` too the answer shows what came of it: what was tried is loaded, so it takes no time.
        try:
            await self._aliases.served(found, target, LONGEST_WAIT if wait else 1.0)
        except Problem:
            if wait:
                raise
        return (200 if wait else 202), self.rollout(found.name, found.alias)

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

    async def preload(self) -> None:
        """Loads what readiness waits for; a reference that fails is tried again until it loads."""
        pause = 1.0
        pending = list(self._preload)
        while pending:
            for reference in list(pending):
                try:
                    await self.load(reference)
                except Problem:
                    continue  # the load's own event says why
                pending.remove(reference)
            if pending:
                await asyncio.sleep(pause)
                pause = min(30.0, pause * 2)
        self._preloaded = True

    async def hint(self, reference: Reference) -> None:
        """Somebody says that something happened to a model: if it is in use, the registry is asked now."""
        if reference.name in self._aliases.snapshot.models:
            with contextlib.suppress(Problem):  # the next poll asks again
                await self._watch.ask(reference)

    # Parts of the above.

    async def _known(self, reference: Reference) -> None:
        """Asks a registry that is asked by name for what the last snapshot lacks."""
        try:
            resolve(self._aliases.snapshot, reference)
        except NotInRegistry:
            await self._watch.find(reference)

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
        if "://" in version.source or self._manager.failure(version) is not None:
            return None
        try:
            return await self._prepare(version)
        except Problem as problem:
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
            return {"reason": servable.phase.value}
        seconds = round(self._clock() - servable.began, 1)
        before = None if servable.prepared is None else servable.prepared.load_seconds
        known = "" if before is None else f" of about {before:.1f} s"
        load = {"phase": servable.phase.value, "seconds": seconds, "expected_seconds": before}
        return {"reason": f"{servable.phase.value} {seconds} s{known}", "load": load}

    def _model(self, name: str) -> Model:
        model = self._aliases.snapshot.models.get(name)
        if model is None:
            self._missing(Reference(name))
            raise Problem("MODEL_NOT_FOUND", f"there is no model {name!r}")
        return model

    def _version(self, name: str, number: str) -> Version:
        _checked(check_version, number)
        try:
            return resolve(self._aliases.snapshot, Reference(name, version=number))
        except NotInRegistry as error:
            raise Problem(error.code, str(error), hint=error.hint) from None

    def _follow(self, name: str, alias: str) -> Alias:
        try:
            return self._aliases.open(name, alias)
        except NotInRegistry as error:
            raise Problem(error.code, str(error), hint=error.hint) from None

    def _missing(self, reference: Reference) -> None:
        try:
            resolve(self._aliases.snapshot, reference)
        except NotInRegistry as error:
            raise Problem(error.code, str(error), hint=error.hint) from None

    def _named(self, name: str, alias: str, version: Version) -> dict[str, Any]:
        return {"name": name, "alias": alias, "version": version.version}

    def _must_be_writable(self) -> None:
        if not self._registry.writable:
            hint = f"edit {self._registry.target} where it is made; the gateway follows it"
            if isinstance(self._registry, ReadOnly):
                hint = self._registry.why_not
            raise Problem("REGISTRY_READ_ONLY", "the registry cannot be written from here", hint=hint)

    async def _blocking(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._io, function, *args)

    async def _writing(self, write: Callable[[], T]) -> T:
        try:
            return await self._blocking(write)
        except PreconditionFailed as error:
            raise Problem("PRECONDITION_FAILED", str(error)) from None
        except NotInRegistry as error:
            raise Problem(error.code, str(error), hint=error.hint) from None
        except RegistryReadOnly as error:
            raise Problem("REGISTRY_READ_ONLY", str(error)) from None
        except RegistryError as error:
            raise Problem("REGISTRY_UNAVAILABLE", pathless(str(error)), retry_after=5) from None


def _checked(check: Callable[[str], str], text: str) -> None:
    try:
        check(text)
    except InvalidReference as error:
        raise Problem("INVALID_REFERENCE", str(error)) from None


def _check_expectation(name: str, alias: str, actual: str | None, expect: str | None) -> None:
    if expect in (ANYWHERE, actual):
        return
    stands = "does not exist" if actual is None else f"points to version {actual}"
    wanted = "that it does not exist" if expect is None else f"version {expect}"
    raise Problem("PRECONDITION_FAILED", f"{name}@{alias} {stands}; expected {wanted}")


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


def _never_moved(name: str, alias: str, error: str, now: float) -> dict[str, Any]:
    return {
        "name": name,
        "alias": alias,
        "desired": None,
        "serving": None,
        "last_good": None,
        "phase": "refused",
        "error": error,
        "since": _iso(now),
        "diverged": False,
        "history": [],
    }


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
