"""A rollout's traffic, made up: two arms with given error rates and call times, and what the guards say."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from gateway.rollouts.guards import Guards, Limits, Outcome, Verdict


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
