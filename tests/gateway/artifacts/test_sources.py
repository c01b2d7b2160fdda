"""Which places the operator lets versions come from, and what is done with those that lie."""

from __future__ import annotations

import contextlib
import functools
import gc
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from gateway.artifacts.base import ArtifactError, Meter
from gateway.artifacts.cache import Artifacts
from gateway.artifacts.sources import Sources, sources_for
from gateway.registries.base import Version
from loaders.package import digest
from tests.conftest import needs
from tests.support.tcp_proxy import CUT, PASS, RESET, proxy

PROXY = "/api/2.0/mlflow-artifacts/artifacts"


def version(source: str) -> Version:
    return Version("iris", "1", source)


@pytest.mark.parametrize(
    ("allowed", "source"),
    [
        (["s3://bucket/models/"], "s3://bucket/models/iris"),
        (["s3://bucket/models"], "s3://bucket/models/iris"),
        (["gs://"], "gs://any/where"),
        (["https://host"], "https://host:8443/x"),
        (["/srv/models"], "/srv/models/iris"),
        (["/srv/models"], "file:///srv/models/iris"),
        (["file:///srv/models"], "/srv/models/iris"),
        (["mlflow+http://127.0.0.1:5000"], f"mlflow+http://127.0.0.1:5000{PROXY}/1"),
    ],
)
def test_what_the_operator_allows(allowed: list[str], source: str) -> None:
    Sources(allowed, local=False).check(version(source))


@pytest.mark.parametrize(
    ("allowed", "source"),
    [
        (["s3://bucket/models/"], "s3://bucket/other"),
        (["s3://bucket/models"], "s3://bucket/models-of-others/iris"),
        (["s3://bucket/models/"], "s3://bucket/models/../other"),
        (["s3://bucket/models/"], "s3://bucket/models/%2e%2e/other"),
        (["https://host"], "https://host.evil/x"),
        (["https://host"], "http://host/x"),
        (["https://host"], "https://host@evil/x"),
        (["/srv/models"], "/srv/models/../secret"),
        (["/srv/models"], "/srv/models-of-others"),
        (["/srv/models"], "file:///srv/models/%2e%2e/secret"),
        (["/srv/models"], "srv/models"),
        (["gs://"], "s3://bucket/x"),
    ],
)
def test_what_the_operator_does_not(allowed: list[str], source: str) -> None:
    with pytest.raises(ArtifactError, match="not among those allowed"):
        Sources(allowed).check(version(source))


@pytest.mark.parametrize(
    "source",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://metadata.google.internal/x",
        "http://metadata.google.internal./x",
        "https://[fd00:ec2::254]/x",
        "http://[::ffff:169.254.169.254]/x",
        "http://100.100.100.200/x",
        f"mlflow+http://169.254.169.254{PROXY}/1",
    ],
)
@pytest.mark.parametrize("local", [True, False])
def test_metadata_services_are_never_called(source: str, local: bool) -> None:
    for allowed in ((), ("http://", "https://", "mlflow+http://")):
        with pytest.raises(ArtifactError, match="metadata"):
            Sources(allowed, local=local).open(version(source))


def test_a_name_that_leads_there_is_refused_too() -> None:
    for address, what in (("169.254.169.254", "metadata"), ("127.0.0.1", "this machine"), ("::1", "machine")):
        allowed = ("https://", "sftp://", "webhdfs://", "hdfs://")
        sources = Sources(allowed, local=False, resolve=lambda host, address=address: [address])
        for scheme in ("https", "sftp", "webhdfs", "hdfs"):
            with pytest.raises(ArtifactError, match=what):
                sources.open(version(f"{scheme}://innocent.example/x"))


def test_a_server_whose_address_is_looked_up_elsewhere_must_be_named() -> None:
    for scheme in ("ftp", "sftp", "webdav", "webhdfs", "hdfs", "smb"):
        source = version(f"{scheme}://host.example/x")
        with pytest.raises(ArtifactError, match="must be in artifact_sources"):
            Sources(local=False).check(source)
        Sources([f"{scheme}://host.example"], local=False).check(source)


