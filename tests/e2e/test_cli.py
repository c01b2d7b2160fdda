"""The command line: real registries, real models, a real server. Each command is started as a process of its
own at least once; its other cases call it in this one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
import yaml

import gateway
import loaders
from gateway.access import control_key
from gateway.commands.options import connect
from tests.support.shell import PATIENCE, Shell, free_port
from tests.support.traffic import until

COMMANDS = (
    *("demo", "serve", "push", "promote", "rollback", "models"),
    *("status", "load", "unload", "predict", "config", "gc"),
)


FLOWER = {"sepal_length": 5.9, "sepal_width": 3.2, "petal_length": 4.8, "petal_width": 1.8}
ROW = {"dataframe_records": [FLOWER]}


class Adder:
    """A model that loads faster than scikit-learn is imported."""

    def __init__(self, term: float) -> None:
        self.term = term

    def predict(self, model_input: Any) -> Any:
        return model_input + self.term


class Unloadable:
    """Pickles well; unpickling it raises."""

    def predict(self, model_input: Any) -> Any:
        return model_input

    def __reduce__(self) -> Any:
        return (exec, ("raise RuntimeError('the weights are gone')",))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model directories: two of iris, one with a column more, one that cannot be loaded, two small ones."""
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression
    from sklearn.tree import DecisionTreeClassifier

    directory = tmp_path_factory.mktemp("packages")
    table, target = load_iris(return_X_y=True, as_frame=True)
    table.columns = list(FLOWER)
    example = table.head(2)
    loaders.save_model(
        LogisticRegression(max_iter=500).fit(table, target), directory / "v1", input_example=example
    )
    loaders.save_model(DecisionTreeClassifier().fit(table, target), directory / "v2", input_example=example)
    loaders.save_model(Adder(0.0), directory / "wider", input_example=table.assign(colour=1.0).head(2))
    loaders.save_model(Unloadable(), directory / "unloadable", verify=False)
    for number in (1.0, 2.0):
        loaders.save_model(
            Adder(number), directory / f"add{number:g}", input_example=np.array([[1.0], [2.0]])
        )
    return {path.name: path for path in directory.iterdir()}


@pytest.fixture
def iris(shell: Shell, packages: dict[str, Path]) -> Shell:
    """A shell with ./registry.yaml: iris 1 (champion) and 2 (challenger)."""
    for name, alias in (("v1", "champion"), ("v2", "challenger")):
        gateway.push(packages[name], "iris", alias=alias, registry=str(shell.directory / "registry.yaml"))
    return shell


def aliases(shell: Shell) -> dict[str, str]:
    found: dict[str, str] = shell.called("models", "iris", "--output", "json").json()["aliases"]
    return found


# Help and wrong usage -----------------------------------------------------------------------------


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


def test_without_a_registry_all_ways_to_name_one_are_named(shell: Shell) -> None:
    complaint = shell.called("models").failed(2)
    for way in (
        "--registry",
        "GATEWAY_REGISTRY",
        "MLFLOW_REGISTRY_URI",
        "MLFLOW_TRACKING_URI",
        "./registry.yaml",
    ):
        assert way in complaint


REGISTRY_COMMANDS: dict[str, list[str]] = {
    "models": ["models"],
    "gc": ["gc"],
    "push": ["push", "PACKAGE", "--name", "iris"],
    "promote": ["promote", "iris@champion", "1"],
    "rollback": ["rollback", "iris@champion", "--to", "1"],
    "predict": ["predict", "models:/iris@champion", "-i", "rows.json"],
    "check": ["check"],
    "env plan": ["env", "plan"],
    "env build": ["env", "build", "--all"],
}


