"""Who may use the control verbs: every form that is refused, and the few that are not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import Problem
from gateway.http.auth import Access

Headers = list[tuple[bytes, bytes]]


def scope(
    *headers: tuple[bytes, bytes], client: tuple[str, int] | None = ("127.0.0.1", 5000)
) -> dict[str, Any]:
    return {"type": "http", "scheme": "http", "client": client, "headers": list(headers)}


HOST = (b"host", b"127.0.0.1:8080")


def refusal(access: Access, request: dict[str, Any]) -> Problem:
    with pytest.raises(Problem) as caught:
        access.check(request)
    return caught.value


@pytest.mark.parametrize("client", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost:8080", "127.0.0.1", "127.1.2.3:9", "[::1]", "[::1]:8080"]
)
def test_a_local_client_is_admitted(client: str, host: str) -> None:
    Access(None).check(scope((b"host", host.encode()), client=(client, 5000)))


def test_a_page_of_the_gateway_itself_is_admitted() -> None:
    Access(None).check(scope(HOST, (b"origin", b"http://127.0.0.1:8080")))


@pytest.mark.parametrize(
    "client", [("10.0.0.7", 1), ("192.168.1.2", 1), ("::ffff:10.0.0.7", 1), ("", 0), None]
)
def test_a_peer_elsewhere_is_refused(client: tuple[str, int] | None) -> None:
    problem = refusal(Access(None), scope(HOST, client=client))
    assert (problem.code, problem.status) == ("FORBIDDEN", 403)


NOT_LOOPBACK = (
    b"evil.example|localhost.evil.example|10.0.0.7:8080|127.0.0.1.evil.example|0.0.0.0:8080|2130706433|"
    b"[::2]|[::1]x|[::1|localhost:x|"
).split(b"|")


@pytest.mark.parametrize("host", NOT_LOOPBACK)
def test_a_host_that_is_not_loopback_is_refused(host: bytes) -> None:
    assert refusal(Access(None), scope((b"host", host))).code == "FORBIDDEN"


@pytest.mark.parametrize("hosts", [[], [HOST, HOST], [HOST, (b"host", b"evil.example")]])
def test_a_request_without_exactly_one_host_is_refused(hosts: Headers) -> None:
    assert refusal(Access(None), scope(*hosts)).code == "FORBIDDEN"


@pytest.mark.parametrize(
    "origin",
    [
        b"http://evil.example",
        b"null",
        b"http://127.0.0.1:9999",
        b"https://127.0.0.1:8080",
        b"http://localhost:8080",
    ],
)
def test_a_foreign_origin_is_refused(origin: bytes) -> None:
    assert refusal(Access(None), scope(HOST, (b"origin", origin))).code == "FORBIDDEN"


@pytest.mark.parametrize(
    "name",
    [
        b"forwarded",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-proto",
        b"x-forwarded-anything",
        b"x-real-ip",
    ],
)
def test_what_came_through_a_proxy_is_refused(name: bytes) -> None:
    assert refusal(Access(None), scope(HOST, (name, b"127.0.0.1"))).code == "FORBIDDEN"


def test_without_a_configured_key_no_key_is_held() -> None:
    assert not Access(None).holds_key(scope(HOST, (b"authorization", b"Bearer x")))


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.write_text("s3cret\n")
    return file


@pytest.mark.parametrize("value", [b"Bearer s3cret", b"bearer s3cret", b"Bearer  s3cret"])
def test_the_key_admits_from_anywhere(key_file: Path, value: bytes) -> None:
    request = scope(
        (b"host", b"gw.example"),
        (b"authorization", value),
        (b"x-forwarded-for", b"1.2.3.4"),
        client=("9.9.9.9", 1),
    )
    access = Access(key_file)
    access.check(request)
    assert access.holds_key(request)


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
        [(b"authorization", b"Bearer \xff\xfe")],
    ],
)
def test_with_a_key_configured_nothing_else_admits(key_file: Path, headers: Headers) -> None:
    access, request = Access(key_file), scope(HOST, *headers)
    problem = refusal(access, request)
    assert (problem.code, problem.status) == ("UNAUTHENTICATED", 401)
    assert not access.holds_key(request)


def test_the_key_is_read_again_when_its_file_changes(key_file: Path) -> None:
    access = Access(key_file)
    old, new = (scope(HOST, (b"authorization", b"Bearer " + key)) for key in (b"s3cret", b"n3w-key"))
    access.check(old)
    fresh = key_file.with_name("fresh")
    fresh.write_text("n3w-key")
    os.replace(fresh, key_file)
    access.check(new)
    refusal(access, old)


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_a_missing_or_empty_key_file_admits_nobody(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_text(content)
    for value in (b"Bearer ", b"Bearer x", b"Bearer"):
        assert refusal(Access(file), scope(HOST, (b"authorization", value))).code == "UNAUTHENTICATED"


def test_a_key_that_was_removed_admits_no_longer(key_file: Path) -> None:
    access, request = Access(key_file), scope(HOST, (b"authorization", b"Bearer s3cret"))
    access.check(request)
    key_file.unlink()
    refusal(access, request)
