"""Three gateways on one document that none of them can write: what one finds holds for all, and a peer that
is lost costs nobody a request."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import httpx
import pandas as pd
import pytest

import gateway
from gateway.registries import open_registry
from gateway.registries.base import Move
from tests.support.callers import Callers
from tests.support.peers import KEY, Installation, address, policy, private_hosts
from tests.support.running import Running
from tests.support.shell import clean_shell
from tests.support.traffic import until
from tests.support.versions import Picky

POLL, AFTER_POLL = 1.0, 2.0
#: So many times longer may it take where other test runs share the processors.
BUSY = 5


@pytest.fixture(scope="module")
def gateways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """At 2, 3 and 4, with version 1 in service everywhere. Version 2 fails for one value in five."""
    private_hosts()
    directory = tmp_path_factory.mktemp("peers")
    registry = directory / "written.yaml"
    for number, worst in enumerate((0, 1), 1):
        gateway.log_model(
            Picky(worst), "picky", str(registry), input_example=pd.DataFrame({"x": [2.0]}), verify=False,
            metadata={"number": number},
        )  # fmt: skip
    open_registry(str(registry)).move(Move("picky", "champion", "1"))
    canary = {"steps": [20], "every": 0, "requests": 150, "within": "1h"}
    made = Installation(directory, registry, policy(canary=canary, guards={"latency": "off"}))
    made.list_addresses(2, 3, 4)
    try:
        made.start(2, 3, 4)
        for server in made.running.values():
            assert server.predict("picky", [{"x": 1.0}]).status_code == 200
        made.meet(2, 3, 4, among=2)
        yield made
    finally:
        made.stop()


def in_canary(gateways: Installation, *numbers: int) -> None:
    for number in numbers:
        until(lambda number=number: gateways.view(number, "picky@champion")["phase"] == "canary 20 %")  # type: ignore[misc]


def rolled_back(gateways: Installation, *numbers: int) -> None:
    for number in numbers:
        until(lambda number=number: gateways.view(number, "picky@champion")["phase"] == "rolled_back")  # type: ignore[misc]


def verdict_at(server: Running) -> datetime:
    """When the log last said that the rollout ended."""
    ends = [event for event in server.events("RolloutChanged") if event["phase"] == "rolled_back"]
    return datetime.fromisoformat(ends[-1]["time"])


def test_a_breach_that_one_sees_ends_the_canary_on_all(gateways: Installation, tmp_path: Path) -> None:
    one, two, three = gateways.running.values()
    gateways.move("picky", "2")
    in_canary(gateways, 2, 3, 4)
    with Callers(two, "picky", 1) as others, Callers(one, "picky") as traffic:
        rolled_back(gateways, 2, 3, 4)
    assert {status for status, _ in traffic.seen} == {status for status, _ in others.seen} == {200}
    first, *later = sorted(verdict_at(server) for server in (one, two, three))
    assert (later[-1] - first).total_seconds() <= BUSY * (POLL + AFTER_POLL)
    until(lambda: gateways.view(4, "picky@champion")["peers"] == {"1": 2})
    gateways.meet(2, 3, 4, among=2)
    until(lambda: three.metric("gateway_peers", state="reached") == 2)
    until(lambda: three.metric("gateway_alias_skew", model="picky", alias="champion") == 0)
    told = gateways.view(4, "picky@champion")
    assert (told["serving"], told["desired"], told["diverged"]) == ("1", "2", True)
    assert told["verdict"]["reason"].startswith("another gateway: errors")
    listed = httpx.get(f"{three.url}/rollouts").json()
    assert listed["verdicts_shared_by"].startswith("peers")
    assert listed["peers"]["known"] == 2
    assert "addresses" not in listed["peers"]  # only with control access
    assert KEY not in "".join(line for server in (one, two, three) for line in server.lines)
    # A gateway that begins without state honours it, too: version 2 never gets a request there.
    gateways.list_addresses(2, 3, 4, 5)
    gateways.start(5)
    fresh = gateways.running[5]
    assert fresh.predict("picky", [{"x": 2.0}]).headers["x-model-version"] == "1"
    until(lambda: gateways.view(5, "picky@champion")["verdict"] is not None)
    assert gateways.view(5, "picky@champion")["verdict"]["outcome"] == "rolled_back"
    assert fresh.stop() == 0
    del gateways.running[5]
    gateways.list_addresses(2, 3, 4)


def test_of_two_verdicts_the_rollback_wins_and_a_move_of_the_alias_ends_it(gateways: Installation) -> None:
    one, two, _ = gateways.running.values()
    gateways.move("picky", "1")
    for number in (2, 3, 4):
        until(lambda number=number: gateways.view(number, "picky@champion")["verdict"] is None)  # type: ignore[misc]
    gateways.move("picky", "2")
    in_canary(gateways, 2, 3, 4)  # it is tried again everywhere
    finished = httpx.post(f"{one.url}/rollouts/picky@champion/finish", headers=one.key)
    assert finished.status_code == 200
    until(lambda: gateways.view(2, "picky@champion")["serving"] == "2")
    assert one.predict("picky", [{"x": 2.0}]).headers["x-model-version"] == "2"
    until(lambda: two.metric("gateway_alias_skew", model="picky", alias="champion") == 1)
    until(lambda: one.metric("gateway_alias_skew", model="picky", alias="champion") == 2)
    assert one.metric("gateway_alias_peer_versions", model="picky", alias="champion") == 2
    with Callers(two, "picky") as traffic:
        rolled_back(gateways, 2, 3, 4)
    assert {status for status, _ in traffic.seen} == {200}
    until(lambda: gateways.view(2, "picky@champion")["serving"] == "1")
    assert gateways.view(2, "picky@champion")["history"][-1]["moved_by"] == "peers"
    assert one.predict("picky", [{"x": 5.0}]).headers["x-model-version"] == "1"


class Garbage:
    """A listener that answers whatever comes with something that is not HTTP."""

    def __init__(self, host: str, port: int) -> None:
        self._bound = socket.create_server((host, port))
        self.served = 0
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._bound.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(bytes(range(256)) * 4)
            self.served += 1

    def __enter__(self) -> Garbage:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bound.shutdown(socket.SHUT_RDWR)
        self._bound.close()
        self._thread.join()


def test_a_peer_that_is_killed_or_stopped_or_answers_garbage_costs_no_request(
    gateways: Installation, tmp_path: Path
) -> None:
    one, two, three = gateways.running.values()
    with Callers(one, "picky") as traffic:
        traffic.until(50)
        three.stop(signal.SIGKILL)
        two.process.send_signal(signal.SIGSTOP)
        with Garbage(address(4), gateways.port) as garbage:
            until(lambda: gateways.peers(2)["reached"] == 0)
            until(lambda: garbage.served >= 2)
            traffic.until(200)
            shown = httpx.get(f"{one.url}/rollouts", headers=one.key).json()["peers"]
        two.process.send_signal(signal.SIGCONT)
        gateways.meet(2, among=1)
    assert set(traffic.seen) == {(200, "1")}
    # At least two questions took the two seconds that a peer may take. A gateway that waits for them would
    # hold up both callers each time; a stall of the machine holds them up once.
    assert sum(wait >= 2.0 for wait in traffic.waits) < 4
    problems = {peer["address"]: peer["problem"] for peer in shown["addresses"]}
    assert problems[address(3)] == "no answer within 2 s"
    assert problems[address(4)]
    status = clean_shell(tmp_path).gateway("status", "--url", one.url).out
    assert "peers: 1 of 2 reached" in status
