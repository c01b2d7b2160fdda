"""Who may read and write a registry file after a write: the same users as before."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from gateway.registries.base import Move
from gateway.registries.file import FileRegistry, _share

THREE = """\
version: 1
models:
  iris:
    versions:
      1: {source: models/iris/1}
      2: {source: models/iris/2}
    aliases: {champion: 1}
"""


def test_mode_and_links_are_kept(tmp_path: Path) -> None:
    real = tmp_path / "real" / "registry.yaml"
    real.parent.mkdir()
    real.write_text(THREE)
    real.chmod(0o640)
    if os.getuid() == 0:
        os.chown(real, 4321, 4322)
    link = tmp_path / "registry.yaml"
    link.symlink_to("real/registry.yaml")
    registry = FileRegistry(str(link))
    snapshot = registry.move(Move("iris", "champion", "2"))
    assert link.is_symlink()
    assert "version: 2" in real.read_text()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    if os.getuid() == 0:
        assert (real.stat().st_uid, real.stat().st_gid) == (4321, 4322)
    assert snapshot.models["iris"].versions["1"].source == str(tmp_path / "real/models/iris/1")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a file of another user")
def test_a_member_of_its_group_keeps_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "registry.yaml"
    file.write_text(THREE)
    os.chown(file, 4321, 4322)
    file.chmod(0o660)
    change = os.chown

    def as_member(path: Any, uid: int, gid: int) -> None:
        if uid not in (-1, os.getuid()):
            raise PermissionError("only root can change a file's owner")
        change(path, uid, gid)

    monkeypatch.setattr(os, "chown", as_member)
    monkeypatch.setattr(os, "fchown", as_member)
    FileRegistry(str(file)).move(Move("iris", "champion", "2"))
    # Others of the group write next: they need the lock, too.
    for written in (file, tmp_path / ".registry.yaml.lock"):
        assert written.stat().st_gid == 4322
        assert stat.S_IMODE(written.stat().st_mode) == 0o660


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("secret")
    other.chmod(0o600)
    link = tmp_path / ".registry.yaml.lock"
    link.symlink_to(other)
    file = tmp_path / "registry.yaml"
    file.write_text(THREE)
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        _share(str(link), file.stat())
    assert stat.S_IMODE(other.stat().st_mode) == 0o600


def test_the_lock_can_be_held_by_all_who_can_write_the_file(tmp_path: Path) -> None:
    file = tmp_path / "registry.yaml"
    file.write_text(THREE)
    file.chmod(0o666)
    before = os.umask(0o077)
    try:
        FileRegistry(str(file)).move(Move("iris", "champion", "2"))
    finally:
        os.umask(before)
    for written in (file, tmp_path / ".registry.yaml.lock"):
        assert stat.S_IMODE(written.stat().st_mode) == 0o666
