"""The command line: real registries, real models, a real server. Each command is started as a process of its
own at least once; its other cases call it in this one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import gateway
import loaders
from tests.support.cli import FLOWER, ROW
from tests.support.shell import Shell

COMMANDS = (
    *("demo", "serve", "push", "promote", "rollback", "models"),
    *("status", "load", "unload", "predict", "config", "gc"),
)


def test_help_is_the_manual(shell: Shell) -> None:
    done = shell.gateway("--help")
    assert done.code == 0
    for command in COMMANDS:
        assert f"  {command} " in done.out
        page = shell.called(command, "--help")
        assert page.code == 0
        assert page.out.startswith(f"Usage: gateway {command}")
        assert "[default: (" not in page.out


def test_help_imports_nothing_heavy(shell: Shell) -> None:
    heavy = {"numpy", "pandas", "httpx", "pydantic", "starlette", "uvicorn", "yaml", "fsspec", "onnxruntime"}
    program = f"import sys, gateway.cli; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version(shell: Shell) -> None:
    assert shell.gateway("--version").out.strip() == gateway.__version__


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["promte"], "No such command"),
        (["push"], "Missing argument"),
        (["push", "d"], "Missing option"),
        (["promote", "iris", "2"], "has no alias"),
        (["promote", "iris@champion"], "either VERSION or --from"),
        (["promote", "iris@champion", "2", "--from", "challenger"], "either VERSION or --from"),
        (["promote", "iris@champion", "two"], "is not a version"),
        (["promote", "iris@champion", "2", "--expect", "1.0"], "is not a version"),
        (["rollback", "a/b/c@x"], "contains '/'"),
        (["load", "models:/iris/latest"], "write NAME"),
        (["status", "--url", "nonsense"], "is not a URL"),
        (["serve", "--port", "high"], "'--port'"),
        (["models"], "./registry.yaml"),
        (["serve", "--port", "0"], "./registry.yaml"),
        (["serve", "models:/iris@champion", "--port", "0"], "./registry.yaml"),
        (["serve", "--access-log"], "GATEWAY_ACCESS_LOG"),
        (["models", "--access-log"], "see gateway models --help"),
        (["models", "--output", "yaml"], "yaml"),
    ],
)
def test_wrong_usage_exits_with_2(shell: Shell, arguments: list[str], says: str) -> None:
    assert says in shell.called(*arguments).failed(2)


def test_a_bare_gateway_shows_its_help(shell: Shell) -> None:
    done = shell.gateway()
    assert done.code == 2
    assert "Commands:" in done.err


def test_predict_offline(iris: Shell, packages: dict[str, Path]) -> None:
    (iris.directory / "row.json").write_text(json.dumps(ROW))
    by_path = iris.gateway("predict", packages["v1"], "-i", "row.json").json()
    csv = ",".join(FLOWER) + "\n" + ",".join(map(str, FLOWER.values())) + "\n"
    by_alias = iris.gateway("predict", "models:/iris@champion", "-i", "-", stdin=csv).json()
    assert by_path == by_alias == {"predictions": [2]}
    assert iris.called("predict", "models:/iris/1", "-i", "row.json").json() == by_path


def test_an_empty_input_is_called_empty_after_the_model_was_found(iris: Shell) -> None:
    (iris.directory / "none.csv").touch()
    complaint = iris.called("predict", "models:/iris/1", "-i", "none.csv").failed()
    assert "gateway: the input none.csv is empty\n" in complaint
    complaint = iris.called("predict", "models/nothing", "-i", "none.csv").failed(2)
    assert "models/nothing is neither a directory nor a model reference" in complaint


def test_predict_offline_enforces_the_signature(iris: Shell) -> None:
    bad = {"dataframe_records": [{**FLOWER, "petal_width": "wide", "sepal_width": None}]}
    for name, text in (("bad", json.dumps(bad)), ("none", "{"), ("row", json.dumps(ROW))):
        (iris.directory / f"{name}.json").write_text(text)
    complaint = iris.called("predict", "models:/iris@champion", "-i", "bad.json").failed()
    assert "petal_width has the wrong type (expected double, got string)" in complaint
    assert "wide" not in complaint
    assert "not valid JSON" in iris.called("predict", "models:/iris/1", "-i", "none.json").failed()
    assert "No such file" in iris.called("predict", "models:/iris/1", "-i", "nowhere.csv").failed()
    assert "rose" in iris.called("predict", "models:/rose", "-i", "row.json").failed()


def test_predict_offline_with_a_graph(shell: Shell) -> None:
    """As a package, and as the file alone; the graph's own types decide."""
    helper, kind = onnx.helper, onnx.TensorProto
    x = helper.make_tensor_value_info("x", kind.FLOAT, ["n", 2])
    y = helper.make_tensor_value_info("y", kind.FLOAT, ["n", 1])
    weights = helper.make_tensor("w", kind.FLOAT, [2, 1], [2.0, 0.5])
    body = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weights])
    graph = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    example = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    loaders.save_model(graph, shell.directory / "package", input_example=example)
    onnx.save(graph, shell.directory / "graph.onnx")
    (shell.directory / "rows.json").write_text(json.dumps({"inputs": example.tolist()}))
    (shell.directory / "wrong.json").write_text(json.dumps({"inputs": [["a", "b"]]}))
    for model in ("package", "graph.onnx"):
        answer = shell.gateway("predict", model, "-i", "rows.json").json()
        assert answer == {"predictions": {"y": [[3.0], [8.0]]}}
        assert "does not fit" in shell.called("predict", model, "-i", "wrong.json").failed()


