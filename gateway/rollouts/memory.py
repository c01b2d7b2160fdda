"""What a gateway remembers of its aliases: the last good version, the history of serving, and the rollouts.

`Memory` is where it is kept; `Courses` are its rollouts. Knows plain facts; no manager, no requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from gateway.rollouts.course import Course
from gateway.rollouts.phases import STOPPED, UNDER_WAY, Phase
from gateway.state import Served


class Memory(Protocol):
    """The facts about an alias that survive a restart. Calls return at once; another thread writes."""

    def last_good(self, name: str, alias: str) -> str | None: ...

    def history(self, name: str, alias: str) -> list[Served]: ...

    def save_last_good(self, name: str, alias: str, version: str) -> None: ...

    def rollout(self, name: str, alias: str) -> dict[str, Any] | None: ...

    def rollouts(self) -> Mapping[tuple[str, str], dict[str, Any]]: ...

    def save_rollout(self, name: str, alias: str, course: dict[str, Any] | None) -> None: ...

    def begin_serving(self, name: str, alias: str, served: Served) -> None: ...

    def end_serving(self, name: str, alias: str, ended: float, reason: str) -> None: ...


class Courses:
    """The last rollout of each alias, with those before it."""

    def __init__(self, memory: Memory, wall: Callable[[], float] = time.time) -> None:
        self._memory = memory
        self._wall = wall

    def of(self, name: str, alias: str) -> Course | None:
        """The last rollout of an alias, also if it has ended."""
        saved = self._memory.rollout(name, alias)
        return None if saved is None else Course.from_json(saved)

    def phase(self, name: str, alias: str, version: str) -> Phase | None:
        """The phase of the last rollout, if it is that of this version. Cheaper than `of`: a scrape of the
        metrics asks for each alias."""
        saved = self._memory.rollout(name, alias)
        return Phase(saved["phase"]) if saved is not None and saved["version"] == version else None

    def save(self, name: str, alias: str, course: Course) -> None:
        self._memory.save_rollout(name, alias, course.to_json())

    def new(self, name: str, alias: str, version: str) -> Course:
        """A rollout that begins: the one before it becomes an earlier one. Saves nothing."""
        before = self.of(name, alias)
        return Course(version, earlier=() if before is None else before.put_away(self._wall()))

    def superseded(self, name: str, alias: str, course: Course) -> None:
        """Saves a rollout that a newer move has ended. The newer one may be recorded already."""
        saved = self.of(name, alias)
        if saved is None or saved.version == course.version:
            self.save(name, alias, course)
        else:
            known = replace(course, earlier=saved.earlier)
            self.save(name, alias, replace(saved, earlier=known.put_away(self._wall())))

    def left(self, name: str, alias: str, version: str) -> None:
        """The alias has left this version: what a person said before its first step is void."""
        course = self.of(name, alias)
        if course is not None and course.version == version and course.phase is Phase.CHECKING:
            said = replace(course, steps=None, shadow=None, paused=False, order=None)
            self.save(name, alias, said)

    def under_way(self) -> list[tuple[str, str]]:
        """The aliases whose rollout had not ended when the gateway last stopped."""
        return [key for key, saved in self._memory.rollouts().items() if Phase(saved["phase"]) in UNDER_WAY]

    def plan(
        self,
        name: str,
        alias: str,
        version: str,
        steps: tuple[float, ...] | None,
        shadow: float | None = None,
        order: str | None = None,
    ) -> Callable[[], None]:
        """Records the steps of a promotion and its share of copied requests before the registry is written;
        None means those of the policy. `order`: what a person said meanwhile. Ends an earlier try of that
        version, because a person asks for it again. Returns a function that undoes the record if the registry
        cannot be written."""
        before = self._memory.rollout(name, alias)
        course = self.of(name, alias)
        again = course is not None and course.version == version and course.phase in STOPPED
        if again or steps is not None or shadow is not None or order is not None:
            planned = self.new(name, alias, version)
            if course is not None and course.phase in UNDER_WAY:
                planned = replace(planned, earlier=course.earlier)  # it ends when the alias moves
            finish = "finish" if order == "finish" else None
            planned = replace(planned, steps=steps, shadow=shadow, paused=order == "pause", order=finish)
            self.save(name, alias, replace(planned, since=self._wall()))
        return lambda: self._memory.save_rollout(name, alias, before)
