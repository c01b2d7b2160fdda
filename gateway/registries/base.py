"""What a registry is to the gateway: a snapshot of names, versions and aliases, and maybe a way to write.

Knows no file, no server and no cache. The members of this family are plain classes that satisfy
`Registry`; `gateway.registries.open_registry` picks one by the target's form.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from gateway.errors import Problem
from gateway.names import Reference

MAX_PREVIOUS = 10
UNREADABLE: Final = "x-unreadable"
"""The key of `Model.rollout` that says why a policy could not be read."""
#: So many models of a large registry are held ready made; who asks for more is not faster, but has room.
MADE_KEPT = 10_000


#: The longest pause between reads of a server that fails, in seconds, unless it asks for a longer one.
LONGEST_PAUSE: Final = 60.0


class RegistryError(Exception):
    """A registry cannot be used as asked; the message is fit for an operator."""


class NoRegistry(RegistryError):
    """Nothing names one."""


class RegistryUnavailable(RegistryError):
    """It cannot be reached or read now. The last valid snapshot stays. `retry_after`: seconds to wait, where
    its server asks for that."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RegistryMissing(RegistryUnavailable):
    """It is a file here, and there is no such file: nothing, or a directory."""


class RegistryInvalid(RegistryError):
    """Its content is not valid. `problems` are (place, what is wrong), all of them."""

    def __init__(self, target: str, problems: list[tuple[str, str]]) -> None:
        lines = "; ".join(f"{place}: {problem}" if place else problem for place, problem in problems)
        super().__init__(f"{target} is not a valid registry: {lines}")
        self.target = target
        self.problems = problems


class RegistryReadOnly(RegistryError, Problem):
    """It cannot be written from here; message or hint say what to edit instead."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        Problem.__init__(self, "REGISTRY_READ_ONLY", message, hint=hint)


class PreconditionFailed(RegistryError, Problem):
    """The alias is not where the caller expected it. `actual` is where it points, None: it does not exist."""

    def __init__(self, message: str, actual: str | None) -> None:
        Problem.__init__(self, "PRECONDITION_FAILED", message)
        self.actual = actual


class NotInRegistry(RegistryError, Problem):
    """A model, version or alias that is not there. `code` is the contract's error code."""

    def __init__(self, code: str, message: str, hint: str | None = None) -> None:
        Problem.__init__(self, code, message, hint=hint)


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
class Verdict:
    """What a gateway found out about the version that an alias points to; it holds for every gateway.

    `version` is the version it is about; a verdict on another version than the alias points to is void.
    `at` is an ISO 8601 time.
    """

    version: str
    outcome: str
    reason: str
    at: str | None = None

    @property
    def said(self) -> str:
        return self.outcome.replace("_", " ")

    def to_json(self) -> dict[str, str]:
        facts = {"version": self.version, "outcome": self.outcome, "reason": self.reason}
        return facts if self.at is None else {**facts, "at": self.at}

    @classmethod
    def from_json(cls, value: object) -> Verdict | None:
        """What `to_json` gave, read back; None for anything else, because people can write it too."""
        if not isinstance(value, Mapping):
            return None
        facts = [value.get(key) for key in ("version", "outcome", "reason", "at")]
        version, outcome, reason, at = (fact if isinstance(fact, str) else None for fact in facts)
        if version is None or outcome not in OUTCOMES:
            return None
        return cls(version, outcome, reason or "no reason is given", at)


OUTCOMES: Final = ("refused", "rolled_back")