@pytest.mark.parametrize("command", REGISTRY_COMMANDS)
def test_every_command_finds_its_registry_in_the_same_order(
    shell: Shell, packages: dict[str, Path], command: str
) -> None:
    """Each registry is a directory: the complaint names the one that was chosen."""
    (shell.directory / "rows.json").write_text('{"inputs": [1]}')
    for name in ("variable", "given", "file", "mlflow"):
        (shell.directory / name).mkdir()
    (shell.directory / "given.yaml").write_text("registry: given\n")
    arguments = [part.replace("PACKAGE", str(packages["unloadable"])) for part in REGISTRY_COMMANDS[command]]

    def chosen(*more: str, **variables: str) -> str:
        return shell.called(*arguments, *more, **variables).failed()

    variables = {"MLFLOW_TRACKING_URI": "mlflow"}
    (shell.directory / "gateway.yaml").write_text("registry: file\n")
    assert "file is a directory" in chosen(**variables)
    assert "given is a directory" in chosen("--config", "given.yaml", **variables)
    variables["GATEWAY_REGISTRY"] = "variable"
    assert "variable is a directory" in chosen("--config", "given.yaml", **variables)


# The registry -------------------------------------------------------------------------------------


def test_push_makes_a_registry_and_gives_the_next_version(shell: Shell, packages: dict[str, Path]) -> None:
    first = shell.gateway(
        "push", packages["v1"], "--name", "iris", "--registry", "r/registry.yaml", "-o", "json"
    )
    assert first.json()["version"] == "1"
    assert first.json()["registry"] == "r/registry.yaml"
    assert (shell.directory / "r/models/iris/1/MLmodel").is_file()
    again = shell.called(
        "push", packages["v1"], "--name", "iris", "--registry", "r/registry.yaml", "-o", "json"
    )
    assert again.json()["version"] == "1"
    done = shell.called("push", packages["v2"], "--name", "iris", "--alias", "new", "-r", "r/registry.yaml")
    assert done.code == 0
    assert "iris/2 is in r/registry.yaml; iris@new points to it" in done.out
    assert done.err.strip().endswith("…") or done.err == ""
    bare = shell.called("push", packages["wider"], "--name", "iris", "-r", "r/registry.yaml")
    assert "next: gateway promote iris@champion 3 --registry r/registry.yaml\n" in bare.err
    view = shell.called("models", "iris", "-r", "r/registry.yaml", "-o", "json").json()
    assert view["aliases"] == {"new": "2"}
    assert [version["version"] for version in view["versions"]] == ["1", "2", "3"]


def test_push_refuses_a_directory_that_is_not_a_model(shell: Shell) -> None:
    (shell.directory / "empty").mkdir()
    assert "MLmodel" in shell.called("push", "empty", "--name", "iris", "-r", "registry.yaml").failed()
    complaint = shell.called("push", "nowhere", "--name", "iris", "-r", "registry.yaml").failed()
    assert "nowhere: there is no such directory" in complaint
    absolute = str(shell.directory / "nowhere")
    complaint = shell.called("push", absolute, "--name", "iris", "-r", "registry.yaml").failed()
    assert f"{absolute}: there is no such directory" in complaint
    assert "pushing" not in shell.called("push", "empty", "--name", "a/b", "-r", "registry.yaml").err
    assert not (shell.directory / "registry.yaml").exists()


def test_models_as_text(iris: Shell) -> None:
    done = iris.gateway("models")
    assert done.out.splitlines()[0].split() == ["MODEL", "ALIASES", "VERSIONS", "LATEST"]
    assert "challenger=2, champion=1" in done.out
    assert "challenger" in iris.called("models", "iris").out.splitlines()[2]
    assert "its models: iris" in iris.called("models", "rose").failed()


def test_an_invalid_registry_names_the_place(iris: Shell) -> None:
    file = iris.directory / "registry.yaml"
    file.write_text(file.read_text().replace("source:", "sorce:", 1))
    assert "models.iris.versions.1" in iris.called("models").failed()


def test_gc_says_what_it_would_remove_and_removes_it(iris: Shell) -> None:
    place = ["--registry", "registry.yaml", "--older-than", "0s"]
    file = iris.directory / "registry.yaml"
    document = yaml.safe_load(file.read_text())
    del document["models"]["iris"]["versions"][1]
    document["models"]["iris"]["aliases"] = {"champion": 2}
    file.write_text(yaml.safe_dump(document))
    said = iris.called("gc", *place)
    assert said.code == 0
    assert "iris/1" in said.out
    assert "1 directory of" in said.out
    assert "could be removed" in said.out
    assert said.err.endswith("to remove: gateway gc --older-than 0s --delete --registry registry.yaml\n")
    assert iris.called("gc", "-o", "json").json()["younger"] == 1
    done = iris.gateway("gc", *place, "--delete", "-o", "json").json()
    assert [one["path"] for one in done["found"]] == ["iris/1"]
    assert done["bytes"] == done["found"][0]["bytes"] > 0
    assert sorted(path.name for path in (iris.directory / "models/iris").iterdir()) == ["2"]
    assert "0 directories" in iris.called("gc", *place, "--delete").out
    assert "'--older-than'" in iris.called("gc", "--older-than", "soon").failed(2)
    assert "has no store" in iris.called("gc", "-r", "http://127.0.0.1:9").failed()


