"""Checks where a version runs, and that an operator can read why."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LinearRegression

import gateway
from gateway.artifacts.packages import Prepared
from gateway.registries.base import Version
from gateway.runners.placement import Place, Placement
from gateway.runners.zygote import Zygotes
from gateway.settings import Isolation, ModelSettings, Settings
from gateway.state import State
from loaders import scan
from tests.conftest import needs
from tests.support.served import Served, settings

LINUX = sys.platform == "linux"


HARMLESS = scan.Verdict(True, "it executes nothing")
FOREIGN = scan.Verdict(False, "its pickle names os.system")


def prepared(verdict: scan.Verdict = HARMLESS, size: int = 10, estimate: int = 10) -> Prepared:
    version = Version("iris", "1", "models/iris/1")
    return Prepared(version, None, None, "sklearn", "sha256:0", size, estimate, None, verdict=verdict)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("everywhere", "own", "found", "expected", "reason"),
    [
        ("auto", {}, prepared(), "pack", "isolation: auto; it executes nothing"),
        ("auto", {}, prepared(FOREIGN), "process", "its pickle names os.system"),
        ("auto", {}, prepared(size=1001), "process", "its files take 1001 bytes"),
        ("auto", {}, prepared(estimate=1001), "process", "it takes about 1001 bytes"),
        ("auto", {"processes": 2}, prepared(), "process", "processes: 2"),
        ("auto", {"memory": 10**9}, prepared(), "process", "a memory limit of its own"),
        ("auto", {"pack": "team a"}, prepared(FOREIGN, size=1001), "pack", "pack: team a"),
        ("process", {}, prepared(), "process", "isolation: process"),
        ("process", {"pack": "team a"}, prepared(), "process", "isolation: process"),
        ("inline", {}, prepared(), "inline", "not contained"),
        ("inline", {"isolation": "process"}, prepared(), "process", "isolation: process"),
        ("inline", {"isolation": "auto"}, prepared(), "pack", "isolation: auto"),
        ("auto", {"isolation": "inline"}, prepared(), "inline", "not contained"),
    ],
)
@pytest.mark.skipif(not LINUX, reason="model processes need Linux")
def test_the_operator_decides_and_the_reason_is_said(
    everywhere: Isolation, own: dict[str, Any], found: Prepared, expected: str, reason: str
) -> None:
    async def place() -> Place:
        chosen = Settings(isolation=everywhere, pack_bytes=1000, models={"iris": ModelSettings(**own)})
        zygotes = Zygotes()
        try:
            return Placement(chosen, zygotes, lambda prepared, what, why: None).place(found)
        finally:
            await zygotes.close()

    place_of = asyncio.run(place())
    assert place_of.isolation == expected
    assert reason in place_of.reason


@pytest.mark.skipif(not LINUX, reason="model processes need Linux")
def test_small_models_share_a_process_and_say_so(tmp_path: Path) -> None:
    registry = str(tmp_path / "registry.yaml")
    factors = {"two": 2.0, "three": 3.0, "alone": 4.0, "team": 5.0}
    example = pd.DataFrame({"x": [1.0, 2.0, 3.0]})
    for name, factor in factors.items():
        fitted = LinearRegression().fit(example, example["x"] * factor)
        gateway.log_model(fitted, name, registry, input_example=example, alias="champion", verify=False)
    own = {"alone": ModelSettings(isolation="process"), "team": ModelSettings(pack="a")}
    with Served(settings(tmp_path, isolation="auto", models=own), registry) as server:
        for name, factor in factors.items():
            answer = server.post(f"/predict/{name}", {"dataframe_records": [{"x": 2.0}]})
            assert answer.status == 200, answer.body
            assert answer.json["predictions"] == pytest.approx([2 * factor])
        views = {name: server.get(f"/models/{name}/versions/1").json for name in factors}
        runners = {one.version.name: one.runner for one in server.gateway.manager}
        pids = {name: runner.status()["processes"][0]["pid"] for name, runner in runners.items() if runner}
    assert pids["two"] == pids["three"]
    assert len(set(pids.values())) == 3
    assert views["two"]["placement"] == {
        "isolation": "pack",
        "reason": "isolation: auto; its pickle names only framework classes, and it is small",
    }
    assert views["alone"]["placement"] == {"isolation": "process", "reason": "isolation: process"}
    assert views["team"]["placement"] == {"isolation": "pack", "reason": "pack: a"}
    with contextlib.closing(State(tmp_path / "state")) as state:
        known = state.scan(views["two"]["digest"], scan.EDITION)
    assert known == (True, "its pickle names only framework classes")


@pytest.mark.skipif(not LINUX, reason="model processes need Linux")
def test_an_onnx_model_runs_outside_the_gateways_process(tmp_path: Path) -> None:
    onnx = needs("onnx")
    needs("onnxruntime")
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 2]) for name in "xy"]
    node = onnx.helper.make_node("Add", ["x", "x"], ["y"])
    graph = onnx.helper.make_graph([node], "twice", value[:1], value[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    example = np.ones((2, 2), np.float32)
    registry = str(tmp_path / "registry.yaml")
    gateway.log_model(model, "twice", registry, input_example=example, alias="champion")
    with Served(settings(tmp_path, isolation="auto"), registry) as server:
        answer = server.post("/predict/twice", {"inputs": [[1, 2]]})
        assert answer.status == 200, answer.body
        view = server.get("/models/twice/versions/1").json
        (servable,) = server.gateway.manager
        assert servable.runner is not None
        pids = [process["pid"] for process in servable.runner.status()["processes"]]
    assert view["placement"] == {
        "isolation": "pack",
        "reason": "isolation: auto; its format (onnx) executes nothing, and it is small",
    }
    assert os.getpid() not in pids
    assert len(pids) == 1
