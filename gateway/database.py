"""SQLite files: what each of the gateway's databases needs from a connection.

Knows SQLite and files; must not know tables.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PAUSE: Final = 0.05
#: How long to wait for others that switch the same database, in seconds.
BUSY_SECONDS: Final = 10.0


def private(path: Path) -> None:
    """Creates the file if there is none, and lets only its owner read it. SQLite gives the files next to it
    the same mode. Raises OSError."""
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    os.chmod(path, 0o600)


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Writes all of the block, or nothing. The connection is in autocommit mode. Raises sqlite3.Error."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # a full disk ends the transaction by itself
            db.execute("ROLLBACK")
        raise


def log_ahead(db: sqlite3.Connection) -> None:
    """Switches a database to the write-ahead log. SQLite does not wait by itself if others do the same at
    this moment. Raises sqlite3.Error."""
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(PAUSE)
