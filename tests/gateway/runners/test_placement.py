"""Where a version runs, and that an operator can read why."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import numpy as np
import pytest

import gateway
from gateway.runners.placement import Place, Placement
from gateway.runners.zygote import Zygotes
from gateway.settings import Isolation, ModelSettings, Settings
from tests.conftest import needs
from tests.support.served import Served, settings

LINUX = sys.platform == "linux"


@pytest.mark.parametrize(
    ("everywhere", "own", "expected", "reason"),
    [
        ("auto", None, "process" if LINUX else "inline", "isolation: auto"),
        ("process", None, "process", "isolation: process"),
        ("inline", None, "inline", "not contained"),
        ("inline", "process", "process", "isolation: process"),
        ("auto", "inline", "inline", "not contained"),
    ],
)
def test_the_operator_decides_and_the_reason_is_said(
    everywhere: Isolation, own: Isolation | None, expected: str, reason: str
) -> None:
    async def place() -> Place:
        chosen = Settings(isolation=everywhere, models={"iris": ModelSettings(isolation=own)})
        zygotes = Zygotes()
        try:
            return Placement(chosen, zygotes, lambda prepared, what, why: None).place("iris")
        finally:
            await zygotes.close()

    place_of = asyncio.run(place())
    assert place_of.isolation == expected
    assert reason in place_of.reason


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
        "isolation": "process",
        "reason": "isolation: auto runs every model outside the gateway's process",
    }
    assert os.getpid() not in pids
    assert len(pids) == 1
