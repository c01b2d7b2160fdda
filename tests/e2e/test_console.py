"""The console in a real browser, as an operator uses it: signed in by the command, at two widths, below a
path prefix, by keyboard, and by the rules for screen readers (axe-core); a canary is paused, resumed and
finished there. Screenshots are kept where GATEWAY_SCREENSHOTS names a directory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import needs
from tests.e2e.test_credentials import made
from tests.e2e.test_docs_page import browser as browser
from tests.support.running import Running, log_scaled, running
from tests.support.traffic import until

POLICY = {"canary": {"steps": [50], "every": "1h", "requests": 1000}}


@pytest.fixture(scope="module")
def server(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("console")
    registry = directory / "registry.yaml"
    log_scaled(registry, "scaled", 2.0, alias="champion")
    log_scaled(registry, "scaled", 3.0)
    document = yaml.safe_load(registry.read_text())
    for number in range(60):
        document["models"][f"other-{number:02d}"] = {"versions": {"1": {"source": "/nowhere"}}}
    broken = {"versions": {"1": {"source": "/nowhere"}}, "aliases": {"champion": "1"}}
    document["models"]["<b>broken"] = broken
    registry.write_text(yaml.safe_dump(document))
    (directory / "gateway.yaml").write_text(
        yaml.safe_dump({"models": {"scaled": {"rollout": POLICY}}, "isolation": "inline"})
    )
    with running(directory, "--registry", str(registry)) as server:
        assert server.predict("scaled", [{"x": 1.0}]).status_code == 200
        assert httpx.post(f"{server.url}/predict/%3Cb%3Ebroken", json={"inputs": [1]}).is_error
        yield server


def inaccessible(page: Any) -> list[str]:
    """What axe-core finds wrong on a page: the rule, and where it is broken."""
    found = needs("axe_playwright_python.sync_playwright").Axe().run(page).response["violations"]
    return [f"{one['id']}: {node['html'][:120]}" for one in found for node in one["nodes"]]


@pytest.mark.parametrize("width", [420, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_pages(browser: Any, server: Running, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    problems: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    for name, path in (
        ("overview", "/"),
        ("failures", "/console/failures"),
        ("rollouts", "/console/rollouts"),
        ("rollout", "/console/rollouts/scaled@champion"),
        ("model", "/models/scaled/docs"),
        ("version", "/models/scaled/versions/1/docs"),
        ("models", "/docs"),
        ("sign-in", "/console/sign-in"),
        ("not-found", "/console/nothing"),
    ):
        page.goto(server.url + path)
        assert page.get_by_role("heading", level=1).count() == 1
        assert page.get_by_role("navigation").get_by_role("link").count() == 4
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert inaccessible(page) == []
        if kept := os.environ.get("GATEWAY_SCREENSHOTS"):
            page.screenshot(path=Path(kept, f"{name}-{width}-{scheme}.png"), full_page=True)
    assert [text for text in problems if "404" not in text] == []
    assert all(url.startswith((server.url, "data:")) for url in asked)
    page.close()


def test_without_javascript_and_by_keyboard(browser: Any, server: Running) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(server.url + "/")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_url("**/#content")
    page.get_by_label("Part of the name").fill("OTHER-5")
    page.keyboard.press("Enter")
    page.wait_for_url("**/?q=OTHER-5*")
    assert page.get_by_role("link", name="other-5").count() == 10
    for shown, name, others in (("Loaded", "scaled", "other-01"), ("With problems", "<b>broken", "scaled")):
        page.goto(server.url + "/")
        page.get_by_label("Which models").select_option(label=shown)
        page.get_by_role("button", name="Search").click()
        page.wait_for_url("**show=*")
        listed = page.get_by_role("table").last
        assert listed.get_by_role("link", name=name).count() == 1
        assert listed.get_by_role("link", name=others).count() == 0
    page.goto(server.url + "/")
    page.get_by_role("link", name="More models").click()
    page.wait_for_url("**after=*")
    assert page.get_by_role("link", name="scaled").count() >= 1
    assert page.get_by_text("What to do:").first.is_visible()
    context.close()


@contextmanager
def below(origin: str, prefix: str) -> Iterator[str]:
    """The URL of a proxy that serves the gateway at `origin` below a prefix, which it takes off."""

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            path = self.path.removeprefix(prefix) if self.path.startswith(f"{prefix}/") else "/nowhere"
            passed = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            answer = httpx.request(
                self.command, origin + path, headers=passed, content=self.rfile.read(length), timeout=60
            )
            self.send_response(answer.status_code)
            for name, value in answer.headers.items():
                if name not in ("connection", "content-length", "transfer-encoding"):
                    self.send_header(name, value)
            self.send_header("content-length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{proxy.server_port}{prefix}"
        proxy.shutdown()
        thread.join()


def signed_in(browser: Any, origin: str, url: str, name: str = "admin", **environ: str) -> Any:
    """A page of a browser that opened what `gateway console` prints for the gateway at `origin`, which the
    browser reaches at `url`. `name`: whose credential the command finds in `environ`."""
    printed = subprocess.run(
        [sys.executable, "-m", "gateway", "console", "--url", origin],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=True,
    )
    page = browser.new_context().new_page()
    page.goto(printed.stdout.strip().replace(origin, url, 1))
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(f"{url}/")
    assert name in page.get_by_role("banner").inner_text()
    return page


def state(server: Running) -> str:
    return str(server.directory / "state")


def test_below_a_prefix(browser: Any, server: Running) -> None:
    with below(server.url, "/ml") as url:
        page = signed_in(browser, server.url, url, GATEWAY_STATE_DIR=state(server))
        page.get_by_role("link", name="Rollouts").click()
        page.get_by_role("link", name="scaled@champion").click()
        page.get_by_role("link", name="The model").click()
        page.get_by_role("link", name="champion").click()
        page.wait_for_url(f"{url}/console/rollouts/scaled@champion")
        page.get_by_role("button", name="Sign out").click()
        page.wait_for_url(f"{url}/")
        assert "admin" not in page.get_by_role("banner").inner_text()
        page.context.close()


def test_on_a_listener_of_its_own_where_each_caller_needs_a_credential(browser: Any, tmp_path: Path) -> None:
    """`admin_listen` with tokens (`anonymous` is `none`), below a prefix: the browser has only its cookie."""
    log_scaled(tmp_path / "registry.yaml", "scaled", 2.0, alias="champion")
    token, entry = made("ops", "--predict", "*", "--control", "*")
    (tmp_path / "tokens.yaml").write_text(json.dumps([entry]))
    environ = {
        "GATEWAY_ACCESS__TOKENS_FILE": str(tmp_path / "tokens.yaml"),
        "GATEWAY_ADMIN_LISTEN": "127.0.0.1:0",
        "GATEWAY_ISOLATION": "inline",
    }
    with running(tmp_path, **environ) as server:
        (said,) = [line for line in server.lines if "control calls and metrics on" in line]
        admin = re.findall(r"http://[\d.:]+", said)[0]
        assert httpx.get(server.url + "/").status_code == 404
        with below(admin, "/ops/gateway") as url:
            stranger = browser.new_page()
            refused = stranger.goto(f"{url}/")
            assert refused.status == 401
            assert "scaled" not in stranger.content()
            assert inaccessible(stranger) == []
            stranger.get_by_role("link", name="Sign in").first.click()
            stranger.wait_for_url(f"{url}/console/sign-in")
            stranger.close()
            page = signed_in(browser, admin, url, "ops", GATEWAY_ADMIN_KEY=token)
            page.get_by_role("link", name="scaled").first.click()
            page.wait_for_url(f"{url}/models/scaled/docs")
            page.get_by_role("button", name="Send").click()
            page.get_by_text("Status 200").wait_for()
            page.get_by_role("link", name="champion").click()
            page.wait_for_url(f"{url}/console/rollouts/scaled@champion")
            page.get_by_role("button", name="Sign out").click()
            page.wait_for_url(f"{url}/")
            assert "scaled" not in page.content()
            page.context.close()


def test_a_canary_is_paused_resumed_and_finished(browser: Any, server: Running) -> None:
    put = f"{server.url}/models/scaled/aliases/champion"
    assert httpx.put(put, json={"version": "2"}, headers=server.key, timeout=60).status_code == 202
    page = signed_in(browser, server.url, server.url, GATEWAY_STATE_DIR=state(server))
    stranger = browser.new_page()
    place = f"{server.url}/console/rollouts/scaled@champion"

    def can_be_paused() -> bool:
        page.goto(place)
        return bool(page.get_by_role("button", name="Pause").count())

    until(can_be_paused)
    stranger.goto(place)
    assert stranger.get_by_role("button", name="Pause").count() == 0
    assert stranger.get_by_text("Sign in with control access").count() == 1
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("button", name="Resume").click()
    page.get_by_role("button", name="Pause").wait_for()
    assert page.get_by_role("heading", name="Evidence").count() == 1
    assert inaccessible(page) == []
    page.get_by_role("button", name="Finish").click()
    page.wait_for_url(place)
    until(lambda: server.predict("scaled", [{"x": 1.0}]).json()["predictions"] == [3.0])
    page.goto(place)
    assert page.get_by_role("heading", name="What happened").count() == 1
    stranger.close()
    page.context.close()
