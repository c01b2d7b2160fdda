"""The periodic work of a gateway: it does not hold up the event loop."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from gateway import cgroup
from gateway.cgroup import Usage
from gateway.runners import memory
from gateway.runners.memory import Footprint, Memory
from tests.support.hostile import descendants
from tests.support.running import log_scaled
from tests.support.served import Served, settings
from tests.support.traffic import until


@pytest.mark.skipif(sys.platform != "linux", reason="model processes need Linux")
@pytest.mark.parametrize("used", [0.1, 0.7, 0.95], ids=["room", "watched", "short"])
def test_the_memory_of_models_is_not_read_on_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: float
) -> None:
    readings: Counter[str] = Counter()
    read = Footprint.read

    def counted(self: Footprint) -> Memory:
        readings[threading.current_thread().name] += 1
        return read(self)

    registry = tmp_path / "registry.yaml"
    log_scaled(registry, "scaled", 2.0, alias="champion")
    share = [0.1]
    monkeypatch.setattr(cgroup, "memory_usage", lambda: Usage(int(share[0] * 1000), 1000))
    with Served(settings(tmp_path, isolation="process"), str(registry)) as server:
        for _ in range(20):  # until then, each answer may show more memory
            asked = server.post("/predict/scaled", {"dataframe_records": [{"x": 1.0}]})
            assert asked.status == 200, asked.body
        monkeypatch.setattr(Footprint, "read", counted)
        monkeypatch.setattr(memory, "RECENT", 600.0)  # a busy machine makes readings old
        share[0] = used
        readings.clear()
        until(lambda: readings.total() >= 8)  # of each process, at least once a second
        server.get("/metrics")
        server.get("/models/scaled/versions/1")
        elsewhere = {name: count for name, count in readings.items() if not name.startswith("io-memory")}
        assert sum(elsewhere.values()) <= 2, elsewhere  # a spare process that has just started is read once


@pytest.mark.skipif(sys.platform != "linux", reason="model processes need Linux")
def test_what_is_told_of_memory_is_never_less_than_what_the_processes_take(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also if the limit has no room for the process that models are forked from."""
    registry = tmp_path / "registry.yaml"
    log_scaled(registry, "scaled", 2.0, alias="champion")
    others = set(descendants())  # servers that tests share
    low = settings(tmp_path, isolation="process").model_copy(update={"memory_limit": 30_000_000})
    with Served(low, str(registry)) as server:
        asked = server.post("/predict/scaled", {"dataframe_records": [{"x": 1.0}]})
        assert asked.status == 200, asked.body

        def told(*names: str) -> int:
            lines = server.get("/metrics").body.decode().splitlines()
            return sum(int(float(line.split()[-1])) for line in lines if line.startswith(names))

        until(lambda: told("gateway_memory_uncounted_bytes ") > 0)
        assert told("gateway_memory_bytes{") <= 30_000_000
        # The pages that a model's process shares with the other one count once. Measured once a second.
        until(
            lambda: (
                told("gateway_memory_bytes{", "gateway_memory_uncounted_bytes ")
                >= sum(map(_anonymous, set(descendants()) - others))
            )
        )
        until(lambda: "memory_limit (30000000 bytes) is too low" in caplog.text)
        asked = server.post("/predict/scaled", {"dataframe_records": [{"x": 1.0}]})
        assert asked.status == 200, "a low limit does not stop all loads"


def _anonymous(pid: int) -> int:
    """The bytes without files, each page by its share."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss_Anon:"))
