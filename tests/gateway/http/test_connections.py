"""Too many connections: idle ones go first, probes and control calls still get through."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from gateway.http.connections import SPARE, Connections, default_most, descriptors
from tests.support.running import log_scaled, running
from tests.support.traffic import until


class Connection:
    def __init__(self, connections: Connections) -> None:
        self.connections = connections
        self.open = True
        connections.opened(self)

    def close(self) -> None:
        if self.open:
            self.open = False
            self.connections.closed(self)


def test_the_longest_idle_goes_first() -> None:
    connections = Connections(2)
    first, second = Connection(connections), Connection(connections)
    connections.busy(first)
    connections.idle(first)
    third = Connection(connections)
    assert (first.open, second.open, third.open) == (True, False, True)
    connections.busy(first)
    connections.busy(third)
    Connection(connections)
    assert connections.crowded
    assert connections.open == 3


def test_while_all_are_busy_a_few_more_are_kept() -> None:
    connections = Connections(5)
    busy = []
    for _ in range(5 + SPARE):
        busy.append(Connection(connections))
        connections.busy(busy[-1])
    assert connections.open == 5 + SPARE
    assert all(one.open for one in busy)
    assert not Connection(connections).open
    assert connections.open == 5 + SPARE
    busy[0].close()
    assert connections.open == 5 + SPARE - 1


def test_who_sends_a_body_too_slowly_gives_way() -> None:
    now = [100.0]
    connections = Connections(3, lambda: now[0])
    fast, slow, asked = (Connection(connections) for _ in range(3))
    for one in (fast, slow, asked):
        connections.busy(one)
    connections.receiving(fast, 1000)
    connections.receiving(slow, 1000)
    connections.receiving(asked, 1000)
    connections.received(asked)
    spare = Connection(connections)
    assert connections.crowded, "nobody is too slow yet"
    connections.busy(spare)
    now[0] += 10.0
    connections.receiving(fast, 10_000_000)
    connections.receiving(slow, 1)
    last = Connection(connections)
    assert [one.open for one in (fast, slow, asked, spare, last)] == [True, False, True, True, True]
    connections.busy(last)
    assert Connection(connections).open
    assert fast.open


@pytest.mark.parametrize("given", [None, 7])
def test_the_default_leaves_descriptors_for_the_rest(given: int | None) -> None:
    most = Connections(given).most
    assert most == (given or default_most())
    assert 0 < descriptors()[0] < descriptors()[1]


BODY = json.dumps({"dataframe_records": [{"x": 2.0}]}).encode()
HEAD = b"POST /predict/m HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def ask(connection: socket.socket, request: bytes) -> bytes:
    connection.sendall(request)
    answer = b""
    while b"\r\n\r\n" not in answer:
        if not (more := connection.recv(65536)):
            break
        answer += more
    return answer


def test_more_idle_connections_than_descriptors(tmp_path: Path) -> None:
    """Each idle connection used to keep its descriptor until no request was served at all."""
    log_scaled(tmp_path / "registry.yaml", "m", 3.0, "champion")
    with running(tmp_path, GATEWAY_MAX_CONNECTIONS="20") as server:
        port = int(server.url.rpartition(":")[2])
        busy: list[socket.socket] = []
        idle = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(80)]
        try:
            assert ask(idle[-1], HEAD % len(BODY) + BODY).startswith(b"HTTP/1.1 200 ")
            assert server.predict("m", [{"x": 1.0}]).status_code == 200
            assert server.metric("gateway_open_connections") <= 21
            assert server.metric("gateway_max_connections") == 20
            assert 20 < server.metric("gateway_open_descriptors") < server.metric("gateway_max_descriptors")
            assert idle[0].recv(10) == b""
            # Now all are in the middle of a request: predictions are refused, a probe is answered.
            busy = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(20)]
            for connection in busy:
                connection.sendall(HEAD % len(BODY) + BODY[:5])
            with socket.create_connection(("127.0.0.1", port), timeout=30) as late:
                assert ask(late, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 200 ")
                with socket.create_connection(("127.0.0.1", port), timeout=30) as later:
                    refused = ask(later, HEAD % len(BODY) + BODY)
            assert refused.startswith(b"HTTP/1.1 429 ")
            assert b"connection: close" in refused
        finally:
            for connection in idle + busy:
                connection.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="a socket option of Linux")
def test_a_client_that_never_reads_its_answer_is_left(tmp_path: Path) -> None:
    """Its answer used to stay in memory, and its connection open, for as long as it liked."""
    log_scaled(tmp_path / "registry.yaml", "m", 3.0, "champion")
    many = json.dumps({"dataframe_split": {"columns": ["x"], "data": [[2.0]] * 200_000}}).encode()
    with running(tmp_path, GATEWAY_SEND_TIMEOUT="0.5s") as server:
        port = int(server.url.rpartition(":")[2])
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(60)
            client.connect(("127.0.0.1", port))
            client.sendall(HEAD % len(many) + many)
            until(lambda: server.metric("gateway_stalled_connections_total") == 1)
            assert server.metric("gateway_open_connections") == 1  # the one that asks
        assert server.predict("m", [{"x": 1.0}]).status_code == 200