@dataclass(frozen=True, slots=True)
class Alias:
    """Where an alias points. `previous`: versions it pointed to before, newest first. `forced`: the
    operator moved it past the gates, and every gateway that follows it must know. `last_good`: the version
    that has answered last. `verdict`: what a gateway found out about `version`."""

    version: str
    previous: tuple[str, ...] = ()
    last_good: str | None = None
    forced: bool = False
    verdict: Verdict | None = None

    @property
    def refused(self) -> Verdict | None:
        """The verdict, where it is on the version the alias points to and is not overruled by `forced`."""
        verdict = self.verdict
        if verdict is None or verdict.version != self.version:
            return None
        # A move forgets verdicts: what was rolled back was found worse after it had been forced.
        return None if self.forced and verdict.outcome == "refused" else verdict

    def to_json(self) -> str | dict[str, Any]:
        """Returns the form written to a document: only the version when nothing else is set."""
        value: dict[str, Any] = {"version": self.version}
        if self.previous:
            value["previous"] = self.previous[0] if len(self.previous) == 1 else list(self.previous)
        if self.last_good is not None:
            value["last_good"] = self.last_good
        if self.forced:
            value["forced"] = True
        if self.verdict is not None:
            value["x-verdict"] = self.verdict.to_json()
        return self.version if len(value) == 1 else value

    @classmethod
    def from_json(cls, value: str | Mapping[str, Any]) -> Alias:
        """Reads the form that `to_json` returns."""
        if isinstance(value, str):
            return cls(value)
        previous = value.get("previous", ())
        earlier = (previous,) if isinstance(previous, str) else tuple(previous)
        verdict = Verdict.from_json(value.get("x-verdict"))
        return cls(value["version"], earlier, value.get("last_good"), value.get("forced", False), verdict)


ANYWHERE: Final = "*"
"""`Move.expect`: the alias may point anywhere, or not exist."""


@dataclass(frozen=True, slots=True)
class Move:
    """One move of an alias, as every registry carries it out.

    `expect`: the version it must point to now; None: it must not exist; `ANYWHERE`: either. `forced`: a gate
    was overruled. `back`: a rollback, so the version it leaves does not become a `previous` one. `last_good`:
    the version that served until now, where the mover knows it.
    """

    name: str
    alias: str
    version: str
    expect: str | None = ANYWHERE
    forced: bool = False
    back: bool = False
    last_good: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.alias}"

    def check(self, current: Alias | None) -> None:
        """Raises PreconditionFailed where the alias is not where the mover expects it."""
        stands = None if current is None else current.version
        if self.expect in (ANYWHERE, stands):
            return
        wanted = "that it does not exist" if self.expect is None else f"version {self.expect}"
        found = "does not exist" if stands is None else f"points to version {stands}"
        raise PreconditionFailed(f"{self} {found}; expected {wanted}", stands)

    def applied(self, current: Alias | None) -> Alias:
        """What the alias is after the move; equal to `current` where that changes nothing. Raises
        PreconditionFailed."""
        self.check(current)
        if current is None:
            return Alias(self.version, forced=self.forced)
        if current.version == self.version:
            # The operator asks again: what was found out before is to be found out once more.
            return replace(current, forced=current.forced or self.forced, verdict=None)
        good = self.last_good or current.last_good
        earlier = current.previous
        if self.back:
            # Back to where it was: what lies after that point of its past is no longer behind it.
            earlier = earlier[earlier.index(self.version) + 1 :] if self.version in earlier else earlier
        elif current.refused is None:  # a version that was refused has not served: no way leads back to it
            earlier = (current.version, *earlier)[:MAX_PREVIOUS]
        return Alias(self.version, earlier, good, self.forced)


@dataclass(frozen=True, slots=True)
class Observation:
    """What a gateway writes down for all: of the version an alias points to, `verdict` (None: nothing against
    it), and `last_good`, the version that answers meanwhile. Void once the alias points elsewhere."""

    name: str
    alias: str
    version: str
    last_good: str | None
    verdict: Verdict | None = None

    def applied(self, current: Alias | None) -> Alias | None:
        """The alias with this written down; `current` itself where it does not apply, or says nothing new."""
        if current is None or current.version != self.version:
            return current
        known = current.verdict
        verdict = self.verdict or known
        if known is not None and verdict is not None and known.reason == verdict.reason:
            verdict = known  # found out before, by this gateway or another
        good = self.last_good or current.last_good
        new = replace(current, last_good=good, verdict=verdict)
        return current if new == current else new


@dataclass(frozen=True, slots=True)
class Model:
    """One name with its versions and aliases; `rollout` is the policy written with it."""

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
        """Reads the form that `to_json` returns."""
        versions = {number: Version(name, number, **facts) for number, facts in entry["versions"].items()}
        aliases = {alias: Alias.from_json(value) for alias, value in entry["aliases"].items()}
        return cls(name, versions, aliases, entry.get("rollout", {}))


