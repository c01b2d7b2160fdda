"""The durable state, in one SQLite file: the last valid snapshot, last good versions, history, measured sizes
and load times. Without it the next start is slower, but no answer changes.

Knows tables and plain values; must not know registries or models. Every method blocks for one short
transaction; the event loop calls it through the I/O pool. Several gateways of one machine may share the
file: the rows of a registry carry its identity.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.database import log_ahead, private, transaction
from gateway.statelock import StateLock

log = logging.getLogger("gateway.state")

SCHEMA = 1
_TABLES = """
CREATE TABLE alias (
    registry TEXT, name TEXT, alias TEXT, last_good TEXT NOT NULL, PRIMARY KEY (registry, name, alias));
CREATE TABLE history (
    id INTEGER PRIMARY KEY, registry TEXT, name TEXT, alias TEXT, version TEXT NOT NULL,
    started REAL NOT NULL, ended REAL, moved_by TEXT NOT NULL, reason TEXT);
CREATE INDEX history_by_alias ON history (registry, name, alias, id);
CREATE TABLE measurement (digest TEXT PRIMARY KEY, bytes INTEGER, load_seconds REAL);
"""
#: Tables that files of the same schema may lack.
_LATER = """
DROP TABLE IF EXISTS snapshot;
CREATE TABLE IF NOT EXISTS first_digest (
    registry TEXT, name TEXT, version TEXT, source TEXT, digest TEXT NOT NULL,
    PRIMARY KEY (registry, name, version, source));
CREATE TABLE IF NOT EXISTS last_snapshot (registry TEXT PRIMARY KEY, stamp TEXT NOT NULL, seen REAL NOT NULL);
CREATE TABLE IF NOT EXISTS scan (
    digest TEXT, edition INTEGER, harmless INTEGER NOT NULL, reason TEXT NOT NULL,
    PRIMARY KEY (digest, edition));
