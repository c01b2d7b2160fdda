"""What is remembered of a load is written when it is new."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.persistence import Persistence
from gateway.registries.base import Version
from gateway.state import State
from loaders import scan
from tests.support.controlled import bare_package


@pytest.mark.anyio
async def test_a_measurement_is_written_only_if_it_says_something_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry: Any = SimpleNamespace(identity="r")
    persistence = Persistence(tmp_path, registry, pack_bytes=1)
    written: list[tuple[int | None, float]] = []
    monkeypatch.setattr(
        persistence._state, "save_measurement", lambda digest, size, seconds: written.append((size, seconds))
    )

    def loaded(size: int | None, seconds: float, before: tuple[int, float] | None) -> None:
        estimate, load_seconds = (500, None) if before is None else before
        prepared: Any = SimpleNamespace(
            digest="d", accepted=None, estimate=estimate, load_seconds=load_seconds
        )
        persistence.save_measurement(prepared, size, seconds)

    loaded(1000, 0.1, None)
    loaded(1000, 0.15, (1000, 0.1))  # nothing new
    loaded(1040, 0.1, (1000, 0.1))  # nothing new
    loaded(None, 0.1, (1000, 0.1))  # nothing new
    loaded(1200, 0.1, (1000, 0.1))
    loaded(800, 0.1, (1000, 0.1))
    loaded(1000, 0.3, (1000, 0.1))
    loaded(1000, 0.04, (1000, 0.1))
    await persistence.close()
    assert written == [(1000, 0.1), (1200, 0.1), (800, 0.1), (1000, 0.3), (1000, 0.04)]


@pytest.mark.anyio
async def test_a_scan_of_a_dry_run_is_written_when_the_version_is_loaded_for_real(tmp_path: Path) -> None:
    registry: Any = SimpleNamespace(identity="r")
    persistence = Persistence(tmp_path, registry, pack_bytes=1)
    package = bare_package(tmp_path / "package")
    found = persistence.scanned("d", package, False)
    assert persistence.scanned("d", package, True) == found
    await persistence.close()
    again = Persistence(tmp_path, registry, pack_bytes=1)
    assert again._state.scan("d", scan.EDITION) == (found.harmless, found.reason)
    await again.close()


NEVER = 600.0
"""Seconds: longer than any test waits."""


def persistence(directory: Path) -> Persistence:
    registry: Any = SimpleNamespace(
        identity="r", lasting=True, record_digest=lambda version, digest: None, name="r"
    )
    return Persistence(directory, registry, pack_bytes=1)


@pytest.mark.anyio
async def test_writes_at_about_the_same_time_share_a_transaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.persistence._GATHERED", NEVER)
    kept = persistence(tmp_path)
    statements: list[str] = []
    kept._state._db.set_trace_callback(statements.append)
    for number in range(10):
        kept.aliases.save_last_good("iris", "champion", str(number))
        kept.aliases.save_last_good(f"model {number}", "champion", "1")
    await kept.close()
    assert [text for text in statements if text.startswith(("BEGIN", "COMMIT"))] == [
        "BEGIN IMMEDIATE",
        "COMMIT",
    ]
    again = State(tmp_path)
    found = again.last_good("r")
    assert found.pop(("iris", "champion")) == "9"
    assert len(found) == 10
    again.close()


@pytest.mark.anyio
async def test_a_write_that_fails_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gateway.persistence._GATHERED", NEVER)
    kept = persistence(tmp_path)
    kept.aliases.save_last_good("iris", "champion", "1")
    kept.aliases.save_last_good("iris", "champion", None)  # type: ignore[arg-type]
    kept._write_behind(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    kept.aliases.save_last_good("iris", "challenger", "2")
    kept.aliases.save_last_good("iris", "champion", "3")
    with caplog.at_level(logging.ERROR):
        await kept.close()
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "cannot write the state: NOT NULL constraint failed: alias.last_good",
        "cannot write the state",
    ]
    again = State(tmp_path)
    assert again.last_good("r") == {("iris", "champion"): "3", ("iris", "challenger"): "2"}
    again.close()


@pytest.mark.anyio
async def test_a_digest_does_not_wait_for_other_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next download must match it."""
    monkeypatch.setattr("gateway.persistence._GATHERED", NEVER)
    kept = persistence(tmp_path)
    version = Version("iris", "1", "/package")
    kept.aliases.save_last_good("iris", "champion", "1")
    kept.save_digest(version, "sha256:1")
    await asyncio.wait_for(asyncio.wrap_future(kept.writer.submit(lambda: None)), 60)
    assert kept.digest(version) == "sha256:1"
    assert kept._state.last_good("r") == {("iris", "champion"): "1"}
    assert not kept._urgent.is_set(), "the next writes wait for each other again"
    await kept.close()
    with pytest.raises(RuntimeError):
        kept.aliases.save_last_good("iris", "champion", "3")


@pytest.mark.anyio
async def test_a_measurement_is_known_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.persistence._GATHERED", NEVER)
    kept = persistence(tmp_path)
    loaded: Any = SimpleNamespace(digest="d", accepted=None, estimate=1, load_seconds=None)
    kept.save_measurement(loaded, 1000, 0.5)
    assert kept.measurement("d") == (1000, 0.5)
    assert kept._state.measurement("d") is None
    kept.save_measurement(loaded, None, 1.5)
    assert kept.measurement("d") == (1000, 1.5)
    await kept.close()
    kept = persistence(tmp_path)
    assert kept.measurement("d") == (1000, 1.5)
    kept.save_measurement(loaded, None, 4.5)
    assert kept.measurement("d") == (1000, 4.5)
    await kept.close()
    kept = persistence(tmp_path)
    assert kept.measurement("d") == (1000, 4.5)
    await kept.close()


@pytest.mark.anyio
async def test_a_measurement_that_drifts_is_written_again(tmp_path: Path) -> None:
    kept = persistence(tmp_path)
    loaded: Any = SimpleNamespace(digest="d", accepted=None)
    for size in range(1000, 1500, 40):
        kept.save_measurement(loaded, size, 0.5)
    await kept.close()
    kept = persistence(tmp_path)
    written = kept.measurement("d")
    await kept.close()
    assert written is not None
    assert written[0] is not None
    assert written[0] > 1400
