"""Rollouts for tests: one gateway over controlled loaders, and made-up traffic of two arms with given error
rates and call times."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gateway.aliasmemory import AliasMemory
from gateway.names import Reference
from gateway.record import RequestRecord
from gateway.registries.base import Alias, Model, Observation, Snapshot
from gateway.rollout_settings import RolloutPolicy
from gateway.rollouts.afterwards import Afterwards
from gateway.rollouts.aliases import Aliases
from gateway.rollouts.before import Before
from gateway.rollouts.course import Course
from gateway.rollouts.gates import Gates
from gateway.rollouts.guards import Guards, Limits, Outcome, Verdict
from gateway.rollouts.phases import Phase
from gateway.rollouts.rollout import Rollout
from gateway.runners.priority import Background
from gateway.service import Inference, Service
from gateway.state import State
from loaders.enforcement import RawInput
from tests.support.controlled import MB, Bench, ControlledRunner, run, turns, version


@dataclass(frozen=True)
class Run:
    verdict: Verdict
    requests: int
    """Of the candidate, until the verdict."""

    @property
    def breached(self) -> str | None:
        return self.verdict.breached


def simulate(
    draw: random.Random,
    *,
    share: float,
    service: float = 0.001,
    candidate: float = 0.001,
    slower: float = 1.0,
    spread: float = 0.4,
    requests: int,
    bursty: bool = False,
    limits: Limits | None = None,
    block_every: int | None = None,
) -> Run:
    """One rollout until a guard is breached or the candidate has had `requests`, judged after each request.

    `service`, `candidate`: error rates. `slower`: ratio of call times. `spread`: of their log. `bursty`:
    load that comes and goes, with five times the errors and three times the call times while it is high.
    `block_every`: a block also ends after so many requests, as little traffic does by the clock.
    """
    guards = Guards(limits or Limits(), share, seed=draw.getrandbits(32))
    high, seen = False, 0
    while guards.candidate.requests < requests:
        if bursty and draw.random() < 0.005:
            high = not high
        errors = (5.0 if high else 0.2) if bursty else 1.0
        load = 3.0 if high else 1.0
        chosen = draw.random() < share
        rate = (candidate if chosen else service) * errors
        seconds = 0.005 * load * math.exp(draw.gauss(0, spread)) * (slower if chosen else 1.0)
        guards.observe(Outcome(draw.random() < rate, seconds, key=str(seen)), candidate=chosen)
        seen += 1
        if block_every and seen % block_every == 0:
            guards.end_block()
        if guards.breached is not None:
            break
    return Run(guards.verdict(), guards.candidate.requests)


def after_swap(
    draw: random.Random,
    *,
    rate: float,
    service: float = 0.001,
    candidate: float = 0.001,
    slower: float = 1.0,
    spread: float = 0.4,
    requests: int,
    bursty: bool = False,
    limits: Limits | None = None,
) -> Run:
    """One watch: ten minutes of the version in service at `rate` requests per second, then the new one until
    a guard is breached or it has had `requests`, judged after each request.

    `service`, `candidate`: error rates. `slower`: ratio of call times. `spread`: of their log. `bursty`: five
    times the load for a quarter of the time, 15 seconds on average, with 16 times the errors and three times
    the call times.
    """
    now, high, turn = 0.0, False, draw.expovariate(1 / 45) if bursty else math.inf
    before = Before(lambda: now, draw.getrandbits(32))
    guards: Afterwards | None = None
    while guards is None or guards.candidate.requests < requests:
        arrives = now + draw.expovariate(rate * (1.0 if not bursty else 2.5 if high else 0.5))
        if arrives >= turn:
            now, high = turn, not high
            turn = now + draw.expovariate(1 / (15 if high else 45))
            continue
        now = arrives
        if now >= 600 and guards is None:
            guards = Afterwards(limits or Limits(), before.reference())
        errors, load = ((4.0, 3.0) if high else (0.25, 1.0)) if bursty else (1.0, 1.0)
        seconds = max(0.005, 0.01 * load * math.exp(draw.gauss(0, spread)))
        if guards is None:
            violated = False if before.checks else None
            before.observe(failed=draw.random() < service * errors, seconds=seconds, violated=violated)
            continue
        failed, key = draw.random() < candidate * errors, str(guards.candidate.requests)
        guards.observe(Outcome(failed, seconds * slower, key=key))
        if guards.breached is not None:
            break
    return Run(guards.verdict(), guards.candidate.requests)


@dataclass(frozen=True)
class Stepped:
    """How a simulated canary ended: its last phase, the candidate's requests, the seconds."""

    phase: Phase
    requests: int
    seconds: float


