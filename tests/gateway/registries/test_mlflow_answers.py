"""What users of an MLflow server wrote there, and what one of them costs the others."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from gateway.names import Reference
from gateway.registries import mlflow_answers as answers
from gateway.registries.base import Alias, RegistryError
from gateway.registries.mlflow import MLflowRegistry
from gateway.registries.mlflow_client import MLflowError
from gateway.registries.webhooks import concerned

DEEP = "[" * 3000


@pytest.mark.parametrize("tag", [DEEP, "{", "[]", '{"version": 1e999}', "9" * 5000])
def test_a_tag_that_is_not_the_gateways_says_nothing(tag: str) -> None:
    assert answers.with_past("1", tag) == Alias("1")
    assert answers.with_verdict(Alias("1"), tag, tag) == Alias("1")
    assert answers.rollout({"gateway.rollout": tag}).keys() <= {"x-unreadable", "version"}


@pytest.mark.parametrize("value", [10**18, "9" * 19, 253_402_300_800_000, -1, "soon", None])
def test_a_moment_that_no_date_has_is_none(value: object) -> None:
    assert answers.moment(value) is None
    assert answers.moment(253_402_300_799_000) == "9999-12-31T23:59:59Z"


def test_an_event_nested_too_deep_concerns_no_model() -> None:
    assert concerned(DEEP.encode()) is None


class Server:
    """An MLflow server with models of one version; `faults` are raised for a name."""

    def __init__(self) -> None:
        self.faults: dict[str, Exception] = {}
        self.tags: list[dict[str, str]] = []
        self.version = "1"

    def call(self, method: str, path: str, values: Any = None, *, retries: int | None = None) -> Any:
        name = values["name"]
        if name in self.faults:
            raise self.faults[name]
        if path == "registered-models/get":
            aliases = [{"alias": "a", "version": self.version}]
            registered = {"name": name, "creation_timestamp": 1, "aliases": aliases, "tags": self.tags}
            return {"registered_model": registered}
        if path == "model-versions/get":
            return {"model_version": {"version": values["version"], "creation_timestamp": "9" * 18}}
        return {"artifact_uri": "s3://bucket/x"}


@pytest.mark.parametrize(
    "fault", [RuntimeError("a bug"), MLflowError("no", "PERMISSION_DENIED", 400)], ids=["bug", "refusal"]
)
def test_one_model_that_cannot_be_read_keeps_its_state_and_stops_no_other(
    fault: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = MLflowRegistry("http://127.0.0.1:9", environ={})
    server = Server()
    monkeypatch.setattr(registry._calls, "call", server.call)
    server.tags = [{"key": "gateway.alias.a", "value": DEEP}]
    for name in ("good", "bad"):
        registry.find(Reference(name))
    server.version, server.faults = "2", {"bad": fault}
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            models = registry.read().models
    assert models["good"].aliases["a"].version == "2"
    assert models["bad"].aliases["a"].version == "1"
    assert [record.args[0] for record in caplog.records if record.args] == ["bad"]
    # All of them: the registry itself is at fault, and is reported so.
    server.faults["good"] = fault
    with pytest.raises((RuntimeError, RegistryError)):
        registry.read()
