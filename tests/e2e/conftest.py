"""Fixtures of the end-to-end tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.containers import TOOLS, Containers, tool
from tests.support.shell import Shell, clean_shell


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return clean_shell(tmp_path)


@pytest.fixture(scope="session")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    """With the image built, once for all tests or ahead of them (IMAGE_UNDER_TEST). It takes minutes: not
    where only some tests are wanted."""
    if not os.environ.get("GATEWAY_TEST_ALL"):
        pytest.skip("builds an image for minutes: only where GATEWAY_TEST_ALL is set")
    for name in TOOLS:
        tool(name)
    ahead = os.environ.get("IMAGE_UNDER_TEST")
    made = Containers(Path(ahead) if ahead else tmp_path_factory.mktemp("containers"))
    try:
        if not ahead:
            made.build()
        yield made
    finally:
        made.close()
