"""A prediction, from the request's parsed parts to the model's answer. Knows no protocol.

`Service.predict` reads top to bottom as the life of a request: resolve, lease, enforce, batch, run. For a
loaded model nothing is awaited before the request is in its model's queue.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from gateway.access.limits import enter
from gateway.access.principal import check_predict
from gateway.errors import Detail, Problem, overloaded
from gateway.events import Emit, InputRefused, OutputDiffers
from gateway.names import Reference
from gateway.record import RequestRecord
from gateway.rollouts.aliases import Target
from gateway.rollouts.rollout import Rollout, hangs
from gateway.runners.base import ModelError, NoProcess, RunnerCrashed, RunnerTimeout
from gateway.runners.suspects import Poisoned
from gateway.serving.admission import LOADING_FULL, NotAdmitted
from gateway.serving.batching import Outcome
from gateway.serving.servable import Servable, Status
from gateway.unanswered import unanswered
from loaders.batch import Columns, Value
from loaders.enforcement import InvalidInput, RawInput, enforce
from loaders.enforcement.violations import EMPTY, NO_COLUMNS, NOT_WHOLE, WRONG_LENGTH

if TYPE_CHECKING:
    from gateway.access.limits import Quota
    from gateway.capture.recorder import Recorder
    from gateway.registries.base import Version
    from gateway.rollouts.alias import LiveAlias
    from gateway.rollouts.aliases import Aliases
    from gateway.rollouts.rollout import InService
    from gateway.serving.manager import Lease, Manager
    from loaders.batch import Batch
    from loaders.enforcement import Enforced, Mode
    from loaders.signature import Signature
    from loaders.worker.wire import Framed

#: How many columns the hint of a body without names shows.
_SHOWN_NAMES: Final = 10
_ONE_FOR_ALL: Final = (
    "the model gave one answer for several rows of text: it may expect a list of texts, not a table"
)

#: The exceptions of a request without an answer.
_UNANSWERED: Final = (
    NotAdmitted,
    TimeoutError,
    RunnerTimeout,
    NoProcess,
    Poisoned,
    RunnerCrashed,
    ModelError,
)


class Unparsed(Protocol):
    """A body too large to be parsed here."""

    async def enforce(
        self, signature: Signature | None, mode: Mode, type_hints: bool, positional: bool
    ) -> ElsewhereEnforced:
        """Enforces the body with this signature. Raises InvalidInput, Problem."""


class ElsewhereEnforced(Protocol):
    """The result for a body that another process has parsed."""

    @property
    def batch(self) -> Framed: ...
    @property
    def warnings(self) -> tuple[str, ...]: ...
    @property
    def lenient(self) -> bool: ...


#: The mark of an answer from another environment than the model's own.
MISMATCH = ("environment",)
#: The mark of an answer to an input that strict enforcement would have refused.
LENIENT = ("lenient-cast",)


@dataclass(slots=True)
class Inference:
    """A request, parsed but untyped. `deadline`: in the event loop's time. `reference`: None means the
    default model. `raw`: None after enforcement, or if the body is `unparsed`. The service fills `record`.
    `lenient`: if the setting `enforcement` is not set, the input is cast as MLflow casts it. `positional`:
    rows without names are read by position. `quotas`: the limits that the request has entered, and whose rows
    are not counted yet. `memory`: the bytes that the body takes, as sent and as parsed.
    `stalled`: if its caller gave up, the seconds for which it had got no further (see `Batcher.stalled`)."""

    reference: Reference | None
    raw: RawInput | None
    params: Any = None
    deadline: float | None = None
    record: RequestRecord = field(default_factory=RequestRecord)
    unparsed: Unparsed | None = None
    lenient: bool = False
    positional: bool = False
    quotas: tuple[Quota, ...] = ()
    memory: int = 0
    stalled: float | None = None


@dataclass(slots=True)
class Answer:
    """A model's answer and its signature; the model and the times are in the request's record. `marks`: the
    values of the header X-Model-Warnings, on every route."""

    result: Batch
    warnings: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    signature: Signature | None = None


class Service:
    """`default_model` answers requests that name no model. `cold_wait`: in seconds. `find` queries an unknown
    name in a registry that is queried by name, and returns whether it did. `recorder` keeps a share of the
    requests for replay."""

    def __init__(
        self,
        aliases: Aliases,
        manager: Manager,
        *,
        default_model: Reference | None = None,
        cold_wait: float = 30.0,
        emit: Emit = lambda event: None,
        stopping: Callable[[], bool] = lambda: False,
        find: Callable[[Reference], Awaitable[bool]] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._aliases = aliases
        self._manager = manager
        self._default_model = default_model
        self._cold_wait = cold_wait
        self._emit = emit
        self._stopping = stopping
        self._chance = random.Random()
        self._find = find
        self._recorder = recorder

    @property
    def stopping(self) -> bool:
        """Returns True if new work is refused."""
        return self._stopping()

    async def predict(self, inference: Inference, given: Target | None = None) -> Answer:
        """Calls the model of the request. `given`: the version that answers, if already decided. Raises
        Problem."""
        record = inference.record
        reference = inference.reference or self._default_model
        if reference is None:
            raise Problem(
                "INVALID_REFERENCE",
                "the request names no model, and no default_model is set",
                hint="POST /predict/NAME, or send the header X-Model: models:/NAME@ALIAS",
            )
        principal = record.principal if given is None else None
        if principal is not None:
            check_predict(principal, reference)
        record.reference = reference
        if principal is not None and principal.quotas and not inference.quotas:
            return await self._limited(inference, principal.quotas)
        if record.late:
            raise Problem("SHUTTING_DOWN", "the gateway is stopping", retry_after=1)
        try:
            target = given or self._aliases.target(reference)
        except Problem:
            if self._find is None or not await self._find(reference):
                raise
            target = self._aliases.target(reference)
        found = target.alias
        version = target.version
        if found is not None and found.observer is not None and given is None and version is not None:
            return await self._observed(inference, version, found, found.observer)
        record.alias = None if found is None else found.alias
        record.version = version or (None if found is None else found.desired)
        lease: Lease | None = None
        try:
            if version is None:
                assert found is not None
                record.cached = False
                version = record.version = await self._aliases.wait_until_served(
                    found, self._patience(inference)
                )
            lease = self._manager.lease(version)
            servable = lease.servable
            if servable.status is Status.LOADING or servable.problem is not None:
                record.cached = False
                self._check_crowd(servable)
                await self._manager.ready(lease, self._patience(inference))
            if record.cached is None:
                record.cached = True
            mismatch = servable.mismatch
            record.elsewhere = mismatch is not None
            outcome, warnings, signature = await self._run(servable, inference)
            if found is not None:
                self._aliases.answered(found, version)
        except Problem as error:
            raise self._late(inference, error) from None
        finally:
            if lease is not None:
                lease.release()
        record.queue, record.predict, record.work = (
            outcome.queue_seconds,
            outcome.predict_seconds,
            outcome.work,
        )
        marks = LENIENT if record.lenient else ()
        if mismatch is not None:
            warnings, marks = (*warnings, *mismatch), (*MISMATCH, *marks)
        return Answer(outcome.result, warnings, marks, signature)

    def name(self, record: RequestRecord) -> None:
        """Names the version in the record of a request that was refused before its model was called: the
        version that its reference means now. Names none if there is none."""
        if record.version is None and record.reference is not None:
            with suppress(Problem):
                record.version, found = self._aliases.meant(record.reference)
                record.alias = None if found is None else found.alias

    async def _limited(self, inference: Inference, quotas: tuple[Quota, ...]) -> Answer:
        """A request of a caller with limits. Raises OVERLOADED."""
        enter(quotas)
        inference.quotas = quotas
        try:
            return await self.predict(inference)
        finally:
            for quota in quotas:
                quota.leave()

    async def _observed(
        self, inference: Inference, serving: Version, found: LiveAlias, observer: Rollout | InService
    ) -> Answer:
        """A request that is recorded, for a rollout or for a later one. If it fails on the new version of a
        rollout, the version before answers it: nothing was sent yet, and a prediction has no effects."""
        record = inference.record
        principal = record.principal
        known = None if principal is None or not principal.known else str(principal)
        caller = observer.caller(record.headers, record.shown_id, known)
        version, other = observer.versions(caller, serving)
        rollout = observer if isinstance(observer, Rollout) else None
        candidate = rollout is not None and version == rollout.candidate
        retries = candidate and other is not None and observer.retries
        copies = rollout is not None and rollout.copies
        raw = inference.raw if retries or copies else None  # else only the typed rows stay in memory
        unparsed = inference.unparsed if retries else None
        failed: Callable[..., None] = partial(observer.observe, caller, version, failed=True)
        clock = asyncio.get_running_loop().time
        began, patience = clock(), observer.patience
        try:
            async with asyncio.timeout(patience if retries else None):
                answer = await self.predict(inference, Target(version, found))
        except asyncio.CancelledError:
            if not self._stopping() and hangs(patience, clock() - began, inference.stalled):
                failed()
            raise
        except (Problem, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                inference.stalled = inference.stalled or 0.0  # perhaps it did not get into the queue
                error = Problem("DEADLINE_EXCEEDED", f"{version} did not answer in time")
            if error.code == "SHUTTING_DOWN":
                raise
            refused, now = error.of_input, clock()
            # A full queue is the load's fault, and a caller's deadline is the caller's choice.
            given_up = inference.stalled is not None
            if error.code == "OVERLOADED" or (
                given_up and not hangs(patience, now - began, inference.stalled)
            ):
                failed = _unrecorded
            late = inference.deadline is not None and now >= inference.deadline
            if not retries or late or other is None:
                failed(refused=refused)
                raise error from None
        else:
            violated = self._violates(version, answer) if observer.checks else None
            observer.observe(caller, version, failed=False, seconds=record.predict, violated=violated)
            if rollout is not None and copies and rollout.copies:
                self._copy(inference, raw, answer, rollout)
            return answer
        inference.raw, inference.unparsed, inference.stalled = raw, unparsed, None
        if rollout is None or not rollout.watching:
            failed(refused=refused, repeats=True)
            return await self.predict(inference, Target(other, found))
        # What the version before cannot answer either says nothing about the new one.
        answer = await self.predict(inference, Target(other, found))
        failed(refused=refused, repeats=True)
        return answer

    def _copy(self, inference: Inference, raw: RawInput | None, answer: Answer, rollout: Rollout) -> None:
        """Hands an answered request to the shadow of a rollout."""
        if rollout.shadow is not None:
            rollout.shadow.offer(
                raw, inference.params, answer.result, memory=inference.memory,
                lenient=inference.lenient, positional=inference.positional,
            )  # fmt: skip

    def _violates(self, version: Version, answer: Answer) -> bool:
        """Returns True if an answer differs from the version's output schema."""
        servable = self._manager.find(version)
        prepared = None if servable is None else servable.prepared
        return prepared is not None and bool(prepared.check_output(answer.result))

    async def _run(
        self, servable: Servable, inference: Inference
    ) -> tuple[Outcome, tuple[str, ...], Signature | None]:
        """Enforces the signature, waits for a turn in the queue, and calls the model. Returns its answer, the
        warnings, and the signature. Raises Problem."""
        enforced: Enforced | ElsewhereEnforced
        params: dict[str, Any] = {}
        signature, mode, type_hints, positional = servable.rules(inference.lenient, inference.positional)
        try:
            if inference.raw is not None:
                enforced = enforce(
                    signature, inference.raw, inference.params, mode,
                    type_hints=type_hints, positional=positional,
                )  # fmt: skip
                params = enforced.params
                inference.raw = None  # only the typed rows are kept while the request waits
            else:
                assert inference.unparsed is not None
                async with asyncio.timeout_at(inference.deadline):
                    enforced = await inference.unparsed.enforce(signature, mode, type_hints, positional)
                inference.unparsed = None
        except TimeoutError as error:
            raise self._unanswered(servable, inference, error) from None
        except InvalidInput as error:
            raise self._misfit(servable, inference, error) from None
        inference.record.rows = enforced.batch.rows or 1
        for quota in inference.quotas:
            quota.rows(inference.record.rows)
        inference.quotas = ()
        if servable.background.lowered:
            servable.background.come_first()
        answer: asyncio.Future[Outcome] | None = None
        try:
            answer = servable.batcher.submit(enforced.batch, params, inference.deadline)
            if inference.deadline is None:
                outcome = await answer
            else:
                async with asyncio.timeout_at(inference.deadline):
                    outcome = await answer
        except (asyncio.CancelledError, *_UNANSWERED) as error:
            if isinstance(error, (asyncio.CancelledError, TimeoutError)):  # its caller gave up
                inference.stalled = 0.0 if answer is None else servable.batcher.stalled(answer)
            if isinstance(error, asyncio.CancelledError):
                raise
            raise self._unanswered(servable, inference, error, enforced.batch) from None
        servable.recent.answered(outcome.queue_seconds + outcome.predict_seconds)
        if servable.options.check_output:
            self._check_output(servable, outcome.result)
        if servable.options.capture:
            self._capture(servable, enforced.batch, params, outcome)
        warnings = enforced.warnings
        if enforced.lenient:
            inference.record.lenient = True
        if inference.record.rows > 1 and _is_one_for_all(enforced.batch, outcome.result):
            warnings = (*warnings, _ONE_FOR_ALL)
        return outcome, warnings, signature

    def _check_output(self, servable: Servable, result: Batch) -> None:
        """Compares a share of the answers with the output schema, and says so where one differs."""
        if self._chance.random() < servable.options.check_output and servable.prepared is not None:
            version = servable.version
            for problem in servable.prepared.check_output(result)[:1]:
                self._emit(OutputDiffers(version.name, version.version, problem))

    def _capture(
        self, servable: Servable, batch: Batch | Framed, params: dict[str, Any], outcome: Outcome
    ) -> None:
        """Hands the request to the recorder, which keeps a share of them."""
        if self._recorder is not None and servable.prepared is not None:
            version, digest = servable.version, servable.prepared.digest
            self._recorder.take(
                version.name, version.version, digest, batch, params, outcome.result,
                outcome.predict_seconds, servable.options.capture,
            )  # fmt: skip

    # Why a request has no answer.

    def _misfit(self, servable: Servable, inference: Inference, error: InvalidInput) -> Problem:
        """The input does not fit the signature: 422, with each place; 415 for a body that is one value where
        the model takes none."""
        version = servable.version
        kinds = tuple(v.problem for v in error.violations)
        self._emit(InputRefused(version.name, version.version, kinds, inference.record.shown_id))
        details = [Detail(v.path, v.problem, v.expected, v.got) for v in error.violations]
        if kinds == (NOT_WHOLE,):
            message = f"{version} does not take a body of this content type: its input is not one such value"
            return Problem("UNSUPPORTED_MEDIA_TYPE", message, details=details)
        message = f"the input does not fit the signature of {version}: {error.count_text}"
        nameless = NO_COLUMNS in kinds or EMPTY in kinds
        unnamed = nameless or (inference.positional and WRONG_LENGTH in kinds)
        hint = _named_form(servable.rules()[0], inference.positional) if unnamed else None
        if EMPTY in kinds and hint:
            hint = f"send at least one row, and {hint}"
        return Problem("INVALID_INPUT", message, details=details, hint=hint)

    def _unanswered(
        self, servable: Servable, inference: Inference, error: Exception, batch: object = None
    ) -> Problem:
        if isinstance(error, TimeoutError) and inference.stalled is None:
            inference.stalled = 0.0  # its caller gave up before its turn came
        return unanswered(servable, inference.record, error, self._emit, batch)

    def _check_crowd(self, servable: Servable) -> None:
        """Refuses a request if too many already wait for the load: they are a queue too."""
        if self._manager.ledger[servable].leases > servable.options.max_queue:
            wait = self._manager.expected_load_seconds(servable)
            raise overloaded(servable.version.name, LOADING_FULL, wait)

    def _late(self, inference: Inference, problem: Problem) -> Problem:
        """If the caller's own deadline ended the wait for a cold model, the problem is DEADLINE_EXCEEDED."""
        if problem.code != "MODEL_LOADING" or inference.deadline is None:
            return problem
        if asyncio.get_running_loop().time() < inference.deadline:
            return problem
        inference.stalled = 0.0
        return Problem("DEADLINE_EXCEEDED", f"the caller's deadline passed: {problem.message}")

    def _patience(self, inference: Inference) -> float:
        """How long this request waits for a cold model, in seconds."""
        if inference.deadline is None:
            return self._cold_wait
        return max(0.0, min(self._cold_wait, inference.deadline - asyncio.get_running_loop().time()))


