"""The notifications that their receivers have not got: a table of the durable state.

Knows rows; must not know events or how a notification is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.state import State


@dataclass(frozen=True, slots=True)
class Undelivered:
    """A notification that its receiver has not got. `created`: unix seconds. `attempts`: those that
    failed."""

    id: str
    url: str
    body: bytes
    created: float
    attempts: int


class Outbox:
    """One registry's notifications that are not delivered. All methods block, and raise sqlite3.Error."""

    def __init__(self, state: State, registry: str) -> None:
        self._state = state
        self._registry = registry

    def put(self, entry: Undelivered, most: int) -> int:
        """Adds one, and drops the oldest ones of its URL beyond `most`. Returns how many that were."""
        with self._state.transaction() as db:
            db.execute(
                "INSERT INTO outbox (id, registry, url, body, created, attempts, due)"
                " VALUES (?, ?, ?, ?, ?, 0, 0)",
                (entry.id, self._registry, entry.url, entry.body, entry.created),
            )
            return db.execute(
                "DELETE FROM outbox WHERE registry = :registry AND url = :url AND number NOT IN"
                " (SELECT number FROM outbox WHERE registry = :registry AND url = :url"
                " ORDER BY number DESC LIMIT :most)",
                {"registry": self._registry, "url": entry.url, "most": most},
            ).rowcount

    def next(self, url: str, now: float, claimed_until: float) -> tuple[Undelivered | None, float | None]:
        """The oldest one for this URL that is due, which no other caller gets before `claimed_until`; else
        the time when the next one is due (None if there is none). Those behind one that is claimed, and has
        not failed yet, wait for it."""
        with self._state.transaction() as db:
            row = db.execute(
                "SELECT id, url, body, created, attempts FROM outbox AS one"
                " WHERE registry = :registry AND url = :url AND due <= :now"
                " AND NOT EXISTS (SELECT 1 FROM outbox WHERE registry = :registry AND url = :url"
                " AND number < one.number AND attempts = 0 AND due > :now) ORDER BY number LIMIT 1",
                {"registry": self._registry, "url": url, "now": now},
            ).fetchone()
            if row is None:
                return None, db.execute(
                    "SELECT min(due) FROM outbox WHERE registry = ? AND url = ? AND due > ?",
                    (self._registry, url, now),
                ).fetchone()[0]
            db.execute("UPDATE outbox SET due = ? WHERE id = ?", (claimed_until, row[0]))
            return Undelivered(*row), None

    def delivered(self, identity: str) -> None:
        with self._state.transaction() as db:
            db.execute("DELETE FROM outbox WHERE id = ?", (identity,))

    def failed(self, entry: Undelivered, due: float, *, alone: bool) -> None:
        """`alone`: the others for its URL need not wait for it."""
        with self._state.transaction() as db:
            db.execute("UPDATE outbox SET attempts = attempts + 1, due = ? WHERE id = ?", (due, entry.id))
            if not alone:
                db.execute(
                    "UPDATE outbox SET due = max(due, ?) WHERE registry = ? AND url = ?",
                    (due, self._registry, entry.url),
                )

    def forget_others(self, urls: Sequence[str]) -> int:
        """Deletes those for other URLs than these. Returns how many that were."""
        known = ", ".join("?" * len(urls))
        with self._state.transaction() as db:
            return db.execute(
                f"DELETE FROM outbox WHERE registry = ? AND url NOT IN ({known})", (self._registry, *urls)
            ).rowcount
