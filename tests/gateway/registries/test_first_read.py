"""The first read of a registry after a restart, next to what the state remembers."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from gateway.app import Gateway
from gateway.registries import open_registry
from gateway.settings import Settings


async def started(directory: Path, text: str) -> None:
    """A gateway over a registry file with this text, started and stopped."""
    registry = directory / "registry.yaml"
    registry.write_text(text)
    settings = Settings(cache_dir=directory / "cache", state_dir=directory / "state")
    gateway = Gateway(settings, open_registry(str(registry)))
    await gateway.start()
    await gateway.stop()


@pytest.mark.anyio
async def test_models_that_are_missing_after_a_restart_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "gateway")
    await started(tmp_path, "models: {a: {}, b: {}, c: {}}\n")
    await started(tmp_path, "models: {a: {}, b: {}, c: {}, d: {}}\n")
    assert not caplog.records
    await started(tmp_path, "models: {a: {}, d: {}, e: {}}\n")
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("the registry no longer has 2 of the 4 models that it had ")
    assert said.endswith(": b, c")
    caplog.clear()
    await started(tmp_path, "models: {a: {}}\n")
    assert caplog.records[0].getMessage().endswith(": d, e")
