"""Shadow: a candidate answers copies of requests, after callers had the answers of the version in service.

Copies wait in a queue of their own and take idle time only. They are sent one by one, each at a moment when
the version in service could answer one more at once and the event loop has nothing else to do; the
candidate then rests as long as it worked. Its processes give way to others meanwhile. What does not fit
into the queue, or becomes too old in it, is dropped and counted. A candidate that crashes, hangs or is slow
drops its own copies and nothing else. What it does not answer in time says nothing about its answers, but
a version that hangs on more copies than may disagree does not pass.

Knows versions and their queues; must not know aliases, the registry or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gateway.rollouts.agreement import Agreement, Compared, Outcome, compare, unanswered
from gateway.runners.base import ModelError, NoProcess, RunnerCrashed, RunnerTimeout
from gateway.runners.suspects import Poisoned, digest
from gateway.serving.admission import NotAdmitted
from loaders.batch import weight
from loaders.enforcement import InvalidInput, enforce

if TYPE_CHECKING:
    from gateway.registries.base import Version
    from gateway.rollout_settings import Shadow as ShadowPolicy
    from gateway.serving.manager import Manager
    from gateway.serving.servable import Servable
    from loaders.batch import Batch
    from loaders.enforcement import Enforced, RawInput

log = logging.getLogger("gateway.shadow")

#: The most copies that wait.
QUEUE: Final = 64
#: The memory of the largest request and of the largest answer that are copied, and of all copies that wait,
#: in bytes.
MAX_REQUEST: Final = 4 << 20
MAX_ANSWER: Final = 256 << 10
MAX_WAITING: Final = 16 << 20
MAX_ROWS: Final = 1024
#: Copies are sent at the earliest this many seconds after they were made: the answers are on their way then.
AFTER_ANSWER: Final = 0.01
#: The version in service is looked at this often, in seconds, until it is idle.
LOOK_EVERY: Final = 0.005
#: A turn of the event loop that took longer, in seconds, had work for users.
LAG: Final = 0.001
#: The most kinds of errors that the evidence lists.
KINDS: Final = 10
_FAILURES: Final = (Poisoned, RunnerCrashed, ModelError)


@dataclass(frozen=True, slots=True)
class Copy:
    """A request that was answered, with its answer. `memory`: the bytes that both take. `made`: the time of
    the copy, of any clock."""

    raw: RawInput
    params: Mapping[str, Any] | None
    lenient: bool
    positional: bool
    answer: Batch
    memory: int
    made: float


class Shadow:
    """The copies of one rollout. `changed` is called when there may be something to decide."""

    def __init__(
        self,
        candidate: Version,
        service: Version,
        policy: ShadowPolicy,
        manager: Manager,
        *,
        changed: Callable[[], None],
        chance: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.policy = policy
        self.candidate = candidate
        self.service = service
        self.late = self.shed = self.large = 0
        #: Of the late ones, those that were sent.
        self._hung = 0
        self._manager = manager
        self._changed = changed
        self._chance = chance or random.Random()
        self._clock = clock
        self._agreement = Agreement(policy.agreement, policy.requests)
        self._errors: Counter[str] = Counter()
        self._queue: deque[Copy] = deque()
        self._waiting = 0
        self._some = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Shadow of {self.candidate}: {self.requests} compared, {len(self._queue)} waiting>"

    @property
    def requests(self) -> int:
        """How many copies were compared."""
        return self._agreement.requests

    @property
    def answers(self) -> int:
        """How many copies the candidate has answered."""
        return self._agreement.answers

    def offer(
        self,
        raw: RawInput | None,
        params: Mapping[str, Any] | None,
        answer: Batch,
        *,
        memory: int,
        lenient: bool = False,
        positional: bool = False,
    ) -> None:
        """Copies a request with its answer, or does not: never waits. `raw` None: a body that was not parsed
        here. `memory`: the bytes of the body, as sent and as parsed."""
        if self._chance.random() >= self.policy.share:
            return
        if raw is None or memory > MAX_REQUEST or (answer.rows or 1) > MAX_ROWS:
            self.large += 1
            return
        if len(self._queue) >= QUEUE:
            self.shed += 1
            return
        answered = weight(answer, MAX_ANSWER + 1)
        memory += answered
        if answered > MAX_ANSWER:
            self.large += 1
        elif self._waiting + memory > MAX_WAITING:
            self.shed += 1
        else:
            self._queue.append(Copy(raw, params, lenient, positional, answer, memory, self._clock()))
            self._waiting += memory
            self._some.set()

    async def run(self) -> None:
        """Sends the copies to the candidate, until it is cancelled."""
        try:
            while True:
                await self._some.wait()
                await self._next(self._queue[0])
        finally:
            if (servable := self._manager.find(self.candidate)) is not None:
                servable.give_way(False)

    async def _next(self, copy: Copy) -> None:
        """Sends the oldest copy now, drops it, or leaves it where it is."""
        await asyncio.sleep(max(0.0, copy.made + AFTER_ANSWER - self._clock()))
        idle = await self._idle()
        late = self._clock() - copy.made > self.policy.deadline
        if not idle and not late:
            await asyncio.sleep(LOOK_EVERY)
            return
        self._queue.popleft()
        self._waiting -= copy.memory
        if not self._queue:
            self._some.clear()
        if late:
            self.late += 1
            return
        began = self._clock()
        try:
            await self._answer(copy)
        except Exception:
            log.exception("a copy for %s failed", self.candidate)
        if self._agreement.breached or self.requests >= self.policy.requests:
            self._changed()
        await asyncio.sleep(min(self._clock() - began, 1.0))

    async def _idle(self) -> bool:
        """Whether the version in service could take another request at once, and nothing waits for the event
        loop."""
        began = time.perf_counter()
        await asyncio.sleep(0)  # what has arrived is read, and gets into the queue
        if time.perf_counter() - began > LAG:
            return False
        servable = self._manager.find(self.service)
        inflight, slots = (0, 1) if servable is None else servable.calls
        return inflight < max(slots, 1)

    async def _answer(self, copy: Copy) -> None:
        servable = self._manager.find(self.candidate)
        if servable is None or not self._manager.is_ready(self.candidate):
            self.shed += 1
            return
        servable.give_way(not self._manager.ledger[servable].serving)  # another alias may use it
        lease = self._manager.lease(self.candidate)
        try:
            await self._ask(servable, copy)
        finally:
            lease.release()

    async def _ask(self, servable: Servable, copy: Copy) -> None:
        signature, mode, type_hints, positional = servable.rules(copy.lenient, copy.positional)
        enforced: Enforced | None = None
        try:
            enforced = enforce(
                signature, copy.raw, copy.params, mode, type_hints=type_hints, positional=positional
            )
            async with asyncio.timeout(self.policy.deadline):
                outcome = await servable.batcher.submit(enforced.batch, enforced.params)
        except (TimeoutError, RunnerTimeout):  # the deadline of copies, or that of the model
            self.late += 1
            self._hung += 1
        except (NotAdmitted, NoProcess):  # its queue is full, or its process starts again
            self.shed += 1
        except InvalidInput:
            await self._failed(copy, enforced, "input refused")
        except _FAILURES as error:
            kind = str(error).partition(":")[0] if isinstance(error, ModelError) else type(error).__name__
            await self._failed(copy, enforced, kind[:80])
        else:

            def compared() -> tuple[Compared, str]:
                found = compare(outcome.result, copy.answer, self.policy.tolerance)
                return found, "" if found.agrees else _hash(copy, enforced)

            self._agreement.add(*await asyncio.to_thread(compared), repeats=True)

    async def _failed(self, copy: Copy, enforced: Enforced | None, kind: str) -> None:
        """The candidate gave no answer. `enforced`: its input, None if it refused that. `kind`: of the error,
        without data."""
        example = await asyncio.to_thread(_hash, copy, enforced)
        self._agreement.add(unanswered(copy.answer), example, repeats=True)
        if kind in self._errors or len(self._errors) < KINDS:
            self._errors[kind] += 1

    def outcome(self, seconds: float) -> Outcome | None:
        """None while it is open. `seconds`: the duration so far."""
        found = self._agreement.outcome
        if found is Outcome.PASSED and self._hangs:
            found = Outcome.THIN
        return None if found is Outcome.THIN and seconds < self.policy.within else found

    @property
    def _hangs(self) -> bool:
        """Whether the agreement would be too low if the copies without an answer in time counted."""
        return self._hung > (1.0 - self.policy.agreement) * (self.requests + self._hung)

    def __str__(self) -> str:
        verdict = self._agreement.verdict()
        if verdict.outcome is Outcome.THIN:
            compared = f"{self.requests} of {self.policy.requests} copies were compared"
            return f"too little traffic: {compared} in {self.policy.within:g} s{self._dropped()}"
        if verdict.outcome is Outcome.PASSED and self._hangs:
            return f"shadow: {self._hung} of {self.requests + self._hung} copies had no answer in time"
        errors = ", ".join(f"{kind} {count}" for kind, count in self._errors.most_common(3))
        return f"shadow: {verdict}" + (f" (errors: {errors})" if errors else "")

    def _dropped(self) -> str:
        dropped = {"not answered in time": self.late, "dropped": self.shed, "too large": self.large}
        shown = ", ".join(f"{count} {what}" for what, count in dropped.items() if count)
        return f" ({shown})" if shown else ""

    def evidence(self) -> dict[str, Any]:
        """JSON-ready; names no value of a request."""
        found = self._agreement.verdict().evidence
        found |= {
            "reference": "same requests",
            "share": self.policy.share,
            "not_compared": {"late": self.late, "shed": self.shed, "large": self.large},
            "errors": dict(self._errors),
        }
        return found


def _hash(copy: Copy, enforced: Enforced | None) -> str:
    """The hash of an input: `enforced`, or as it came if the candidate refused it. Empty if it has none, as
    CSV and Arrow tables that came so: each of these counts as another input."""
    if enforced is not None:
        return digest(enforced.batch, enforced.params).hex()
    return digest(copy.raw.data, copy.params or {}).hex()
