"""What must be loaded before the gateway is ready: references and patterns of the setting `preload`.

`iris`, `iris@champion`, `iris/3`: that one. `fraud-*`: the default alias of every model whose name matches.
`@champion`, `fraud-*@champion`: that alias of every (matching) model that has it. `*`: the default alias of
every model. A pattern that matches nothing is named, because it may be mistyped. It does not delay readiness;
what it matches later is loaded then.

Knows references and what a snapshot says; how a version is loaded is the caller's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from gateway import backoff
from gateway.errors import Problem
from gateway.names import Reference, is_pattern, parse_short
from gateway.registries.base import Snapshot
from gateway.rollouts.unused import Unused

log = logging.getLogger("gateway.preload")

#: So many loads are under way at once.
AT_ONCE = 4
LONGEST_PAUSE = 30.0
#: Seconds between two looks at patterns that match nothing; of a registry that must be listed for it.
LOOK_AGAIN = 2.0
LISTING_INTERVAL = 60.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the setting. `pattern`: a pattern of names, None for a reference. `alias`: None means the
    default alias."""

    text: str
    reference: Reference | None = None
    pattern: str | None = None
    alias: str | None = None

    @classmethod
    def parsed(cls, text: str) -> Entry:
        """Raises InvalidReference."""
        name, at, alias = text.rpartition("@")
        if at and not name:
            return cls(text, pattern="*", alias=parse_short(f"x@{alias}").alias)
        reference = parse_short(text)
        if reference.version is None and not reference.latest and is_pattern(reference.name):
            return cls(text, pattern=reference.name, alias=reference.alias)
        return cls(text, reference=reference)

    def references(self, snapshot: Snapshot, default_alias: Sequence[str]) -> Iterator[Reference]:
        """The references that the entry matches now."""
        if self.reference is not None:
            yield self.reference
            return
        for name in list(snapshot.models):
            if not fnmatchcase(name, self.pattern or "*"):
                continue
            aliases = snapshot.models[name].aliases
            wanted = default_alias if self.alias is None else (self.alias,)
            alias = next((alias for alias in wanted if alias in aliases), None)
            if alias is not None:
                yield Reference(name, alias=alias)


class Preload:
    """`pending`: what is not loaded yet, by its text, with the reason of its last failure ("" before one).
    `unmatched`: patterns that match nothing, with a sentence for the user. `done`: everything was loaded
    once; it stays true. `again`: seconds between two looks at patterns that match nothing. `unused`: the keys
    of the setting `models` (`named`) that match nothing."""

    def __init__(
        self,
        entries: Sequence[Entry],
        default_alias: Sequence[str] = ("champion",),
        *,
        again: float = LOOK_AGAIN,
        named: Iterable[str] = (),
    ) -> None:
        self.unused = Unused(named)
        self._entries = tuple(entries)
        self._default_alias = tuple(default_alias)
        self._again = again
        self.pending: dict[str, str] = {entry.text: "" for entry in self._entries}
        self.unmatched: dict[str, str] = {}
        self.done = not self.pending
        self._seen: tuple[str, list[Reference]] | None = None

    @classmethod
    def parsed(
        cls,
        texts: Sequence[str],
        default_alias: Sequence[str] = ("champion",),
        *,
        again: float = LOOK_AGAIN,
        named: Iterable[str] = (),
    ) -> Preload:
        """Raises InvalidReference."""
        return cls([Entry.parsed(text) for text in texts], default_alias, again=again, named=named)

    async def run(
        self, snapshot: Callable[[], Awaitable[Snapshot]], load: Callable[[Reference], Awaitable[object]]
    ) -> None:
        """Loads everything. Retries a failed load until it succeeds or the registry no longer has the
        version. Ends when every entry has matched something and is loaded."""
        loaded: set[Reference] = set()
        turns = asyncio.Semaphore(AT_ONCE)
        rounds = 0
        while self.pending or self.unmatched:
            try:
                wanted = await self._wanted(snapshot)
            except Problem as problem:
                self.pending = dict.fromkeys(self.pending, problem.message)
            else:
                self._keep({str(reference): reference for reference in wanted if reference not in loaded})

                async def one(reference: Reference) -> None:
                    async with turns:
                        if await self._loads(reference, load):
                            loaded.add(reference)

                await asyncio.gather(*(one(reference) for reference in wanted if reference not in loaded))
                self.done = self.done or not self.pending
            if self.pending:
                rounds += 1
                await asyncio.sleep(backoff.pause(rounds, longest=LONGEST_PAUSE))
            elif self.unmatched:
                await asyncio.sleep(self._again)

    async def _wanted(self, snapshot: Callable[[], Awaitable[Snapshot]]) -> list[Reference]:
        if all(entry.pattern is None for entry in self._entries):
            return [entry.reference for entry in self._entries if entry.reference is not None]
        now = await snapshot()
        if self._seen is not None and self._seen[0] == now.stamp:
            return self._seen[1]  # to match patterns with many names takes long
        found: dict[Reference, None] = {}
        for entry in self._entries:
            meant = list(entry.references(now, self._default_alias))
            found.update(dict.fromkeys(meant))
            if meant:
                self.unmatched.pop(entry.text, None)
            elif entry.text not in self.unmatched:
                self.unmatched[entry.text] = self._nothing(entry)
                log.warning("preload: %s", self.unmatched[entry.text])
        self._seen = (now.stamp, list(found))
        return self._seen[1]

    def _nothing(self, entry: Entry) -> str:
        aliases = self._default_alias if entry.alias is None else (entry.alias,)
        return f"{entry.text} matches no model that has the alias {' or '.join(aliases)}"

    def _keep(self, wanted: dict[str, Reference]) -> None:
        self.pending = {text: self.pending.get(text, "") for text in wanted}

    async def _loads(self, reference: Reference, load: Callable[[Reference], Awaitable[object]]) -> bool:
        text = str(reference)
        try:
            await load(reference)
        except Problem as problem:
            if self.pending.get(text) != problem.message:
                log.warning("preload: %s is not loaded: %s", text, problem.message)
            self.pending[text] = problem.message
            return False
        self.pending.pop(text, None)
        return True
