"""What a registry is to the gateway: a snapshot of names, versions and aliases, and maybe a way to write.

Knows no file, no server and no cache. The members of this family are plain classes that satisfy
`Registry`; `gateway.registries.open_registry` picks one by the target's form.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from gateway.names import Reference


MAX_PREVIOUS = 10
#: So many models of a large registry are held ready made; who asks for more is not faster, but has room.
MADE_KEPT = 10_000


class RegistryError(Exception):
    """A registry cannot be used as asked; the message is fit for an operator."""


class NoRegistry(RegistryError):
    """Nothing names one."""


class RegistryUnavailable(RegistryError):
    """It cannot be reached or read now. The last valid snapshot stays."""


class RegistryInvalid(RegistryError):
    """Its content is not valid. `problems` are (place, what is wrong), all of them."""

    def __init__(self, target: str, problems: list[tuple[str, str]]) -> None:
        lines = "; ".join(f"{place}: {problem}" if place else problem for place, problem in problems)
        super().__init__(f"{target} is not a valid registry: {lines}")
        self.problems = problems


class RegistryReadOnly(RegistryError):
    """It cannot be written from here; the message says what to edit instead."""


class PreconditionFailed(RegistryError):
    """The alias does not stand where the caller expected it. `actual` is where it stands, None: nowhere."""

    def __init__(self, message: str, actual: str | None) -> None:
        super().__init__(message)
        self.actual = actual


class NotInRegistry(RegistryError):
    """A write named a model, version or alias that is not there. `code` is the contract's error code."""

    def __init__(self, code: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable version. `source` is absolute: a local path or a URI. `digest` is `sha256:<hex>` or
    None. Two values that are equal are the same package; a changed source or digest is another one."""

    name: str
    version: str
    source: str
    digest: str | None = None
    created: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


@dataclass(frozen=True, slots=True)
class Alias:
    """Where an alias points. `previous`: versions it pointed to before, newest first. `forced`: the
    operator moved it past the gates, and every gateway that follows it must know."""

    version: str
    previous: tuple[str, ...] = ()
    last_good: str | None = None
    forced: bool = False

    def to_json(self) -> str | dict[str, Any]:
        """As it stands in a document: the version alone where there is nothing else to say."""
        value: dict[str, Any] = {"version": self.version}
        if self.previous:
            value["previous"] = self.previous[0] if len(self.previous) == 1 else list(self.previous)
        if self.last_good is not None:
            value["last_good"] = self.last_good
        if self.forced:
            value["forced"] = True
        return self.version if len(value) == 1 else value

    @classmethod
    def from_json(cls, value: str | Mapping[str, Any]) -> Alias:
        """What `to_json` gave, read back."""
        if isinstance(value, str):
            return cls(value)
        previous = value.get("previous", ())
        earlier = (previous,) if isinstance(previous, str) else tuple(previous)
        return cls(value["version"], earlier, value.get("last_good"), value.get("forced", False))


@dataclass(frozen=True, slots=True)
class Model:
    """One name with its versions and aliases; `rollout` is the policy written beside it."""

    name: str
    versions: Mapping[str, Version]
    aliases: Mapping[str, Alias]
    rollout: Mapping[str, Any] = field(default_factory=dict)

    def latest(self) -> Version | None:
        return max(self.versions.values(), key=lambda v: int(v.version), default=None)

    def to_json(self) -> dict[str, Any]:
        """As plain data, without what is not said."""
        versions = {}
        for number, version in self.versions.items():
            facts: dict[str, Any] = {"source": version.source, "digest": version.digest}
            facts |= {"created": version.created, "tags": dict(version.tags) or None}
            versions[number] = {fact: value for fact, value in facts.items() if value is not None}
        entry = {"versions": versions, "aliases": {a: e.to_json() for a, e in self.aliases.items()}}
        return entry | ({"rollout": dict(self.rollout)} if self.rollout else {})

    @classmethod
    def from_json(cls, name: str, entry: Mapping[str, Any]) -> Model:
        """What `to_json` gave, read back."""
        versions = {number: Version(name, number, **facts) for number, facts in entry["versions"].items()}
        aliases = {alias: Alias.from_json(value) for alias, value in entry["aliases"].items()}
        return cls(name, versions, aliases, entry.get("rollout", {}))


class Entries(Mapping[str, Model]):
    """Models of a registry that may hold very many: each is its JSON until somebody asks for it. `content`
    is not changed any more. Models of `before` that are the same are not made anew."""

    def __init__(self, content: Mapping[str, bytes], before: Entries | None = None) -> None:
        self.content = content
        self._made: dict[str, Model] = {}
        if before is not None:
            made = list(before._made.items())  # one step, whoever else reads
            self._made = {n: model for n, model in made if content.get(n) is before.content.get(n)}

    def __getitem__(self, name: str) -> Model:
        model = self._made.get(name)
        if model is None:
            model = Model.from_json(name, json.loads(self.content[name]))
            if len(self._made) >= MADE_KEPT:
                self._made.clear()
            self._made[name] = model
        return model

    def __contains__(self, name: object) -> bool:
        return name in self.content

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)

    def __repr__(self) -> str:
        return f"<Entries {len(self.content)} models>"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All a registry said at one moment. `stamp` changes whenever the content does."""

    models: Mapping[str, Model]
    stamp: str

    def entries(self) -> Mapping[str, bytes]:
        """Each model as JSON, for the durable state; `Entries` reads it back."""
        if isinstance(self.models, Entries):
            return self.models.content
        return {name: json.dumps(model.to_json()).encode() for name, model in self.models.items()}


class Registry(Protocol):
    """A source of snapshots. All methods block: they are called from the I/O pool or a command.

    `identity` keys durable state (stable over restarts, equal for equal registries); `target` is what
    users are shown; `poll_interval` is the default, in seconds; `writable` may change over its life.
    """

    identity: str
    target: str
    poll_interval: float

    @property
    def writable(self) -> bool: ...

    def read(self) -> Snapshot:
        """The present content. Raises RegistryUnavailable or RegistryInvalid."""

    def set_alias(
        self,
        name: str,
        alias: str,
        version: str,
        *,
        expect: str | None = None,
        absent: bool = False,
        forced: bool = False,
        back: bool = False,
    ) -> Snapshot:
        """Moves an alias atomically and returns the new content.

        `expect`: the version it must point to now; `absent`: it must not exist. `back`: a rollback; the
        version it leaves does not become a `previous` one. Raises PreconditionFailed, NotInRegistry,
        RegistryReadOnly, RegistryUnavailable.
        """

    def delete_alias(self, name: str, alias: str) -> Snapshot: ...

    def add_version(
        self,
        name: str,
        package: str,
        digest: str,
        *,
        tags: Mapping[str, str] | None = None,
        alias: str | None = None,
    ) -> Version:
        """Copies the model directory `package` into the store as the next version, which it returns.

        A version with the same digest is returned as it is. With `alias`, that alias is moved to it.
        Safe against others doing the same at the same moment.
        """

    def close(self) -> None: ...


class ReadOnly:
    """The writing half of a registry that cannot be written from here. `why_not` says so, and what to do."""

    writable = False
    why_not: str

    def set_alias(
        self,
        name: str,
        alias: str,
        version: str,
        *,
        expect: str | None = None,
        absent: bool = False,
        forced: bool = False,
        back: bool = False,
    ) -> Snapshot:
        raise RegistryReadOnly(self.why_not)

    def delete_alias(self, name: str, alias: str) -> Snapshot:
        raise RegistryReadOnly(self.why_not)

    def add_version(
        self,
        name: str,
        package: str,
        digest: str,
        *,
        tags: Mapping[str, str] | None = None,
        alias: str | None = None,
    ) -> Version:
        raise RegistryReadOnly(self.why_not)


@runtime_checkable
class AskedByName(Protocol):
    """What a registry has beside `Registry` that is too large to be read whole: its snapshots hold the names
    in use alone, and `read` asks for those again. Versions of such a registry are immutable: one without a
    digest is held to that of its first fetch."""

    def find(self, reference: Reference) -> None:
        """Asks for what a reference means. What is found is in use from now on; what the registry says is not
        there is not in `known()` afterwards. Blocks. Raises RegistryUnavailable."""

    def known(self) -> Snapshot:
        """What was said last, without asking."""

    def resume(self, snapshot: Snapshot) -> None:
        """The names that were in use before a restart, with what the registry said then."""

    def forget(self, names: Collection[str]) -> None:
        """These are not in use any more, until they are asked for again. Does not block."""

    def listing(self, name: str | None = None) -> Snapshot:
        """The first thousand of all names, or all versions of one. Blocks. Raises RegistryUnavailable."""

    def record_digest(self, version: Version, digest: str) -> None:
        """Writes down, where that is allowed, what the files of a version were at first. Blocks."""

    def record_status(self, name: str, alias: str, version: str, status: str) -> None:
        """Writes down, where that is allowed, what became of a version that an alias points to. Blocks."""


def ask(registry: Registry, reference: Reference) -> Snapshot:
    """A snapshot that answers for a reference, however the registry is read. Raises what `read` does."""
    if not isinstance(registry, AskedByName):
        return registry.read()
    registry.find(reference)
    return registry.known()


def resolve(
    snapshot: Snapshot, reference: Reference, default_alias: Sequence[str] = ("champion",)
) -> Version:
    """The version that a `models:/` reference means now. A bare name means its first alias of
    `default_alias` that exists. Raises NotInRegistry, with the contract's code and what there is instead."""
    model = snapshot.models.get(key(reference))
    if model is None and not reference.name:
        message = f"{reference} is not there: it means something in an MLflow registry only"
        raise NotInRegistry("MODEL_NOT_FOUND", message)
    if model is None:
        # Anybody may ask for any name: what is compared is bounded, however large the registry.
        looked_at = islice(snapshot.models, 5000)
        alike = (name for name in looked_at if name[:1].lower() == reference.name[:1].lower())
        near = difflib.get_close_matches(reference.name, islice(alike, 200), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else None
        raise NotInRegistry("MODEL_NOT_FOUND", f"there is no model {reference.name!r} in the registry", hint)
    if reference.version is not None:
        return _version(model, reference.version, f"{model.name} has no version {reference.version}")
    if reference.latest or not reference.name:
        latest = model.latest()
        if latest is None:
            raise NotInRegistry("VERSION_NOT_FOUND", f"{model.name} has no versions")
        return latest
    wanted = [reference.alias] if reference.alias is not None else list(default_alias)
    for alias in wanted:
        if alias in model.aliases:
            version = model.aliases[alias].version
            missing = f"the alias {alias} of {model.name} points to version {version}, which is not there"
            return _version(model, version, missing)
    raise NotInRegistry(
        "ALIAS_NOT_FOUND",
        f"{model.name} has no alias {' or '.join(wanted)}",
        f"aliases of {model.name}: {_some(sorted(model.aliases))}",
    )


def moved(current: Alias | None, version: str, *, forced: bool, back: bool) -> Alias:
    """What an alias is once it points to `version`; `current` itself where that changes nothing."""
    if current is None:
        return Alias(version, forced=forced)
    if current.version == version:
        return replace(current, forced=current.forced or forced)
    if back:
        # Back to where it was: what lies after that point of its past is no longer behind it.
        earlier = current.previous
        rest = earlier[earlier.index(version) + 1 :] if version in earlier else earlier
        return replace(current, version=version, previous=rest, forced=forced)
    previous = (current.version, *current.previous)[:MAX_PREVIOUS]
    return replace(current, version=version, previous=previous, forced=forced)


def expect_alias(name: str, current: Alias | None, expect: str | None, *, absent: bool) -> None:
    """Raises PreconditionFailed where the alias called `name` is not where a writer expects it."""
    stands = None if current is None else current.version
    if (expect is not None and stands != expect) or (absent and stands is not None):
        wanted = "it to be absent" if absent else f"version {expect}"
        found = "it does not exist" if stands is None else f"it points to version {stands}"
        raise PreconditionFailed(f"{name}: expected {wanted}, but {found}", stands)


def key(reference: Reference) -> str:
    """Under what a snapshot has a reference's model: its name, or a model id or a run's path as they are
    written, which no name can be."""
    return reference.name or str(reference)


def _version(model: Model, version: str, otherwise: str) -> Version:
    if version in model.versions:
        return model.versions[version]
    known = _some(sorted(model.versions, key=int, reverse=True))
    raise NotInRegistry("VERSION_NOT_FOUND", otherwise, f"versions of {model.name}: {known}")


def _some(names: Sequence[str]) -> str:
    """At most twenty of them, for a hint."""
    return ", ".join(names[:20]) + (", …" if len(names) > 20 else "") if names else "none"
