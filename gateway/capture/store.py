"""The file of captured requests, `captures.db` in `state_dir`: mode 0600, SQLite, one row per request.

Every row carries the time after which it is deleted, so that it goes even when capturing is off by then. What
is deleted is overwritten with zeros. Several gateways may share the file: rows carry the registry's identity.
The file is worth nothing without its purpose, so a damaged one is deleted, and a new one begun.

Every method blocks; the event loop calls them through a thread. Knows rows and limits; must not know
settings or requests.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gateway.capture.records import Record
from gateway.database import private, transaction
from gateway.quantities import utc

log = logging.getLogger("gateway.capture")

FILE: Final = "captures.db"
#: How long to wait for another process's transaction, in seconds.
_LOCKED_SECONDS: Final = 10.0
#: What a row takes besides its frame, about, so that many small ones count.
ROW_BYTES: Final = 512
#: So many rows, and about so many bytes, are deleted at once.
_PART_ROWS: Final = 20_000
_PART_BYTES: Final = 16 << 20
#: The share of `max_bytes` that stays when the oldest requests are deleted.
_KEPT: Final = 0.95
_TABLE = """
CREATE TABLE IF NOT EXISTS capture (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL, registry TEXT NOT NULL, name TEXT NOT NULL,
    version TEXT NOT NULL, digest TEXT NOT NULL, at REAL NOT NULL, until REAL NOT NULL,
    seconds REAL NOT NULL, rows INTEGER NOT NULL, size INTEGER NOT NULL, removed TEXT NOT NULL,
    redact TEXT NOT NULL, frame BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS capture_by_version ON capture (registry, name, version, number);
CREATE INDEX IF NOT EXISTS capture_by_end ON capture (until);
"""
_COLUMNS: Final = "number, id, name, version, digest, at, seconds, rows, removed, frame"


@dataclass(frozen=True, slots=True)
class Limits:
    """What holds for a model's captures. `keep`: in seconds. `max_bytes`: of all its versions."""

    keep: float
    max_bytes: int
    redact: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Summary:
    """The captures of one version. `oldest`, `newest`: unix seconds. `replayable`: those whose input has no
    redacted column."""

    model: str
    version: str
    requests: int
    replayable: int
    rows: int
    size: int
    oldest: float
    newest: float

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "version": self.version,
            "requests": self.requests,
            "replayable": self.replayable,
            "rows": self.rows,
            "bytes": self.size,
            "oldest": utc(self.oldest),
            "newest": utc(self.newest),
        }


