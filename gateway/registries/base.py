"""The contract of registries: a snapshot of names, versions and aliases, and possibly a way to write.

Registries are plain classes that satisfy `Registry`; `gateway.registries.open_registry` chooses one by the
form of the target. Must not know files, servers or caches.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from gateway.errors import Problem
from gateway.names import Reference

MAX_PREVIOUS = 10
UNREADABLE: Final = "x-unreadable"
"""The key of `Model.rollout` that says why a policy could not be read."""
#: The most models of a large registry that are kept parsed, to bound the memory.
MADE_KEPT = 10_000


#: The longest pause between reads of a server that fails, in seconds, unless it asks for a longer one.
LONGEST_PAUSE: Final = 60.0


class RegistryError(Exception):
    """A registry cannot be used; the message is for operators. `hint`: what they can do, None if the message
    says it."""

    hint: str | None = None


class NoRegistry(RegistryError):
    """No registry is set."""


class RegistryUnavailable(RegistryError):
    """It cannot be reached or read now. The last valid snapshot stays. `retry_after`: the seconds that its
    server asks to wait, or None."""

    hint: str | None = (
        "check that it runs and that its address is right: `gateway config` shows where that comes from"
    )

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RegistryMissing(RegistryUnavailable):
    """It is a file on this machine that does not exist, or is a directory (`file` is None then)."""

    hint = "--registry names a registry file"

    def __init__(self, message: str, file: str | None = None) -> None:
        super().__init__(message)
        if file is not None:
            push = f"gateway push DIR --name NAME --registry {shlex.quote(file)}"
            self.hint = f"{self.hint}; `{push}` creates this one"


class RegistryInvalid(RegistryError):
    """Its content is not valid. `problems` are (place, what is wrong), all of them."""

    hint = "correct the registry; until then a running gateway keeps the last valid content"

    def __init__(self, target: str, problems: list[tuple[str, str]]) -> None:
        lines = "; ".join(f"{place}: {problem}" if place else problem for place, problem in problems)
        super().__init__(f"{target} is not a valid registry: {lines}")
        self.target = target
        self.problems = problems


class RegistryReadOnly(RegistryError, Problem):
    """It cannot be written from here; the message or the hint says what to edit instead."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        Problem.__init__(self, "REGISTRY_READ_ONLY", message, hint=hint)


class PreconditionFailed(RegistryError, Problem):
    """The alias does not point to the expected version. `actual`: its version, None if it does not exist."""

    def __init__(self, message: str, actual: str | None) -> None:
        Problem.__init__(self, "PRECONDITION_FAILED", message)
        self.actual = actual


class NotInRegistry(RegistryError, Problem):
    """A model, version or alias does not exist. `code`: the contract's error code."""

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

    def __hash__(self) -> int:
        return hash((self.name, self.version))  # each request looks it up: two are rarely of one name

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A gateway's verdict on the version that an alias points to; it applies to every gateway.

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
        """The inverse of `to_json`; None for anything else, because people can write it too."""
        if not isinstance(value, Mapping):
            return None
        facts = [value.get(key) for key in ("version", "outcome", "reason", "at")]
        version, outcome, reason, at = (fact if isinstance(fact, str) else None for fact in facts)
        if version is None or outcome not in OUTCOMES:
            return None
        return cls(version, outcome, reason or "no reason given", at)


OUTCOMES: Final = ("refused", "rolled_back")
BACK: Final = "x-back"
"""The key of an alias that names the version that a rollback went to. Older gateways ignore it."""


@dataclass(frozen=True, slots=True)
class Alias:
    """An alias and its version. `previous`: the versions that served under it before, newest first. `forced`:
    the operator overruled the gates, which every gateway must know. `last_good`: the last version that has
    answered. `verdict`: a gateway's verdict on `version`. `back`: a rollback went to `version`, so it has
    served before, and every gateway goes back at once."""

    version: str
    previous: tuple[str, ...] = ()
    last_good: str | None = None
    forced: bool = False
    verdict: Verdict | None = None
    back: bool = False

    @property
    def refused(self) -> Verdict | None:
        """The verdict, if it is on the alias's version and `forced` does not overrule it; else None."""
        verdict = self.standing
        # A move clears verdicts, so a rollback verdict is newer than `forced`.
        forced = verdict is not None and self.forced and verdict.outcome == "refused"
        return None if forced else verdict

    @property
    def standing(self) -> Verdict | None:
        """The verdict, if it is on the alias's version; one on another version is void."""
        verdict = self.verdict
        return verdict if verdict is not None and verdict.version == self.version else None

    @property
    def served(self) -> str | None:
        """The version that served last, as far as the registry knows: one that was superseded while it was
        tried, or refused, has not served. None: unknown."""
        return self.last_good or (self.version if self.refused is None else None)

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
        if self.back:
            value[BACK] = self.version  # void once a person writes another version
        return self.version if len(value) == 1 else value

    @classmethod
    def from_json(cls, value: str | Mapping[str, Any]) -> Alias:
        """Reads the form that `to_json` returns."""
        if isinstance(value, str):
            return cls(value)
        previous = value.get("previous", ())
        earlier = (previous,) if isinstance(previous, str) else tuple(previous)
        verdict = Verdict.from_json(value.get("x-verdict"))
        version, forced = value["version"], value.get("forced", False)
        return cls(version, earlier, value.get("last_good"), forced, verdict, value.get(BACK) == version)