class Entries(Mapping[str, Model]):
    """The models of a registry, which may be very many: each stays JSON until it is first read. `content`
    must not change. Unchanged models are taken over from `before`."""

    def __init__(self, content: Mapping[str, bytes], before: Entries | None = None) -> None:
        self.content = content
        self._made: dict[str, Model] = {}
        if before is not None:
            made = list(before._made.items())  # one atomic step: other threads may read
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
    """A source of snapshots. All methods block, unless they say otherwise: they are called from the I/O pool
    or a command.

    `identity` keys durable state (stable over restarts, equal for equal registries); `target` is what
    users are shown; `poll_interval` is the default, in seconds; `longest_pause` the longest one between reads
    while it does not answer; `writable` may change over its life.
    `partial`: it is too large to be read whole, so its snapshots hold only the names in use, and `read` asks
    for those again. `lasting`: its versions never change, so one without a digest must match its first fetch.
    """

    identity: str
    target: str
    poll_interval: float
    longest_pause: float
    partial: bool
    lasting: bool

    @property
    def writable(self) -> bool: ...

    def why_not_writable(self) -> str | None:
        """Why it cannot be written from here and what to do instead; None where it can. Does not block."""

    def read(self) -> Snapshot:
        """The present content. Raises RegistryUnavailable or RegistryInvalid."""

    def find(self, reference: Reference) -> Snapshot:
        """Content that answers for a reference. What is found is in use from now on; what is not in the
        answer is not there. Raises RegistryUnavailable or RegistryInvalid."""

    def known(self) -> Snapshot | None:
        """What a partial registry said last, without asking it. Does not block."""

    def listing(self, name: str | None = None) -> Snapshot:
        """For people: all names (of a partial registry the first thousand), or all versions of one. Raises
        RegistryUnavailable or RegistryInvalid."""

    def resume(self, snapshot: Snapshot) -> None:
        """Takes over the names that were in use before a restart, with what was said of them then."""

    def forget(self, names: Collection[str]) -> None:
        """These names are not in use any more, until somebody asks for them. Does not block."""

    def move(self, move: Move) -> Snapshot:
        """Moves an alias, atomically where the registry can, and returns the new content. Raises
        PreconditionFailed, NotInRegistry, RegistryReadOnly, RegistryUnavailable."""

    def delete_alias(self, name: str, alias: str) -> Snapshot: ...

    def record(self, observation: Observation) -> Snapshot | None:
        """Writes an observation down for other gateways, where that is possible; returns the new content if
        it was. Raises what `move` does, but PreconditionFailed."""

    def record_digest(self, version: Version, digest: str) -> None:
        """Writes down, where that is allowed, what the files of a version were at first."""

    def record_status(self, name: str, alias: str, version: str, status: str) -> None:
        """Writes down, where that is allowed, what became of a version that an alias points to."""

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


class Whole:
    """The reading half of a registry whose every snapshot holds all of it."""

    longest_pause = LONGEST_PAUSE
    partial = False
    lasting = True

    def read(self) -> Snapshot:
        raise NotImplementedError

    def find(self, reference: Reference) -> Snapshot:
        return self.read()

    def known(self) -> Snapshot | None:
        return None

    def listing(self, name: str | None = None) -> Snapshot:
        return self.read()

    def resume(self, snapshot: Snapshot) -> None:
        """Nothing is in use by name."""

    def forget(self, names: Collection[str]) -> None:
        """Nothing is in use by name."""

    def record_digest(self, version: Version, digest: str) -> None:
        """The owner writes digests."""

    def record_status(self, name: str, alias: str, version: str, status: str) -> None:
        """The owner sees observations, and nothing else is written."""


class ReadOnly:
    """The writing half of a registry that cannot be written from here. `why_not` says so, and what to do."""

    writable = False
    why_not: str

    def why_not_writable(self) -> str | None:
        return self.why_not

    def move(self, move: Move) -> Snapshot:
        raise RegistryReadOnly(self.why_not)

    def delete_alias(self, name: str, alias: str) -> Snapshot:
        raise RegistryReadOnly(self.why_not)

    def record(self, observation: Observation) -> Snapshot | None:
        return None

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
