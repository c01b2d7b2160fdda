"""What was used by the gateways with one durable state: sums by kind, team and model. Each gateway adds to
them. Knows rows; must not know how usage is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from gateway.state import State

#: So many sums of a registry are kept: those changed last.
MAX_USED: Final = 20_000


class Used(NamedTuple):
    """What was used, of one kind, by a team and a model: CPU in seconds, memory in byte-seconds."""

    kind: str
    team: str
    model: str
    requests: int
    rows: int
    cpu: float
    memory: float


class UsageMemory:
    """The sums of one registry. `write` runs a write elsewhere, in order."""

    def __init__(
        self,
        state: State,
        registry: str,
        write: Callable[[Callable[[], None]], object],
        *,
        clock: Callable[[], float] = time.time,
        most: int = MAX_USED,
    ) -> None:
        self._state = state
        self._registry = registry
        self._write = write
        self._clock = clock
        self._most = most

    def read(self) -> tuple[list[Used], float | None]:
        """The sums, and when the first of them began in unix seconds. Blocks."""
        with self._state.transaction() as db:
            rows = db.execute(
                "SELECT kind, team, model, requests, rows, cpu, memory, began FROM used WHERE registry = ?",
                (self._registry,),
            ).fetchall()
        return [Used(*row[:-1]) for row in rows], min((row[-1] for row in rows), default=None)

    def add(self, since: float, used: Iterable[Used]) -> None:
        """Adds what was used since then, in unix seconds. Returns at once."""
        rows = [(self._registry, *one, since, self._clock()) for one in used]
        self._write(lambda: self._add(rows))

    def _add(self, rows: Iterable[tuple[object, ...]]) -> None:
        with self._state.transaction() as db:
            db.executemany(
                "INSERT INTO used VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (registry, kind, team, model) DO UPDATE SET"
                " requests = requests + excluded.requests, rows = rows + excluded.rows,"
                " cpu = cpu + excluded.cpu, memory = memory + excluded.memory, changed = excluded.changed",
                rows,
            )
            db.execute(
                "DELETE FROM used WHERE registry = :registry AND rowid NOT IN"
                " (SELECT rowid FROM used WHERE registry = :registry ORDER BY changed DESC LIMIT :most)",
                {"registry": self._registry, "most": self._most},
            )
