"""The commands about a registry, called on real registries with real models."""

from __future__ import annotations

import shutil
from pathlib import Path

import joblib
import pytest
import yaml

import gateway
from tests.support.cli import aliases
from tests.support.shell import Shell


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


def test_push_takes_nothing_but_the_model(shell: Shell, packages: dict[str, Path]) -> None:
    """Of a directory without an MLmodel only the model file; never the registry and its store."""
    joblib.dump({"a": 1}, shell.directory / "model.joblib")
    (shell.directory / "serve.log").write_text("a line")
    for place, warns in ((".", True), ("model.joblib", False)):
        done = shell.called("push", place, "--name", "bare", "-r", "registry.yaml")
        assert done.code == 0
        assert ("warning: bare: only model.joblib is copied, and nothing else" in done.err) == warns
    assert [path.name for path in (shell.directory / "models/bare/1").iterdir()] == ["model.joblib"]
    assert not (shell.directory / "models/bare/2").exists()
    shutil.copytree(packages["v1"], shell.directory / "whole")
    inside = ("push", "whole", "--name", "iris", "-r", "whole/registry.yaml")
    assert "whole holds the registry" in shell.called(*inside).failed()
    assert not (shell.directory / "whole/registry.yaml").exists()


def test_a_new_directory_for_a_registry_is_told(
    shell: Shell, packages: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("v1", "v2"):
        shell.called("push", packages[name], "--name", "iris", "-r", "typo/registry.yaml")
    assert [f"making the directory {shell.directory}/typo" in text for text in caplog.messages] == [True]


def test_a_registry_given_in_the_place_of_a_model(iris: Shell) -> None:
    told = iris.called("serve", "registry.yaml", "--port", "0").failed()
    assert "write --registry registry.yaml" in told
    told = iris.called("serve", "--registry", "nope.yaml", "--port", "0").failed()
    assert f"`gateway push DIR --name NAME --registry {iris.directory}/nope.yaml` creates this one" in told


def test_models_as_text(iris: Shell) -> None:
    done = iris.gateway("models")
    assert done.out.splitlines()[0].split() == ["MODEL", "ALIASES", "VERSIONS", "LATEST"]
    assert "challenger=2, champion=1" in done.out
    assert "challenger" in iris.called("models", "iris").out.splitlines()[2]
    assert "its models: iris" in iris.called("models", "rose").failed()
    (iris.directory / "new.yaml").write_text("models: {}")
    told = "no models yet; `gateway push DIR --name NAME --registry new.yaml` adds one\n"
    assert iris.called("models", "--registry", "new.yaml").out == told


def test_an_alias_without_a_version_is_shown_and_fails_the_check(iris: Shell) -> None:
    file = iris.directory / "registry.yaml"
    file.write_text(file.read_text().replace("champion: 1", "champion: 9"))
    done = iris.called("check")
    assert done.code == 1
    assert "iris/2 (challenger): would serve\n" in done.out
    assert "iris@champion: would NOT serve\n" in done.out
    assert "points to version 9, which does not exist" in done.out
    row = next(line for line in iris.called("models", "iris").out.splitlines() if "champion" in line)
    assert row.split()[0] == "9"
    assert row.endswith("this version does not exist")


def test_a_check_says_that_it_did_not_read_the_source(iris: Shell) -> None:
    """And where a version passes, what it may replace."""
    cached = "the files are from the cache: their source was not read"
    first = iris.called("check", "iris/2", "--against", "iris@champion")
    assert "models:/iris/2: would serve, and may replace iris/1\n" in first.out
    assert cached not in first.out
    with (iris.directory / "models/iris/2/MLmodel").open("a") as file:
        file.write("# touched\n")
    assert cached in iris.called("check", "iris/2").out
    refused = iris.called("check", "iris/2", GATEWAY_CACHE_DIR=str(iris.directory / "other"))
    assert refused.code == 1
    assert "digest mismatch" in refused.out
    assert cached not in refused.out
    assert "`gateway check" not in refused.out, "a hint to do what was just done"


def test_models_mark_an_alias_whose_version_was_refused(iris: Shell) -> None:
    file = iris.directory / "registry.yaml"
    document = yaml.safe_load(file.read_text())
    verdict = {"version": "2", "outcome": "rolled_back", "reason": "errors", "at": "2026-11-30T20:00:00Z"}
    refused = {"version": "2", "last_good": "1", "x-verdict": verdict}
    forced = {**refused, "forced": True, "x-verdict": {**verdict, "outcome": "refused"}}
    unproven = {"version": "2", "x-verdict": {**verdict, "outcome": "refused"}}
    document["models"]["iris"]["aliases"] = {"a": refused, "b": forced, "c": unproven, "d": 1}
    file.write_text(yaml.safe_dump(document))
    assert "a=2 (rolled back, 1 serves), b=2, c=2 (refused), d=1 " in iris.called("models").out
    assert "a (rolled back, 1 serves), b, c (refused) " in iris.called("models", "iris").out
    view = iris.called("models", "iris", "-o", "json").json()
    assert view["aliases"] == {"a": "2", "b": "2", "c": "2", "d": "1"}
    assert view["verdicts"]["a"] == {**verdict, "last_good": "1"}
    assert list(view["verdicts"]) == ["a", "c"]


def test_an_invalid_registry_names_the_place(iris: Shell) -> None:
    file = iris.directory / "registry.yaml"
    file.write_text(file.read_text().replace("source:", "sorce:", 1))
    complaint = iris.called("models").failed()
    assert "models.iris.versions.1" in complaint
    assert "hint: correct the registry" in complaint


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


def test_promote_checks_a_version_that_the_alias_points_to_already(
    shell: Shell, packages: dict[str, Path]
) -> None:
    gateway.push(packages["add1"], "iris", alias="champion", registry=str(shell.directory / "registry.yaml"))
    file = shell.directory / "models/iris/1/MLmodel"
    file.write_text(file.read_text() + "# edited\n")
    for more in ([], ["--dry-run"]):
        assert "digest mismatch" in shell.called("promote", "iris@champion", "1", *more).failed()
    assert aliases(shell) == {"champion": "1"}
