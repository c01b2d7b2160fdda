"""The file of tokens: what it may hold, and that it is followed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gateway.access.principal import Principal
from gateway.access.tokens import InvalidTokens, TokensFile, digest, new_token, parse

HEX = hashlib.sha256(b"secret").hexdigest()


def problems(text: str) -> list[tuple[str, str]]:
    with pytest.raises(InvalidTokens) as caught:
        parse(text, ["champion"])
    return caught.value.problems


def test_an_entry_is_read() -> None:
    text = f"""
- name: ci
  sha256: sha256:{HEX.upper()}
  team: fraud
  predict: [fraud-*, iris@champion]
  control: fraud-*@challenger
  until: 2027-01-31
  x-note: of the build server
"""
    (principal,) = parse(text, ["champion"]).values()
    assert (principal.name, principal.kind, principal.team) == ("ci", "token", "fraud")
    assert principal.predict.texts == ("fraud-*", "iris@champion")
    assert principal.control.texts == ("fraud-*@challenger",)
    assert principal.until == 1801353600.0
    assert parse(text, []).keys() == {digest(b"secret")}
    assert parse(f'[{{"name": "ci", "sha256": "{HEX}"}}]', [])[digest(b"secret")].predict.texts == ()


@pytest.mark.parametrize("text", ["", "[]", "# none\n"])
def test_a_file_without_tokens_is_valid(text: str) -> None:
    assert parse(text, []) == {}


def test_every_problem_is_named_with_its_place() -> None:
    text = f"""
- {{name: ci, sha256: abc, predict: [a:b]}}
- {{sha256: {HEX}, until: soon, teem: x}}
- {{name: ci, sha256: {HEX}}}
- {{name: ci, sha256: {HEX}}}
- word
"""
    found = dict(problems(text))
    assert found.keys() == {
        *("[0].sha256", "[0].predict", "[1].name", "[1].until", "[1].teem", "[3].name", "[3].sha256", "[4]"),
    }
    assert "team" in found["[1].teem"]
    assert not any(HEX in what for what in found.values())


@pytest.mark.parametrize("text", ["a: b", "word", "[[}", "- {name: a, name: b}"])
def test_what_is_not_a_list_of_tokens_is_refused(text: str) -> None:
    assert problems(text)


def replace(file: Path, text: str) -> None:
    fresh = file.with_suffix(".fresh")
    fresh.write_text(text)
    os.replace(fresh, file)


def test_the_file_is_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "tokens.yaml"
    entry = f"- {{name: ci, sha256: {HEX}}}\n"
    file.write_text(entry)
    tokens = TokensFile(file, [])
    tokens.read()
    assert not tokens.look()
    replace(file, entry + f"- {{name: other, sha256: {hashlib.sha256(b'two').hexdigest()}}}\n")
    assert tokens.look()
    assert len(tokens.by_digest) == 2
    replace(file, "- {name: ci}\n")
    assert not tokens.look()
    assert len(tokens.by_digest) == 2, "an invalid file changes nothing"
    assert caplog.text.count("stay as they were") == 1
    assert not tokens.look()
    assert caplog.text.count("stay as they were") == 1, "it is said once"
    file.unlink()
    assert tokens.look()
    assert not tokens.by_digest
    assert not tokens.look()
    replace(file, entry)
    assert tokens.look()
    assert len(tokens.by_digest) == 1
    file.unlink()
    os.mkfifo(file)
    assert not tokens.look()


def test_the_teams_are_those_of_the_tokens_that_a_thread_has_just_read(tmp_path: Path) -> None:
    file = tmp_path / "tokens.yaml"
    entry = "- {{name: ci, team: {team}, predict: [iris], sha256: {digest}}}\n"
    file.write_text(entry.format(team="old", digest=HEX))
    tokens = TokensFile(file, [])
    tokens.read()

    class Followed(dict[bytes, Principal]):
        """The thread reads the file while the event loop collects the teams."""

        def values(self) -> Any:
            replace(file, entry.format(team="new", digest=HEX))
            tokens.look()
            return super().values()

    tokens.by_digest = Followed(tokens.by_digest)
    assert [team for team, _ in tokens.teams] == ["old"]
    assert [team for team, _ in tokens.teams] == ["new"]


def test_an_invalid_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tokens.yaml"
    file.write_text("[]")
    tokens = TokensFile(file, [])
    tokens.read()
    reads: list[str] = []

    def counted(text: str, default_alias: Sequence[str]) -> dict[bytes, Principal]:
        reads.append(text)
        return parse(text, default_alias)

    monkeypatch.setattr("gateway.access.tokens.parse", counted)
    for text in ("- {name: ci}\n", "- {name: other}\n"):
        replace(file, text)
        for _ in range(3):
            assert not tokens.look()
        assert reads.pop() == text
        assert not reads
    replace(file, f"- {{name: ci, sha256: {HEX}}}\n")
    assert tokens.look()
    assert tokens.by_digest


def test_a_new_token_is_long_and_recognisable() -> None:
    token = new_token()
    assert token.startswith("mgw_")
    assert len(token) >= 47
    assert token != new_token()
