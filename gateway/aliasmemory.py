"""What a registry's aliases have served, in memory and in the durable state: the last good versions, the
history of serving, rollouts in progress. Must not know rules of aliases.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from gateway.state import HISTORY_KEPT, Served, State


class AliasMemory:
    """One registry's part of the state. It is read once. Writes return at once: `write` runs their
    transactions elsewhere, in order."""

    def __init__(self, state: State, registry: str, write: Callable[[Callable[[], None]], object]) -> None:
        self._state = state
        self._registry = registry
        self._write = write
        self._last_good = state.last_good(registry)
        self._histories = state.histories(registry)
        self._rollouts = {key: json.loads(course) for key, course in state.rollouts(registry).items()}

    def last_good(self, name: str, alias: str) -> str | None:
        return self._last_good.get((name, alias))

    def history(self, name: str, alias: str) -> list[Served]:
        return list(self._histories.get((name, alias), ()))

    def served(self, name: str, version: str) -> bool:
        """Returns whether a version has served here, under any alias."""
        return any(
            entry.version == version
            for (of, _), history in self._histories.items()
            if of == name
            for entry in history
        ) or any(good == version for (of, _), good in self._last_good.items() if of == name)

    def save_last_good(self, name: str, alias: str, version: str) -> None:
        self._last_good[name, alias] = version
        self._write(lambda: self._state.save_last_good(self._registry, name, alias, version))

    def rollout(self, name: str, alias: str) -> dict[str, Any] | None:
        return self._rollouts.get((name, alias))

    def rollouts(self) -> Mapping[tuple[str, str], dict[str, Any]]:
        return self._rollouts

    def save_rollout(self, name: str, alias: str, course: dict[str, Any] | None) -> None:
        if course is None:
            self._rollouts.pop((name, alias), None)
        else:
            self._rollouts[name, alias] = course
        text = None if course is None else json.dumps(course)
        self._write(lambda: self._state.save_rollout(self._registry, name, alias, text))

    def begin_serving(self, name: str, alias: str, served: Served) -> None:
        history = self._histories.setdefault((name, alias), [])
        history.append(served)
        del history[:-HISTORY_KEPT]
        self._write(lambda: self._state.begin_serving(self._registry, name, alias, served))

    def end_serving(self, name: str, alias: str, ended: float, reason: str) -> None:
        history = self._histories.get((name, alias))
        if history and history[-1].ended is None:
            history[-1] = replace(history[-1], ended=ended, reason=reason)
        self._write(lambda: self._state.end_serving(self._registry, name, alias, ended, reason))