class CaptureStore:
    """The captures of one registry. The file is created with the first request that is added. Methods raise
    OSError and sqlite3.Error."""

    def __init__(self, directory: Path, registry: str, *, clock: Callable[[], float] = time.time) -> None:
        self._path = directory / FILE
        self._registry = registry
        self._clock = clock
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        #: The bytes by model, at least: other processes may have deleted some.
        self._sizes: dict[str, int] = {}

    # Writing.

    def add(self, records: Sequence[Record], limits: Limits) -> None:
        """Adds requests of one model, then deletes its oldest ones beyond `max_bytes`."""
        redact = _spelled(limits.redact)
        with self._transaction(create=True) as db:
            assert db is not None
            db.executemany(
                "INSERT INTO capture (id, registry, name, version, digest, at, until, seconds, rows, size,"
                " removed, redact, frame) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        one.id, self._registry, one.model, one.version, one.digest, one.at,
                        one.at + limits.keep, one.seconds, one.rows, one.size + ROW_BYTES,
                        json.dumps(one.removed), redact, one.frame,
                    )
                    for one in records
                ],
            )  # fmt: skip
        for name in {one.model for one in records}:
            size = sum(one.size + ROW_BYTES for one in records if one.model == name)
            if name in self._sizes:
                self._sizes[name] += size
            if self._sizes.get(name, limits.max_bytes + 1) > limits.max_bytes:
                self._shrink(name, limits.max_bytes)

    def expire(self, limits: Callable[[str], Limits]) -> int:
        """Deletes what is older than its `keep`, then or now, and what was stored before a column was
        redacted. `limits` are the present ones of a model. Returns how many requests that were."""
        now = self._clock()
        deleted = self._delete("until <= ?", (now,))
        stored = self._query(
            "SELECT DISTINCT name, redact FROM capture WHERE registry = ?", (self._registry,)
        )
        for name, redact in stored:
            present, where = limits(name), "registry = ? AND name = ?"
            if not {one.casefold() for one in present.redact} <= set(json.loads(redact)):
                deleted += self._delete(f"{where} AND redact = ?", (self._registry, name, redact))
            deleted += self._delete(f"{where} AND at + ? <= ?", (self._registry, name, present.keep, now))
            deleted += self._shrink(name, present.max_bytes)
        return deleted

    def drop(self, name: str | None = None, version: str | None = None) -> int:
        """Deletes the captures of a version, of a model or of all models. Returns how many."""
        return self._delete(*self._where(name, version))

    def _shrink(self, name: str, most: int) -> int:
        """Deletes the oldest requests of a model if there are more than `most` bytes. Leaves a little room,
        so that the next ones need not search again."""
        total = self._query(
            "SELECT sum(size) FROM capture WHERE registry = ? AND name = ?", (self._registry, name)
        )
        self._sizes[name] = size = (total[0][0] or 0) if total else 0
        if size <= most:
            return 0
        last = self._query(
            "SELECT max(number) FROM (SELECT number, sum(size) OVER (ORDER BY number DESC) AS total"
            " FROM capture WHERE registry = ? AND name = ?) WHERE total > ?",
            (self._registry, name, int(most * _KEPT)),
        )
        return self._delete("registry = ? AND name = ? AND number <= ?", (self._registry, name, last[0][0]))

    def _delete(self, where: str, values: Collection[Any]) -> int:
        """Deletes rows, and returns their room to the disk. Part by part, so that others may write between
        the parts, and so that a part fits into memory: on a full disk a journal has no room."""
        deleted = 0
        self._sizes.clear()
        while self._query(f"SELECT 1 FROM capture WHERE {where} LIMIT 1", values):
            try:
                part = self._delete_part(where, values)
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_FULL:
                    raise
                part = self._delete_part(where, values, journal="MEMORY")
            deleted += part
            if not part:
                break
        return deleted

    def _delete_part(self, where: str, values: Collection[Any], journal: str = "DELETE") -> int:
        with self._lock:
            db = self._opened(create=False)
            if db is None:
                return 0
            db.execute(f"PRAGMA journal_mode = {journal}")
            try:
                deleted = db.execute(
                    "DELETE FROM capture WHERE number IN (SELECT number FROM"
                    " (SELECT number, sum(size) OVER (ORDER BY number) - size AS before FROM"
                    f" (SELECT number, size FROM capture WHERE {where} ORDER BY number LIMIT {_PART_ROWS}))"
                    f" WHERE before < {_PART_BYTES})",
                    tuple(values),
                ).rowcount
                db.executescript("PRAGMA incremental_vacuum")  # `execute` would free only one page
            finally:
                db.execute("PRAGMA journal_mode = DELETE")
            return deleted

    # Reading.

    def summaries(self, name: str | None = None) -> list[Summary]:
        where, values = self._where(name, None)
        rows = self._query(
            "SELECT name, version, count(*), sum(removed = '[]'), sum(rows), sum(size), min(at), max(at)"
            f" FROM capture WHERE {where} AND until > ? GROUP BY name, version",
            (*values, self._clock()),
        )
        found = [Summary(*row) for row in rows]
        # A model that MLflow names by its id has no number.
        return sorted(found, key=lambda one: (one.model, one.version.zfill(20), one.version))

    def newest(self, name: str, version: str, count: int, digest: str | None = None) -> tuple[list[int], int]:
        """The numbers of the last requests of a version that can be replayed, oldest first, at most `count`;
        and how many requests of that time cannot, because a column is redacted. `digest`: only those that
        these files answered."""
        where, values = self._where(name, version)
        if digest is not None:
            where, values = f"{where} AND digest = ?", (*values, digest)
        where, values = f"{where} AND until > ?", (*values, self._clock())
        numbers = self._query(
            f"SELECT number FROM capture WHERE {where} AND removed = '[]' ORDER BY number DESC LIMIT ?",
            (*values, count),
        )
        since = numbers[-1][0] if len(numbers) >= count else 0
        left_out = self._query(
            f"SELECT count(*) FROM capture WHERE {where} AND removed != '[]' AND number >= ?",
            (*values, since),
        )
        return [number for (number,) in reversed(numbers)], int(left_out[0][0]) if left_out else 0

    def read(self, number: int) -> Record | None:
        """One request; None if it was deleted meanwhile."""
        rows = self._query(f"SELECT {_COLUMNS} FROM capture WHERE number = ?", (number,))
        return _record(rows[0]) if rows else None

    def every(self, name: str | None = None, version: str | None = None) -> Iterator[Record]:
        """All requests, oldest first, read one by one, so that writers need not wait."""
        where, values = self._where(name, version)
        number = 0
        while rows := self._query(
            f"SELECT {_COLUMNS} FROM capture WHERE {where} AND until > ? AND number > ?"
            " ORDER BY number LIMIT 1",
            (*values, self._clock(), number),
        ):
            number = rows[0][0]
            yield _record(rows[0])

    def _where(self, name: str | None, version: str | None) -> tuple[str, tuple[Any, ...]]:
        if name is None:
            return "registry = ?", (self._registry,)
        if version is None:
            return "registry = ? AND name = ?", (self._registry, name)
        return "registry = ? AND name = ? AND version = ?", (self._registry, name, version)

    # The file.

    def _query(self, sql: str, values: Collection[Any]) -> list[tuple[Any, ...]]:
        with self._lock:
            db = self._opened(create=False)
            return [] if db is None else db.execute(sql, tuple(values)).fetchall()

    @contextlib.contextmanager
    def _transaction(self, *, create: bool = False) -> Iterator[sqlite3.Connection | None]:
        with self._lock:
            db = self._opened(create=create)
            if db is None:
                yield None
                return
            with transaction(db):
                yield db

    def _opened(self, *, create: bool) -> sqlite3.Connection | None:
        """Returns the connection; None if the file does not exist and is not to be created."""
        if self._db is not None and not self._path.exists():
            self._db.close()  # somebody has removed the file
            self._db = None
        if self._db is None:
            if not create and not self._path.exists():
                return None
            try:
                self._db = self._connected()
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError as error:
                log.warning("cannot use %s (%s): deleted it", self._path.name, error)
                for suffix in ("", "-journal"):
                    Path(f"{self._path}{suffix}").unlink(missing_ok=True)
                self._db = self._connected()
        return self._db

    def _connected(self) -> sqlite3.Connection:
        try:
            private(self._path)
            url = self._path.absolute().as_uri()
        except OSError:
            if not self._path.exists():
                raise
            url = f"{self._path.absolute().as_uri()}?mode=ro"  # what is there can be read
        db = sqlite3.connect(
            url, uri=True, timeout=_LOCKED_SECONDS, check_same_thread=False, isolation_level=None
        )
        try:
            if "?mode=ro" not in url:
                db.execute("PRAGMA auto_vacuum = INCREMENTAL")
                db.execute("PRAGMA secure_delete = ON")
                db.execute("PRAGMA synchronous = NORMAL")
                db.executescript(_TABLE)
            else:
                db.execute("SELECT count(*) FROM capture")
        except BaseException:
            db.close()
            raise
        return db

    def close(self) -> None:
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None


def _record(row: Sequence[Any]) -> Record:
    _, identity, name, version, digest, at, seconds, rows, removed, frame = row
    return Record(identity, name, version, digest, at, seconds, rows, tuple(json.loads(removed)), frame)


def _spelled(names: Collection[str]) -> str:
    return json.dumps(sorted({name.casefold() for name in names}))
