"""After a swap on a real server: a version that is fine on its example and bad on what callers send is taken
back, without a failed request, and stays out after kill -9."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pytest

import gateway
from gateway.names import Reference
from gateway.registries import open_registry
from gateway.registries.base import Move
from tests.support.callers import Callers
from tests.support.running import Running, running
from tests.support.shell import operator
from tests.support.traffic import until

POLICY = {"watch": "10m", "guards": {"latency": "off"}}  # a busy machine is not a slow version
EXAMPLE = pd.DataFrame({"x": [2.0]})


class Doubles:
    """Doubles x. On any row but its example it does what `how` says."""

    def __init__(self, how: str = "works") -> None:
        self.how = how

    def predict(self, model_input: Any) -> Any:
        if self.how != "works" and (model_input["x"] != 2.0).any():
            if self.how == "raises":
                raise RuntimeError("no such region")
            if self.how == "exits":
                os._exit(3)
            if self.how == "hangs":
                time.sleep(3600)
            if self.how == "answers text":
                return ["twice " + str(x) for x in model_input["x"]]
        return (model_input["x"] * 2).to_numpy()


def view_of(server: Running) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/rollouts/twice@champion").json()
    return found


def until_phase(server: Running, phase: str, desired: str | None = None) -> dict[str, Any]:
    """Waits for a phase of the alias; with `desired`, of the move to that version, not of an earlier one."""
    views: list[dict[str, Any]] = []

    def reached() -> bool:
        views[:] = [view_of(server)]
        return views[0]["phase"] == phase and desired in {None, views[0]["desired"]}

    until(reached, 60.0)
    return views[0]


def registered_verdict(registry: Path) -> tuple[str, str] | None:
    """The version and the outcome of the verdict in the registry file."""
    with closing(open_registry(str(registry))) as opened:
        entry = opened.find(Reference("twice")).models["twice"].aliases["champion"]
    return None if entry.verdict is None else (entry.verdict.version, entry.verdict.outcome)


def saved_phase(directory: Path) -> str | None:
    """The phase of the rollout in the state: what a gateway that is killed now goes on with."""
    with closing(sqlite3.connect(directory / "state" / "state.db")) as state:
        saved = state.execute("SELECT course FROM rollout").fetchone()
    return None if saved is None else str(json.loads(saved[0])["phase"])


def registry_of(directory: Path, *how: str) -> Path:
    registry = directory / "registry.yaml"
    for number, kind in enumerate(("works", *how), 1):
        gateway.log_model(
            Doubles(kind), "twice", str(registry), input_example=EXAMPLE, verify=False,
            metadata={"number": number},
        )  # fmt: skip
    open_registry(str(registry)).move(Move("twice", "champion", "1"))
    return registry


@pytest.mark.parametrize(
    ("by", "kinds"), [("gateway", ("raises", "hangs")), ("file", ("exits", "answers text"))]
)
def test_a_bad_version_is_taken_back_after_the_swap_without_a_failed_request(
    tmp_path: Path, by: str, kinds: tuple[str, ...]
) -> None:
    registry = registry_of(tmp_path, *kinds)
    with running(tmp_path, GATEWAY_ROLLOUT=json.dumps(POLICY)) as server:
        assert server.predict("twice", [{"x": 1.0}]).status_code == 200
        with Callers(server, "twice") as traffic:
            traffic.until(150)
            for number in ("2", "3"):
                if by == "gateway" and number == "2":
                    # The command waits for the end of the watch, not for the swap.
                    done = operator(server, tmp_path).gateway("promote", "twice@champion", "2", "--wait")
                    assert done.code == 1, done.err
                    assert "  watching" in done.err
                    assert "gateway: version 2 was rolled back: " in done.err
                elif by == "gateway":
                    moved = httpx.put(
                        f"{server.url}/models/twice/aliases/champion", params={"wait": "true"},
                        headers=server.key, json={"version": number}, timeout=60,
                    )  # fmt: skip
                    assert moved.status_code == 200, moved.text
                    assert moved.json()["phase"] == moved.json()["rollout"]["phase"] == "serving (watching)"
                else:
                    open_registry(str(registry)).move(Move("twice", "champion", number))
                view = until_phase(server, "rolled_back", number)
                assert (view["serving"], view["desired"], view["last_good"]) == ("1", number, "1")
                assert view["rollout"]["evidence"]["felt"] == 0, view
                assert f"twice/{number} was rolled back: " in view["error"]
                assert view["history"][-2]["ended_because"].startswith("rolled back: ")
                traffic.until(20)
        assert {status for status, _ in traffic.seen} == {200}
        assert server.metric("gateway_swaps_total", model="twice", result="rolled_back") == 2
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        # A thread writes the verdict, another one here reads the log.
        until(lambda: registered_verdict(registry) == ("3", "rolled_back"))
        until(lambda: any("was rolled back" in line or "rolled_back" in line for line in list(server.lines)))
        status = httpx.get(f"{server.url}/rollouts").json()["rollouts"][0]
        assert "rolled back" in status["error"]


def test_one_gateway_takes_a_version_back_for_all_and_a_person_may_go_back_first(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, "works", "raises")
    settings = {"GATEWAY_REGISTRY": str(registry), "GATEWAY_ROLLOUT": json.dumps(POLICY)}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with running(tmp_path / "a", **settings) as one, running(tmp_path / "b", **settings) as other:
        for server in (one, other):
            with Callers(server, "twice", 1) as traffic:
                traffic.until(60)
        # A person goes back to a smaller number during the watch: it ends, and nothing is held against 2.
        open_registry(str(registry)).move(Move("twice", "champion", "2"))
        until_phase(one, "serving (watching)", "2")
        until_phase(other, "serving (watching)", "2")
        gone = httpx.post(
            f"{one.url}/models/twice/aliases/champion/rollback", params={"wait": "true"},
            headers=one.key, json={}, timeout=60,
        )  # fmt: skip
        assert (gone.status_code, gone.json()["serving"], gone.json()["phase"]) == (200, "1", "done")
        assert gone.json()["verdict"] is None
        assert view_of(one)["earlier_rollouts"][0]["phase"] == "superseded"
        until(lambda: view_of(other)["serving"] == "1")
        # The other gateway has no traffic of its own, and follows the verdict.
        open_registry(str(registry)).move(Move("twice", "champion", "3"))
        until_phase(other, "serving (watching)", "3")
        with Callers(one, "twice") as traffic:
            until_phase(one, "rolled_back", "3")
            until_phase(other, "rolled_back", "3")
        assert view_of(other)["serving"] == "1"
        assert {status for status, _ in traffic.seen} == {200}
        assert "another gateway: errors: " in view_of(other)["rollout"]["reason"]


def test_kill_9_during_a_watch_goes_on_watching_and_after_a_rollback_stays_back(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, "raises")
    with running(tmp_path, GATEWAY_ROLLOUT=json.dumps(POLICY)) as server:
        with Callers(server, "twice") as traffic:
            traffic.until(150)
        open_registry(str(registry)).move(Move("twice", "champion", "2"))
        until_phase(server, "serving (watching)", "2")
        until(lambda: saved_phase(tmp_path) == "watching")  # a thread writes it
        server.stop(signal.SIGKILL)
    with running(tmp_path, GATEWAY_ROLLOUT=json.dumps(POLICY)) as server:
        view = until_phase(server, "serving (watching)", "2")
        assert view["rollout"]["evidence"]["service"]["requests"] >= 100  # the reference is kept
        until(lambda: server.predict("twice/versions/1", [{"x": 2.0}]).status_code == 200)
        with Callers(server, "twice") as traffic:
            until_phase(server, "rolled_back", "2")
        assert {status for status, _ in traffic.seen} == {200}
        until(lambda: saved_phase(tmp_path) == "rolled_back")
        until(lambda: registered_verdict(registry) == ("2", "rolled_back"))
        server.stop(signal.SIGKILL)
    with running(tmp_path, GATEWAY_ROLLOUT=json.dumps(POLICY)) as server:
        with Callers(server, "twice") as traffic:
            traffic.until(20)
        assert set(traffic.seen) == {(200, "1")}
        assert view_of(server)["phase"] == "rolled_back"


def test_without_a_policy_a_crash_loop_after_the_swap_is_rolled_back(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, "exits")
    with running(tmp_path) as server:
        assert server.predict("twice", [{"x": 1.0}]).status_code == 200
        open_registry(str(registry)).move(Move("twice", "champion", "2"))
        until(lambda: view_of(server)["serving"] == "2")
        with Callers(server, "twice") as traffic:
            view = until_phase(server, "rolled_back", "2")
            assert "crash loop" in view["error"]
            traffic.until(20)
        assert (200, "1") in traffic.seen
