"""The durable state: what is written is read again, and a file that is damaged is set aside, not lost."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.aliasmemory import AliasMemory
from gateway.database import transaction
from gateway.state import HISTORY_KEPT, SCHEMA, LastSnapshot, Served, State


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    state = State(tmp_path, clock=lambda: 50.0)
    state.save_snapshot("r", "one", {"ä": b"1", "b": b"2"})
    state.save_last_good("r", "iris", "champion", "3")
    state.begin_serving("r", "iris", "champion", Served("2", 10.0, "registry"))
    state.end_serving("r", "iris", "champion", 20.0, "replaced by 3")
    state.begin_serving("r", "iris", "champion", Served("3", 20.0, "promote"))
    state.save_measurement("sha256:1", 1000, 2.5)
    state.save_measurement("sha256:1", None, 3.5)
    state.close()

    again = State(tmp_path)
    assert again.snapshot("r") == LastSnapshot("one", {"ä": b"1", "b": b"2"}, 50.0)
    assert again.snapshot("another registry") is None
    assert again.last_good("r") == {("iris", "champion"): "3"}
    assert again.histories("r") == {
        ("iris", "champion"): [
            Served("2", 10.0, "registry", 20.0, "replaced by 3"),
            Served("3", 20.0, "promote"),
        ]
    }
    assert again.measurement("sha256:1") == (1000, 3.5)
    assert again.measurement("sha256:2") is None
    again.close()


def test_a_snapshot_costs_the_models_that_changed(tmp_path: Path) -> None:
    def written() -> int:
        """Rows since the last question."""
        now = state._db.total_changes
        written.before, before = now, getattr(written, "before", 0)  # type: ignore[attr-defined]
        return now - before

    many = {str(i): b"1" for i in range(1000)}
    state = State(tmp_path)
    state.save_snapshot("r", "one", many)
    assert written() >= 1000
    state.save_snapshot("r", "one", dict(many))
    assert written() <= 2  # when it was seen
    two = {**many, "7": b"2", "new": b"3"}
    del two["8"]
    state.save_snapshot("r", "two", two)
    assert written() <= 10
    state.save_snapshot("another", "two", many)
    assert state.snapshot("r") == LastSnapshot("two", two, pytest.approx(time.time(), abs=60))
    state.close()

    # After a restart what the file holds is what counts, and between two gateways what came last.
    state = State(tmp_path)
    state.save_snapshot("r", "three", many)
    assert written() <= 10
    other = State(tmp_path)
    other.save_snapshot("r", "four", {**many, "9": b"4"})
    state.save_snapshot("r", "five", {**many, "1": b"5"})
    found = other.snapshot("r")
    assert found is not None
    assert (found.stamp, found.entries) == ("five", {**many, "1": b"5"})
    other.close()
    state.close()


def test_a_damaged_file_is_set_aside_and_begun_again(tmp_path: Path) -> None:
    State(tmp_path).close()
    path = tmp_path / "state.db"
    path.write_bytes(b"this is no database, and it is long enough to be looked at" * 100)
    content = path.read_bytes()
    state = State(tmp_path, clock=lambda: 7.0)
    state.save_last_good("r", "iris", "champion", "1")
    assert state.last_good("r") == {("iris", "champion"): "1"}
    assert (tmp_path / "state.db.unreadable-7").read_bytes() == content
    state.close()


def test_a_file_that_somebody_writes_is_not_taken_for_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    State(tmp_path).close()
    monkeypatch.setattr("gateway.state.LOCKED_SECONDS", 0.05)
    other = sqlite3.connect(tmp_path / "state.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(OSError, match="cannot use the state"):
        State(tmp_path)
    other.execute("ROLLBACK")
    other.close()
    assert [path.name for path in tmp_path.glob("state.db.unreadable*")] == []
    State(tmp_path).close()


def test_what_a_newer_gateway_wrote_is_left_to_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    State(tmp_path).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "state.db")) as newer:
        newer.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    content = (tmp_path / "state.db").read_bytes()
    for _ in range(2):
        state = State(tmp_path)
        state.save_last_good("r", "iris", "champion", "1")
        state.close()
    assert "belongs to a newer gateway" in caplog.text
    assert (tmp_path / "state.db").read_bytes() == content
    state = State(tmp_path)
    assert state.last_good("r") == {("iris", "champion"): "1"}
    state.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-1.db", "state.db", "state.lock"]


def test_where_nothing_can_be_written_what_is_there_still_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = State(tmp_path)
    state.save_last_good("r", "iris", "champion", "1")
    state.close()
    (tmp_path / "state.db-wal").mkdir()  # where the log of writes would be
    content = (tmp_path / "state.db").read_bytes()
    state = State(tmp_path)
    assert "lost when this gateway ends" in caplog.text
    assert state.last_good("r") == {("iris", "champion"): "1"}
    state.save_last_good("r", "iris", "champion", "2")
    assert state.last_good("r") == {("iris", "champion"): "2"}
    state.close()
    assert (tmp_path / "state.db").read_bytes() == content


def test_without_a_file_it_remembers_until_it_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "state.db").mkdir()
    state = State(tmp_path)
    assert "lost when this gateway ends" in caplog.text
    state.save_last_good("r", "iris", "champion", "1")
    assert state.last_good("r") == {("iris", "champion"): "1"}
    state.close()


def test_a_state_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match="is not a directory"):
            State(place)


def test_history_is_bounded_in_the_file_and_in_memory(tmp_path: Path) -> None:
    state = State(tmp_path)
    memory = AliasMemory(state, "r", lambda write: write())
    for number in range(HISTORY_KEPT + 20):
        memory.begin_serving("iris", "champion", Served(str(number), float(number), "registry"))
        memory.end_serving("iris", "champion", number + 1.0, "replaced")
    kept = memory.history("iris", "champion")
    assert len(kept) == HISTORY_KEPT
    assert kept[-1] == Served("119", 119.0, "registry", 120.0, "replaced")
    assert state.histories("r")["iris", "champion"] == kept
    state.close()


def test_only_the_owner_may_read_the_files(tmp_path: Path) -> None:
    older = tmp_path / "older"
    older.mkdir()
    (older / "state.db").touch(0o644)
    for directory in (tmp_path / "new", older):
        state = State(directory)
        state.save_last_good("r", "m", "a", "1")
        assert {path.name: path.stat().st_mode & 0o077 for path in directory.iterdir()} == dict.fromkeys(
            ("state.db", "state.db-wal", "state.db-shm", "state.lock"), 0
        )
        state.close()
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0


def test_a_transaction_that_sqlite_has_ended_says_why() -> None:
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.execute("CREATE TABLE t (x)")

    def write(ends: str, error: Exception) -> None:
        with transaction(db):
            db.execute("INSERT INTO t VALUES (1)")
            db.execute(ends)
            raise error

    full = sqlite3.OperationalError("database or disk is full")
    with pytest.raises(sqlite3.OperationalError, match="disk is full"):
        write("ROLLBACK", full)  # as SQLite does by itself on a full disk
    with pytest.raises(ZeroDivisionError):
        write("SELECT 1", ZeroDivisionError())
    assert db.execute("SELECT count(*) FROM t").fetchone() == (0,)
    db.close()


def test_writes_together_are_all_written_or_none(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.save_last_good("r", "iris", "champion", "1")

    def save(number: str | None) -> Callable[[], None]:
        return lambda: state.save_last_good("r", "iris", "champion", number)  # type: ignore[arg-type]

    with pytest.raises(sqlite3.IntegrityError):
        state.together([save("2"), save(None)])
    assert state.last_good("r") == {("iris", "champion"): "1"}
    state.together([save("2"), lambda: state.save_scan("d", 1, True, "why"), save("3")])
    state.save_measurement("d", 1, 2.0)
    state.close()
    again = State(tmp_path)
    assert again.last_good("r") == {("iris", "champion"): "3"}
    assert again.scan("d", 1) == (True, "why")
    assert again.measurement("d") == (1, 2.0)
    again.close()
