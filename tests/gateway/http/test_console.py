"""The console over a socket: what each page says, who may see it, and which requests a browser's cookie
counts for."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.support.guarded import bearer, guarded, token
from tests.support.served import ODD_NAME, Served, make_registry, path_of, settings

EVIL = '<script>alert("1")</script>'
PAGES = (
    "/",
    "/?q=iris",
    "/console/failures",
    "/console/rollouts",
    "/console/rollouts/iris@champion",
    "/console/sign-in",
)


def registry_in(directory: Path) -> str:
    registry = make_registry(directory)
    document = yaml.safe_load(Path(registry).read_text())
    evil = EVIL.replace("/", "\\")  # a name holds no slash
    document["models"][evil] = {"versions": {"1": {"source": "/nowhere"}}, "aliases": {"champion": "1"}}
    Path(registry).write_text(yaml.safe_dump(document))
    return registry


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("console")
    with Served(settings(directory), registry_in(directory)) as running:
        yield running


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A gateway that no caller may read without a credential."""
    directory = tmp_path_factory.mktemp("asking")
    with guarded(registry_in(directory), directory, anonymous="none") as running:
        yield running


def post(
    served: Served, path: str, body: bytes = b"", method: str = "POST", **headers: str
) -> httpx.Response:
    """Sends what a browser sends: only its cookie as a credential."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    sent.setdefault("content-type", "application/x-www-form-urlencoded")
    return httpx.request(
        method, f"http://127.0.0.1:{served.port}{path}", content=body, headers=sent, timeout=60
    )


def sign_in(served: Served, bearer: str, **headers: str) -> str:
    """The cookie of a browser that signed in with a code for the holder of a credential."""
    code = served.request("POST", "/console/codes", b"", authorization=f"Bearer {bearer}").json["code"]
    reply = post(served, "/console/sign-in", f"code={code}".encode(), **headers)
    assert reply.status_code == 303, reply.text
    return reply.headers["set-cookie"].partition(";")[0]


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_html_that_loads_nothing_from_elsewhere(served: Served, path: str) -> None:
    served.post(f"/predict/{path_of(EVIL.replace('/', chr(92)))}", {"inputs": [1]})  # it fails
    reply = served.get(path)
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert "unsafe" not in reply.headers["content-security-policy"]
    assert reply.headers["cache-control"] == "no-store"
    html = reply.body.decode()
    assert "<script>" not in html
    assert 'style="' not in html
    assert not re.search(r' on\w+="', html)
    assert all(
        not place.startswith(("http", "//", "/"))
        for place in re.findall(r'(?:href|src|action)="([^"]*)"', html)
    )
    assert served.request("HEAD", path).body == b""
    assert post(served, path.partition("?")[0]).status_code in (403, 405)


def test_a_page_shows_of_the_readiness_what_readyz_shows(
    served: Served, asking: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gateway in (served, asking):
        views = gateway.gateway.parts.views
        registry = {"age_seconds": 1.0, "error": "cannot read /secret/registry.yaml"}
        view = replace(views.ready(), registry=registry, preload_pending=["echo"])
        monkeypatch.setattr(views, "ready", lambda view=view: view)
    for gateway, given, is_operator in (
        (served, {}, False),
        (served, {"authorization": f"Bearer {served.key}"}, True),
        (asking, bearer("alice"), False),
        (asking, bearer("boss"), True),
    ):
        html = gateway.get("/", **given).body.decode()
        assert ("/secret" in html) == is_operator
        assert ("the log says why" in html) != is_operator
    assert "It waits for: echo" in asking.get("/", **bearer("boss")).body.decode()
    assert "It waits for" not in asking.get("/", **bearer("alice")).body.decode()


def test_what_is_wrong_comes_first_with_what_to_do(served: Served) -> None:
    served.post(f"/predict/{path_of(EVIL.replace('/', chr(92)))}", {"inputs": [1]})
    for path in ("/", "/console/failures"):
        html = served.get(path).body.decode()
        assert "What to do:" in html
        assert "&lt;script&gt;alert" in html
    assert html.index("What to do:") < len(html)


def test_pages_that_are_not_there_are_pages(served: Served) -> None:
    for path, status in (
        ("/console/nothing", 404),
        ("/console/rollouts/iris@nobody", 404),
        ("/console/rollouts/iris", 400),
        ("/console/rollouts/%ff@champion", 400),
    ):
        reply = served.get(path)
        assert (reply.status, reply.headers["content-type"]) == (status, "text/html; charset=utf-8")
    assert served.get(f"/console/rollouts/{path_of(ODD_NAME)}@champion").status == 200


def test_a_code_needs_the_key(served: Served) -> None:
    assert post(served, "/console/codes").json()["error_code"] == "UNAUTHENTICATED"
    assert post(served, "/console/codes", authorization="Bearer wrong").status_code == 401
    for body in (b"code=wrong", b"", b"code=" + b"a" * 3000, b"\xff"):
        assert post(served, "/console/sign-in", body).status_code == 403
    assert post(served, "/console/sign-in", b"code=" + b"a" * 5000).status_code == 413


def test_the_cookie_signs_in_and_out(served: Served) -> None:
    assert served.key is not None
    cookie = sign_in(served, served.key)
    assert "admin" in served.get("/", cookie=cookie).body.decode()
    assert "admin" not in served.get("/").body.decode()
    assert served.get("/models/iris/versions/1", cookie=cookie).json.keys() >= {"input_example"}
    left = post(served, "/console/sign-out", cookie=cookie)
    assert left.status_code == 303
    assert "Max-Age=0" in left.headers["set-cookie"]
    assert "admin" not in served.get("/", cookie=cookie).body.decode()


OTHER = [
    {"sec_fetch_site": "cross-site"},
    {"sec_fetch_site": "same-site"},
    {"origin": "http://127.0.0.1:1"},
    {"origin": "null"},
    {"origin": "https://evil.example"},
]


@pytest.mark.parametrize("headers", OTHER)
def test_the_cookie_counts_for_no_request_of_another_page(served: Served, headers: dict[str, str]) -> None:
    assert served.key is not None
    cookie = sign_in(served, served.key)
    for method, path in (
        ("POST", "/console/rollouts/iris@champion/abort"),
        ("POST", "/console/sign-out"),
        ("POST", "/models/iris/unload"),
        ("PUT", "/models/iris/aliases/champion"),
    ):
        reply = post(served, path, b'{"version": "1"}', method, cookie=cookie, **headers)
        assert reply.status_code in (401, 403), (path, reply.text)
    assert "admin" in served.get("/", cookie=cookie).body.decode()  # still signed in
    assert "input_example" not in served.get("/models/iris/versions/1", cookie=cookie, **headers).json
    with pytest.raises(AssertionError):
        sign_in(served, served.key, **headers)


def test_a_verb_that_is_refused_says_why_on_its_page(served: Served) -> None:
    assert served.key is not None
    cookie = sign_in(served, served.key)
    own = f"http://127.0.0.1:{served.port}"
    reply = post(served, "/console/rollouts/iris@champion/pause", cookie=cookie, origin=own)
    assert reply.status_code == 409
    assert 'role="alert"' in reply.text
    calls = served.gateway.parts.access.calls("iris", "champion")
    assert "POST /console/rollouts/iris@champion/pause" in str(calls)
    assert post(served, "/console/rollouts/iris@champion/other", cookie=cookie).status_code == 405


@pytest.mark.parametrize(
    "path", ["/", "/console/failures", "/console/rollouts", "/console/rollouts/iris@champion"]
)
def test_without_a_credential_a_page_shows_how_to_sign_in(asking: Served, path: str) -> None:
    reply = asking.get(path)
    assert (reply.status, reply.headers["content-type"]) == (401, "text/html; charset=utf-8")
    assert "gateway console" in reply.body.decode()
    assert "broken" not in reply.body.decode()


def test_who_signs_in_sees_what_the_credential_covers(asking: Served) -> None:
    everything, few = sign_in(asking, token("boss")), sign_in(asking, token("alice"))
    whole = asking.get("/", cookie=everything).body.decode()
    assert "tensor" in whole
    assert "Memory in use" in whole
    assert asking.get("/models/iris/docs", cookie=few).status == 200
    part = asking.get("/", cookie=few).body.decode()
    assert "iris" in part
    assert "tensor" not in part
    assert "Memory in use" not in part
    assert "What to do" not in asking.get("/console/failures", cookie=few).body.decode()
    assert asking.get("/console/rollouts/tensor@champion", cookie=few).status == 403
    assert post(asking, "/console/rollouts/iris@champion/pause", cookie=few).status_code == 403
    assert post(asking, "/console/codes").status_code == 401
    assert asking.get("/", **bearer("alice")).status == 200


def test_another_key_signs_everybody_out(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("first-key-of-the-gateway")
    with Served(settings(tmp_path, admin_key_file=key), make_registry(tmp_path / "r")) as served:
        cookie = sign_in(served, "first-key-of-the-gateway")
        assert "admin" in served.get("/", cookie=cookie).body.decode()
        key.write_text("another-key-of-the-gateway-now")
        assert "admin" not in served.get("/", cookie=cookie).body.decode()


def test_the_console_can_be_switched_off(tmp_path: Path) -> None:
    with Served(settings(tmp_path, console=False), make_registry(tmp_path / "r")) as served:
        assert served.get("/").status == 404
        assert served.get("/console/failures").status == 404
        html: Any = served.get("/docs").body.decode()
        assert "console/" not in html
    shutil.rmtree(tmp_path / "r")
