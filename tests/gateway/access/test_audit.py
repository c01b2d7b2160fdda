"""The file of the audit log, which gateways with one `state_dir` share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.access import audit
from gateway.access.audit import Audit, Audited
from gateway.names import Reference


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Audit, Audit]]:
    monkeypatch.setattr(audit, "MAX_FILE", 10)
    made = Audit(tmp_path / "audit.jsonl"), Audit(tmp_path / "audit.jsonl")
    yield made
    for one in made:
        one.close()


@pytest.mark.parametrize("lines", [["a long line of the first"], ["a long line of the first", "short"]])
def test_two_gateways_fill_the_file_at_once_and_lose_no_line(
    logs: tuple[Audit, Audit],
    lines: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second = logs
    write = os.write

    def meanwhile(descriptor: int, data: bytes) -> int:
        """The second one has opened the file when the first one writes and renames it."""
        monkeypatch.setattr(os, "write", write)
        for line in lines:
            first._write(line)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", meanwhile)
    second._write("a long line of the second")
    renamed = (tmp_path / "audit.jsonl.1").read_text().splitlines()
    assert renamed == ["a long line of the first", "a long line of the second"]
    file = tmp_path / "audit.jsonl"
    assert (file.read_text().splitlines() if file.exists() else []) == lines[1:]
    assert not caplog.text
    second._write("the next one")
    assert (tmp_path / "audit.jsonl.1").read_text().splitlines() == [*lines[1:], "the next one"]


def test_a_caller_without_rights_cannot_replace_the_calls_of_others(tmp_path: Path) -> None:
    now = [0.0]
    log = Audit(tmp_path / "audit.jsonl", lambda: now[0])

    def called(who: str, result: str) -> None:
        about = Audited("2026-01-01T00:00:00Z", who, "team", "PUT", "m@champion", result=result)
        log.record(about, Reference("m", alias="champion"))

    called("admin", "done")
    for _ in range(1000):
        called("token:curious", "FORBIDDEN")
    now[0] = 60.0
    called("token:curious", "FORBIDDEN")
    log.close()
    assert [call["who"] for call in log.calls("m", "champion")] == ["admin"]
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [line["who"] for line in lines] == ["admin", "token:curious", "token:curious"]
    assert "999 more" in lines[2]["note"]


def test_the_calls_about_an_alias_are_there_after_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"

    def called(number: int) -> Audited:
        return Audited("now", "admin", "", f"PUT {number}", "models:/iris@champion", {"version": "2"})

    before = Audit(file)
    for number in range(audit.SHOWN + 5):
        before.record(called(number), Reference("iris", alias="champion"))
    before.record(Audited("now", "admin", "", "POST /registry/refresh", None), None)
    shown = before.calls("iris", "champion")
    before.close()
    with file.open("ab") as lines:
        lines.write(b'{"at": "now"}\nnot JSON\n[]\n{"at": "now", "who": "admin", "te')
    after = Audit(file)
    assert after.calls("iris", "champion") == shown
    assert [one["call"] for one in shown][-1] == f"PUT {audit.SHOWN + 4}"
    after.close()


def test_a_long_file_is_read_at_its_end_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "RECALLED", 400)
    before = Audit(tmp_path / "audit.jsonl")
    for number in range(10):
        before.record(Audited("now", "admin", "", str(number), "models:/iris@champion"), None)
    before.close()
    after = Audit(tmp_path / "audit.jsonl")
    assert [one["call"] for one in after.calls("iris", "champion")] == ["8", "9"]
    after.close()


def test_a_pipe_in_place_of_the_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    Audit(tmp_path / "pipe").close()
