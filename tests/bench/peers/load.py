"""Sends requests: to compare every answer, and to measure.

`wrk` measures where it is installed, else the small client below. Knows HTTP. Does not know what a server's
answer means: the caller gives a function for that.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Asked:
    """A request: everything is POSTed."""

    path: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def all_headers(self) -> dict[str, str]:
        return {"Content-Type": "application/json", **dict(self.headers)}


@dataclass(frozen=True)
class Measured:
    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


class Refused(Exception):
    """An answer is not 200."""


class Connection:
    def __init__(self, port: int, timeout: float = 120.0) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)

    def ask(self, asked: Asked) -> bytes:
        self._connection.request("POST", asked.path, asked.body, asked.all_headers)
        answer = self._connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise Refused(f"{asked.path}: {answer.status} {body[:300]!r}")
        return body

    def close(self) -> None:
        self._connection.close()


def answered(port: int, asked: Asked) -> bool:
    """Whether the server is there and answers this request with 200."""
    try:
        Connection(port, 60).ask(asked)
    except (OSError, http.client.HTTPException, Refused):
        return False
    return True


def differences(
    port: int, requests: Sequence[Asked], connections: int, right: Callable[[int, bytes], bool]
) -> list[int]:
    """The requests whose answers are wrong. All are sent, each on one of so many connections at a time."""
    wrong: list[int] = []
    failures: list[Exception] = []

    def work(first: int) -> None:
        connection = Connection(port)
        try:
            for i in range(first, len(requests), connections):
                if not right(i, connection.ask(requests[i])):
                    wrong.append(i)
        except Exception as error:  # noqa: BLE001 - told by the thread that waits
            failures.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=work, args=(first,)) for first in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return sorted(wrong)


def measured(
    port: int, requests: Sequence[Asked], order: Sequence[int], connections: int, seconds: float, core: int
) -> Measured:
    """Sends `requests` in this order, over and over, on so many connections for so many seconds."""
    with tempfile.TemporaryDirectory() as directory:
        if shutil.which("wrk"):
            return _wrk(port, requests, order, connections, seconds, core, Path(directory))
        given = [[asked.path, asked.body.decode(), asked.all_headers] for asked in requests]
        file = Path(directory, "requests.json")
        file.write_text(json.dumps({"requests": given, "order": list(order)}))
        client = [sys.executable, "-P", __file__, str(port), str(file), str(connections), str(seconds)]
        return Measured(*json.loads(_output(client, core)))


def _output(command: list[str], core: int) -> str:
    return subprocess.run(
        ["taskset", "-c", str(core), *command], stdout=subprocess.PIPE, text=True, check=True
    ).stdout


_SCRIPT = """
local asked = {%s}
local order = {%s}
local turn = 0
request = function()
  turn = turn %% #order + 1
  return asked[order[turn]]
end
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("RESULT %%d %%d %%f %%f %%d\\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), e.connect + e.read + e.write + e.status + e.timeout))
end
"""


def _wrk(
    port: int,
    requests: Sequence[Asked],
    order: Sequence[int],
    connections: int,
    seconds: float,
    core: int,
    directory: Path,
) -> Measured:
    raw = ",\n".join(f"{json.dumps(_raw(port, asked).decode(), ensure_ascii=False)}" for asked in requests)
    script = directory / "requests.lua"
    script.write_text(_SCRIPT % (raw, ",".join(str(i + 1) for i in order)))
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "30s"]
    output = _output([*command, "-s", str(script), f"http://127.0.0.1:{port}"], core)
    found = re.search(r"RESULT (\d+) (\d+) ([\d.]+) ([\d.]+) (\d+)", output)
    if found is None or int(found[5]):
        raise Refused(f"failed answers under load:\n{output}")
    return Measured(int(found[1]), int(found[2]) / 1e6, float(found[3]) / 1e3, float(found[4]) / 1e3)


def _raw(port: int, asked: Asked) -> bytes:
    headers = {"Host": f"127.0.0.1:{port}", **asked.all_headers, "Content-Length": str(len(asked.body))}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {asked.path} HTTP/1.1\r\n{lines}\r\n".encode() + asked.body


async def _client(
    port: int, raw: list[bytes], order: list[int], connections: int, seconds: float
) -> list[float]:
    taken: list[float] = []
    turn = 0
    end = time.perf_counter() + seconds

    async def one() -> None:
        nonlocal turn
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (started := time.perf_counter()) < end:
            turn += 1
            writer.write(raw[order[turn % len(order)]])
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            if not head.startswith(b"HTTP/1.1 200") or length is None:
                raise SystemExit(f"failed answer under load: {head!r}")
            await reader.readexactly(int(length[1]))
            taken.append(time.perf_counter() - started)
        writer.close()

    await asyncio.gather(*(one() for _ in range(connections)))
    return sorted(taken)


def main(port: str, file: str, connections: str, seconds: str) -> None:
    given: dict[str, Any] = json.loads(Path(file).read_text())
    raw = [
        _raw(int(port), Asked(path, body.encode(), tuple(headers.items())))
        for path, body, headers in given["requests"]
    ]
    began = time.perf_counter()
    taken = asyncio.run(_client(int(port), raw, given["order"], int(connections), float(seconds)))
    took = time.perf_counter() - began
    print(json.dumps([len(taken), took, taken[len(taken) // 2] * 1e3, taken[int(len(taken) * 0.99)] * 1e3]))


if __name__ == "__main__":
    main(*sys.argv[1:])
