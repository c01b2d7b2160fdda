"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.shell import Shell, clean_shell


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return clean_shell(tmp_path)
