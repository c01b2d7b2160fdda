"""A registry document behind a URL, asked over real sockets."""

from __future__ import annotations

import contextlib
import http.server
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from gateway.registries import open_registry, remote
from gateway.registries.base import Move, RegistryInvalid, RegistryReadOnly, RegistryUnavailable
from gateway.registries.document import dump, parse
from tests.support.tcp_proxy import FAULTS, HALF_OPEN, HANG, PASS, proxy

DOCUMENT = b"models: {iris: {versions: {1: {source: models/iris/1}}, aliases: {champion: 1}}}\n"


class Documents(http.server.ThreadingHTTPServer):
    """Serves `content` with an entity tag, to whom sends it back, that it has not changed."""

    content = DOCUMENT
    sent = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Documents

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path != "/a/registry.yaml":
            self.send_error(404)
            return
        tag = f'"{hash(self.server.content)}"'
        if self.headers["if-none-match"] == tag:
            self.send_response(304)
            self.end_headers()
            return
        self.server.sent += 1
        self.send_response(200)
        self.send_header("etag", tag)
        self.send_header("content-length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Not to standard error."""


@pytest.fixture
def documents() -> Iterator[Documents]:
    server = Documents()
    yield server
    server.shutdown()
    server.server_close()


def test_a_document_is_sent_again_only_when_it_changed(documents: Documents) -> None:
    registry = open_registry(f"{documents.url}/a/registry.yaml")
    first = registry.read()
    assert first.models["iris"].versions["1"].source == f"{documents.url}/a/models/iris/1"
    assert registry.read() is first
    assert documents.sent == 1
    documents.content = DOCUMENT.replace(b"champion: 1", b"champion: 1, old: 1")
    assert "old" in registry.read().models["iris"].aliases
    assert registry.read().stamp != first.stamp
    assert documents.sent == 2
    registry.close()


def test_what_one_thread_read_is_not_kept_with_the_tag_that_another_one_got(
    documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = open_registry(f"{documents.url}/a/registry.yaml")
    assert isinstance(registry, remote.RemoteRegistry)
    models = registry._models
    other = threading.Thread(target=registry.read)

    def late(content: bytes) -> Any:
        if other.ident is None:
            documents.content = DOCUMENT.replace(b"champion: 1", b"champion: 1, new: 1")
            other.start()
            other.join(0.5)  # it ends now, or it waits for this one
        return models(content)

    monkeypatch.setattr(registry, "_models", late)
    registry.read()
    other.join()
    assert "new" in registry.read().models["iris"].aliases
    registry.close()


def test_a_document_that_is_wrong_stays_wrong_until_it_changes(documents: Documents) -> None:
    registry = open_registry(f"{documents.url}/a/registry.yaml")
    registry.read()
    documents.content = b"models: [a typo]\n"
    for _ in range(3):
        with pytest.raises(RegistryInvalid):
            registry.read()
    documents.content = DOCUMENT
    assert "iris" in registry.read().models
    registry.close()


def test_json_is_read_as_what_it_is(documents: Documents) -> None:
    models = parse(DOCUMENT, "yaml", target="x", base="/base")
    documents.content = dump(models.values())
    assert documents.content.startswith(b"{")
    registry = open_registry(f"{documents.url}/a/registry.yaml")
    assert registry.read().models == models
    documents.content = b"{models: {}}"  # YAML in flow style
    assert registry.read().models == {}
    registry.close()


def test_what_is_secret_in_its_url_is_sent_and_not_shown(documents: Documents) -> None:
    address = documents.url.replace("http://", "http://me:word@")
    registry = open_registry(f"{address}/a/registry.yaml?sig=key")
    with pytest.raises(RegistryUnavailable, match="404") as error:  # the path is compared with its query
        registry.read()
    assert documents.asked == ["/a/registry.yaml?sig=key"]
    other = open_registry(f"{address}/a/registry.yaml?sig=other")
    assert registry.identity != other.identity
    for shown in (registry.target, registry.identity, repr(registry), str(error.value), registry.why_not):
        assert not {"word", "key"} & set(re.split(r"\W", shown)), shown
    away = open_registry("ftp://me:word@127.0.0.1:1/a/registry.yaml")
    with pytest.raises(RegistryUnavailable) as refused:
        away.read()
    assert "word" not in str(refused.value) + away.target + away.identity
    for one in (registry, other, away):
        one.close()


def test_containers_of_one_account_are_different_registries() -> None:
    one, two = (open_registry(f"memory://{name}@account/registry.yaml") for name in ("prod", "staging"))
    assert one.identity != two.identity
    assert "prod@account" in one.target


def test_it_is_not_written_from_here(documents: Documents) -> None:
    registry = open_registry(f"{documents.url}/a/registry.yaml")
    assert not registry.writable
    with pytest.raises(RegistryReadOnly, match="cannot be written from here"):
        registry.move(Move("iris", "champion", "1"))
    registry.close()


@pytest.mark.parametrize("fault", [f for f in FAULTS if f not in (HANG, HALF_OPEN, "drip", "other JSON")])
def test_a_document_that_cannot_be_had_changes_nothing(fault: str, documents: Documents) -> None:
    with proxy(documents.server_port) as between:
        registry = open_registry(f"{between.url}/a/registry.yaml")
        first = registry.read()
        documents.content = DOCUMENT + b"x-a: 1\n"
        between.breaks(fault)
        with pytest.raises((RegistryUnavailable, RegistryInvalid)):
            registry.read()
        between.breaks(PASS)
        assert registry.read().models == first.models
        registry.close()


@pytest.mark.parametrize("part", ["headers", "body"])
def test_a_server_that_sends_without_end_is_given_up(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read gets something in time, and the whole never comes."""
    monkeypatch.setattr(remote, "DEADLINE", 0.5)
    head = b"HTTP/1.1 200 OK\r\n" + (b"" if part == "headers" else b"\r\n")
    ended = threading.Event()

    def trickle(server: socket.socket) -> None:
        with server.accept()[0] as client, contextlib.suppress(OSError):
            client.sendall(head)
            for _ in range(200):
                client.sendall(b"x: y\r\n")
                if ended.wait(0.05):
                    return

    with socket.create_server(("127.0.0.1", 0)) as server:
        sending = threading.Thread(target=trickle, args=(server,))
        sending.start()
        registry = open_registry(f"http://127.0.0.1:{server.getsockname()[1]}/registry.yaml")
        with pytest.raises(RegistryUnavailable, match="did not come within"):
            registry.read()
        ended.set()
        sending.join()
        registry.close()


def test_what_is_not_there_is_said(documents: Documents) -> None:
    with pytest.raises(RegistryUnavailable, match="404"):
        open_registry(f"{documents.url}/registry.yaml").read()
    with pytest.raises(RegistryUnavailable, match="does not exist"):
        open_registry("memory://nowhere/registry.yaml").read()


def test_a_document_in_any_store(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/registry.yaml", DOCUMENT)
    try:
        registry = open_registry("memory://bucket/registry.yaml")
        assert registry.read().models["iris"].versions["1"].source == "memory://bucket/models/iris/1"
        store.pipe("/bucket/registry.yaml", DOCUMENT.replace(b"champion", b"other"))
        assert registry.read().models["iris"].aliases.keys() == {"other"}
    finally:
        store.rm("/bucket", recursive=True)


class Connected(MemoryFileSystem):  # type: ignore[misc]
    """Connects when it is made, as those of FTP and SFTP do, and is of no use once its connection broke."""

    protocol = "connected"
    up = False

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        if not Connected.up:
            raise ConnectionRefusedError("nothing listens there")
        self.alive = True

    @classmethod
    def _strip_protocol(cls, path: str) -> Any:
        return super()._strip_protocol(path.removeprefix("connected:"))

    def info(self, path: str, **options: object) -> Any:
        if not self.alive:
            raise EOFError
        return super().info(path, **options)


def test_a_store_that_is_away_at_the_start_or_breaks_off_is_connected_again() -> None:
    fsspec.register_implementation("connected", Connected, clobber=True)
    fsspec.filesystem("memory").pipe("/bucket/registry.yaml", DOCUMENT)
    try:
        registry = open_registry("connected://bucket/registry.yaml")
        with pytest.raises(RegistryUnavailable, match="ConnectionRefusedError"):
            registry.read()
        Connected.up = True
        assert "iris" in registry.read().models
        registry._place[0].alive = False  # type: ignore[attr-defined]
        with pytest.raises(RegistryUnavailable, match="EOFError"):
            registry.read()
        assert "iris" in registry.read().models
    finally:
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_credentials_stay_here() -> None:
    source = b"models: {m: {versions: {1: {source: 'https://me:secret@host/m'}}}}"
    models = parse(source, "yaml", target="x", base="/base")
    assert b"secret" not in dump(models.values())
    assert b"https://host/m" in dump(models.values())
