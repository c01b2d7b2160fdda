"""Fixtures of the gateway's tests."""

from __future__ import annotations

from typing import Literal

import pytest

from tests.support.processes import START


@pytest.fixture(params=START)
def start(request: pytest.FixtureRequest) -> Literal["fork", "spawn"]:
    """How a zygote makes model processes."""
    return request.param  # type: ignore[no-any-return]
