"""What is said of settings for models that do not exist."""

from __future__ import annotations

import logging

import pytest

from gateway.errors import Problem
from gateway.registries.base import Model, Snapshot
from gateway.rollouts.unused import Unused


def snapshot(*names: str) -> Snapshot:
    return Snapshot({name: Model(name, {}, {}) for name in names}, str(names))  # the stamp changes with them


@pytest.mark.anyio
async def test_a_setting_for_no_model_is_named_until_one_comes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.rollouts.unused.AGAIN", 0.0)
    monkeypatch.setattr("gateway.rollouts.unused.FIRST_AGAIN", 0.0)
    unused = Unused(["iris", "irs", "fraud_*", "zz_*"])
    states: list[dict[str, str]] = []
    snapshots = iter([*2 * [snapshot("iris", "fraud_a")], snapshot("iris", "zz_a")])

    async def now() -> Snapshot:
        states.append(dict(unused.sentences))
        if len(states) == 1:
            raise Problem("REGISTRY_UNAVAILABLE", "not read yet")
        return next(snapshots, snapshot("irs"))

    with caplog.at_level(logging.WARNING):
        await unused.run(now)
    mistyped = "models.irs matches no model of the registry, did you mean iris?"
    pattern = "models.zz_* matches no model of the registry"
    assert states == [{}, {}, *2 * [{"irs": mistyped, "zz_*": pattern}], {"irs": mistyped}]
    assert not unused.sentences
    assert caplog.messages == [f"settings: {mistyped}", f"settings: {pattern}"]
