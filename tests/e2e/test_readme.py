"""The README is true: its story runs as it is written, its tables say what the code says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gateway import cli, configuration, errors, settings
from tests.support.shell import SCRIPT, Shell, free_port

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTED_URL = "http://127.0.0.1:8080"


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def rows(text: str) -> list[list[str]]:
    """The cells of a table's body."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def run(script: str, place: Shell) -> str:
    bash = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(
        bash,
        cwd=place.directory,
        env=place.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def place(shell: Shell) -> Shell:
    """A shell where `gateway` and `python` are those of this environment."""
    commands = shell.directory.parent / "bin"
    commands.mkdir()
    if not SCRIPT.exists():
        (commands / "gateway").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gateway "$@"\n')
        (commands / "gateway").chmod(0o755)
    path = os.pathsep.join([str(SCRIPT.parent), str(commands), shell.environment["PATH"]])
    return Shell(shell.directory, {**shell.environment, "PATH": path})


def test_the_story_runs_as_it_is_written(place: Shell) -> None:
    if shutil.which("curl") is None:
        if os.environ.get("GATEWAY_TEST_ALL"):
            pytest.fail("needs curl")
        pytest.skip("needs curl, which is not installed here")
    story = section("From a model to a promotion")
    python, own = blocks(story, "python")
    first, *rest = blocks(story, "sh")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    (place.directory / "train.py").write_text(python, encoding="utf-8")
    run("python train.py", place)
    (place.directory / "own.py").write_text(own, encoding="utf-8")
    run("python own.py", place)
    before, serve = first.strip().rsplit("\n", 1)
    assert "challenger=2, champion=1" in run(before, place)
    words = serve.split()
    assert words[:2] == ["gateway", "serve"]
    with place.running(*words[1:], port=port):
        assert DOCUMENTED_URL in rest[0]
        said = run("\n".join(rest).replace(DOCUMENTED_URL, url), place)
    answered = re.findall(r'"version":"(\d)","alias":"(\w+)"', said)
    assert answered == [("1", "champion"), ("2", "challenger"), ("2", "champion")]
    assert f"iris@champion is 2 and served at {url}" in said
    assert f"iris@champion is 1 and served at {url}" in said
    assert '{"predictions": [1]}' in said
    assert "flowers/1 is in registry.yaml" in said


def test_the_two_lines_stand_as_they_are_promised() -> None:
    enter = "python3 -m venv .venv && . .venv/bin/activate"
    assert f"    {enter} && pip install -c constraints.txt '.[demo]' && gateway demo\n" in README
    assert f"    {enter} && pip install -c constraints.txt -e '.[test]' && pytest\n" in README


def test_settings_and_their_defaults() -> None:
    table = rows(section("Settings").partition("Under `models:`")[0])
    assert len(table) > 15
    for cell, default, _ in table:
        documented = names(cell)
        assert set(documented) <= set(settings.Settings.model_fields)
        values = [part.strip().strip("`") for part in default.split(",")]
        if default.startswith(("none", "see", "under", "`{")) or "control group" in default:
            continue
        if default == "false":
            values *= len(documented)
        assert len(values) == len(documented), cell
        environment = {
            f"GATEWAY_{name.upper()}": value for name, value in zip(documented, values, strict=True)
        }
        given, plain = configuration.load({}, environment), configuration.load({}, {})
        for name in documented:
            assert getattr(given, name) == (getattr(plain, name) or getattr(given, name)), name


def test_the_settings_of_a_model_are_all_there() -> None:
    table = section("Settings").partition("Under `models:`")[2]
    documented = {name for row in rows(table) for name in names(row[0])}
    fields = settings.ModelSettings.model_fields
    assert documented | {"environment"} == {field.alias or name for name, field in fields.items()}


def test_error_codes() -> None:
    seen = set()
    for statuses, codes in rows(section("Predicting")):
        numbers = {int(number) for number in re.findall(r"\d{3}", statuses)}
        documented = [name for name in names(codes) if name.isupper()]
        assert documented
        assert {errors.STATUS[name] for name in documented} == numbers
        seen.update(documented)
    assert errors.STATUS.keys() - seen == {"INTERNAL"}  # a fault of the gateway's own


def test_commands() -> None:
    documented = {name.split()[1] for row in rows(section("Commands")) for name in names(row[0])}
    single = {command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    assert documented == single | {group.name for group in cli.app.registered_groups}


def test_files_that_are_named_exist() -> None:
    for path in re.findall(r"`((?:gateway|loaders|tests|\.ci)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
