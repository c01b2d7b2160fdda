"""What is remembered of a load is written when it is new."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.persistence import Persistence
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
