"""The admin key: every form that is refused, and the few that are not."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gateway.access import Access
from gateway.access.keys import control_key
from gateway.errors import Problem
from gateway.http.callers import Callers
from gateway.http.problems import contradiction
from gateway.record import RequestRecord
from gateway.settings import Settings

Headers = list[tuple[bytes, bytes]]
HOST = (b"host", b"127.0.0.1:8080")


def record(*headers: tuple[bytes, bytes]) -> RequestRecord:
    return RequestRecord(headers=dict(headers), twice=contradiction(headers))


def access_to(key_file: Path) -> Callers:
    return Callers(Access(Settings(admin_key_file=key_file)))


def refusal(access: Callers, request: RequestRecord) -> Problem:
    request.principal = None  # each call is a request of its own
    with pytest.raises(Problem) as caught:
        access.control(request, None)
    assert not access.controls(request, None)
    return caught.value


def admitted(access: Callers, request: RequestRecord) -> None:
    request.principal = None
    access.control(request, None)
    assert access.controls(request, None)


def test_without_a_key_control_is_closed_to_all(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    access = Callers(Access(Settings(state_dir=tmp_path / "file")))
    problem = refusal(access, record(HOST, (b"authorization", b"Bearer ")))
    assert (problem.code, problem.status) == ("FORBIDDEN", 403)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.write_text("s3cret\n")
    return file


@pytest.mark.parametrize("value", [b"Bearer s3cret", b"bearer s3cret", b"Bearer  s3cret"])
def test_the_key_admits_from_anywhere(key_file: Path, value: bytes) -> None:
    forwarded = (b"x-forwarded-for", b"1.2.3.4")
    admitted(access_to(key_file), record((b"host", b"gw.example"), (b"authorization", value), forwarded))


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"Bearer wrong")],
        [(b"authorization", b"Bearer s3cre")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"s3cret")],
        [(b"authorization", b"Basic s3cret")],
        [(b"authorization", b"Bearer s3cret"), (b"authorization", b"Bearer wrong")],
        [(b"authorization", b"Bearer wrong"), (b"authorization", b"Bearer s3cret")],
        [(b"authorization", b"Bearer \xff\xfe")],
    ],
)
def test_with_a_key_configured_nothing_else_admits(key_file: Path, headers: Headers) -> None:
    problem = refusal(access_to(key_file), record(HOST, *headers))
    assert (problem.code, problem.status) == ("UNAUTHENTICATED", 401)


def test_the_key_is_read_again_when_its_file_changes(key_file: Path) -> None:
    access = access_to(key_file)
    old, new = (record(HOST, (b"authorization", b"Bearer " + key)) for key in (b"s3cret", b"n3w-key"))
    admitted(access, old)
    fresh = key_file.with_name("fresh")
    fresh.write_text("n3w-key")
    os.replace(fresh, key_file)
    admitted(access, new)
    refusal(access, old)


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_a_missing_or_empty_key_file_admits_no_caller(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_text(content)
    for value in (b"Bearer ", b"Bearer x", b"Bearer"):
        assert refusal(access_to(file), record(HOST, (b"authorization", value))).code == "UNAUTHENTICATED"


def test_a_key_that_was_removed_admits_no_longer(key_file: Path) -> None:
    access, request = access_to(key_file), record(HOST, (b"authorization", b"Bearer s3cret"))
    admitted(access, request)
    key_file.unlink()
    refusal(access, request)


def test_a_pipe_or_a_device_in_place_of_the_key_admits_no_caller_and_stops_nothing(key_file: Path) -> None:
    access, request = access_to(key_file), record(HOST, (b"authorization", b"Bearer s3cret"))
    admitted(access, request)
    key_file.unlink()
    os.mkfifo(key_file)
    refusal(access, request)
    key_file.unlink()
    key_file.symlink_to("/dev/zero")
    refusal(access, request)
    key_file.unlink()
    key_file.write_text("s3cret")
    admitted(access, request)


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def test_a_key_is_made_that_this_user_alone_reads(tmp_path: Path) -> None:
    made = control_key(tmp_path / "state")
    assert made == tmp_path / "state" / "control.key"
    assert mode(made) == 0o600
    key = made.read_text().strip()
    assert len(key) >= 43
    assert control_key(tmp_path / "state") == made
    assert made.read_text().strip() == key, "gateways may share a state_dir, and clients hold its key"
    assert os.listdir(tmp_path / "state") == ["control.key"]
    admitted(access_to(made), record((b"authorization", f"Bearer {key}".encode())))
    assert control_key(tmp_path / "other") is not None
    assert (tmp_path / "other" / "control.key").read_text().strip() != key


@pytest.mark.parametrize("found", ["open", "empty", "link"])
def test_a_key_that_others_may_know_is_replaced(tmp_path: Path, found: str) -> None:
    file = tmp_path / "control.key"
    (tmp_path / "elsewhere").write_text("known" if found != "empty" else "")
    if found == "link":
        (tmp_path / "elsewhere").chmod(0o600)
        file.symlink_to(tmp_path / "elsewhere")
    else:
        (tmp_path / "elsewhere").rename(file)
        file.chmod(0o644 if found == "open" else 0o600)
    assert control_key(tmp_path) == file
    assert not file.is_symlink()
    assert mode(file) == 0o600
    assert file.read_text().strip() not in ("", "known")


def test_of_gateways_that_start_at_once_one_key_holds(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(control_key, [tmp_path] * 8))
    assert set(files) == {tmp_path / "control.key"}
    assert os.listdir(tmp_path) == ["control.key"]


def test_where_no_key_can_be_written_control_is_closed_and_the_log_reports_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert control_key(tmp_path / "file") is None
    assert "control calls are closed" in caplog.text
