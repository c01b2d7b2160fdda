from __future__ import annotations

from pathlib import Path

import pytest

from gateway.plugins import Plugin, PluginError, find, known

TABLE = {
    "ours": Plugin("gateway.plugins:Plugin"),
    "lacking": Plugin("surely_not_installed.part:Part", install="surely-not-installed"),
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution that brings parts of its own."""
    (tmp_path / "brought_parts.py").write_text("class Part: pass\n")
    information = tmp_path / "brought_parts-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: brought-parts\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[test.group]\n"
        "brought = brought_parts:Part\nours = brought_parts:Part\nbroken = brought_parts:Nothing\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_part_of_the_table_is_imported() -> None:
    assert find("test.group", TABLE, "ours") is Plugin


def test_a_part_that_lacks_its_package_says_what_to_install() -> None:
    with pytest.raises(PluginError, match="pip install surely-not-installed"):
        find("test.group", TABLE, "lacking")


def test_an_unknown_part_names_the_known_ones() -> None:
    with pytest.raises(PluginError, match="known: lacking, ours"):
        find("test.group", TABLE, "nothing")


@pytest.mark.usefixtures("installed")
def test_other_distributions_bring_parts() -> None:
    assert known("test.group", TABLE) == {"ours", "lacking", "brought", "broken"}
    assert find("test.group", TABLE, "brought").__module__ == "brought_parts"
    assert find("test.group", TABLE, "ours") is Plugin
    with pytest.raises(PluginError, match=r"cannot import broken \(brought_parts:Nothing\)"):
        find("test.group", TABLE, "broken")
