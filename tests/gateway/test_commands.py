"""What commands print: lines that are made from a gateway's views, without a gateway."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.commands.operating import _differences
from gateway.commands.rollouts import _line
from gateway.commands.terminal import Output, note, result, working

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


def test_no_command_shows_the_password_of_a_registry(capsys: pytest.CaptureFixture[str]) -> None:
    url = "http://u:p%40ss@mlflow.internal:5000/x"
    result(Output.json, {"registry": url, "mail": "a@b"}, "")
    result(Output.text, {}, f"pushed to {url}")
    note(f"gateway gc --registry {url}")
    with working(f"reading {url}"):
        pass
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("http://***@mlflow.internal:5000/x") == 4
    assert "p%40ss" not in shown.out + shown.err
    assert "a@b" in shown.out


def test_a_rollout_without_a_version_says_so() -> None:
    assert _line(ROLLOUT) == "iris@old  deleted  serves no version: the alias is no longer in the registry"
    assert _line(AWAY) == "iris@old  refused  serves no version, wanted 3: too old"