def test_a_link_does_not_lead_out_of_what_the_operator_allows(tmp_path: Path) -> None:
    for place in ("allowed/iris", "elsewhere", "mounted/iris"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "allowed" / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "allowed" / "in").symlink_to(tmp_path / "allowed" / "iris")
    (tmp_path / "models").symlink_to(tmp_path / "mounted")
    sources = Sources([str(tmp_path / "allowed"), f"file://{tmp_path}/models"])
    for source in ("allowed/iris", "allowed/in", "models/iris"):
        sources.open(version(f"{tmp_path}/{source}"))
    out = f"{tmp_path}/allowed/out"
    for source in (out, f"file://{out}", f"local://{out}", f"simplecache::file://{out}"):
        with pytest.raises(ArtifactError, match="not among those allowed"):
            sources.open(version(source))


@pytest.mark.parametrize(
    "source", ["/etc", "file:///etc", "http://127.0.0.1/x", "http://[::1]:80/x", "webhdfs://127.0.0.1:9870/x"]
)
def test_a_remote_registry_does_not_point_at_this_machine(source: str) -> None:
    with pytest.raises(ArtifactError, match="refused"):
        sources_for("https://registry.example/registry.yaml", environ={}).check(version(source))
    sources_for("http://127.0.0.1:5000", environ={}).check(version(source))
    sources_for("/here/registry.yaml", environ={}).check(version(source))


class Server(http.server.ThreadingHTTPServer):
    """Speaks the artifact proxy's part of MLflow, and lies as it is told."""

    files: dict[str, bytes]
    listed: list[dict[str, object]]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {}
        self.listed = []
        self.authorizations: list[str | None] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def source(self) -> str:
        return f"mlflow+http://127.0.0.1:{self.server_port}{PROXY}/m"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.authorizations.append(self.headers["authorization"])
        path = self.path.removeprefix(PROXY)
        if path.startswith("?"):
            content = json.dumps({"files": self.server.listed}).encode()
        else:
            content = self.server.files[path.removeprefix("/m/")]
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Not to standard error."""


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.shutdown()
    made.server_close()


@pytest.mark.all
@pytest.mark.parametrize("scheme", ["http", "mlflow+http", "simplecache::http"])
def test_a_name_that_leads_elsewhere_at_the_second_look_is_sent_nothing(scheme: str, server: Server) -> None:
    needs("aiohttp")
    server.files = {"": b"", "MLmodel": b"flavors: {}"}
    wanted = version(f"{scheme}://localhost:{server.server_port}{PROXY}/m")
    sources = Sources(local=False, resolve=lambda host: ["93.184.215.14"])
    with pytest.raises((ArtifactError, OSError)):
        sources.open(wanted).files(wanted)
    assert server.authorizations == []  # one for each request
    with contextlib.suppress(ArtifactError):  # an empty page
        Sources().open(wanted).files(wanted)
    assert server.authorizations


def entry(path: str, size: int, *, is_dir: bool = False) -> dict[str, object]:
    return {"path": path, "file_size": size, "is_dir": is_dir}


@pytest.mark.parametrize(
    ("listed", "complaint"),
    [
        ([entry("../MLmodel", 3)], "outside"),
        ([entry("/etc/passwd", 3)], "outside"),
        ([entry("..", 0, is_dir=True)], "outside"),
        ([entry("a", 0, is_dir=True)], "outside"),  # for ever deeper
        ([entry("MLmodel", 2)], "does not answer"),  # more comes than was announced
        ([entry("MLmodel", 4)], "does not answer"),  # less
        ([entry("MLmodel", 10**10)], "do not fit in the cache"),
        ([entry(f"f{i}", 0) for i in range(100_001)], "more than 100,000 files"),
        ([], "no files"),
        ([{"path": "x", "file_size": "many"}], "does not answer"),
    ],
    ids=["up", "absolute", "parent", "depth", "longer", "shorter", "huge", "many", "none", "nonsense"],
)
def test_a_hostile_listing_is_never_visible(
    listed: list[dict[str, object]], complaint: str, server: Server, tmp_path: Path
) -> None:
    server.files = {"MLmodel": b"123"}
    server.listed = listed
    with pytest.raises(ArtifactError, match=complaint):
        Artifacts(tmp_path / "cache", 10**9).fetch(version(server.source))
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


def test_credentials_go_to_the_operators_servers_alone(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    server.files = {"MLmodel": b"123"}
    server.listed = [entry("MLmodel", 3)]
    own = f"http://127.0.0.1:{server.server_port}"
    Artifacts(tmp_path / "a", 10**9, sources_for("http://127.0.0.1:1")).fetch(version(server.source))
    assert set(server.authorizations) == {None}
    server.authorizations.clear()
    Artifacts(tmp_path / "b", 10**9, sources_for(own)).fetch(version(server.source))
    assert set(server.authorizations) == {"Bearer secret"}


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's store in memory, empty before and after."""
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()