def stepped(
    draw: random.Random,
    *,
    policy: RolloutPolicy,
    rate: float,
    service: float = 0.001,
    candidate: float = 0.001,
    slower: float = 1.0,
    spread: float = 0.4,
) -> Stepped:
    """One canary by `policy` at `rate` requests per second, from its first step to the swap or to its end
    before that; decided once a second, and after each request of the candidate that may decide.

    `service`, `candidate`: error rates. `slower`: ratio of call times. `spread`: of their log.
    """
    now = 0.0
    course = Course("2", "1").to(Phase.CANARY, now)
    rollout = Rollout(version(2), policy, course, service=version(1), clock=lambda: now)
    guards = rollout.guards
    assert isinstance(guards, Guards)
    guards._random = random.Random(draw.getrandbits(32))
    tick = 0.0
    while True:
        now += draw.expovariate(rate)
        caller = str(draw.getrandbits(32))
        chosen = rollout.takes(caller)
        failed = draw.random() < (candidate if chosen else service)
        seconds = 0.01 * math.exp(draw.gauss(0, spread)) * (slower if chosen else 1.0)
        rollout.observe(caller, version(2 if chosen else 1), failed=failed, seconds=seconds)
        if now - tick < 1.0 and not rollout.changed.is_set():
            continue
        tick = now
        rollout.changed.clear()
        decision = rollout.decide(None)
        if decision.phase is None:
            continue
        if decision.phase is not Phase.CANARY:
            return Stepped(decision.phase, guards.candidate.requests, now)
        rollout.move(rollout.course.to(Phase.CANARY, now, step=decision.step))


def giving_way(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Which processes give way, after each change. Process 7 is that of a version."""
    said: list[list[int]] = [[]]

    def lower(self: Background, pids: list[int]) -> None:
        if list(pids) != said[-1]:
            said.append(list(pids))

    monkeypatch.setattr(ControlledRunner, "isolation", "process")
    monkeypatch.setattr(ControlledRunner, "pids", [7], raising=False)
    monkeypatch.setattr(Background, "lower", lower)
    return said


CHAMPION = Reference("iris", alias="champion")
STEPS = {"canary": {"steps": [20, 50], "every": 0, "requests": 20, "within": "1h"}}


class Setup:
    """One gateway over a bench: `say` is the registry moving, `ask` a caller. `clock` moves by hand."""

    def __init__(self, directory: Path, policy: dict[str, Any] = STEPS, *, limit: int = 100 * MB) -> None:
        self.bench = Bench(directory / "package", limit=limit, capacity_wait=0.0)
        self.state = State(directory / "state")
        weakref.finalize(self, self.state.close)
        self.policy = RolloutPolicy.model_validate(policy)
        self.found: list[Observation] = []
        self.arms: list[str] = []
        self.entry: Alias | None = None
        self.stamp = 0
        self.start()

    def start(self) -> None:
        """A gateway that begins, with the state that the one before has left."""
        self.aliases = Aliases(
            self.bench.manager,
            Gates(self.bench.manager, prepare=self.bench.prepare, policy=lambda model: (self.policy, None)),
            memory=AliasMemory(self.state, "test", lambda write: write()),
            emit=self.bench.events.append,
            found_out=self.found.append,
            counted=lambda name, alias, arm: self.arms.append(arm),
            clock=self.bench.clock,
        )
        self.service = Service(self.aliases, self.bench.manager)
        self.asked = 0

    async def restart(self) -> None:
        await self.aliases.close()
        for number in "123":
            self.bench.manager.retire(version(int(number)), "unloaded")
        await turns(50)
        self.start()
        self.say(self.entry)
        await turns(50)

    def say(self, entry: Alias | str | None) -> None:
        self.entry = Alias(entry) if isinstance(entry, str) else entry
        self.stamp += 1
        aliases = {} if self.entry is None else {"champion": self.entry}
        models = {"iris": Model("iris", {n: version(int(n)) for n in "123"}, aliases)}
        self.aliases.apply(Snapshot(models, str(self.stamp)))

    async def ask(
        self, times: int = 1, key: str | None = None, *, reference: Reference = CHAMPION, row: float = 1.0
    ) -> list[str]:
        """So many callers, one after the other, with this row: which versions answered. Raises Problem."""
        answered = []
        for _ in range(times):
            self.asked += 1
            name = (key or f"caller-{self.asked}").encode()
            record = RequestRecord(name)
            inference = Inference(reference, RawInput("instances", [[row]]), record=record)
            try:
                await self.service.predict(inference)
                assert record.version is not None
                answered.append(record.version.version)
            finally:
                await turns(6)
        return answered

    async def begun(self) -> Rollout:
        """Version 1 serves, and version 2 has begun its first step."""
        self.say("1")
        assert await self.ask() == ["1"]
        self.say(Alias("2", previous=("1",), last_good="1"))
        await turns(50)
        return self.rollout

    @property
    def rollout(self) -> Rollout:
        found = self.aliases.find("iris", "champion")
        assert found is not None
        assert found.rollout is not None, (found, found.error)
        return found.rollout

    @property
    def phase(self) -> str:
        view = self.aliases.view("iris", "champion")
        assert view is not None
        return view.phase

    @property
    def course(self) -> str:
        course = self.aliases.conductor.course("iris", "champion")
        assert course is not None
        return course.phase.value

    @property
    def earlier(self) -> tuple[Mapping[str, Any], ...]:
        """The rollouts before the last one, oldest first."""
        course = self.aliases.conductor.course("iris", "champion")
        return () if course is None else course.earlier

    def say_verb(self, verb: str) -> None:
        """A person's word about the rollout under way."""
        found = self.aliases.find("iris", "champion")
        assert found is not None
        self.aliases.orders.give(found, verb)

    def fails(self, number: int, text: str | None = "boom") -> None:
        self.bench.behaviour(version(number)).fails_predict = text


Test = Callable[[Setup], Awaitable[None]]


def conducted(directory: Path, test: Test, policy: dict[str, Any] = STEPS, **kwargs: Any) -> None:
    async def main() -> None:
        made = Setup(directory, policy, **kwargs)
        await test(made)
        await made.aliases.close()

    run(main)