ANYWHERE: Final = "*"
"""`Move.expect`: the alias may point anywhere, or not exist."""


@dataclass(frozen=True, slots=True)
class Move:
    """One move of an alias; every registry carries it out in the same way.

    `expect`: the version it must point to now; None: it must not exist; `ANYWHERE`: either.
    `forced`: a gate was overruled. `back`: a rollback, so the version it leaves does not become a
    `previous` one. `last_good`: the last version that has answered, and `serving`: the one that serves until
    now, where the mover knows them.
    """

    name: str
    alias: str
    version: str
    expect: str | None = ANYWHERE
    forced: bool = False
    back: bool = False
    last_good: str | None = None
    serving: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.alias}"

    def check(self, current: Alias | None) -> None:
        """Raises PreconditionFailed if the alias does not point to the expected version."""
        stands = None if current is None else current.version
        if self.expect in (ANYWHERE, stands):
            return
        wanted = "that it does not exist" if self.expect is None else f"version {self.expect}"
        found = "does not exist" if stands is None else f"points to version {stands}"
        raise PreconditionFailed(f"{self} {found}; expected {wanted}", stands)

    def applied(self, current: Alias | None) -> Alias:
        """The alias after the move; equal to `current` if nothing changes. Raises PreconditionFailed."""
        self.check(current)
        if current is None:
            return Alias(self.version, forced=self.forced)
        if current.version == self.version:
            # The operator repeats the move: the version is checked again.
            return replace(current, forced=current.forced or self.forced, verdict=None)
        good = self.last_good or self.serving or current.last_good
        if self.back:
            earlier = since(current.previous, self.version)
        else:
            served = self.serving or current.served
            earlier = before(current.previous, served, self.version)
        return Alias(self.version, earlier, good, self.forced, back=self.back)


def since(previous: tuple[str, ...], version: str) -> tuple[str, ...]:
    """The previous versions after a rollback: those after that point are no longer previous ones."""
    return previous[previous.index(version) + 1 :] if version in previous else previous


def before(previous: tuple[str, ...], served: str | None, version: str) -> tuple[str, ...]:
    """The previous versions after a move to `version`. `served`: the version that served until then, None if
    none did."""
    if served is None or served in (version, *previous[:1]):
        return previous
    return (served, *previous)[:MAX_PREVIOUS]


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
        """The alias with this written down; `current` itself where it does not apply, or says nothing new.
        Gateways may disagree: a verdict wins over none, and a rollback over a refusal, in any order."""
        if current is None or current.version != self.version:
            return current
        known = current.verdict
        verdict = self.verdict or known
        if known is not None and verdict is not None and known.version == self.version:
            found_before = known.reason == verdict.reason  # by this gateway or another
            if found_before or known.outcome == "rolled_back":
                verdict = known
        good = self.last_good or current.last_good
        if verdict is not None and verdict.version == good == self.version:
            good = current.last_good  # one gateway served it, another took it back
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
        """The model as plain data, without empty members."""
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
    """The models of a registry, which may be very many: each stays JSON until it is first used. `content`
    must not change. Unchanged models are reused from `before`."""

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
    """The content of a registry at one moment. `stamp` changes whenever the content does."""

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

    `identity`: the key of durable state (stable over restarts, equal for equal registries). `target`: its
    name for users. `poll_interval`: the default, in seconds. `longest_pause`: the longest pause between reads
    while it does not answer. `writable` may change over time. `partial`: it is too large to be read as a
    whole, so its snapshots hold only the names in use, and `read` queries those again. `lasting`: its
    versions never change, so one without a digest must match its first fetch.
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
        """Why it cannot be written from here, and what to do instead; None if it can. Does not block."""

    def read(self) -> Snapshot:
        """The current content. Raises RegistryUnavailable or RegistryInvalid."""

    def find(self, reference: Reference) -> Snapshot:
        """Content that resolves a reference. A found name is in use from now on; a name that is not in the
        answer does not exist. Raises RegistryUnavailable or RegistryInvalid."""

    def known(self) -> Snapshot | None:
        """The last content of a partial registry, without a query. Does not block."""

    def listing(self, name: str | None = None) -> Snapshot:
        """For people: all names (the first thousand of a partial registry), or all versions of one name.
        Raises RegistryUnavailable or RegistryInvalid."""

    def resume(self, snapshot: Snapshot) -> None:
        """Restores the names that were in use before a restart, with their content."""

    def forget(self, names: Collection[str]) -> None:
        """Marks names as no longer in use, until they are requested again. Does not block."""

    def move(self, move: Move) -> Snapshot:
        """Moves an alias, atomically where the registry can, and returns the new content. Raises
        PreconditionFailed, NotInRegistry, RegistryReadOnly, RegistryUnavailable."""

    def delete_alias(self, name: str, alias: str) -> Snapshot: ...

    def record(self, observation: Observation) -> Snapshot | None:
        """Writes an observation for other gateways, if possible; returns the new content if it did. Raises
        what `move` does, except PreconditionFailed."""

    def record_digest(self, version: Version, digest: str) -> None:
        """Writes the digest of a version's first download, if allowed."""

    def record_status(self, name: str, alias: str, version: str, status: str) -> None:
        """Writes the status of a version that an alias points to, if allowed."""

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

        Returns an existing version with the same digest unchanged. With `alias`, moves that alias to it. Safe
        if other processes do the same at the same time.
        """

    def close(self) -> None: ...
