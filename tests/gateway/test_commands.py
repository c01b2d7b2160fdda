"""What commands print: lines that are made from a gateway's views, without a gateway."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.commands.operating import _differences
from gateway.commands.rollouts import _line

ROLLOUT: dict[str, Any] = {
    "name": "iris",
    "alias": "old",
    "phase": "deleted",
    "desired": None,
    "serving": None,
    "diverged": False,
    "error": "the alias is no longer in the registry",
    "step": None,
}
KEPT = {**ROLLOUT, "serving": "2", "error": "the alias is no longer in the registry; it continues to answer"}
AWAY = {**ROLLOUT, "phase": "refused", "desired": "3", "diverged": True, "error": "too old"}


@pytest.mark.parametrize(
    ("rollout", "lines"),
    [
        (ROLLOUT, []),
        (KEPT, ["iris@old the alias is no longer in the registry; it continues to answer"]),
        (AWAY, ["iris@old should serve version 3, but serves no version: too old"]),
    ],
)
def test_status_names_no_fault_of_an_alias_that_ended_as_wanted(
    rollout: dict[str, Any], lines: list[str]
) -> None:
    assert _differences([rollout]) == lines


def test_a_rollout_without_a_version_says_so() -> None:
    assert _line(ROLLOUT) == "iris@old  deleted  serves no version: the alias is no longer in the registry"
    assert _line(AWAY) == "iris@old  refused  serves no version, wanted 3: too old"
