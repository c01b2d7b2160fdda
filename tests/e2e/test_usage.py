"""Usage of a running gateway: what teams and models used, against what the kernel says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LinearRegression

import gateway
from gateway.access.tokens import digest
from tests.support.hostile import eventually
from tests.support.running import Running, running


class Busy:
    """A model that computes for a while, in a process of its own."""

    def predict(self, model_input: Any) -> Any:
        import time

        end = time.process_time() + 0.15
        while time.process_time() < end:
            pass
        return model_input["x"].to_numpy()


def entry(name: str, team: str) -> dict[str, Any]:
    return {"name": name, "team": team, "sha256": digest(name.encode()).hex(), "predict": ["*"]}


def ask(server: Running, model: str, caller: str, rows: int) -> None:
    body = {"dataframe_records": [{"x": 1.0}] * rows}
    head = {"Authorization": f"Bearer {caller}"}
    answer = httpx.post(f"{server.url}/predict/{model}", json=body, headers=head, timeout=60)
    assert answer.status_code == 200, answer.text


def used(server: Running, by: str = "team,model") -> dict[str, Any]:
    answer = httpx.get(f"{server.url}/usage?by={by}", headers=server.key)
    assert answer.status_code == 200, answer.text
    return answer.json()


def of_the_kernel(top: int) -> float:
    """The CPU seconds of a process, of those below it, and of those below it that have ended."""
    parents, seconds = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has just ended
            parents[int(entry.name)] = int(fields[1])
            seconds[int(entry.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    below = {top}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return sum(seconds[pid] for pid in below)


class Group:
    """A control group of its own, as a container has one, where this machine lets a test make one."""

    def __init__(self) -> None:
        self.before: tuple[str, ...] = ()
        self._place: Path | None = None
        for root, usage in (("cpuacct", "cpuacct.usage"), ("", "cpu.stat"), ("unified", "cpu.stat")):
            place = Path("/sys/fs/cgroup") / root / f"gateway-test-{os.getpid()}"
            with suppress(OSError):
                place.mkdir()
                self._place, self._usage = place, place / usage
                enter = f'echo $$ > {place}/cgroup.procs && exec "$@"'
                self.before = ("sh", "-c", enter, "sh")
                return

    def seconds(self) -> float | None:
        """The CPU seconds of all that ran in it; None without one."""
        if self._place is None:
            return None
        text = self._usage.read_text()
        return int(text) / 1e9 if text.strip().isdigit() else int(text.split()[1]) / 1e6

    def close(self) -> None:
        if self._place is not None:
            assert eventually(self._removed), "processes are left in it"

    def _removed(self) -> bool:
        assert self._place is not None
        with suppress(OSError):  # the last of its processes may take a moment to end
            self._place.rmdir()
        return not self._place.exists()


@pytest.fixture
def group() -> Iterator[Group]:
    made = Group()
    yield made
    made.close()


def test_usage_adds_up_to_what_the_kernel_counts(tmp_path: Path, group: Group) -> None:
    registry = str(tmp_path / "registry.yaml")
    frame = pd.DataFrame({"x": np.arange(4.0)})
    gateway.log_model(Busy(), "busy", registry, input_example=frame, alias="champion", verify=False)
    for name in ("small", "other"):
        model = LinearRegression().fit(frame, frame["x"])
        gateway.log_model(model, name, registry, input_example=frame, alias="champion", verify=False)
    tokens = [entry("alice", "blue"), entry("bob", "red")]
    (tmp_path / "tokens.yaml").write_text(json.dumps(tokens))
    environ = {"GATEWAY_ACCESS__TOKENS_FILE": str(tmp_path / "tokens.yaml")}
    server = Running(tmp_path, (), environ, before=group.before)
    try:
        for _ in range(15):
            ask(server, "busy", "alice", 3)
        used(server)  # what follows is another team's
        for _ in range(5):
            ask(server, "busy", "bob", 1)
        for _ in range(40):
            ask(server, "small", "bob", 10)
        view = used(server)
        shown = {(one["team"], one["model"]): one for one in view["usage"]}
        assert {key: (one["requests"], one["rows"]) for key, one in shown.items()} == {
            ("blue", "busy"): (15, 45),
            ("red", "busy"): (5, 5),
            ("red", "small"): (40, 400),
        }
        # 20 calls of 0.15 s, which the clock's ticks and the load of the machine blur. What a call has used
        # when the kernel is read during it is idle.
        assert 7 * 0.15 <= shown["blue", "busy"]["cpu_seconds"] < 2 * 15 * 0.15 + 1
        assert 2 * 0.14 <= shown["red", "busy"]["cpu_seconds"] < 2 * 5 * 0.15 + 1
        assert all(one["memory_byte_seconds"] > 0 for one in shown.values())
        for name in ("cpu_seconds", "memory_byte_seconds"):
            parts = [one[name] for key in ("usage", "idle") for one in view[key]]
            parts += [one[name] for one in view["shared"].values()]
            assert sum(parts) == pytest.approx(view["total"][name], rel=0.02)
        by_team = used(server, "team")
        assert [(one["team"], one["requests"]) for one in by_team["usage"]] == [("blue", 15), ("red", 45)]
        assert used(server, "")["usage"][0]["requests"] == 60
        bad = httpx.get(f"{server.url}/usage?by=planet", headers=server.key)
        assert bad.status_code == 422
        env = {**os.environ, "GATEWAY_URL": server.url, "GATEWAY_STATE_DIR": str(tmp_path / "state")}
        command = [sys.executable, "-m", "gateway", "usage", "--by", "team"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=tmp_path)
        assert said.returncode == 0, said.stderr
        assert "blue" in said.stdout
        assert "total" in said.stdout
        before = group.seconds()
        final = used(server)["total"]["cpu_seconds"]
        after = group.seconds()
        assert final == pytest.approx(of_the_kernel(server.process.pid), rel=0.02, abs=0.2)
        if before is not None and after is not None:
            assert 0.98 * before <= final <= 1.02 * after
    finally:
        server.stop()
    with running(tmp_path, **environ) as server:
        again = used(server)
        assert again["since"] == view["since"]
        assert [(one["team"], one["model"], one["requests"]) for one in again["usage"]] == [
            ("blue", "busy", 15),
            ("red", "busy", 5),
            ("red", "small", 40),
        ]
        assert again["total"]["cpu_seconds"] > final
