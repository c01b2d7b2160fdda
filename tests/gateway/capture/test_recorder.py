"""The recorder: a share of the requests reaches the disk, and no caller notices what goes wrong there."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.capture import recorder as module
from gateway.capture.recorder import MAX_RECORD, MAX_WAITING, Recorder
from gateway.capture.records import Record
from gateway.capture.store import CaptureStore, Limits
from gateway.http.captures import Captures
from gateway.rollout_settings import Capture
from loaders.batch import Batch, Columns, Tensors, Value
from tests.support.controlled import run, turns

ROW = Columns({"age": np.array([1.0])}, 1)


class Blocked(CaptureStore):
    """Adds nothing before `go` is set, and fails with `error`."""

    error: Exception | None = None
    closed_between = False
    """Closed while it had nothing to add."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "one")
        self.go = threading.Event()
        self.go.set()

    def add(self, records: Sequence[Record], limits: Limits) -> None:
        assert self.go.wait(60)
        if self.error is not None:
            raise self.error
        super().add(records, limits)

    def close(self) -> None:
        self.closed_between = self.go.is_set()
        super().close()


class Setup:
    def __init__(self, directory: Path, pool: ThreadPoolExecutor, **settings: Any) -> None:
        self.settings = Capture(**{"share": 1.0, **settings})
        self.counts: Counter[str] = Counter()
        self.store = Blocked(directory)
        self.recorder = Recorder(
            self.store, directory, pool, capture=lambda name: self.settings,
            counted=lambda model, result, number: self.counts.update({result: number}),
            chance=random.Random(1),
        )  # fmt: skip

    def take(self, batch: Batch = ROW, answer: Batch = ROW, share: float = 1.0) -> None:
        self.recorder.take("iris", "1", "d", batch, {}, answer, 0.1, share)

    @property
    def kept(self) -> int:
        return sum(one.requests for one in self.store.summaries())


@asynccontextmanager
async def made(directory: Path, workers: int = 1, **settings: Any) -> AsyncIterator[Setup]:
    with ThreadPoolExecutor(workers) as pool:
        setup = Setup(directory, pool, **settings)
        try:
            yield setup
        finally:
            setup.store.go.set()
            await setup.recorder.close()


def test_the_share_is_that_of_the_settings(tmp_path: Path) -> None:
    async def main() -> None:
        async with made(tmp_path) as setup:
            for _ in range(2000):
                setup.take(share=0.05)
                if len(setup.recorder._waiting) > 100:
                    await setup.recorder.flush()
            await setup.recorder.flush()
            assert 60 <= setup.kept <= 140
            assert setup.counts["kept"] == setup.kept

    run(main)


def test_what_was_taken_is_on_disk_after_a_while_and_after_the_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with made(tmp_path) as setup:
            setup.take()
            task = asyncio.get_running_loop().create_task(setup.recorder.run())
            while not setup.counts["kept"]:  # noqa: ASYNC110 - another thread writes
                await asyncio.sleep(0.01)
            task.cancel()
            setup.take()
        assert setup.kept == 2
        setup.store.close()

    run(main)


def test_a_slow_disk_drops_requests_and_holds_up_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with made(tmp_path) as setup:
            setup.store.go.clear()
            setup.take()
            writing = asyncio.get_running_loop().create_task(setup.recorder.flush())
            await turns(4)
            for _ in range(MAX_WAITING + 10):
                setup.take()
            assert setup.counts == {"full": 10}
            setup.store.go.set()
            await writing
            await setup.recorder.flush()
            assert setup.kept == MAX_WAITING + 1

    run(main)


def test_what_is_being_written_is_deleted_too(tmp_path: Path) -> None:
    async def main() -> None:
        async with made(tmp_path, workers=4) as setup:
            setup.store.go.clear()
            for _ in range(20):
                setup.take()
            writing = asyncio.get_running_loop().create_task(setup.recorder.flush())
            await turns(4)
            assert not setup.recorder._waiting
            dropping = asyncio.get_running_loop().create_task(Captures(setup.recorder).drop("iris", None))
            await turns(50)
            setup.store.go.set()
            assert (await dropping)["dropped"] == 20
            await writing
            assert setup.kept == 0

    run(main)


def test_what_is_being_written_counts_as_memory_until_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING_BYTES", 3 * 2 * ROW.arrays["age"].nbytes)

    async def main() -> None:
        async with made(tmp_path) as setup:
            setup.store.go.clear()
            for _ in range(3):
                setup.take()
            writing = asyncio.get_running_loop().create_task(setup.recorder.flush())
            await turns(4)
            setup.take()
            assert setup.counts == {"full": 1}
            setup.store.go.set()
            await writing
            setup.take()
            assert setup.counts == {"full": 1, "kept": 3}

    run(main)


