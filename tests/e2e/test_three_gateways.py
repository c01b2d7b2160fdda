"""Three gateways on one registry file, and on one MLflow server: what one of them finds out ends a canary on
all of them, and of two verdicts in conflict the rollback wins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

import gateway
from gateway.names import Reference
from gateway.registries import open_registry
from gateway.registries.base import Move
from tests.e2e.test_watch import EXAMPLE, Doubles
from tests.support.callers import Callers
from tests.support.mlflow_server import Server
from tests.support.running import Running, running
from tests.support.traffic import until

POLL = 1.0
#: A write, a poll with its jitter, and two seconds; ten more for a busy machine.
WITHIN = 1.2 * POLL + 2.0 + 10.0
POLICY = {
    "canary": {"steps": [50], "every": 0, "requests": 100_000},
    "guards": {"latency": "off"},  # a busy machine is not a slow version
}


@pytest.fixture(params=["file", pytest.param("mlflow", marks=pytest.mark.all)])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A registry with versions 1, 2 and 3 of `trio`; 2 and 3 raise on what callers send."""
    if request.param == "file":
        found = str(tmp_path / "registry.yaml")
    else:
        server: Server = request.getfixturevalue("mlflow_server")
        found = server.url
    for number, how in enumerate(("works", "raises", "raises"), 1):
        gateway.log_model(
            Doubles(how), "trio", found, input_example=EXAMPLE, verify=False, metadata={"number": number}
        )
    move(found, "1")
    yield found
    if request.param == "mlflow":
        server.remove("trio")


def move(target: str, version: str) -> None:
    """Someone writes the registry; no gateway is asked."""
    with closing(open_registry(target)) as registry:
        registry.move(Move("trio", "champion", version))


def view_of(server: Running) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/rollouts/trio@champion", timeout=30).json()
    return found


def until_all(servers: list[Running], phase: str, desired: str) -> None:
    """Waits for a phase of the move to `desired`, not of an earlier one."""

    def reached(server: Running) -> bool:
        view = view_of(server)
        return (view["phase"], view["desired"]) == (phase, desired)

    for server in servers:
        until(lambda: reached(server), 60.0)  # noqa: B023


def ended(server: Running) -> datetime:
    return datetime.fromisoformat(view_of(server)["rollout"]["changes"][-1]["at"])


def test_what_one_of_three_gateways_finds_out_holds_for_all(target: str, tmp_path: Path) -> None:
    settings = {
        "GATEWAY_REGISTRY": target,
        "GATEWAY_ROLLOUT": json.dumps(POLICY),
        "GATEWAY_POLL_INTERVAL": f"{POLL:g}s",
    }
    with ExitStack() as stack:
        servers = []
        for name in "abc":
            (tmp_path / name).mkdir()
            servers.append(stack.enter_context(running(tmp_path / name, **settings)))
        first, second, third = servers
        for server in servers:
            assert server.predict("trio", [{"x": 2.0}]).headers["x-model-version"] == "1"

        # A breach that one of them sees. The others have no requests.
        move(target, "2")
        until_all(servers, "canary 50 %", "2")
        with Callers(first, "trio") as traffic:
            until_all(servers, "rolled_back", "2")
        assert {status for status, _ in traffic.seen} == {200}
        for server in (second, third):
            view = view_of(server)
            assert (view["serving"], view["verdict"]["outcome"]) == ("1", "rolled_back")
            assert view["rollout"]["reason"].startswith("another gateway: errors: ")
            assert (ended(server) - ended(first)).total_seconds() < WITHIN

        # Two verdicts in conflict: a person finishes the rollout at one, another one takes the version back.
        move(target, "3")
        until_all(servers, "canary 50 %", "3")
        path = f"{second.url}/rollouts/trio@champion/finish"
        assert httpx.post(path, headers=second.key, timeout=30).status_code == 200
        until_all([second], "done", "3")
        assert second.predict("trio", [{"x": 2.0}]).headers["x-model-version"] == "3"
        with Callers(first, "trio") as traffic:
            until_all(servers, "rolled_back", "3")
        assert {status for status, _ in traffic.seen} == {200}
        for server in servers:
            assert httpx.post(f"{server.url}/registry/refresh", headers=server.key, timeout=30).is_success
            assert server.predict("trio", [{"x": 5.0}]).headers["x-model-version"] == "1"
            view = view_of(server)
            assert (view["phase"], view["serving"], view["last_good"]) == ("rolled_back", "1", "1")
        with closing(open_registry(target)) as registry:
            entry = registry.find(Reference("trio")).models["trio"].aliases["champion"]
        assert (entry.version, entry.last_good) == ("3", "1")
        assert entry.verdict is not None
        assert entry.verdict.outcome == "rolled_back"

        # A gateway that starts later, without a state, follows it too.
        (tmp_path / "late").mkdir()
        late = stack.enter_context(running(tmp_path / "late", **settings))
        answer = late.predict("trio", [{"x": 5.0}])
        assert answer.headers["x-model-version"] == "1", (answer.text, view_of(late), late.lines[-10:])