def test_promote_and_rollback_in_the_registry(shell: Shell, packages: dict[str, Path]) -> None:
    for name, alias in (("add1", "champion"), ("add2", "challenger")):
        gateway.push(packages[name], "iris", alias=alias, registry=str(shell.directory / "registry.yaml"))
    dry = shell.called("promote", "iris@champion", "2", "--dry-run")
    assert dry.code == 0, dry.err
    assert "may move to version 2" in dry.out
    assert aliases(shell)["champion"] == "1"
    moved = shell.gateway(
        "promote", "iris@champion", "--from", "challenger", "--expect", "1", "-o", "json"
    ).json()
    assert moved["version"] == "2"
    assert moved["previous"] == "1"
    assert moved["target"].endswith("registry.yaml")
    assert aliases(shell)["champion"] == "2"
    assert "2 already" in shell.called("promote", "iris@champion", "2").out
    assert "expected version 1" in shell.called("promote", "iris@champion", "1", "--expect", "1").failed()
    assert "no version 7" in shell.called("promote", "iris@champion", "7").failed()
    assert shell.called("promote", "iris@fresh", "1", "--expect", "none").code == 0
    shell.called("promote", "iris@fresh", "2", "--expect", "none").failed()
    rolled = shell.gateway("rollback", "iris@champion", "-o", "json")
    assert "registry.yaml: running" in rolled.err
    back = rolled.json()
    assert (back["version"], back["previous"]) == ("1", "2")
    assert aliases(shell) == {"champion": "1", "challenger": "2", "fresh": "1"}
    assert "--to V" in shell.called("rollback", "iris@champion").failed()
    assert shell.called("rollback", "iris@champion", "--to", "2").code == 0
    assert aliases(shell)["champion"] == "2"


def test_the_gates_run_here_when_no_gateway_is_named(iris: Shell, packages: dict[str, Path]) -> None:
    iris.called("push", packages["wider"], "--name", "iris")
    iris.called("push", packages["unloadable"], "--name", "iris")
    before = (iris.directory / "registry.yaml").read_bytes()
    assert "colour" in iris.called("promote", "iris@champion", "3").failed()
    assert "the weights are gone" in iris.gateway("promote", "iris@champion", "4", "--force").failed()
    assert (iris.directory / "registry.yaml").read_bytes() == before
    forced = iris.gateway("promote", "iris@champion", "3", "--force", "-o", "json").json()
    assert "colour" in str(forced["forced_past"])
    assert aliases(iris)["champion"] == "3"


def test_a_wrong_digest_is_refused_before_anything_loads(iris: Shell) -> None:
    with (iris.directory / "models/iris/2/MLmodel").open("a") as file:
        file.write("# touched\n")
    assert "digest" in iris.gateway("promote", "iris@champion", "2").failed()
    assert aliases(iris)["champion"] == "1"


# Offline prediction -------------------------------------------------------------------------------


def test_predict_offline(iris: Shell, packages: dict[str, Path]) -> None:
    (iris.directory / "row.json").write_text(json.dumps(ROW))
    by_path = iris.gateway("predict", packages["v1"], "-i", "row.json").json()
    csv = ",".join(FLOWER) + "\n" + ",".join(map(str, FLOWER.values())) + "\n"
    by_alias = iris.gateway("predict", "models:/iris@champion", "-i", "-", stdin=csv).json()
    assert by_path == by_alias == {"predictions": [2]}
    assert iris.called("predict", "models:/iris/1", "-i", "row.json").json() == by_path


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


