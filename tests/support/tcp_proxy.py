"""A TCP proxy whose connections go wrong on command: what networks and tired servers do to a client."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PASS = "pass"
REFUSE = "refuse"
HANG = "hang"
HALF_OPEN = "half open"
RESET = "reset in the body"
CUT = "end in the body"
DRIP = "drip"
ANSWERS = {
    "500": b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 4\r\n\r\noops",
    "429": b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 2\r\ncontent-length: 0\r\n\r\n",
    "bad JSON": b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"regist"',
    "other JSON": b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}",
    "a page": b"HTTP/1.1 404 Not Found\r\ncontent-type: text/html\r\ncontent-length: 6\r\n\r\n<html>",
    "nonsense": b"SSH-2.0-OpenSSH_9.2\r\n",
}
FAULTS = (REFUSE, HANG, HALF_OPEN, RESET, CUT, DRIP, *ANSWERS)


class Proxy:
    """In front of a port of this machine. `fault` holds for connections and bytes from now on; with `times`,
    for so many connections only."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.fault = PASS
        self.times: int | None = None
        self.connections = 0
        #: In the body faults: so many bytes of an answer go through.
        self.lets_through = 150
        #: How fast each connection's answers come, as far-away stores do it; None: as fast as they can.
        self.bytes_per_second: float | None = None
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def breaks(self, fault: str, times: int | None = None) -> None:
        """From now on: connections that stand are cut as well."""
        self.fault, self.times = fault, times
        with self._lock:
            standing = list(self._open)
        for connection in standing:
            _reset(connection)

    def close(self) -> None:
        self._ended.set()
        self._listener.close()
        self.breaks(REFUSE)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            fault = self.fault
            if self.times is not None:
                self.times -= 1
                if self.times < 0:
                    fault = PASS
            threading.Thread(target=self._serve, args=(client, fault), daemon=True).start()

    def _serve(self, client: socket.socket, fault: str) -> None:
        with self._lock:
            self._open.add(client)
        try:
            if fault == REFUSE:
                return
            if fault in ANSWERS:
                client.recv(65536)
                client.sendall(ANSWERS[fault])
                client.shutdown(socket.SHUT_WR)
                client.recv(65536)
                return
            if fault in (HANG, HALF_OPEN):
                if fault == HALF_OPEN:
                    client.recv(65536)
                    client.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{")
                self._ended.wait(60)
                return
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                threading.Thread(target=_pump, args=(client, server), daemon=True).start()
                self._answer(server, client, fault)
        except OSError:
            pass  # either side left, as they may
        finally:
            with self._lock:
                self._open.discard(client)
            if fault in (REFUSE, RESET):
                _reset(client)
            else:
                with contextlib.suppress(OSError):  # closing alone does not end what another thread reads
                    client.shutdown(socket.SHUT_RDWR)
                client.close()

    def _answer(self, server: socket.socket, client: socket.socket, fault: str) -> None:
        sent = 0
        began = time.monotonic()
        while chunk := server.recv(65536):
            if self.bytes_per_second is not None:
                ahead = sent / self.bytes_per_second - (time.monotonic() - began)
                if ahead > 0 and self._ended.wait(ahead):
                    return
            if fault == DRIP:
                for byte in chunk:
                    client.sendall(bytes([byte]))
                    if self._ended.wait(0.05):
                        return
                continue
            if fault in (RESET, CUT):
                chunk = chunk[: self.lets_through - sent]
            client.sendall(chunk)
            sent += len(chunk)
            if fault in (RESET, CUT) and sent >= self.lets_through:
                return


def _pump(from_: socket.socket, to: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := from_.recv(65536):
            to.sendall(chunk)
        to.shutdown(socket.SHUT_WR)


def _reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@contextmanager
def proxy(port: int) -> Iterator[Proxy]:
    made = Proxy(port)
    try:
        yield made
    finally:
        made.close()
