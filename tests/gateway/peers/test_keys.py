"""The shared secret: one or two lines, read again when the file changes, and never in the log."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.peers.keys import InvalidKeys, KeyFile, parse

OLD, NEW = "the old secret, 16 or more", "the new secret, 16 or more"


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "0 lines"), ("\n \n", "0 lines"), ("short", "16 characters"), (f"{OLD}\n{NEW}\n{OLD}x", "3 lines")],
)
def test_a_file_that_is_no_key_is_refused(text: str, said: str) -> None:
    with pytest.raises(InvalidKeys, match=said):
        parse(text.encode())


def signed(text: str, place: Path) -> str:
    file = place / "other.key"
    file.write_text(text)
    signature = KeyFile(file).sign(b"what is said")
    assert signature is not None
    return signature


def test_a_key_is_changed_with_two_lines(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{OLD}\n")
    keys = KeyFile(file)
    by_old, by_new = signed(OLD, tmp_path), signed(NEW, tmp_path)
    assert keys.verify(b"what is said", by_old)
    assert not keys.verify(b"what is said", by_new)
    assert not keys.verify(b"what is said?", by_old)
    file.write_text(f"{OLD}\r\n{NEW}\n")  # first at all gateways: both are accepted, the old one signs
    keys.look()
    assert keys.sign(b"what is said") == by_old
    assert keys.verify(b"what is said", by_new)
    file.write_text(f"{NEW}\n{OLD}\n")
    keys.look()
    assert keys.sign(b"what is said") == by_new
    assert keys.verify(b"what is said", by_old)
    file.write_text(f"{NEW}\n")
    keys.look()
    assert not keys.verify(b"what is said", by_old)


def test_without_a_valid_file_nothing_is_believed_until_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "key"
    file.write_text(OLD)
    keys, by_old = KeyFile(file), signed(OLD, tmp_path)
    for wrong in ("", f"{OLD}\n{NEW}\n{NEW}2", None):
        if wrong is None:
            file.unlink()
        else:
            file.write_text(wrong)
        caplog.clear()
        keys.look()
        keys.look()
        assert len(caplog.records) == 1  # said once
        assert OLD not in caplog.text
        assert keys.sign(b"what is said") is None
        assert not keys.verify(b"what is said", by_old)
        file.write_text(f"{OLD}\n\n")
        keys.look()
        assert keys.verify(b"what is said", by_old)
