"""The file of captured requests: private, within its limits, and worth nothing when it is damaged."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.capture import store as module
from gateway.capture.records import Record, Taken, recorded
from gateway.capture.store import FILE, ROW_BYTES, CaptureStore, Limits
from loaders.batch import Columns

WIDE = Limits(keep=1000.0, max_bytes=1 << 30)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[CaptureStore]:
    made = CaptureStore(tmp_path, "one", clock=clock)
    yield made
    made.close()


def record(number: int = 0, *, redact: tuple[str, ...] = (), at: float = 0.0, **more: Any) -> Record:
    given: dict[str, Any] = {
        "model": "iris",
        "version": "1",
        "digest": "d",
        "seconds": 0.1,
        "params": {},
        **more,
    }
    batch = Columns({"n": np.array([number]), "ssn": np.array([7])}, 1)
    return recorded(Taken(batch=batch, answer=batch, at=at, **given), redact, 1 << 20)


def numbers(store: CaptureStore, **where: Any) -> list[int]:
    found = []
    for one in store.every(**where):
        batch = one.content().batch
        assert isinstance(batch, Columns)
        found.append(int(batch.arrays["n"][0]))
    return found


def test_only_the_owner_may_read_the_file(store: CaptureStore, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store.add([record()], WIDE)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


def test_no_file_before_the_first_request(store: CaptureStore, tmp_path: Path) -> None:
    assert store.summaries() == []
    assert store.newest("iris", "1", 10) == ([], 0)
    assert store.drop() == 0
    assert store.expire(lambda name: WIDE) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_newest_requests_that_can_be_replayed(store: CaptureStore) -> None:
    store.add([record(n) for n in range(3)], WIDE)
    store.add([record(3, redact=("ssn",)), record(4), record(5, redact=("ssn",)), record(6)], WIDE)
    found, left_out = store.newest("iris", "1", 2)
    read = [store.read(number) for number in found]
    assert [int(one.content().batch.arrays["n"][0]) for one in read if one is not None] == [4, 6]  # type: ignore[union-attr]
    assert left_out == 1
    assert store.newest("iris", "1", 100)[1] == 2
    assert store.newest("iris", "1", 2, "other")[0] == []
    assert store.read(10**6) is None


def test_old_requests_go_with_the_limit_of_then_or_now(store: CaptureStore, clock: Clock) -> None:
    store.add([record(1, at=0.0), record(2, at=50.0)], Limits(100.0, 1 << 30))
    clock.now = 101.0
    assert numbers(store) == [2]  # before the sweep too
    assert store.expire(lambda name: Limits(1e9, 1 << 30)) == 1
    assert numbers(store) == [2]
    assert store.expire(lambda name: Limits(10.0, 1 << 30)) == 1
    assert numbers(store) == []


def test_the_oldest_go_when_there_are_too_many_bytes(store: CaptureStore) -> None:
    size = record().size + ROW_BYTES
    store.add([record(n, version=str(n % 2 + 1)) for n in range(10)], Limits(1000.0, 4 * size))
    assert numbers(store) == [7, 8, 9]  # a twentieth of the limit stays free
    store.add([record(1, model="rent")], Limits(1000.0, 4 * size))  # another model has its own room
    assert numbers(store, name="iris") == [7, 8, 9]
    assert store.expire(lambda name: Limits(1000.0, 2 * size)) == 2
    assert numbers(store, name="iris") == [9]


def test_the_bytes_are_summed_only_when_there_may_be_too_many(
    store: CaptureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = record().size + ROW_BYTES
    limits = Limits(1000.0, 100 * size)
    sums = []
    ask = store._query
    monkeypatch.setattr(store, "_query", lambda sql, values: sums.append("sum(" in sql) or ask(sql, values))
    for n in range(300):
        store.add([record(n)], limits)
    assert 95 <= len(numbers(store)) <= 100
    assert sum(sums) < 150


def test_what_was_kept_before_a_column_was_redacted_goes(store: CaptureStore) -> None:
    store.add([record(1)], WIDE)
    store.add([record(2, redact=("SSN",))], Limits(1000.0, 1 << 30, frozenset({"SSN"})))
    assert store.expire(lambda name: Limits(1000.0, 1 << 30, frozenset({"ssn"}))) == 1
    assert numbers(store) == [2]


def test_deleted_content_is_not_in_the_file_any_more(store: CaptureStore, tmp_path: Path) -> None:
    batch = Columns({"n": np.array(["the-secret-text" * 30_000], object)}, 1)
    taken = Taken("iris", "1", "d", 0.0, 0.1, batch, {}, batch)
    store.add([recorded(taken, (), 1 << 20)], WIDE)
    assert b"the-secret-text" in (tmp_path / FILE).read_bytes()
    before = (tmp_path / FILE).stat().st_size
    assert store.drop("iris") == 1
    assert b"the-secret-text" not in (tmp_path / FILE).read_bytes()
    assert (tmp_path / FILE).stat().st_size < before / 2
    assert [entry.name for entry in tmp_path.iterdir()] == [FILE]


def test_summaries_and_drops_by_model_and_version(store: CaptureStore) -> None:
    store.add([record(1), record(2, redact=("ssn",), at=5.0)], WIDE)
    store.add([record(3, version="10"), record(4, version="2")], WIDE)
    store.add([record(5, model="rent", version="m-0123")], WIDE)
    found = store.summaries()
    assert [(one.model, one.version, one.requests) for one in found] == [
        ("iris", "1", 2), ("iris", "2", 1), ("iris", "10", 1), ("rent", "m-0123", 1),
    ]  # fmt: skip
    assert (found[0].replayable, found[0].rows, found[0].oldest, found[0].newest) == (1, 2, 0.0, 5.0)
    assert store.drop("iris", "2") == 1
    assert store.drop("iris") == 3
    assert [one.model for one in store.summaries()] == ["rent"]
    assert store.drop() == 1


def test_registries_share_the_file_and_not_the_requests(store: CaptureStore, tmp_path: Path) -> None:
    other = CaptureStore(tmp_path, "two", clock=lambda: 0.0)
    store.add([record(1)], WIDE)
    other.add([record(2)], WIDE)
    assert (numbers(store), numbers(other)) == ([1], [2])
    assert other.drop() == 1
    assert numbers(store) == [1]
    other.close()


def test_a_full_disk_does_not_keep_requests_from_being_deleted(
    store: CaptureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add([record(n) for n in range(3)], WIDE)
    part, journals = CaptureStore._delete_part, []

    def full(self: CaptureStore, where: str, values: Any, journal: str = "DELETE") -> int:
        journals.append(journal)
        if journal == "DELETE":
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        return part(self, where, values, journal)

    monkeypatch.setattr(CaptureStore, "_delete_part", full)
    assert store.drop() == 3
    assert journals == ["DELETE", "MEMORY"]
    assert numbers(store) == []


def test_many_requests_are_deleted_in_parts(store: CaptureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PART_BYTES", 1)
    store.add([record(n) for n in range(5)], WIDE)
    parts = []
    part = CaptureStore._delete_part
    monkeypatch.setattr(
        CaptureStore, "_delete_part", lambda *given, **more: parts.append(part(*given, **more)) or parts[-1]
    )
    assert store.drop("iris") == 5
    assert parts == [1] * 5


def test_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database" * 1000)
    store = CaptureStore(tmp_path, "one", clock=lambda: 0.0)
    store.add([record(1)], WIDE)
    assert numbers(store) == [1]
    store.close()


def test_a_file_that_somebody_removed_begins_again(store: CaptureStore, tmp_path: Path) -> None:
    store.add([record(1)], WIDE)
    (tmp_path / FILE).unlink()
    assert numbers(store) == []
    store.add([record(2)], WIDE)
    assert numbers(store) == [2]


@contextmanager
def disk(directory: Path) -> Iterator[Callable[[], object]]:
    """A directory, and a function after which it cannot be written, by the superuser either."""
    directory.mkdir()
    if os.geteuid() != 0:
        yield lambda: ((directory / FILE).chmod(0o400), directory.chmod(0o500))
        directory.chmod(0o700)
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", directory], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,ro", directory], check=True)
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def test_a_directory_that_cannot_be_written(tmp_path: Path, clock: Clock) -> None:
    with disk(tmp_path / "state") as fix:
        store = CaptureStore(tmp_path / "state", "one", clock=clock)
        store.add([record(1)], WIDE)
        store.close()
        fix()
        assert numbers(store) == [1]
        with pytest.raises(sqlite3.Error):
            store.add([record(2)], WIDE)
        store.close()
