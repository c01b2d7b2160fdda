"""Settings under `models` whose name or pattern matches no model of the registry: it may be mistyped.

They are named once in the log and as long as it is so in the status. It is no error, because a model may come
later. Knows names and what a snapshot says; must not know what the settings mean.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from itertools import islice

from gateway.errors import Problem
from gateway.names import did_you_mean
from gateway.registries.base import Snapshot

log = logging.getLogger("gateway.settings")


class Unused:
    """`sentences`: for each of `names` that matches no model now, what to say of it. `again`: seconds between
    two looks."""

    def __init__(self, names: Iterable[str], again: float) -> None:
        self._left = tuple(names)
        self._again = again
        self._seen = ""
        self.sentences: dict[str, str] = {}

    async def run(self, snapshot: Callable[[], Awaitable[Snapshot]]) -> None:
        """Ends when every name has matched a model."""
        while self._left:
            with suppress(Problem):  # the registry was not read yet
                self._look(await snapshot())
            if self._left:
                await asyncio.sleep(self._again)

    def _look(self, now: Snapshot) -> None:
        if now.stamp == self._seen:
            return  # to match patterns with many names takes long
        self._seen = now.stamp
        known = list(now.models)
        self._left = tuple(name for name in self._left if not _matches(name, now, known))
        for name in self.sentences.keys() - set(self._left):
            del self.sentences[name]
        for name in self._left:
            if name not in self.sentences:
                alike = (one for one in known if one[:1].lower() == name[:1].lower())
                near = did_you_mean(name, islice(alike, 200))
                self.sentences[name] = f"models.{name} matches no model of the registry" + (
                    f", {near}" if near else ""
                )
                log.warning("settings: %s", self.sentences[name])


def _matches(name: str, now: Snapshot, known: list[str]) -> bool:
    """Returns whether a key of the setting `models` is for a model: its name, or a pattern that it fits."""
    return name in now.models or (any(c in name for c in "*?[") and any(fnmatchcase(k, name) for k in known))