def _unrecorded(**facts: bool) -> None:
    """Replaces `observe` for a request that tells nothing about its version."""


def _is_one_for_all(batch: Batch | Framed, answer: Batch) -> bool:
    """Whether a model got several texts, one per row, and gave one answer: most likely it does not read its
    input as rows."""
    if not isinstance(batch, Columns) or len(batch.arrays) != 1 or batch.rows < 2:
        return False
    if batch.texts.isdisjoint(batch.arrays):
        return False
    if answer.rows is None and isinstance(answer, Value):
        return not isinstance(answer.value, list) or len(answer.value) == 1
    return answer.rows == 1


def _named_form(signature: Signature | None, positional: bool) -> str | None:
    """The form that works, for a body without the names of the columns. `positional`: the route takes
    `instances`, also without names."""
    names = [str(spec.name) for spec in (signature and signature.inputs) or () if spec.name is not None]
    if not names:
        return None
    few = names[:_SHOWN_NAMES]
    row = ", ".join(f"{json.dumps(name)}: …" for name in few) + (", …" if len(names) > len(few) else "")
    form = "instances" if positional else "dataframe_records"
    also = f", or send one value per column ({len(names)}) in each row" if positional else ""
    return f'name the columns in each row: {{"{form}": [{{{row}}}]}}{also}'
