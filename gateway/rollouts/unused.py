"""Settings under `models` whose name or pattern matches no model of the registry: it may be mistyped.

The log names each of them once, and the status as long as no model has come. This is not an error, because a
model may come later. Knows names and what a snapshot says; must not know what the settings mean.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Final

from gateway.errors import Problem
from gateway.names import did_you_mean_of_many, is_pattern
from gateway.registries.base import Snapshot

log = logging.getLogger("gateway.settings")

#: Seconds between two looks at the models, and between two before the registry was read.
AGAIN: Final = 60.0
FIRST_AGAIN: Final = 2.0


class Unused:
    """`sentences`: for each of `names` that matches no model now, what to say of it."""

    def __init__(self, names: Iterable[str]) -> None:
        self._left = tuple(names)
        self._seen: str | None = None
        self.sentences: dict[str, str] = {}

    async def run(self, snapshot: Callable[[], Awaitable[Snapshot]]) -> None:
        """Ends when every name has matched a model."""
        while self._left:
            with suppress(Problem):  # the registry was not read yet
                await self._look(await snapshot())
            if self._left:
                await asyncio.sleep(FIRST_AGAIN if self._seen is None else AGAIN)

    async def _look(self, now: Snapshot) -> None:
        if now.stamp == self._seen:
            return
        self._seen = now.stamp
        known = list(now.models)
        # To match patterns with many names takes long.
        self._left = await asyncio.to_thread(_unmatched, self._left, known)
        for name in self.sentences.keys() - set(self._left):
            del self.sentences[name]
        for name in self._left:
            if name not in self.sentences:
                near = did_you_mean_of_many(name, known)
                self.sentences[name] = f"models.{name} matches no model of the registry" + (
                    f", {near}" if near else ""
                )
                log.warning("settings: %s", self.sentences[name])


def _unmatched(names: Iterable[str], known: list[str]) -> tuple[str, ...]:
    """Returns the keys of the setting `models` that are for none of the known models: neither a name of one,
    nor a pattern that one fits."""
    models = set(known)
    return tuple(
        name
        for name in names
        if name not in models and not (is_pattern(name) and any(fnmatchcase(one, name) for one in known))
    )