CREATE TABLE IF NOT EXISTS last_model (
    registry TEXT, name TEXT, entry BLOB NOT NULL, PRIMARY KEY (registry, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rollout (
    registry TEXT, name TEXT, alias TEXT, course TEXT NOT NULL, PRIMARY KEY (registry, name, alias));
CREATE TABLE IF NOT EXISTS outbox (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, registry TEXT NOT NULL, url TEXT NOT NULL,
    body BLOB NOT NULL, created REAL NOT NULL, attempts INTEGER NOT NULL, due REAL NOT NULL);
CREATE TABLE IF NOT EXISTS used (
    registry TEXT, kind TEXT, team TEXT, model TEXT, requests INTEGER NOT NULL, rows INTEGER NOT NULL,
    cpu REAL NOT NULL, memory REAL NOT NULL, began REAL NOT NULL, changed REAL NOT NULL,
    PRIMARY KEY (registry, kind, team, model))
"""
_FORGETFUL = "cannot write the state in %s (%s): changes are lost when this gateway ends"
_SHARED = (
    "the state in %s is in use by %s, on another machine: changes are lost when this gateway ends; give each "
    "machine a state_dir of its own"
)
HISTORY_KEPT = 100
#: How long to wait for another gateway's transaction.
LOCKED_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Served:
    """One period of serving: `version` answered from `started` to `ended` (None: it still answers), in unix
    seconds. `moved_by` says what started it, `reason` why it ended."""

    version: str
    started: float
    moved_by: str
    ended: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class LastSnapshot:
    """The last valid content of a registry: its stamp, each model as the caller's JSON, and the time when it
    was read (unix seconds)."""

    stamp: str
    entries: dict[str, bytes]
    seen: float


class _Newer(Exception):
    """A later version of the gateway has written the file."""


class State:
    """The durable state under `directory`.

    A damaged file is renamed, and a new one is created. The file of a newer gateway stays unchanged, and
    another file is used. If nothing can be written, the file is read and changes stay in memory until the
    process ends. Each case is logged. Raises OSError if `directory` is not a directory, and if other
    processes hold the file for longer than `LOCKED_SECONDS`.
    """

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = directory / "state.db"
        self._clock = clock
        self._lock = threading.RLock()
        self._in_together = False
        self._saved: dict[str, tuple[str, Mapping[str, bytes]]] = {}
        self._lock_file: StateLock | None = None
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise NotADirectoryError(errno.ENOTDIR, "it is not a directory", str(directory)) from None
        except OSError as error:
            log.error(_FORGETFUL, directory, error.strerror)
            self._db = self._in_memory()
            return
        self._lock_file = StateLock(directory)
        if self._lock_file.holder is not None:
            log.error(_SHARED, directory, self._lock_file.holder)
            self._db = self._in_memory()
            return
        try:
            self._db = self._opened()
        except _Newer as error:
            self._path = directory / f"state-{SCHEMA}.db"
            log.warning(
                "the state file in %s belongs to a newer gateway, using another: %s", directory, error
            )
            self._db = self._opened()

    def _opened(self) -> sqlite3.Connection:
        """Opens the file, or its replacement. Raises OSError and _Newer."""
        try:
            return self._open()
        except sqlite3.OperationalError as error:
            # The file itself may be sound, and others may be using it.
            if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise OSError(f"cannot use the state in {self._path} now: {error}") from error
            log.error(_FORGETFUL, self._path, error)
            return self._in_memory()
        except sqlite3.DatabaseError as error:
            aside = self._path.with_name(f"{self._path.name}.unreadable-{int(self._clock())}")
            try:
                for suffix in ("", "-wal", "-shm"):
                    part = Path(f"{self._path}{suffix}")
                    if part.exists():
                        part.rename(f"{aside}{suffix}")
            except OSError as refused:
                log.error(_FORGETFUL, self._path, f"{error}; {refused.strerror}")
                return self._in_memory()
            log.warning("cannot use the state file %s (%s): renamed it to %s", self._path, error, aside.name)
            try:
                return self._open()
            except sqlite3.Error as again:
                log.error(_FORGETFUL, self._path, again)
                return self._in_memory()

    def _in_memory(self) -> sqlite3.Connection:
        """A database in memory, with the content of the file if that can be read."""
        for how in ("mode=ro", "immutable=1"):  # the second works where even a lock cannot be written
            db = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
            try:
                url = f"{self._path.absolute().as_uri()}?{how}"
                with contextlib.closing(sqlite3.connect(url, uri=True)) as file:
                    file.backup(db)
                return _prepared(db)
            except (sqlite3.Error, _Newer):
                db.close()  # the file is missing or not readable
        return _prepared(sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None))

    def _open(self) -> sqlite3.Connection:
        with contextlib.suppress(OSError):  # SQLite says what is wrong with the file
            private(self._path)
        return _prepared(
            sqlite3.connect(self._path, timeout=LOCKED_SECONDS, check_same_thread=False, isolation_level=None)
        )

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Writes all of the block, or nothing. Raises sqlite3.Error."""
        with self._lock:
            if self._in_together:
                yield self._db
                return
            with transaction(self._db):
                yield self._db

    def together(self, writes: Iterable[Callable[[], None]]) -> None:
        """Calls these methods of the state in one transaction, which costs about as much as one of them.
        Raises what one of them raises; then none of them has written anything."""
        with self._lock, transaction(self._db):
            self._in_together = True
            try:
                for write in writes:
                    write()
            finally:
                self._in_together = False

    def _query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    # The last valid snapshot of a registry, one row per model, so that a move writes one row.

    def save_snapshot(self, registry: str, stamp: str, entries: Mapping[str, bytes]) -> None:
        """Writes the differences to the saved snapshot. The caller must not change `entries` afterwards."""
        with self.transaction() as db:
            row = db.execute("SELECT stamp FROM last_snapshot WHERE registry = ?", (registry,)).fetchone()
            before: Mapping[str, bytes]
            saved, before = self._saved.get(registry, (None, {}))
            if row is None or row[0] != saved:  # another gateway wrote since, or this one has just started
                before = {} if row is not None and row[0] == stamp else self._last_entries(db, registry)
            if row is None or row[0] != stamp:
                db.executemany(
                    "DELETE FROM last_model WHERE registry = ? AND name = ?",
                    [(registry, name) for name in before if name not in entries],
                )
                changed = [(registry, n, entry) for n, entry in entries.items() if before.get(n) != entry]
                db.executemany("REPLACE INTO last_model VALUES (?, ?, ?)", changed)
            db.execute("REPLACE INTO last_snapshot VALUES (?, ?, ?)", (registry, stamp, self._clock()))
            self._saved[registry] = (stamp, entries)

    def snapshot(self, registry: str) -> LastSnapshot | None:
        with self._lock:
            self._db.execute("BEGIN")  # both queries see the same state
            try:
                row = self._db.execute(
                    "SELECT stamp, seen FROM last_snapshot WHERE registry = ?", (registry,)
                ).fetchone()
                return row and LastSnapshot(row[0], self._last_entries(self._db, registry), row[1])
            finally:
                self._db.execute("COMMIT")

    @staticmethod
    def _last_entries(db: sqlite3.Connection, registry: str) -> dict[str, bytes]:
        return dict(db.execute("SELECT name, entry FROM last_model WHERE registry = ?", (registry,)))

    # Aliases: the last good version, and the history of serving.

    def save_last_good(self, registry: str, name: str, alias: str, version: str) -> None:
        with self.transaction() as db:
            db.execute("REPLACE INTO alias VALUES (?, ?, ?, ?)", (registry, name, alias, version))

    def last_good(self, registry: str) -> dict[tuple[str, str], str]:
        rows = self._query("SELECT name, alias, last_good FROM alias WHERE registry = ?", registry)
        return {(name, alias): version for name, alias, version in rows}

    def begin_serving(self, registry: str, name: str, alias: str, served: Served) -> None:
        """Starts a period; the previous one should have ended. Deletes old ones beyond `HISTORY_KEPT`."""
        with self.transaction() as db:
            db.execute(
                "INSERT INTO history (registry, name, alias, version, started, moved_by)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (registry, name, alias, served.version, served.started, served.moved_by),
            )
            db.execute(
                "DELETE FROM history WHERE registry = :registry AND name = :name AND alias = :alias"
                " AND id NOT IN (SELECT id FROM history WHERE registry = :registry AND name = :name"
                " AND alias = :alias ORDER BY id DESC LIMIT :most)",
                {"registry": registry, "name": name, "alias": alias, "most": HISTORY_KEPT},
            )

    def end_serving(self, registry: str, name: str, alias: str, ended: float, reason: str) -> None:
        with self.transaction() as db:
            db.execute(
                "UPDATE history SET ended = ?, reason = ?"
                " WHERE registry = ? AND name = ? AND alias = ? AND ended IS NULL",
                (ended, reason, registry, name, alias),
            )

    def histories(self, registry: str) -> dict[tuple[str, str], list[Served]]:
        """The periods of serving by (name, alias), oldest first."""
        rows = self._query(
            "SELECT name, alias, version, started, moved_by, ended, reason FROM history"
            " WHERE registry = ? ORDER BY id",
            registry,
        )
        found: dict[tuple[str, str], list[Served]] = {}
        for name, alias, *served in rows:
            found.setdefault((name, alias), []).append(Served(*served))
        return found

    # How far the last rollout of an alias is, as the caller's JSON.

    def save_rollout(self, registry: str, name: str, alias: str, course: str | None) -> None:
        """`course` None deletes it."""
        with self.transaction() as db:
            if course is None:
                db.execute(
                    "DELETE FROM rollout WHERE registry = ? AND name = ? AND alias = ?",
                    (registry, name, alias),
                )
            else:
                db.execute("REPLACE INTO rollout VALUES (?, ?, ?, ?)", (registry, name, alias, course))

    def rollouts(self, registry: str) -> dict[tuple[str, str], str]:
        rows = self._query("SELECT name, alias, course FROM rollout WHERE registry = ?", registry)
        return {(name, alias): course for name, alias, course in rows}

    # The digests of downloaded versions for which the registry has none.

    def save_digest(
        self, registry: str, name: str, version: str, source: str, digest: str, *, first: bool = True
    ) -> None:
        """`first`: keep the first digest; else keep the last one."""
        with self.transaction() as db:
            db.execute(
                f"INSERT OR {'IGNORE' if first else 'REPLACE'} INTO first_digest VALUES (?, ?, ?, ?, ?)",
                (registry, name, version, source, digest),
            )

    def digest(self, registry: str, name: str, version: str, source: str) -> str | None:
        rows = self._query(
            "SELECT digest FROM first_digest WHERE registry = ? AND name = ? AND version = ? AND source = ?",
            registry,
            name,
            version,
            source,
        )
        return rows[0][0] if rows else None

    # Measurements by digest: the same files need the same memory under any name.

    def save_measurement(self, digest: str, size: int | None, load_seconds: float) -> None:
        with self.transaction() as db:
            db.execute(
                "INSERT INTO measurement VALUES (?, ?, ?) ON CONFLICT (digest) DO UPDATE"
                " SET bytes = coalesce(excluded.bytes, bytes), load_seconds = excluded.load_seconds",
                (digest, size, load_seconds),
            )

    def measurement(self, digest: str) -> tuple[int | None, float] | None:
        """(bytes, load seconds) of the last time these files were loaded, or None."""
        rows = self._query("SELECT bytes, load_seconds FROM measurement WHERE digest = ?", digest)
        return (rows[0][0], rows[0][1]) if rows else None

    # What the files of a digest execute, as found by one edition of the scan.

    def save_scan(self, digest: str, edition: int, harmless: bool, reason: str) -> None:
        with self.transaction() as db:
            db.execute("REPLACE INTO scan VALUES (?, ?, ?, ?)", (digest, edition, harmless, reason))

    def scan(self, digest: str, edition: int) -> tuple[bool, str] | None:
        """(harmless, reason), or None if it was not scanned."""
        rows = self._query(
            "SELECT harmless, reason FROM scan WHERE digest = ? AND edition = ?", digest, edition
        )
        return (bool(rows[0][0]), rows[0][1]) if rows else None

    def close(self) -> None:
        with self._lock:
            self._db.close()
        if self._lock_file is not None:
            self._lock_file.close()


def _prepared(db: sqlite3.Connection) -> sqlite3.Connection:
    """The connection with all tables. Closes it if that fails. Raises sqlite3.Error and _Newer."""
    try:
        log_ahead(db)
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("BEGIN IMMEDIATE")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            for statement in _TABLES.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {SCHEMA}")
        elif version > SCHEMA:
            raise _Newer(f"its schema is {version}, this gateway reads {SCHEMA}")
        elif version < SCHEMA:
            raise sqlite3.DatabaseError(f"its schema is {version}, this gateway reads {SCHEMA}")
        for statement in _LATER.split(";"):
            db.execute(statement)
        db.execute("COMMIT")
    except BaseException:
        db.close()
        raise
    return db