def predict(url: str, path: str = "/predict/iris") -> dict[str, Any]:
    answer = httpx.post(url + path, json=ROW, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_registry_served_and_operated(iris: Shell, packages: dict[str, Path]) -> None:
    iris.called("push", packages["wider"], "--name", "iris")
    port = free_port()
    with iris.running("serve", "--registry", "registry.yaml", port=port) as url:
        assert "--to V" in iris.called("rollback", "iris@champion", "--url", url).failed()
        empty = iris.called("status", "--url", url, "-o", "json").json()
        assert empty["ready"] is True
        assert empty["versions"] == []
        loaded = iris.gateway("load", "iris@champion", "--url", url, "-o", "json").json()
        assert (loaded["state"], loaded["version"]) == ("READY", "1")
        assert predict(url)["model"]["version"] == "1"

        there = iris.gateway(
            "promote", "iris@champion", "2", "--expect", "1", "--wait", "--url", url, "-o", "json"
        )
        assert there.json()["serving"] == "2"
        assert there.json()["target"] == url
        assert predict(url)["model"]["version"] == "2"
        assert aliases(iris)["champion"] == "2"
        assert (
            "PRECONDITION_FAILED"
            in iris.called("promote", "iris@champion", "1", "--expect", "1", "--url", url).failed()
        )
        refused = iris.called("promote", "iris@champion", "3", GATEWAY_URL=url).failed()
        assert "colour" in refused
        assert "ROLLOUT_REFUSED" in refused
        assert predict(url)["model"]["version"] == "2"

        (row,) = iris.called("status", "-o", "json", GATEWAY_URL=url).json()["versions"][-1:]
        assert (row["model"], row["state"]) == ("iris", "READY")
        text = iris.gateway("status", "--url", url)
        assert f"{url} ready" in text.out
        assert "champion" in text.out

        assert (
            "champion is 1 and served" in iris.called("rollback", "iris@champion", "--wait", "--url", url).out
        )
        assert predict(url)["model"]["version"] == "1"
        assert iris.gateway("unload", "iris/2", "--url", url, "-o", "json").json()["state"] == "UNLOADED"
        for call in (("load", "rose"), ("promote", "rose@champion", "1")):
            complaint = iris.called(*call, "--url", url).failed()
            assert "MODEL_NOT_FOUND" in complaint
            assert "`gateway models`" in complaint
    assert "no gateway answers" in iris.gateway("status", "--url", url).failed()


def test_the_admin_key(iris: Shell) -> None:
    key = iris.directory / "key"
    key.write_text("open sesame\n")
    port = free_port()
    with iris.running("serve", port=port, GATEWAY_ADMIN_KEY_FILE=str(key)) as url:
        refused = iris.called("load", "iris", "--url", url).failed()
        assert "UNAUTHENTICATED" in refused
        assert "--admin-key-file FILE" in refused
        assert iris.gateway("load", "iris", "--url", url, "--admin-key-file", key).code == 0
        assert iris.called("unload", "iris", "--url", url, GATEWAY_ADMIN_KEY="open sesame").code == 0


def test_a_settings_file_leads_commands_to_its_gateway(iris: Shell) -> None:
    key, config, port = iris.directory / "key", iris.directory / "settings.yaml", free_port()
    key.write_text("open sesame\n")
    config.write_text(f"port: {port}\nadmin_key_file: {key}\n")
    with iris.running("serve", "--config", config, port=port) as url:
        begun = iris.called("load", "iris", "--no-wait", "--config", config)
        assert begun.code == 0, begun.err
        assert begun.out == f"the load of iris has begun at {url}\n"
        until(lambda: "READY" in iris.called("status", "--config", config).out, PATIENCE)
        assert (
            iris.called("unload", "iris", "--no-wait", "--config", config, "-o", "json").json()["target"]
            == url
        )
        until(lambda: "READY" not in iris.called("status", "--config", config).out, PATIENCE)
        other = iris.called("status", GATEWAY_PORT=str(free_port())).failed()
        assert "no gateway answers" in other
        assert "nowhere.yaml: cannot be read" in iris.called(
            "load", "iris", "--config", "nowhere.yaml"
        ).failed(2)


def test_the_key_that_a_gateway_made_is_found_by_commands_of_its_user(iris: Shell) -> None:
    port = free_port()
    with iris.running("serve", port=port) as url:
        assert iris.called("load", "iris", "--url", url).code == 0
        assert iris.called("load", "iris", GATEWAY_PORT=str(port)).code == 0, "the port in force is called"
        elsewhere = {"GATEWAY_STATE_DIR": str(iris.directory / "nowhere")}
        complaint = iris.called("unload", "iris", "--url", url, **elsewhere).failed()
        assert "control.key" in complaint
        shown = iris.called("status", "--url", url, **elsewhere)
        assert shown.code == 0, shown.err
        assert "registry read" in shown.out
        assert "registry.yaml read" in iris.called("status", "--url", url).out


def test_the_key_of_this_machine_is_not_sent_to_others(iris: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    state = iris.directory / "held"
    assert control_key(state) is not None
    monkeypatch.chdir(iris.directory)
    monkeypatch.setenv("GATEWAY_STATE_DIR", str(state))
    for url, sent in [("http://127.0.0.1:9", True), ("http://[::1]:9", True), ("http://gw.example", False)]:
        with connect(url, None) as client:
            assert ("authorization" in client._http.headers) is sent, url


def test_a_bare_directory_is_served_without_a_registry(shell: Shell, packages: dict[str, Path]) -> None:
    with shell.running("serve", packages["v1"], port=free_port()) as url:
        assert predict(url, "/predict/v1")["predictions"] == [2]
        assert httpx.post(f"{url}/invocations", json=ROW).json() == {"predictions": [2]}
        log = next(shell.directory.glob("serve-*.log")).read_text()
        assert f"POST {url}/predict/v1" in log
        assert "REGISTRY_READ_ONLY" in shell.called("promote", "v1@champion", "1", "--url", url).failed()


def test_what_cannot_be_served(iris: Shell) -> None:
    complaint = iris.gateway("serve", "-r", "nowhere.yaml", "--port", 0).failed()
    assert "does not exist" in complaint
    assert "hint: --registry names a registry file" in complaint
    assert "does not exist" in iris.gateway("serve", "nowhere", "--port", 0).failed()
    assert "is a directory" in iris.gateway("serve", "-r", ".", "--port", 0).failed()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "--port" in iris.gateway("serve", "--port", port).failed()
        assert "--port" in iris.gateway("demo", "--port", port).failed()
    assert not (iris.directory / "gateway-demo").exists()


def test_the_demo_from_predict_to_promotion(shell: Shell) -> None:
    port = free_port()
    with shell.running("demo", "--dir", "d", port=port) as url:
        said = (shell.directory / f"serve-{port}.log").read_text()
        key = "--admin-key-file d/state/control.key"
        assert f"gateway promote iris@champion 2 --url {url} {key}" in said
        first = predict(url)
        assert first["model"] == {"name": "iris", "version": "1", "alias": "champion"}
        assert shell.gateway("promote", "iris@champion", "2", "--wait", "--url", url, *key.split()).code == 0
        second = predict(url)
        assert second["model"]["version"] == "2"
        assert first["predictions"] != second["predictions"]
        for line in said.splitlines():
            if line.startswith("  curl "):
                path = next(word for word in line.split() if word.startswith(url)).removeprefix(url)
                body = line.split(" -d ")[1].strip("'")
                answer = httpx.post(url + path, content=body, headers={"content-type": "application/json"})
                assert answer.status_code == 200, (path, answer.text)
    pushed = sorted(path.name for path in (shell.directory / "d" / "models").iterdir())
    assert pushed == ["diabetes", "iris", "tickets"]
    registry = (shell.directory / "d" / "registry.yaml").read_bytes()
    placed = {"GATEWAY_HOST": "0.0.0.0", "GATEWAY_PORT": str(port)}
    with shell.running("demo", "--dir", "d", port=port, **placed) as url:
        assert predict(url)["model"]["version"] == "2"
        assert " on http://0.0.0.0:" in (shell.directory / f"serve-{port}.log").read_text()
        assert (
            f"gateway promote iris@champion 1 --url {url}"
            in (shell.directory / f"serve-{port}.log").read_text()
        )
    assert (shell.directory / "d" / "registry.yaml").read_bytes() == registry
