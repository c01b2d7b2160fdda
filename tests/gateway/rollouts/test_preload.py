"""What readiness waits for: references and patterns, and what is said of those that fail."""

from __future__ import annotations

import logging

import pytest

from gateway import backoff
from gateway.errors import Problem
from gateway.names import InvalidReference, Reference
from gateway.registries.base import Alias, Model, Snapshot, Version
from gateway.rollouts.preload import Entry, Preload


def snapshot(**aliases: tuple[str, ...]) -> Snapshot:
    models = {
        name: Model(name, {"1": Version(name, "1", "/1")}, {alias: Alias("1") for alias in given})
        for name, given in aliases.items()
    }
    return Snapshot(models, str(aliases))  # the stamp changes with the content


NOW = snapshot(iris=("champion", "next"), fraud_a=("champion",), fraud_b=("next",), bare=())


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("*", ["iris@champion", "fraud_a@champion"]),
        ("fraud_*", ["fraud_a@champion"]),
        ("@next", ["iris@next", "fraud_b@next"]),
        ("fraud_*@next", ["fraud_b@next"]),
        ("iris", ["iris"]),
        ("gone@champion", ["gone@champion"]),
        ("none-*", []),
    ],
)
def test_what_an_entry_means(text: str, meant: list[str]) -> None:
    found = Entry.parsed(text).references(NOW, ["champion"])
    assert [str(reference) for reference in found] == [f"models:/{one}" for one in meant]


@pytest.mark.parametrize("text", ["@latest", "@", "a/b/c"])
def test_what_no_entry_can_be(text: str) -> None:
    with pytest.raises(InvalidReference):
        Entry.parsed(text)


@pytest.mark.anyio
async def test_what_fails_is_named_at_once_and_tried_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backoff, "pause", lambda *_, **__: 0.0)
    tries: list[str] = []
    seen: list[dict[str, str]] = []

    with caplog.at_level(logging.WARNING):
        preload = Preload.parsed(["*", "nobody"])

        async def load(reference: Reference) -> None:
            tries.append(reference.name)
            if reference.name == "fraud_a" and tries.count("fraud_a") < 3:
                raise Problem("MODEL_UNAVAILABLE", "the weights are gone")
            if reference.name == "nobody" and tries.count("nobody") < 2:
                raise Problem("MODEL_NOT_FOUND", "there is no model 'nobody'")
            seen.append(dict(preload.pending))

        async def now() -> Snapshot:
            return NOW

        await preload.run(now, load)
        assert preload.done

    assert tries.count("iris") == 1
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if "the weights are gone" in line]) == 1
    assert len([line for line in said if "nobody" in line]) == 1
    assert any(pending.get("models:/fraud_a@champion") == "the weights are gone" for pending in seen)


@pytest.mark.anyio
async def test_a_pattern_that_matches_nothing_is_named_until_a_model_comes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    empty, full = snapshot(iris=("champion",)), snapshot(iris=("champion",), zz_a=("champion",))
    loads: list[str] = []

    with caplog.at_level(logging.WARNING):
        preload = Preload.parsed(["iris", "zz_*", "@prod"], again=0.0)
        states: list[tuple[bool, list[str]]] = []
        snapshots = iter([empty, empty, full])

        async def now() -> Snapshot:
            states.append((preload.done, list(preload.unmatched)))
            return next(snapshots, snapshot(zz_a=("champion", "prod"), iris=("champion",)))

        async def load(reference: Reference) -> None:
            loads.append(str(reference))

        await preload.run(now, load)
        assert states == [
            (False, []),
            (True, ["zz_*", "@prod"]),
            (True, ["zz_*", "@prod"]),
            (True, ["@prod"]),
        ], "readiness is not taken back, and does not wait for what may never come"
        assert preload.done
        assert not preload.unmatched

    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "preload: zz_* matches no model that has the alias champion",
        "preload: @prod matches no model that has the alias prod",
    ]
    assert loads == ["models:/iris", "models:/zz_a@champion", "models:/zz_a@prod"]
