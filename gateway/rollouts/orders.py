"""Orders: what a person says about a rollout: pause, resume, finish or abort.

An order acts at once. Before the first step, while the new version is still loaded and checked, `abort` ends
the load; `pause` and `finish` are kept until the rollout begins, also across a restart. Runs on the event
loop. Knows rollouts and aliases; must not know HTTP or the command line.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gateway.errors import Problem
from gateway.rollouts.conductor import BEGINS, Conductor
from gateway.rollouts.phases import STOPPED, Phase
from gateway.rollouts.records import ROLLBACK, has_served, is_other

if TYPE_CHECKING:
    from gateway.registries.base import Model, Version
    from gateway.rollout_settings import RolloutPolicy
    from gateway.rollouts.alias import LiveAlias
    from gateway.rollouts.reconciler import Reconciler
    from gateway.rollouts.rollout import Rollout


class Orders:
    """`model`: gives the registry's current model."""

    def __init__(
        self,
        conductor: Conductor,
        reconciler: Reconciler,
        *,
        model: Callable[[str], Model | None],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._conductor = conductor
        self._reconciler = reconciler
        self._model = model
        self._wall = wall

    def give(self, found: LiveAlias, verb: str) -> None:
        """Carries out an order. Raises Problem if no rollout is under way."""
        rollout = found.rollout
        if rollout is None:
            self._before(found, verb)
            return
        if verb == "pause":
            rollout.pause()
        elif verb == "resume" and rollout.course.phase is Phase.HELD:
            model = self._model(found.name)
            self._resume(found, rollout, rollout.policy if model is None else self._conductor.policy(model))
        elif verb == "resume":
            rollout.resume()
        else:
            rollout.order = verb
        self._conductor.courses.save(found.name, found.alias, rollout.course)
        rollout.changed.set()

    def begins(self, found: LiveAlias) -> bool:
        """Whether a new version is on its way, and another one answers until it serves."""
        return found.rollout is None and self._on_its_way(found) is not None

    def _on_its_way(self, found: LiveAlias) -> tuple[Version, Version] | None:
        """The version that is loaded and checked, and the version in service. A rollback has no rollout."""
        target, service = found.goal, found.serving or found.last_good
        model = self._model(found.name)
        if target is None or service is None or model is None or found.moved_by == ROLLBACK:
            return None
        if target != found.desired or not is_other(service, target) or found.phase in STOPPED:
            return None
        if found.task is None and has_served(found, model, target):
            return None  # it was in service when it was unloaded
        return target, service

    def _before(self, found: LiveAlias, verb: str) -> None:
        """An order that comes before the first step."""
        both = self._on_its_way(found)
        if both is None:
            raise no_rollout(found.name, found.alias)
        target, service = both
        if verb == "abort":
            self._reconciler.abort(found, target, service)
            return
        model = self._model(found.name)
        if model is None or not self._conductor.wanted(found, model, target):
            message = f"{target} has no steps to {verb}: it serves as soon as it has passed its checks"
            raise Problem("ROLLOUT_REFUSED", message, hint="abort keeps the version in service")
        said: dict[str, Any] = {"order": verb} if verb == "finish" else {"paused": verb == "pause"}
        courses = self._conductor.courses
        course = courses.of(found.name, found.alias)
        if course is None or course.version != target.version or course.phase not in BEGINS:
            course = courses.new(found.name, found.alias, target.version)
            course = replace(course, since=self._wall())
        courses.save(found.name, found.alias, replace(course, **said))

    def _resume(self, found: LiveAlias, rollout: Rollout, policy: RolloutPolicy) -> None:
        """The phase or step that was held begins again, by the present policy; a step keeps its share."""
        course, stage = rollout.course, rollout.course.stage
        phase = self._conductor.first_phase(stage, policy, course)
        if phase is None:  # nothing that it was held in is left
            rollout.order = "finish"
            return
        if stage is Phase.CANARY:
            canary = policy.canary.model_copy(update={"steps": rollout.policy.canary.steps})
            policy = policy.model_copy(update={"canary": canary})
        step = course.step if phase is stage else 0
        rollout.follow(policy)
        rollout.move(self._conductor.onto(course, policy, phase, step=step, reason="resumed"))
        found.show(self._wall(), rollout.shown)


def no_rollout(name: str, alias: str) -> Problem:
    message = f"no rollout of {name}@{alias} is under way"
    return Problem("ROLLOUT_REFUSED", message, hint="gateway rollout shows which are")
