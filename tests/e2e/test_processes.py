"""Models in processes, seen from outside: what one of them does is its own affair."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pytest

import gateway
from tests.support.running import Running, log_scaled, running

EXAMPLE = pd.DataFrame({"x": [0.0, 0.0]})


class Moody:
    """Answers its rows, but for some that make it do worse."""

    def predict(self, model_input: Any) -> Any:
        import os as system
        import time as clock

        x = float(model_input["x"].iloc[0])
        if x == 13 or x >= 1000:
            system._exit(7)
        if x == 14:
            raise SystemExit("enough")
        if x == 15:
            clock.sleep(600)
        return model_input["x"].to_numpy()


def log_moody(directory: Path, name: str = "moody") -> None:
    registry = str(directory / "registry.yaml")
    gateway.log_model(Moody(), name=name, registry=registry, input_example=EXAMPLE, alias="champion")


def pids(server: Running, name: str, version: str = "1") -> list[int]:
    view = httpx.get(f"{server.url}/models/{name}/versions/{version}", headers=server.key).json()
    runner = view["runner"]
    return [process["pid"] for process in runner["processes"]]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_model_process_that_is_killed_under_traffic_costs_no_request(tmp_path: Path) -> None:
    """Four callers send the same body again and again; somebody kills the process five times."""
    log_scaled(tmp_path / "registry.yaml", "scaled", 2.0, alias="champion")
    log_moody(tmp_path)
    kills = 5
    done = threading.Event()

    def call(server: Running) -> list[int]:
        codes = []
        while not done.is_set():
            codes.append(server.predict("moody", [{"x": 1.0}]).status_code)
        return codes

    with running(tmp_path) as server, ThreadPoolExecutor(4) as pool:
        assert server.predict("scaled", [{"x": 1.0}]).status_code == 200
        assert server.predict("moody", [{"x": 1.0}]).status_code == 200
        callers = [pool.submit(call, server) for _ in range(4)]
        try:
            for count in range(1, kills + 1):
                end = time.monotonic() + 90
                while not (serving := pids(server, "moody")):
                    assert time.monotonic() < end, "no process came back"
                os.kill(serving[0], signal.SIGKILL)
                while server.metric("gateway_crashes_total", model="moody") < count:
                    assert time.monotonic() < end
                assert server.predict("moody", [{"x": 1.0}]).status_code == 200
        finally:
            done.set()
        codes = [code for caller in callers for code in caller.result(90)]
        assert set(codes) == {200}
        assert server.predict("scaled", [{"x": 1.0}]).json()["predictions"] == [2.0]


def test_what_a_model_does_in_predict_is_its_own_affair(tmp_path: Path) -> None:
    log_scaled(tmp_path / "registry.yaml", "scaled", 2.0, alias="champion")
    log_moody(tmp_path)
    (tmp_path / "gateway.yaml").write_text("models: {moody: {timeout: 6s}}\n")
    with running(tmp_path) as server:
        expected = {
            13.0: (500, "PREDICTION_FAILED"),
            14.0: (500, "PREDICTION_FAILED"),
            15.0: (504, "DEADLINE_EXCEEDED"),
        }
        for x, (status, code) in expected.items():
            answer = server.predict("moody", [{"x": x}])
            assert (answer.status_code, answer.json()["error_code"]) == (status, code), answer.text
            assert server.predict("scaled", [{"x": 1.0}]).json()["predictions"] == [2.0]
        end = time.monotonic() + 60
        while server.predict("moody", [{"x": 1.0}]).status_code != 200:
            assert time.monotonic() < end


def test_a_model_that_keeps_crashing_is_put_in_quarantine(tmp_path: Path) -> None:
    log_moody(tmp_path)
    with running(tmp_path) as server:
        for x in range(1000, 1010):
            answer = server.predict("moody", [{"x": float(x)}])
            if answer.status_code == 503:
                break
            assert answer.json()["error_code"] == "PREDICTION_FAILED", answer.text
            assert answer.json()["retryable"] is False
        assert answer.json()["error_code"] == "MODEL_UNAVAILABLE"
        assert "quarantine" in answer.json()["message"]
        version = httpx.get(f"{server.url}/models/moody/versions/1").json()
        assert version["state"] == "FAILED"
        assert "quarantine" in version["reason"]


def test_no_process_outlives_a_gateway_that_is_killed(tmp_path: Path) -> None:
    log_scaled(tmp_path / "registry.yaml", "scaled", 2.0, alias="champion")
    with running(tmp_path) as server:
        assert server.predict("scaled", [{"x": 1.0}]).status_code == 200
        children = pids(server, "scaled")
        zygotes = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and _parent(entry) == server.process.pid
        ]
        assert children
        assert zygotes
        server.stop(signal.SIGKILL)
        end = time.monotonic() + 60
        while any(is_alive(pid) for pid in (*children, *zygotes)):
            assert time.monotonic() < end, "processes outlive the gateway"


def test_a_gateway_buries_what_a_killed_zygote_leaves(tmp_path: Path) -> None:
    log_scaled(tmp_path / "registry.yaml", "scaled", 2.0, alias="champion")
    with running(tmp_path) as server:
        assert server.predict("scaled", [{"x": 1.0}]).status_code == 200
        (model,) = pids(server, "scaled")
        zygote = _parent(Path("/proc", str(model)))
        for pid in (zygote, model):
            os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + 60
        while any(Path("/proc", str(pid)).exists() for pid in (zygote, model)):
            assert time.monotonic() < end, "zombies are left"
            time.sleep(0.05)
        assert server.predict("scaled", [{"x": 1.0}]).json()["predictions"] == [2.0]


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def test_promise_4_unloading_returns_the_memory(tmp_path: Path) -> None:
    ballast = 100_000_000
    log_scaled(tmp_path / "registry.yaml", "large", 2.0, alias="champion", ballast=ballast)
    with running(tmp_path) as server:
        assert server.predict("large", [{"x": 1.0}]).status_code == 200
        loaded = server.metric("gateway_model_bytes", model="large")
        assert ballast <= loaded <= 1.6 * ballast
        (pid,) = pids(server, "large")
        rollup = Path(f"/proc/{pid}/statm").read_text().split()
        resident = int(rollup[1]) * os.sysconf("SC_PAGE_SIZE")
        assert resident >= loaded * 0.95
        httpx.post(f"{server.url}/models/large/unload", headers=server.key).raise_for_status()
        assert not is_alive(pid)
        assert server.metric("gateway_model_bytes", model="large") == 0
        assert server.predict("large", [{"x": 2.0}]).json()["predictions"] == [4.0]


def test_versions_that_ship_a_module_of_one_name_use_their_own(tmp_path: Path) -> None:
    registry = str(tmp_path / "registry.yaml")
    for number, package in enumerate(("loaders", "gateway"), start=1):
        code = tmp_path / f"code{number}"
        (code / package).mkdir(parents=True)
        (code / package / "__init__.py").write_text(f"WHO = {number * 100}\n")
        (code / "wire.py").write_text(f"FACTOR = {number}\n")
        (code / "answering.py").write_text(
            f"import wire\nfrom {package} import WHO\n\n\nclass Answering:\n"
            "    def predict(self, model_input):\n"
            "        import wire as late\n"
            "        return model_input['x'].to_numpy() * late.FACTOR + WHO\n"
        )
        _log_shipped(code, registry)
    with running(tmp_path) as server:
        first = server.predict("shipped/versions/1", [{"x": 5.0}])
        second = server.predict("shipped/versions/2", [{"x": 5.0}])
        assert first.json()["predictions"] == [105.0], first.text
        assert second.json()["predictions"] == [210.0], second.text


def _log_shipped(code: Path, registry: str) -> None:
    """A package whose loader module lies in its own `code/`, as MLflow's public convention has it."""
    directory = code.parent / f"package-{code.name}"
    shipped = directory / "code"
    shipped.mkdir(parents=True)
    for file in code.rglob("*.py"):
        target = shipped / file.relative_to(code)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(file.read_text())
    (shipped / "its_loader.py").write_text(
        "def _load_pyfunc(path):\n    from answering import Answering\n\n    return Answering()\n"
    )
    (directory / "MLmodel").write_text(
        "flavors:\n  python_function:\n    loader_module: its_loader\n    code: code\n"
        'signature:\n  inputs: \'[{"type": "double", "name": "x"}]\'\n'
    )
    gateway.push(directory, name="shipped", registry=registry)


def _kernel_says(pid: int, *names: str) -> int:
    """Bytes of those lines of a process's `smaps_rollup`."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sum(sizes[name] for name in names)


def test_the_sums_are_what_the_kernel_says(tmp_path: Path) -> None:
    sizes = {"small": 1_000_000, "middle": 40_000_000, "large": 120_000_000}
    for name, ballast in sizes.items():
        log_scaled(tmp_path / "registry.yaml", name, 2.0, alias="champion", ballast=ballast)
    with running(tmp_path) as server:
        for name in sizes:
            assert server.predict(name, [{"x": 1.0}]).status_code == 200
        models = [pid for name in sizes for pid in pids(server, name)]
        zygotes = {_parent(Path(f"/proc/{pid}")) for pid in models}
        try:
            real = sum(_kernel_says(pid, "Private_Clean", "Private_Dirty") for pid in models)
            real += sum(_kernel_says(pid, "Anonymous") for pid in zygotes)
        except PermissionError:
            pytest.skip("model processes are closed to others of this user, and only root may look into them")
        end = time.monotonic() + 60
        while abs(server.metric("gateway_memory_bytes") - real) > 0.05 * real:
            assert time.monotonic() < end, (server.metric("gateway_memory_bytes"), real)
