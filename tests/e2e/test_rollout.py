"""Canaries on a real server: a version that is fine on its example and fails for one row in five, and one
that is as good as the version in service. Each test has a model of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pytest

import gateway
from gateway.registries import open_registry
from gateway.registries.base import Move
from tests.support.callers import Callers
from tests.support.running import Running, running
from tests.support.shell import operator
from tests.support.traffic import until
from tests.support.versions import Picky

GUARDS = {"latency": "off"}  # a busy machine is not a slow version
POLICY = {"canary": {"steps": [20, 50], "every": 0, "requests": 150}, "guards": GUARDS}
SHORT = {"canary": {"steps": [50], "every": 0, "requests": 20}, "guards": GUARDS}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[gateway.ModelVersion]:
    """Versions 1, 2 and 3: 2 fails for one row in five."""
    registry = tmp_path_factory.mktemp("packages") / "registry.yaml"
    example = pd.DataFrame({"x": [2.0]})
    return [
        gateway.log_model(
            Picky(worst),
            "picky",
            str(registry),
            input_example=example,
            verify=False,
            metadata={"number": number},
        )
        for number, worst in enumerate((0, 1, 0), 1)
    ]


def register(directory: Path, packages: list[gateway.ModelVersion], name: str) -> None:
    """Adds a model of that name with these versions to the registry in `directory`; its champion is 1."""
    registry = open_registry(str(directory / "registry.yaml"), create=True)
    for package in packages:
        assert package.digest is not None
        registry.add_version(name, package.source, package.digest)
    registry.move(Move(name, "champion", "1"))


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, packages: list[gateway.ModelVersion]
) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("rollout")
    register(directory, packages, "other")
    with running(directory, GATEWAY_ROLLOUT=json.dumps(POLICY)) as served:
        yield served


class Subject:
    """A model of one test at a gateway: version 1 serves its champion."""

    def __init__(self, server: Running, name: str) -> None:
        self.server = server
        self.name = name
        assert server.predict(name, [{"x": 1.0}]).headers["x-model-version"] == "1"

    @property
    def view(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.server.url}/rollouts/{self.name}@champion").json()
        return found

    def promote(self, version: str) -> httpx.Response:
        return httpx.put(
            f"{self.server.url}/models/{self.name}/aliases/champion", params={"wait": "true"},
            headers=self.server.key, json={"version": version}, timeout=60,
        )  # fmt: skip

    def abort(self) -> None:
        """Aborts the rollout under way, and waits until it has ended."""
        path = f"{self.server.url}/rollouts/{self.name}@champion/abort"
        assert httpx.post(path, headers=self.server.key, timeout=60).status_code == 200
        until(lambda: self.view["phase"] == "aborted")

    def registered_verdict(self) -> str | None:
        """What the registry says of the version that the alias points to; a thread writes it."""
        models = httpx.get(f"{self.server.url}/registry.yaml").json()["models"]
        verdict = models[self.name]["aliases"]["champion"].get("x-verdict")
        return None if verdict is None else str(verdict["outcome"])


def subject(server: Running, packages: list[gateway.ModelVersion], name: str) -> Subject:
    """A new model of that name at a gateway that runs."""
    register(server.directory, packages, name)
    assert httpx.post(f"{server.url}/registry/refresh", headers=server.key, timeout=60).is_success
    return Subject(server, name)


def test_a_shadow_refuses_a_version_that_fails_for_one_row_in_five_before_a_caller_gets_it(
    shared: Running, packages: list[gateway.ModelVersion], tmp_path: Path
) -> None:
    model, shell = subject(shared, packages, "shadowed"), operator(shared, tmp_path)
    with Callers(shared, model.name) as traffic:
        done = shell.gateway("promote", "shadowed@champion", "2", "--shadow", "1.0", "--wait")
    assert done.code == 1, done.err
    assert "shadowing" in done.err
    assert "was refused: shadow: " in done.err
    assert set(traffic.seen) == {(200, "1")}
    view = model.view
    assert (view["phase"], view["serving"], view["desired"]) == ("refused", "1", "2")
    evidence = view["rollout"]["evidence"]["shadow"]
    assert evidence["errors"] == {"RuntimeError": evidence["failed"]}
    assert 0 < evidence["failed"] <= evidence["requests"]  # the first copies may all be such rows
    assert evidence["exact"] == evidence["requests"] - evidence["failed"]
    assert "RuntimeError" in shell.called("rollout", "shadowed@champion").out
    assert shared.metric("gateway_swaps_total", model=model.name, result="refused") == 1
    until(lambda: model.registered_verdict() == "refused")


def test_a_version_that_fails_for_one_row_in_five_is_taken_back_without_a_failed_request(
    shared: Running, packages: list[gateway.ModelVersion], tmp_path: Path
) -> None:
    model, shell = subject(shared, packages, "guarded"), operator(shared, tmp_path)
    with Callers(shared, model.name) as traffic:
        done = shell.gateway("promote", "guarded@champion", "2", "--wait")
    assert done.code == 1, done.err
    assert "rolled back: errors" in done.err
    assert {status for status, _ in traffic.seen} == {200}  # version 1 answered what version 2 could not
    view = model.view
    assert (view["phase"], view["serving"], view["desired"]) == ("rolled_back", "1", "2")
    evidence = view["rollout"]["evidence"]
    assert evidence["felt"] == 0
    assert evidence["retried"] == evidence["candidate"]["errors"] > 0
    assert evidence["guards"]["errors"]["evidence"] >= evidence["guards"]["errors"]["bound"]
    assert shared.metric("gateway_rollout_requests_total", model=model.name, arm="candidate") > 0
    until(lambda: model.registered_verdict() == "rolled_back")


def test_a_person_aborts_a_rollout_and_what_it_has_shown_stays(
    shared: Running, packages: list[gateway.ModelVersion], tmp_path: Path
) -> None:
    model, shell = subject(shared, packages, "aborted"), operator(shared, tmp_path)
    for version in ("2", "3"):
        assert model.promote(version).status_code == 202  # its first step begins
        assert shell.called("rollout", "abort", "aborted@champion").code == 0
        until(lambda version=version: (model.view["phase"], model.view["desired"]) == ("aborted", version))  # type: ignore[misc]
    assert shared.metric("gateway_rollout_phase", model=model.name, phase="aborted") == 1
    assert "aborted@champion  aborted  serves 1, wanted 3" in shell.called("rollout").out
    told = shell.called("rollout", "aborted@champion").out
    assert "earlier rollouts" in told
    assert "version 2  aborted: a person aborted it" in told
    page = httpx.get(f"{shared.url}/console/rollouts/aborted@champion").text
    assert "Version 2: aborted" in page


def test_a_good_version_completes_its_steps(
    shared: Running, packages: list[gateway.ModelVersion], tmp_path: Path
) -> None:
    model, shell = subject(shared, packages, "improved"), operator(shared, tmp_path)
    with httpx.stream("GET", f"{shared.url}/events", headers=shared.key, timeout=60) as events:
        assert model.promote("3").status_code == 202  # its first step begins
        shown = shell.called("status").out
        with Callers(shared, model.name) as traffic:
            done = shell.gateway("promote", "improved@champion", "3", "--wait")
        assert done.code == 0, done.err
        phases = _until_done(events, model.name)
    assert phases == ["canary 20 %", "canary 50 %", "done"]
    assert "improved@champion moves to version 3: canary 20 %, step 1 of 2 (20 % of the callers, " in shown
    assert "0 of 150 requests); version 1 answers the others" in shown
    assert "improved@champion is 3 and served" in done.out
    lines = [line.split("version 3  ")[1] for line in done.err.splitlines() if "version 3  " in line]
    assert [line.split(" ")[0] for line in lines] == ["canary", "canary", "done"]
    assert {status for status, _ in traffic.seen} == {200}
    view = model.view
    assert (view["phase"], view["serving"], view["diverged"]) == ("done", "3", False)
    assert shared.metric("gateway_rollout_phase", model=model.name, alias="champion", phase="done") == 1
    told = shell.called("rollout", "improved@champion").out
    assert "improved@champion  done  serves 3" in told


def _until_done(events: httpx.Response, name: str) -> list[str]:
    """The phases of the rollout of a model, from the stream of events."""
    phases: list[str] = []
    for line in events.iter_lines():
        if line.startswith("data: ") and "phase" in line:
            said = json.loads(line.removeprefix("data: "))
            if said["model"] == name:
                phases.append(said["phase"])
                if said["phase"] == "done":
                    break
    return phases


def test_what_the_rollouts_have_shown_survives_a_restart_that_waits_for_no_stream_of_events(
    packages: list[gateway.ModelVersion], tmp_path: Path
) -> None:
    register(tmp_path, packages, "kept")
    with running(tmp_path, GATEWAY_ROLLOUT=json.dumps(SHORT)) as server:
        model = Subject(server, "kept")
        assert model.promote("2").status_code == 202
        model.abort()
        with Callers(server, model.name):
            assert model.promote("3").status_code in (200, 202)
            until(lambda: model.view["phase"] == "done", 60.0)
        with httpx.stream("GET", f"{server.url}/events", headers=server.key, timeout=60) as events:
            lines = events.iter_lines()
            assert next(lines).startswith(":")
            assert server.stop() == 0
            assert list(lines) == [""]
    with running(tmp_path, GATEWAY_ROLLOUT=json.dumps(SHORT)) as server:
        assert server.predict("kept", [{"x": 1.0}]).headers["x-model-version"] == "3"
        model.server = server
        view = model.view
        assert (view["phase"], view["rollout"]["phase"]) == ("done", "done")
        assert [(one["version"], one["phase"]) for one in view["earlier_rollouts"]] == [("2", "aborted")]
        moved = model.promote("1")  # it has served before: no steps
        assert (moved.status_code, moved.json()["phase"]) == (200, "done")
        earlier = model.view["earlier_rollouts"]
        assert [one["version"] for one in earlier] == ["3", "2"]
        assert earlier[0]["evidence"]["candidate"]["requests"] >= 20
