"""The reader of YAML in packages: numbers, and sizes of the files next to `MLmodel`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.environments import facts
from loaders import environment
from loaders.package import MAX_SIDE_BYTES, PackageError
from loaders.yamltext import parse_yaml
from tests.support.packages import described


@pytest.mark.parametrize(
    "text",
    [
        "1",
        "-7",
        "0",
        "017",
        "0x1F",
        "-0b101",
        "1_000",
        "1.5",
        "-1.5e+10",
        ".5",
        "-.5",
        "1e3",
        "-.inf",
        ".nan",
        "08",
    ],
)
def test_numbers_are_those_of_pyyaml(text: str) -> None:
    assert repr(parse_yaml(text.encode(), "f")) == repr(yaml.safe_load(text))


@pytest.mark.parametrize(
    "text", ["1:30", "190:20:30", "1:30.5", "1" + ":0" * 500_000, "1" + ":0" * 500_000 + ".5"]
)
def test_a_number_to_the_base_60_is_text(text: str) -> None:
    """PyYAML reads one in quadratic time: this one would take hours."""
    assert parse_yaml(f"a: {text}".encode(), "f") == {"a": text}


@pytest.mark.parametrize(
    "value",
    ["!!int 1" + ":0" * 500_000, "!!float 1" + ":0" * 500_000 + ".5", "1" * 100_000, "0x" + "f" * 100_000],
)
@pytest.mark.parametrize("place", ["a: {}", "? {}\n: a", "- [{}]"])
def test_a_number_has_a_bound(value: str, place: str) -> None:
    with pytest.raises(PackageError, match="a number of more than"):
        parse_yaml(place.format(value).encode(), "f")


def test_a_long_text_is_still_text() -> None:
    assert parse_yaml(b"a: '" + b"1" * 100_000 + b"'", "f") == {"a": "1" * 100_000}


@pytest.mark.parametrize("name", ["conda.yaml", "requirements.txt", "python_env.yaml"])
def test_a_file_of_the_environment_has_a_bound(name: str, tmp_path: Path) -> None:
    large: dict[str, Any] = {name: b"#" * (MAX_SIDE_BYTES + 1)}
    package = described(tmp_path, requirements=None, python=None, files=large)
    with pytest.raises(PackageError, match=f"{name}: is larger than 1 MiB"):
        facts.read(package)
    if name != "python_env.yaml":
        assert "larger than 1 MiB" in str(environment.check(package)[0])