def test_a_large_file_of_a_store_comes_in_ranges(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.artifacts.ranges.RANGED", 1000)
    monkeypatch.setattr("gateway.artifacts.ranges.RANGE", 777)
    content = bytes(range(256)) * 40
    memory.pipe({"/m/MLmodel": b"flavors: {}", "/m/data/weights": content})
    ranges: list[tuple[int, int]] = []
    whole = type(memory).cat_file

    def cat_file(self: object, path: str, start: int | None = None, end: int | None = None) -> bytes:
        if start is not None and end is not None:
            ranges.append((start, end))
        found: bytes = whole(self, path, start, end)
        return found

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    local = Artifacts(tmp_path / "cache", 10**9).fetch(version("memory://m"))
    assert (local.path / "data" / "weights").read_bytes() == content
    assert digest(local.path) == local.digest
    assert len(ranges) == 14
    monkeypatch.setattr(type(memory), "cat_file", lambda self, path, start=0, end=0: b"short")
    with pytest.raises(ArtifactError, match="incomplete"):
        Artifacts(tmp_path / "other", 10**9).fetch(version("memory://m"))
    assert [path.name for path in (tmp_path / "other").iterdir() if path.is_dir()] == []


def test_a_file_without_an_announced_size_does_not_fill_the_disk(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe({"/m/MLmodel": b"flavors: {}", "/m/bomb": b"x" * 3_000_000})
    listed = memory.find("/m")
    monkeypatch.setattr(type(memory), "find", lambda *a, **k: {name: {"type": "file"} for name in listed})
    with pytest.raises(ArtifactError, match="do not fit in the cache"):
        Artifacts(tmp_path / "cache", 2_000_000).fetch(version("memory://m"))
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
    assert Artifacts(tmp_path / "cache", 4_000_000).fetch(version("memory://m")).bytes == 3_000_011


def test_files_without_announced_sizes_take_only_the_space_that_is_left(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a web server."""
    for name in "abc":
        memory.pipe({f"/{name}/MLmodel": b"flavors: {}", f"/{name}/weights": name.encode() * 900_000})
    sized = type(memory).find
    monkeypatch.setattr(
        type(memory), "find", lambda *a, **k: {name: {"type": "file"} for name in sized(*a, **k)}
    )
    cache = Artifacts(tmp_path / "cache", 2_000_000)
    used = [cache.fetch(version(f"memory://{name}")) for name in "ab"]
    with pytest.raises(ArtifactError, match="the cache has no space"):
        cache.fetch(version("memory://c"))
    assert cache.bytes() == sum(local.bytes for local in used) == 1_800_022
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2
    del used
    gc.collect()  # nothing is in use, so what is older gives way
    assert cache.fetch(version("memory://c")).bytes == 900_011
    assert cache.bytes() == 1_800_022


def test_what_comes_of_unknown_size_counts_for_other_fetches(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Artifacts(tmp_path / "cache", 2_000_000)
    memory.pipe({"/a/MLmodel": b"flavors: {}", "/b/MLmodel": b"flavors: {}", "/b/weights": b"b" * 900_000})
    with cache._room(version("memory://a"), 0) as (_, room):
        room(1_500_000)
        with pytest.raises(ArtifactError, match="the cache has no space"):
            cache.fetch(version("memory://b"))
    assert cache.fetch(version("memory://b")).bytes == 900_011


@pytest.mark.all
def test_a_web_servers_directory_is_a_source(tmp_path: Path) -> None:
    needs("aiohttp")
    package = tmp_path / "package"
    (package / "data").mkdir(parents=True)
    (package / "MLmodel").write_bytes(b"flavors: {}")
    (package / "data" / "the weights").write_bytes(b"x" * 300_000)
    handler = functools.partial(_Listing, directory=str(package.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
        with proxy(web.server_port) as between:
            wanted = version(f"{between.url}/package")
            between.lets_through = 100_000  # the listings go through
            for fault in (CUT, RESET, "500"):
                between.breaks(fault)
                with pytest.raises(ArtifactError):
                    Artifacts(tmp_path / "cache", 10**9).fetch(wanted)
                assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
            between.breaks(PASS)
            assert Artifacts(tmp_path / "cache", 10**9).fetch(wanted).digest == digest(package)
        web.shutdown()


class _Listing(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Not to standard error."""


def test_progress_is_told_now_and_then_and_at_the_end() -> None:
    now = [0.0]
    told: list[tuple[int, int | None]] = []

    def meter(*sizes: int | None) -> Meter:
        files = [(str(i), str(i), size) for i, size in enumerate(sizes)]
        return Meter(files, lambda so_far, total: told.append((so_far, total)), lambda: now[0])

    announced = meter(60, 40)
    for now[0], count in ((0.05, 10), (0.11, 10), (0.15, 20), (0.18, -10), (0.2, 70), (9.0, 30)):
        announced.add(count)
    assert told == [(0, 100), (20, 100), (100, 100), (100, 100)]
    told.clear()
    meter(None, 5).add(5)
    assert told == [(0, None)]


@pytest.mark.parametrize("kind", ["directory", "store", "silent", "ranges", "unannounced", "proxied"])
def test_progress_of_every_kind_of_source(
    kind: str, memory: Any, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.artifacts.base._TOLD_EACH", 0.0)
    package = tmp_path / "package"
    package.mkdir()
    (package / "MLmodel").write_bytes(b"flavors: {}")
    (package / "weights").write_bytes(b"x" * 10_000)
    source, total, fewest = str(package), 10_011, 3
    if kind not in ("directory", "proxied"):
        source = "memory://m"
        memory.pipe({f"/m/{file.name}": file.read_bytes() for file in package.iterdir()})
    if kind == "ranges":
        monkeypatch.setattr("gateway.artifacts.ranges.RANGED", 1000)
        monkeypatch.setattr("gateway.artifacts.ranges.RANGE", 1000)
        fewest = 12
    if kind == "proxied":
        source, total = server.source, 10_000
        server.listed, server.files = [entry("weights", 10_000)], {"weights": b"x" * 10_000}
        fewest = 2
    if kind == "silent":  # it does not announce the size
        got = type(memory).get_file
        monkeypatch.setattr(
            type(memory), "get_file", lambda self, one, other, callback=None: got(self, one, other)
        )
        fewest = 2
    if kind == "unannounced":
        listed = memory.find("/m")
        monkeypatch.setattr(type(memory), "find", lambda *a, **k: {name: {"type": "file"} for name in listed})
    told: list[tuple[int, int | None]] = []
    cache = Artifacts(tmp_path / "cache", 10**9)
    local = cache.fetch(version(source), lambda so_far, total: told.append((so_far, total)))
    announced = None if kind == "unannounced" else total
    assert told[0] == (0, announced)
    assert told[-1] == (total, announced)
    assert [so_far for so_far, _ in told] == sorted(so_far for so_far, _ in told)
    assert len(told) >= fewest
    told.clear()
    again = Version("iris", "1", source, local.digest)
    cache.fetch(again, lambda so_far, total: told.append((so_far, total)))
    assert told == []  # it is here


@pytest.mark.parametrize(
    "source",
    [
        "simplecache::file:///srv/models/iris",
        "simplecache://::file:///srv/models/iris",
        "zip://::simplecache::http://127.0.0.1/x.zip",
        "simplecache://::https://169.254.169.254/x",
        "reference::s3://bucket/x",
        "zip://::unheard://x/y",
        "dask::file:///srv",
        "github://owner:repo@main/x",
    ],
)
def test_every_link_of_a_chain_is_checked(source: str) -> None:
    with pytest.raises(ArtifactError, match=r"refused|not supported"):
        Sources((), local=False).open(version(source))
    with pytest.raises(ArtifactError):
        Sources(["s3://bucket/models/"], local=False).open(version(source))


def test_a_chain_that_ends_where_the_operator_allows(tmp_path: Path) -> None:
    source = f"simplecache://::file://{tmp_path}/models/iris"
    Sources([f"{tmp_path}/models"], local=False).check(version(source))
    with pytest.raises(ArtifactError, match="not among those allowed"):
        Sources([f"{tmp_path}/other"], local=False).check(version(source))