def test_what_could_not_be_written_does_not_count_as_memory_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING_BYTES", 2 * ROW.arrays["age"].nbytes)

    async def main() -> None:
        async with made(tmp_path) as setup:
            setup.store.error = MemoryError()
            setup.take()
            with pytest.raises(MemoryError):
                await setup.recorder.flush()
            setup.store.error = None
            setup.take()
            await setup.recorder.flush()
            assert setup.counts == {"kept": 1}

    run(main)


def test_the_end_waits_for_a_write_whose_caller_was_cancelled(tmp_path: Path) -> None:
    async def main() -> None:
        async with made(tmp_path, workers=4) as setup:
            setup.store.go.clear()
            setup.take()
            writing = asyncio.get_running_loop().create_task(setup.recorder.flush())
            await turns(4)
            writing.cancel()
            closing = asyncio.get_running_loop().create_task(setup.recorder.close())
            await asyncio.wait({writing})
            await turns(4)
            setup.store.go.set()
            await closing
            assert setup.store.closed_between
            assert setup.counts == {"kept": 1}

    run(main)


@pytest.mark.parametrize(
    "error", [sqlite3.OperationalError("database or disk is full"), OSError(28, "No space left on device")]
)
def test_a_disk_that_refuses_drops_requests_and_is_said_once(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with made(tmp_path) as setup:
            setup.store.error = error
            for _ in range(3):
                setup.take()
                await setup.recorder.flush()
            assert setup.counts == {"failed": 3}
            assert len(caplog.records) == 1
            setup.store.error = None
            setup.take()
            await setup.recorder.flush()
            assert setup.counts["kept"] == 1

    run(main)


def test_a_nearly_full_disk_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        total, free = 10**9, 10**6

    monkeypatch.setattr(module.shutil, "disk_usage", lambda place: Full)

    async def main() -> None:
        async with made(tmp_path) as setup:
            setup.take()
            await setup.recorder.flush()
            assert setup.counts == {"failed": 1}
            assert setup.kept == 0

    run(main)


@pytest.mark.parametrize(
    "large",
    [
        lambda: Tensors({"": np.zeros(MAX_RECORD // 8 + 1)}, None),
        lambda: Columns({"t": np.array(["x" * (MAX_RECORD + 1)], object)}, 1),
        lambda: Value([{"t": ["x" * (MAX_RECORD + 1)]}], 1),
    ],
)
def test_a_huge_request_is_not_kept(tmp_path: Path, large: Callable[[], Batch]) -> None:
    async def main() -> None:
        async with made(tmp_path) as setup:
            setup.take(large())
            setup.take(answer=large())
            assert setup.counts == {"large": 2}
            assert not setup.recorder._waiting

    run(main)


def test_many_nested_values_are_not_counted_on_the_loop(tmp_path: Path) -> None:
    async def main() -> None:
        async with made(tmp_path, max_bytes=1000) as setup:
            setup.take(Value([[0] * 100_000]))
            await setup.recorder.flush()
            assert setup.counts == {"large": 1}

    run(main)


def test_an_input_without_names_is_not_kept_where_a_column_is_redacted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with made(tmp_path, redact=["ssn"]) as setup:
            for _ in range(3):
                setup.take(Tensors({"": np.zeros(1)}, 1))
            setup.take()
            await setup.recorder.flush()
            assert setup.counts == {"unnamed": 3, "kept": 1}
            assert len(caplog.records) == 1

    run(main)


def test_an_answer_that_cannot_be_encoded_is_not_kept(tmp_path: Path) -> None:
    async def main() -> None:
        async with made(tmp_path) as setup:
            deep: Any = []
            for _ in range(5000):
                deep = [deep]
            setup.take(answer=Value(deep))
            setup.take()
            await setup.recorder.flush()
            assert setup.counts["kept"] == 1
            assert setup.counts.total() == 2

    run(main)


def test_turned_off_the_limits_of_then_hold() -> None:
    limits = module.limits_of(Capture(share=0, keep=1, redact=["a"]))
    assert limits.keep > 1e9
    assert limits.redact == {"a"}


# Settings.


def test_capture_is_off_by_default_and_a_models_keys_come_on_top() -> None:
    from gateway.configuration import load

    assert not load({}, {}).captures("iris")
    given = {
        "capture": {"share": 0.01, "keep": "1h", "redact": ["ssn"]},
        "models": {"iris": {"capture": {"share": 1, "redact": "email"}}, "rent": {"capture": "off"}},
    }
    settings = load(given, {})
    iris = settings.capture_of("iris")
    assert (iris.share, iris.keep, iris.redact) == (1.0, 3600.0, ["ssn", "email"])
    assert settings.capture_of("other").share == 0.01
    assert not settings.captures("rent")
    assert load({}, {"GATEWAY_CAPTURE__SHARE": "0.5"}).capture_of("iris").share == 0.5
