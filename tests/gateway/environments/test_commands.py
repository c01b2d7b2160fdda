"""`gateway env` and `gateway check` as a person types them, with a small index and packages that need it."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LinearRegression

import gateway
from gateway import cli
from tests.support import wheels
from tests.support.packages import described


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two packages that can share an environment, and one whose requirements are refused."""
    with wheels.index(tmp_path / "index") as index:
        for name, version in {
            "scikit_learn": "1.0.2", "cloudpickle": "2.2.0", "numpy": "1.23.4", "pandas": "1.5.1",
            "setuptools": "65.5.0", "acme": "1.0",
        }.items():  # fmt: skip
            index.wheel(name, version)
        for name in list(os.environ):
            if name.startswith(("UV_", "PIP_", "GATEWAY_", "MLFLOW_")):
                monkeypatch.delenv(name)
        for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "UV_HTTP_RETRIES"):
            monkeypatch.setenv(name, index.environ[name])
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("GATEWAY_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setenv("GATEWAY_STATE_DIR", str(tmp_path / "state"))
        monkeypatch.chdir(tmp_path)
        lines = "scikit-learn==1.0.2\ncloudpickle==2.2.0\n"
        described(tmp_path / "m" / "a", requirements=lines, python=None)
        described(tmp_path / "m" / "b", requirements=f"{lines}acme==1.0\n", python=None)
        described(tmp_path / "m" / "c", requirements=f"{lines}-i https://elsewhere.example\n", python=None)
        models = {
            name: {"versions": {"1": {"source": f"m/{name}"}}, "aliases": {"champion": "1"}} for name in "abc"
        }
        file = tmp_path / "registry.yaml"
        file.write_text(json.dumps({"version": 1, "models": models}))
        yield file


def ran(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code = cli.run([*arguments, "--output", "json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.skipif(sys.platform != "linux", reason="model processes need Linux")
def test_the_plan_says_which_models_share_a_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GATEWAY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("GATEWAY_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    frame = pd.DataFrame({"x": [0.0, 1.0, 2.0]})
    for name in ("a", "b", "own", "apart", "theirs"):
        model = LinearRegression().fit(frame, frame["x"])
        gateway.log_model(model, name, "registry.yaml", input_example=frame, alias="champion", verify=False)
    Path("gateway.yaml").write_text(
        "models: {own: {isolation: process}, apart: {threads: 7}}\n"
        "access: {teams: {others: {predict: [theirs]}}}\n"
    )
    _, plan = ran(capsys, "env", "plan", "--registry", "registry.yaml")
    assert [pack["members"] for pack in plan["packs_here"]] == [["a/1", "b/1"], ["apart/1"], ["theirs/1"]]
    assert plan["alone"] == {"own/1": "isolation: process"}
    assert cli.run(["env", "plan", "--registry", "registry.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "packs in this interpreter: small models (2), small models (1), small models (1); models" in shown


def test_environments_are_planned_built_listed_and_removed(
    registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, plan = ran(capsys, "env", "plan", "--registry", str(registry))
    assert code == 0
    [shared] = plan["environments"]
    assert shared["members"] == ["a/1", "b/1"]
    assert not shared["built"]
    assert shared["packs"] == []
    assert "a/1" in plan["alone"], "its code is not known to be harmless"
    assert "is an index option" in plan["refused"]["c/1"]

    code, built = ran(capsys, "env", "build", "--all", "--registry", str(registry))
    assert code == 1, "one cannot be built, and CI must see it"
    assert [each["members"] for each in built["built"]] == [["a/1", "b/1"]]

    _, plan = ran(capsys, "env", "plan", "--registry", str(registry))
    assert plan["environments"][0]["built"]
    _, listed = ran(capsys, "env", "list")
    [environment] = listed["environments"]
    assert environment["packages"]["scikit-learn"] == "1.0.2"
    assert listed["bytes"] > 0

    assert ran(capsys, "env", "gc")[1] == {"unused": [], "removed": []}
    key = environment["environment"]
    gc.collect()  # what the commands before used: each of them is a process of its own for users
    assert ran(capsys, "env", "gc", "--days", "0", "--delete")[1] == {"unused": [key], "removed": [key]}
    assert ran(capsys, "env", "list")[1]["environments"] == []


def test_packages_that_pin_different_things_share_what_meets_both(
    registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`d` pins an older pandas than `a` would get alone; `a` runs with it from then on."""
    wheels.wheel(tmp_path / "index", "pandas", "1.4.4")
    lines = "scikit-learn==1.0.2\ncloudpickle==2.2.0\npandas==1.4.4\n"
    described(tmp_path / "m" / "d", requirements=lines, python=None)
    model = {"versions": {"1": {"source": "m/d"}}, "aliases": {"champion": "1"}}
    content = json.loads(registry.read_text())
    content["models"] = {"a": content["models"]["a"], "d": model}
    registry.write_text(json.dumps(content))
    assert ran(capsys, "env", "build", "models:/a/1", "--registry", str(registry))[0] == 0
    assert ran(capsys, "env", "list")[1]["environments"][0]["packages"]["pandas"] == "1.5.1"

    _, plan = ran(capsys, "env", "plan", "--registry", str(registry))
    [shared] = plan["environments"]
    assert (shared["members"], shared["packages"]["pandas"]) == (["a/1", "d/1"], "1.4.4")
    assert ran(capsys, "env", "build", "--all", "--registry", str(registry))[0] == 0
    _, built = ran(capsys, "env", "build", "models:/a/1", "--registry", str(registry))
    assert built["built"][0]["environment"] == shared["lock"]


def test_one_package_is_built_by_its_reference(registry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, built = ran(capsys, "env", "build", "models:/a@champion", "--registry", str(registry))
    assert code == 0
    assert built["built"][0]["members"] == ["a/1"]
    assert cli.run(["env", "build"]) == 2


def test_check_says_every_reason_and_the_way_out(
    registry: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_ENVIRONMENTS__BUILD", "never")
    code, found = ran(capsys, "check", "--registry", str(registry))
    assert code == 1
    assert not found["serves"]
    for report in found["reports"]:
        assert report["executes_code"]
        assert "1.0.2" in report["reasons"][0]
        assert "gateway env build" in report["hints"][0]
        assert report["environment"]["verdict"] in ("differs", "missing")


def test_check_of_a_directory_names_it_in_the_command_that_helps(
    registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_ENVIRONMENTS__BUILD", "never")
    assert cli.run(["check", str(tmp_path / "m" / "a")]) == 1
    text = capsys.readouterr().out
    assert f"gateway env build {tmp_path / 'm' / 'a'}" in text
    assert "a/1" not in text
    assert "environment: this interpreter is not its own: " in text
    assert "1.0.2" in text


def test_check_of_a_package_that_fits_and_of_one_that_may_not_replace_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("GATEWAY_STATE_DIR", str(tmp_path / "state"))
    registry = tmp_path / "registry.yaml"
    rows = {"x": np.arange(3.0)}

    def fitted(columns: list[str]) -> Any:
        import pandas as pd
        from sklearn.linear_model import LinearRegression

        frame = pd.DataFrame(dict.fromkeys(columns, rows["x"]))
        return LinearRegression().fit(frame, rows["x"]), frame

    for columns, alias in ((["x"], "champion"), (["x", "y"], "challenger")):
        model, example = fitted(columns)
        gateway.log_model(model, name="line", registry=registry, input_example=example, alias=alias)
    code, found = ran(capsys, "check", str(tmp_path / "models" / "line" / "1"))
    assert (code, found["serves"]) == (0, True)
    assert found["reports"][0]["runs_in"] == "same"
    code, found = ran(
        capsys, "check", "models:/line@challenger", "--against", "line@champion", "--registry", str(registry)
    )
    assert code == 1
    assert "it may not replace line/1" in found["reports"][0]["reasons"][0]
