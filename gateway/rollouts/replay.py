"""Replay: a candidate answers captured requests of the version in service, before any caller gets it.

The requests are the last ones that were captured, in their order, one at a time, so that the times of its
calls are its own. Its answers are compared with those that callers got then (`agreement`). A request with a
redacted input column is not replayed; the report counts it.

The candidate gets a request as it would get it from a caller: where its signature differs from that of the
version in service, the typed input is enforced again. Knows captured requests, versions and their queues;
must not know aliases, HTTP or the command line.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor
from statistics import median_high
from typing import TYPE_CHECKING, Any, Final, Protocol

from gateway.capture.records import Unreadable
from gateway.errors import Detail, Problem
from gateway.rollouts.agreement import Agreement, Compared, Outcome, compare, unanswered
from gateway.runners.base import ModelError, NoProcess, RunnerCrashed, RunnerTimeout
from gateway.runners.suspects import Poisoned
from gateway.serving.admission import NotAdmitted
from loaders.batch import Columns, Tensors, frame
from loaders.enforcement import InvalidInput, RawInput, enforce

if TYPE_CHECKING:
    from gateway.capture.records import Content, Record
    from gateway.registries.base import Version
    from gateway.rollout_settings import Replay
    from gateway.serving.manager import Manager
    from gateway.serving.servable import Servable
    from loaders.batch import Batch
    from loaders.signature import Signature

log = logging.getLogger("gateway.replay")

#: The most kinds of errors that a report lists.
_KINDS: Final = 10
#: So many requests without an answer in time may end a replay.
_HANGS: Final = 3
_REFUSED: Final = "input refused"
_HUNG: Final = "no answer in time"
_FAILURES: Final = (RunnerTimeout, NoProcess, Poisoned, RunnerCrashed, ModelError)


class Captures(Protocol):
    """Where captured requests come from. Both block, and raise OSError and sqlite3.Error."""

    def newest(
        self, name: str, version: str, count: int, digest: str | None = None
    ) -> tuple[list[int], int]: ...

    def read(self, number: int) -> Record | None: ...


class Report:
    """What a replay has shown so far. `captured`: the requests that were found. `left_out`: those with a
    redacted column."""

    def __init__(self, candidate: Version, service: Version, policy: Replay, *, off: bool = False) -> None:
        self.candidate = candidate
        self.service = service
        self.policy = policy
        self.captured = self.left_out = self.lost = 0
        self.ended = False
        #: Why it could not be carried out.
        self.problem: str | None = None
        self._off = off
        self._agreement = Agreement(policy.agreement, policy.requests)
        self._errors: Counter[str] = Counter()
        self._seconds: list[float] = []
        self._before: list[float] = []

    @property
    def requests(self) -> int:
        return self._agreement.requests

    @property
    def answers(self) -> int:
        """How many requests the candidate has answered."""
        return self._agreement.answers

    @property
    def hangs(self) -> bool:
        """Whether enough requests had no answer in time to be sure that the agreement is too low: to wait for
        the others would tell nothing more."""
        return self._agreement.breached and self._errors[RunnerTimeout.__name__] >= _HANGS

    @property
    def wanted(self) -> int:
        return self.policy.requests

    @property
    def outcome(self) -> Outcome | None:
        """None while it runs."""
        return self._agreement.outcome if self.ended else None

    def answered(self, record: Record, compared: Compared, seconds: float) -> None:
        self._agreement.add(compared, record.id)
        self._seconds.append(seconds)
        self._before.append(record.seconds)

    def failed(self, record: Record, reference: Batch, kind: str) -> bool:
        """The candidate gave no answer. `kind`: of the error, without data. Returns whether it is the first
        of its kind."""
        self._agreement.add(unanswered(reference), record.id)
        if kind not in self._errors and len(self._errors) >= _KINDS:
            return False
        self._errors[kind] += 1
        return self._errors[kind] == 1

    def evidence(self) -> dict[str, Any]:
        """JSON-ready; names no value of a request."""
        found = self._agreement.verdict().evidence
        found |= {
            "reference": f"captured answers of version {self.service.version}",
            "captured": self.captured,
            "not_replayed": {"redacted": self.left_out, "unreadable": self.lost},
            "errors": dict(self._errors),
        }
        if self._seconds:
            found["latency"] = {
                "candidate_median_seconds": round(median_high(self._seconds), 6),
                "captured_median_seconds": round(median_high(self._before), 6),
            }
        if self.problem is not None:
            found["problem"] = self.problem
        return found

    def to_json(self) -> dict[str, Any]:
        """The evidence with its outcome, and in words."""
        outcome = None if self.outcome is None else self.outcome.value
        return {"outcome": outcome, "says": str(self), **self.evidence()}

    def details(self) -> list[Detail]:
        """What is too low or too few, and the output columns that differ, for an error."""
        found = self._agreement.verdict().evidence
        got = found["agreement"]
        if found["requests"] < found["requests_wanted"]:
            wanted, answered = found["requests_wanted"], found["requests"]
            details = [Detail("replay.requests", "are too few", f"{wanted}", f"{answered}")]
        else:
            details = []
        if got is not None:
            low = "is too low" if got < found["wanted"] else "is high enough"
            details.append(Detail("replay.agreement", low, f"{found['wanted']:g}", f"{got:g}"))
        for column, counts in found["worst_columns"].items():
            if counts["differ"]:
                differs = f"{counts['differ']} of {counts['values']} values differ"
                details.append(Detail(f"replay.{column}", differs))
        return details

    def __str__(self) -> str:
        verdict = self._agreement.verdict()
        if verdict.outcome is not Outcome.THIN:
            text = f"replay: {verdict}"
            if self._errors:
                text += f" (errors: {', '.join(f'{kind} {n}' for kind, n in self._errors.most_common(3))})"
            return text
        text = f"too few captured requests: {self.requests} of {self.wanted} were replayed"
        if self.requests:
            text += f", {verdict.evidence['differ']} got another answer"
        if self.left_out:
            text += f"; {self.left_out} more have a redacted column"
        if self.problem is not None:
            text += f"; {self.problem}"
        elif self._off:
            text += f"; capture is off for {self.service.name}: set capture.share"
        return text


class Replays:
    """`io` runs what blocks. `captured` returns whether requests of a model are captured."""

    def __init__(
        self,
        captures: Captures,
        manager: Manager,
        io: Executor,
        *,
        captured: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self._captures = captures
        self._manager = manager
        self._io = io
        self._captured = captured

    def report(self, candidate: Version, service: Version, policy: Replay) -> Report:
        """An empty report, for `run`."""
        return Report(candidate, service, policy, off=not self._captured(service.name))

    async def run(self, report: Report, *, signature: Signature | None = None) -> None:
        """Lets the candidate, which is loaded, answer the requests. `signature`: that of the version in
        service, if it is not loaded here. Ends after `within`, and raises nothing."""
        try:
            async with asyncio.timeout(report.policy.within):
                await self._run(report, signature)
        except TimeoutError:
            report.problem = f"the replay did not end in {report.policy.within:g} s"
        except (OSError, sqlite3.Error) as error:
            report.problem = "the captured requests cannot be read"
            log.warning("%s: %s", report.problem, error)
        except Problem as problem:
            report.problem = problem.message
        except Exception:
            report.problem = "the replay failed; the gateway's log has the reason"
            log.exception("the replay for %s failed", report.candidate)
        finally:
            if (servable := self._manager.find(report.candidate)) is not None:
                servable.give_way(False)
        report.ended = True

    async def _run(self, report: Report, signature: Signature | None) -> None:
        service, policy = report.service, report.policy
        standing = self._manager.find(service)
        digest = None
        if standing is not None and standing.prepared is not None:
            digest, signature = standing.prepared.digest, standing.rules()[0]
        numbers, report.left_out = await self._blocking(
            self._captures.newest, service.name, service.version, policy.requests, digest
        )
        report.captured = len(numbers)
        for number in numbers:
            record = await self._blocking(self._captures.read, number)
            if record is None:
                report.lost += 1
                continue
            try:
                content = await self._blocking(record.content)
            except Unreadable:
                report.lost += 1
                continue
            servable = self._manager.find(report.candidate)
            if servable is None or not self._manager.is_ready(report.candidate):
                report.problem = f"{report.candidate} is not loaded any more"
                return
            servable.give_way(not self._manager.ledger[servable].serving)  # another alias may use it
            await self._one(report, servable, record, content, signature)
            if report.hangs:
                return

    async def _one(
        self,
        report: Report,
        servable: Servable,
        record: Record,
        content: Content,
        signature: Signature | None,
    ) -> None:
        asked = False
        try:
            batch, params = await self._suited(servable, content, signature)
            asked = True
            outcome = await servable.batcher.submit(batch, params)
        except asyncio.CancelledError:
            if asked:
                report.failed(record, content.answer, _HUNG)
            raise
        except NotAdmitted:
            report.lost += 1  # its queue is full of other requests
        except InvalidInput:
            report.failed(record, content.answer, _REFUSED)
        except _FAILURES as error:
            kind = str(error).partition(":")[0] if isinstance(error, ModelError) else type(error).__name__
            if report.failed(record, content.answer, kind[:80]):
                log.warning(
                    "%s raised %s at the captured request %s%s", report.candidate, error, record.id,
                    f"\n{trace}" if (trace := getattr(error, "trace", "")) else "",
                )  # fmt: skip
        else:
            tolerance = report.policy.tolerance
            compared = await self._blocking(compare, outcome.result, content.answer, tolerance)
            report.answered(record, compared, outcome.predict_seconds)

    async def _suited(
        self, servable: Servable, content: Content, signature: Signature | None
    ) -> tuple[Batch, dict[str, Any]]:
        """The input and the params as the candidate's signature wants them. Raises InvalidInput."""
        own, mode, type_hints, positional = servable.rules()
        if _inputs(own) == _inputs(signature):
            return content.batch, content.params
        enforced = await self._blocking(
            lambda: enforce(
                own, _raw(content.batch), content.params or None, mode, type_hints=type_hints,
                positional=positional,
            )
        )  # fmt: skip
        return enforced.batch, enforced.params

    async def _blocking(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._io, function, *arguments)


def _inputs(signature: Signature | None) -> tuple[Any, Any]:
    return (None, None) if signature is None else (signature.inputs, signature.params)


def _raw(batch: Batch) -> RawInput:
    """A typed input as what it was before enforcement."""
    if isinstance(batch, Columns):
        return RawInput("python", frame(batch, gap=None))
    if isinstance(batch, Tensors):
        return RawInput("tensors", batch.arrays)
    return RawInput("python", batch.value)
