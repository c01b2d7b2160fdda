"""Models in the gateway's own process: measured by what that grows by, and given back when they go."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.runners import memory
from gateway.runners.inline import InlineRunner
from tests.support.hostile import write_package
from tests.support.processes import ONE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux")

# Small pieces, which the C library keeps for itself when they are freed, unless it is told otherwise.
GROWS = "self.kept = [bytes(1000) for _ in range(100_000)] if not hasattr(self, 'kept') else self.kept"

LOADS = "Model.kept_by_load = [bytes(1000) for _ in range(100_000)]"


def main(directory: Path) -> None:
    package = write_package(
        directory / "p",
        at_load=LOADS,
        at_predict=GROWS,
    )

    async def work() -> None:
        runner = InlineRunner(package, {})
        assert runner.measured_bytes is None
        await runner.start()
        loaded = runner.measured_bytes
        assert loaded is not None
        assert 90e6 < loaded < 150e6, loaded
        await runner.predict(ONE, {})
        assert 190e6 < (runner.measured_bytes or 0) < 280e6, runner.measured_bytes
        before = memory.own()
        await runner.close()
        assert before - memory.own() > 80e6, (before, memory.own())

    asyncio.run(work())


def test_an_inline_model_is_measured_by_what_the_gateway_grows_by(tmp_path: Path) -> None:
    """In a process of its own, as what other tests left behind would be counted too."""
    code = """
import pathlib, sys
from tests.gateway.runners.test_inline import main
main(pathlib.Path(sys.argv[1]))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
