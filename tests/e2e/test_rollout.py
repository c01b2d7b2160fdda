"""Canaries on a real server: a version that is fine on its example and fails for one row in five, and one
that is as good as the version in service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pandas as pd
import pytest

import gateway
from gateway.registries import open_registry
from gateway.registries.base import Move
from tests.support.callers import Callers
from tests.support.running import Running, running
from tests.support.shell import Shell, operator
from tests.support.traffic import until
from tests.support.versions import Picky

POLICY = {
    "canary": {"steps": [20, 50], "every": 0, "requests": 150},
    "guards": {"latency": "off"},  # a busy machine is not a slow version
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("rollout")
    registry = directory / "registry.yaml"
    for number, worst in enumerate((0, 1, 0), 1):
        example = pd.DataFrame({"x": [2.0]})
        gateway.log_model(
            Picky(worst), "picky", str(registry), input_example=example, verify=False,
            metadata={"number": number},
        )  # fmt: skip
    open_registry(str(registry)).move(Move("picky", "champion", "1"))
    with running(directory, GATEWAY_ROLLOUT=json.dumps(POLICY)) as served:
        yield served


@pytest.fixture
def shell(server: Running, tmp_path: Path) -> Shell:
    return operator(server, tmp_path)


def test_a_shadow_refuses_a_version_that_fails_for_one_row_in_five_before_a_caller_gets_it(
    server: Running, shell: Shell
) -> None:
    assert server.predict("picky", [{"x": 1.0}]).status_code == 200
    with Callers(server, "picky") as traffic:
        done = shell.gateway("promote", "picky@champion", "2", "--shadow", "1.0", "--wait")
    assert done.code == 1, done.err
    assert "shadowing" in done.err
    assert "was refused: shadow: " in done.err
    assert set(traffic.seen) == {(200, "1")}
    view = httpx.get(f"{server.url}/rollouts/picky@champion").json()
    assert (view["phase"], view["serving"], view["desired"]) == ("refused", "1", "2")
    evidence = view["rollout"]["evidence"]["shadow"]
    assert evidence["errors"] == {"RuntimeError": evidence["failed"]}
    assert 0 < evidence["failed"] < evidence["requests"]
    assert evidence["exact"] == evidence["requests"] - evidence["failed"]
    assert "RuntimeError" in shell.gateway("rollout", "picky@champion").out
    assert server.metric("gateway_swaps_total", model="picky", result="refused") == 1
    document = httpx.get(f"{server.url}/registry.yaml").json()["models"]["picky"]
    assert document["aliases"]["champion"]["x-verdict"]["outcome"] == "refused"


def test_a_version_that_fails_for_one_row_in_five_is_taken_back_without_a_failed_request(
    server: Running, shell: Shell
) -> None:
    assert server.predict("picky", [{"x": 1.0}]).status_code == 200
    with Callers(server, "picky") as traffic:
        done = shell.gateway("promote", "picky@champion", "2", "--wait")
    assert done.code == 1, done.err
    assert "rolled back: errors" in done.err
    assert {status for status, _ in traffic.seen} == {200}  # version 1 answered what version 2 could not
    view = httpx.get(f"{server.url}/rollouts/picky@champion").json()
    assert (view["phase"], view["serving"], view["desired"]) == ("rolled_back", "1", "2")
    evidence = view["rollout"]["evidence"]
    assert evidence["felt"] == 0
    assert evidence["retried"] == evidence["candidate"]["errors"] > 0
    assert evidence["guards"]["errors"]["evidence"] >= evidence["guards"]["errors"]["bound"]
    assert server.metric("gateway_rollout_requests_total", model="picky", arm="candidate") > 0
    model = httpx.get(f"{server.url}/registry.yaml").json()["models"]["picky"]
    assert model["aliases"]["champion"]["x-verdict"]["outcome"] == "rolled_back"


def test_a_person_aborts_a_rollout(server: Running, shell: Shell) -> None:
    assert shell.gateway("promote", "picky@champion", "3").code == 0
    assert shell.gateway("rollout", "abort", "picky@champion").code == 0
    until(lambda: httpx.get(f"{server.url}/rollouts/picky@champion").json()["phase"] == "aborted")
    assert server.metric("gateway_rollout_phase", model="picky", phase="aborted") == 1
    assert "picky@champion  aborted  serves 1, wanted 3" in shell.gateway("rollout").out


def test_a_good_version_completes_its_steps(server: Running, shell: Shell) -> None:
    with httpx.stream("GET", f"{server.url}/events", headers=server.key, timeout=60) as events:
        assert shell.gateway("promote", "picky@champion", "3").code == 0
        shown = shell.gateway("status").out
        with Callers(server, "picky") as traffic:
            done = shell.gateway("promote", "picky@champion", "3", "--wait")
        assert done.code == 0, done.err
        phases = [json.loads(line[6:])["phase"] for line in _until_done(events) if "phase" in line]
    assert phases == ["canary 20 %", "canary 50 %", "done"]
    assert "picky@champion moves to version 3: canary 20 %, step 1 of 2 (20 % of the callers, " in shown
    assert "0 of 150 requests); version 1 answers the others" in shown
    assert "picky@champion is 3 and served" in done.out
    lines = [line.split("version 3  ")[1] for line in done.err.splitlines() if "version 3  " in line]
    assert [line.split(" ")[0] for line in lines] == ["canary", "canary", "done"]
    assert {status for status, _ in traffic.seen} == {200}
    view = httpx.get(f"{server.url}/rollouts/picky@champion").json()
    assert (view["phase"], view["serving"], view["diverged"]) == ("done", "3", False)
    assert server.metric("gateway_rollout_phase", model="picky", alias="champion", phase="done") == 1
    # What the rollouts before have shown stays, newest first.
    aborted, canary, shadow = view["earlier_rollouts"]
    assert (canary["version"], canary["phase"], shadow["phase"]) == ("2", "rolled_back", "refused")
    assert (aborted["version"], aborted["phase"]) == ("3", "aborted")
    assert canary["evidence"]["retried"] > 0
    told = shell.gateway("rollout", "picky@champion").out
    assert "picky@champion  done  serves 3" in told
    assert "version 2  rolled_back: errors: " in told
    assert "version 2  refused: shadow: " in told
    page = httpx.get(f"{server.url}/console/rollouts/picky@champion").text
    assert "Version 2: rolled_back" in page


def _until_done(events: httpx.Response) -> Iterator[str]:
    for line in events.iter_lines():
        if line.startswith("data: "):
            yield line
            if '"done"' in line:
                return


def test_a_stream_of_events_does_not_hold_up_the_end(server: Running) -> None:
    with httpx.stream("GET", f"{server.url}/events", headers=server.key, timeout=60) as events:
        lines = events.iter_lines()
        assert next(lines).startswith(":")
        assert server.stop() == 0
        assert list(lines) == [""]


def test_what_the_rollouts_have_shown_survives_a_restart(server: Running, shell: Shell) -> None:
    with running(server.directory, GATEWAY_ROLLOUT=json.dumps(POLICY)) as again:
        assert again.predict("picky", [{"x": 1.0}]).status_code == 200
        view = httpx.get(f"{again.url}/rollouts/picky@champion").json()
        assert (view["phase"], view["rollout"]["phase"]) == ("done", "done")
        assert [one["phase"] for one in view["earlier_rollouts"]] == ["aborted", "rolled_back", "refused"]
        moved = httpx.put(
            f"{again.url}/models/picky/aliases/champion", params={"wait": "true"}, headers=again.key,
            json={"version": "1"}, timeout=60,
        )  # fmt: skip
        assert (moved.status_code, moved.json()["phase"]) == (200, "done")
        view = httpx.get(f"{again.url}/rollouts/picky@champion").json()
        assert [one["version"] for one in view["earlier_rollouts"]] == ["3", "3", "2", "2"]
        assert view["earlier_rollouts"][0]["evidence"]["candidate"]["requests"] >= 300
