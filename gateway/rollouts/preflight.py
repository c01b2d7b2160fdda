"""Preflight: would a version load and serve here, and may it replace the version in service?

Checks everything, so that one report names every reason: files and digest, format, environment, load in a
temporary process, the answer to its example, its output, its signature against the version in service. Uses
the parts of `offline`. Must not write anything, and must not know the command line.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gateway.errors import Problem
from gateway.rollouts.agreement import Outcome
from gateway.rollouts.gates import refusals
from loaders import flavors

if TYPE_CHECKING:
    from gateway.artifacts.packages import Prepared
    from gateway.registries.base import Version
    from gateway.rollout_settings import RolloutPolicy
    from gateway.rollouts import replay as replays
    from gateway.rollouts.offline import Workshop
    from loaders.signature import Signature

#: What the hint of a failed load says of this very check.
_THIS_COMMAND = re.compile(r"; `gateway check [^`]*` gives every reason")


@dataclass(slots=True)
class Report:
    """The findings. `reasons`: why it would not serve, or not replace the version in service. `hints`: what
    helps. `warnings`: other facts for the operator. `place`: where it runs, as text. `from_cache`: the cache
    had the files, so that nothing is known of their source. `replaces`: the version that it may replace."""

    subject: str
    reasons: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    executes_code: bool | None = None
    signature: bool | None = None
    example: bool | None = None
    environment: dict[str, Any] | None = None
    runs_in: str | None = None
    place: str | None = None
    replay: dict[str, Any] | None = None
    from_cache: bool = False
    replaces: str | None = None

    @property
    def serves(self) -> bool:
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        return {
            "subject": self.subject,
            "serves": self.serves,
            "reasons": self.reasons,
            "hints": self.hints,
            "warnings": self.warnings,
            "executes_code": self.executes_code,
            "signature": self.signature,
            "example": self.example,
            "environment": self.environment,
            "runs_in": self.runs_in,
            "from_cache": self.from_cache,
            **({} if self.replaces is None else {"replaces": self.replaces}),
            **({} if self.replay is None else {"replay": self.replay}),
        }


async def examined(
    parts: Workshop,
    version: Version,
    subject: str,
    *,
    against: Signature | None = None,
    replaced: str | None = None,
    policy: RolloutPolicy | None = None,
    replay: Callable[[Signature | None], Awaitable[replays.Report]] | None = None,
) -> Report:
    """A version, looked at from all sides. `replaced` names the version whose signature `against` is.
    `replay` lets the loaded version answer captured requests, typed by that signature."""
    report = Report(subject)
    report.from_cache = await parts.packages.cached(version)
    try:
        prepared = await parts.packages.get(version, remember=False)
    except Problem as problem:
        _refused(report, problem, version)
        return report
    _facts(report, prepared)
    lease = parts.manager.lease(version, prepared)
    try:
        servable = await parts.manager.ready(lease)
        report.warnings += [_about_subject(report, text, version) for text in servable.warnings]
        prepared = servable.prepared or prepared
        if servable.prepared is not None and servable.prepared.runtime is not None:
            runtime = servable.prepared.runtime
            report.runs_in, report.place = runtime.kind, runtime.place
            report.environment = servable.prepared.environment()
        if replay is not None:
            found = await replay(against)
            report.replay = found.evidence()
            if found.outcome is not Outcome.PASSED:
                report.reasons.append(f"it may not replace {replaced}: {found}")
    except Problem as problem:
        _refused(report, problem, version)
    finally:
        lease.release()
    if replaced is not None and policy is not None:
        reasons = refusals(policy, against, prepared.stated)
        report.reasons[:0] = [f"it may not replace {replaced}: {reason}" for reason in reasons]
        report.replaces = None if report.reasons else replaced
    return report


async def stated(parts: Workshop, version: Version) -> Signature | None:
    """The signature that callers of a version rely on. A bare model file states it only once it is loaded.
    Raises Problem."""
    prepared = await parts.packages.get(version, remember=False)
    if prepared.package.bare:
        lease = parts.manager.lease(version, prepared)
        try:
            prepared = (await parts.manager.ready(lease)).prepared or prepared
        finally:
            lease.release()
    return prepared.stated


def _facts(report: Report, prepared: Prepared) -> None:
    package = prepared.package
    report.executes_code = flavors.get(prepared.flavor).trust == "code"
    report.signature = package.signature is not None
    report.example = package.example is not None
    if not report.example:
        report.warnings.append("it has no input example: only its load was tested, not an answer")
    if prepared.needs is not None:
        report.environment = prepared.environment()


def _refused(report: Report, problem: Problem, version: Version) -> None:
    report.reasons.append(_about_subject(report, problem.message, version))
    if problem.hint:
        hint = _THIS_COMMAND.sub("", problem.hint)
        report.hints.append(_about_subject(report, hint, version))


def _about_subject(report: Report, text: str, version: Version) -> str:
    """A text about a version, about the subject instead: a directory is not version 1 of a model."""
    if version.source.endswith(report.subject) or report.subject.endswith(version.source):
        return re.sub(rf"(?<![\w/@.-]){re.escape(str(version))}(?![\w/@.-])", lambda _: report.subject, text)
    return text
