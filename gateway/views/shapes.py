"""The views: frozen and typed, with their fields in the order of the JSON.

Must not know where the facts are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from gateway.quantities import utc
from gateway.rollouts.alias import number

if TYPE_CHECKING:
    from gateway.rollouts.alias import Attempt, LiveAlias
    from gateway.rollouts.gates import Trial
    from gateway.state import Served

#: Maximum number of stretches of an alias's history in a view.
SHOWN_HISTORY = 20


class Absent(Enum):
    """The value of a field that a view does not have; its JSON omits the field."""

    ABSENT = "absent"


ABSENT: Final = Absent.ABSENT


@dataclass(frozen=True, slots=True)
class View:
    """The base of all views."""

    def to_json(self) -> dict[str, Any]:
        members = {member.name.rstrip("_"): getattr(self, member.name) for member in fields(self)}
        return {name: _plain(value) for name, value in members.items() if value is not ABSENT}


def _plain(value: Any) -> Any:
    if isinstance(value, View):
        return value.to_json()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


# Versions and models.


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionView(View):
    """The state of a version in this gateway. `hint`: advice after a failure. `bytes`: its total bytes in
    memory. `evicted`: the reason of its eviction. `environment`: where it runs; in the view of a single
    version also what it was made with. `load` and `fetch`: their progress. The fields from `writable` on
    exist only in the view of a single version: `flavor` and `metadata` once its files are verified, the
    others if the caller may see possibly real data."""

    name: str | Absent = ABSENT
    version: str
    state: str
    reason: str | None
    hint: str | Absent | None = ABSENT
    bytes: int | None = None
    last_used: str | None
    stuck: str | None = None
    placement: Mapping[str, Any] | None = None
    recent: Mapping[str, Any] | None = None
    last_error: Mapping[str, Any] | None = None
    evicted: Mapping[str, Any] | Absent = ABSENT
    warnings: list[str] | Absent = ABSENT
    load: Mapping[str, Any] | Absent = ABSENT
    fetch: Mapping[str, Any] | Absent = ABSENT
    digest: str | None
    created: str | None
    tags: Mapping[str, str]
    writable: bool | Absent = ABSENT
    aliases: list[str] | Absent = ABSENT
    signature: Mapping[str, Any] | Absent | None = ABSENT
    environment: Mapping[str, Any] | Absent | None = ABSENT
    flavor: list[str] | Absent = ABSENT
    metadata: Mapping[str, Any] | Absent | None = ABSENT
    runner: Mapping[str, Any] | Absent = ABSENT
    input_example: Mapping[str, Any] | Absent | None = ABSENT
    example_answer: Any = ABSENT

    def without_others(self) -> VersionView:
        """Returns the view without the names of other models, such as the one that caused the eviction."""
        if isinstance(self.evicted, Absent):
            return self
        return replace(self, evicted={"seconds_ago": self.evicted["seconds_ago"], "for": None, "why": None})


@dataclass(frozen=True, slots=True)
class ModelView(View):
    """A model of the registry with its versions, ordered by number. `rollouts`, by alias, and `writable`
    exist only in the view of a single model."""

    name: str
    aliases: Mapping[str, str]
    versions: tuple[VersionView, ...]
    rollouts: Mapping[str, RolloutView] | Absent = ABSENT
    writable: bool | Absent = ABSENT

    def without_others(self) -> ModelView:
        """Returns the view without the names of other models."""
        return replace(self, versions=tuple(version.without_others() for version in self.versions))


# Rollouts.


@dataclass(frozen=True, slots=True)
class Stretch(View):
    """A period in which an alias served a version. `from_` and `until` are UTC times."""

    version: str
    from_: str
    until: str | None
    moved_by: str
    ended_because: str | None

    @classmethod
    def of(cls, served: Served) -> Stretch:
        ended = None if served.ended is None else utc(served.ended)
        return cls(served.version, utc(served.started), ended, served.moved_by, served.reason)


@dataclass(frozen=True, slots=True)
class CourseView(View):
    """A rollout: its step, the measurements of its guards, and its events so far."""

    version: str
    compared_with: str | None
    phase: str
    reason: str | None
    step: Mapping[str, Any] | None
    evidence: Mapping[str, Any] | None
    changes: list[Mapping[str, Any]]

    @classmethod
    def earlier(cls, kept: Mapping[str, Any]) -> CourseView:
        """A rollout that a later one has replaced, as `Course.put_away` keeps it."""
        known: dict[str, Any] = {field.name: kept.get(field.name) for field in fields(cls)}
        return cls(**known)


@dataclass(frozen=True, slots=True)
class RolloutView(View):
    """An alias: its desired, serving and last good versions, and the running attempt or rollout. Also an
    attempt with an alias that does not exist (any more).

    `calls`: the last control calls about it, for callers who may control it. `step`: the step of a running
    canary. `peers`: how many other gateways serve each version, if the settings name them. `policy`,
    `policy_error` (why the registry's policy is not used), `rollout` and `earlier_rollouts` (newest first)
    exist only in full views; `forced_past`, `checks` and
    `environment` only after a promotion.
    """

    name: str
    alias: str
    phase: str
    error: str | None
    since: str | None
    desired: str | None = None
    serving: str | None = None
    last_good: str | None = None
    diverged: bool = False
    unproven: bool = False
    verdict: Mapping[str, Any] | None = None
    trial: Mapping[str, Any] | None = None
    step: Mapping[str, Any] | None = None
    peers: Mapping[str, int] | Absent = ABSENT
    history: tuple[Stretch, ...] = ()
    policy: Mapping[str, Any] | Absent = ABSENT
    policy_error: str | Absent = ABSENT
    rollout: CourseView | Absent = ABSENT
    earlier_rollouts: list[CourseView] | Absent = ABSENT
    forced_past: list[str] | Absent = ABSENT
    checks: list[dict[str, Any]] | Absent = ABSENT
    environment: Mapping[str, Any] | Absent | None = ABSENT
    calls: list[dict[str, Any]] | Absent = ABSENT

    @classmethod
    def of(cls, found: LiveAlias, trial: Trial | None) -> RolloutView:
        return cls(
            found.name,
            found.alias,
            found.phase,
            found.error,
            None if found.phase == "unloaded" else utc(found.since),
            desired=number(found.desired),
            serving=number(found.serving),
            last_good=number(found.last_good),
            diverged=found.diverged,
            unproven=found.unproven,
            verdict=None if found.verdict is None else found.verdict.to_json(),
            trial=None if trial is None else trial.to_json(),
            step=None if found.rollout is None else found.rollout.step_view(),
            history=tuple(Stretch.of(served) for served in found.history[-SHOWN_HISTORY:]),
        )

    @classmethod
    def of_attempt(cls, attempt: Attempt) -> RolloutView:
        return cls(attempt.name, attempt.alias, attempt.phase, attempt.error, utc(attempt.since))


@dataclass(frozen=True, slots=True)
class DryRunView(View):
    """A promotion that passed its checks but was not made. `replay`: what captured requests have shown, if
    its rollout would begin with them: `outcome` is `passed`, or `thin`, which holds the rollout."""

    name: str
    alias: str
    version: str
    previous: str | None
    checks: list[dict[str, Any]]
    environment: Mapping[str, Any] | None
    forced_past: list[str] | Absent = ABSENT
    replay: Mapping[str, Any] | Absent = ABSENT
    dry_run: bool = True
    accepted: bool = True


# The gateway.


@dataclass(frozen=True, slots=True)
class ReadinessView(View):
    """Whether the gateway can take traffic: it has a registry snapshot, and all preloaded models are loaded.
    `draining`: it is stopping."""

    ready: bool
    registry: Mapping[str, Any]
    preload_pending: list[str]
    preload_errors: Mapping[str, str]
    preload_unmatched: Mapping[str, str]
    settings_unmatched: Mapping[str, str]
    memory: Mapping[str, float | None]
    draining: bool | Absent = ABSENT

    def without_names(self) -> ReadinessView:
        """Returns the view without the names of models, for callers that may not see all of them."""
        return replace(
            self, preload_pending=[], preload_errors={}, preload_unmatched={}, settings_unmatched={}
        )

    def stopping(self) -> ReadinessView:
        return replace(self, ready=False, draining=True)