# Settings -----------------------------------------------------------------------------------------


def test_config_says_where_each_setting_comes_from(shell: Shell) -> None:
    (shell.directory / "gateway.yaml").write_text("cold_wait: 5s\nport: 9000\n")
    view = shell.called("config", "-o", "json", GATEWAY_PORT="9001").json()["settings"]
    assert view["port"] == {"value": 9001, "source": "GATEWAY_PORT"}
    assert view["cold_wait"]["value"] == 5.0
    assert view["cold_wait"]["source"].endswith("gateway.yaml")
    assert view["host"] == {"value": "127.0.0.1", "source": "default"}
    assert "9001" in shell.called("config", GATEWAY_PORT="9001").out
    assert view["registry"] == {"value": None, "source": "default"}
    (shell.directory / "registry.yaml").write_text("version: 1\nmodels: {}\n")
    view = shell.called("config", "-o", "json").json()["settings"]
    assert view["registry"] == {"value": "registry.yaml", "source": "default"}
    assert view["poll_interval"] == {"value": 1.0, "source": "default"}
    tracking = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    view = shell.called("config", "-o", "json", **tracking).json()["settings"]
    assert view["registry"] == {"value": "http://127.0.0.1:9", "source": "MLFLOW_TRACKING_URI"}
    assert view["poll_interval"] == {"value": 5.0, "source": "default"}
    view = shell.called("config", "-o", "json", GATEWAY_POLL_INTERVAL="2s", **tracking).json()["settings"]
    assert view["poll_interval"] == {"value": 2.0, "source": "GATEWAY_POLL_INTERVAL"}
    schema = shell.called("config", "--schema").json()
    assert "memory_limit" in schema["properties"]


def test_each_of_several_problems_has_a_line(iris: Shell) -> None:
    (iris.directory / "bad.json").write_text(json.dumps({"dataframe_records": [{"sepal_length": "long"}]}))
    (iris.directory / "bad.yaml").write_text(
        "version: 1\nmodels: {a: {versions: {x: {}}}, b/c: {versions: {}}}\n"
    )
    settings = iris.called("config", GATEWAY_PORT="x", GATEWAY_COLD_WAIT="soon").failed(2)
    registry = iris.called("models", "--registry", "bad.yaml").failed()
    values = iris.called("predict", "models:/iris/1", "-i", "bad.json").failed()
    for said, places in (
        (settings, ("GATEWAY_PORT: ", "GATEWAY_COLD_WAIT: ")),
        (registry, ("models.a.versions.x: ", "models.b/c: ")),
        (values, ("dataframe_records[0].sepal_length has ", "dataframe_records.petal_width is ")),
    ):
        lines = said.splitlines()
        assert any(line.startswith("gateway: ") and line.endswith(":") for line in lines), said
        for place in places:
            assert sum(line.startswith(f"  {place}") for line in lines) == 1, said


def test_wrong_settings_exit_with_2(shell: Shell) -> None:
    assert "GATEWAY_PROT" in shell.called("config", GATEWAY_PROT="9000").failed(2)


def test_config_shows_the_settings_of_models_one_by_one(shell: Shell) -> None:
    file = shell.directory / "gateway.yaml"
    file.write_text("models: {fraud-*: {timeout: 5s}, iris: {pin: true}}\nrollout: {gate: none}\n")
    view = shell.called("config", "-o", "json", GATEWAY_MODELS__iris__TIMEOUT="2s").json()["settings"]
    assert view["models.fraud-*.timeout"] == {"value": 5.0, "source": "gateway.yaml"}
    assert view["models.iris.pin"] == {"value": True, "source": "gateway.yaml"}
    assert view["models.iris.timeout"] == {"value": 2.0, "source": "GATEWAY_MODELS__iris__TIMEOUT"}
    assert view["rollout"]["source"] == "gateway.yaml"
    told = shell.called("config", GATEWAY_MODELS__iris__TIMEOUT="2s", GATEWAY_MAX_BODY_BYTES="8MB").out
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in told.splitlines()}
    assert rows["models.fraud-*.timeout"].split() == ["5s", "gateway.yaml"]
    assert rows["models.iris.timeout"].split() == ["2s", "GATEWAY_MODELS__iris__TIMEOUT"]
    assert rows["rollout.gate"].split() == ["none", "gateway.yaml"]
    assert rows["rollout.canary.every"].split() == ["2m", "default"]
    assert rows["max_inflight_bytes"].split() == ["256", "MiB", "default"]
    assert rows["max_body_bytes"].split() == ["8", "MB", "GATEWAY_MAX_BODY_BYTES"]
    assert rows["disk_limit"].split() == ["20", "GB", "default"]
    assert "models" not in view
    foreign = shell.called("config", GATEWAY_TOKEN="x")
    assert (foreign.code, "GATEWAY_TOKEN is not a setting" in foreign.err) == (0, True)
    assert "GATEWAY_COLD_WAIT" in shell.called("serve", GATEWAY_COLD_WAIT="soon").failed(2)


# A running gateway --------------------------------------------------------------------------------
