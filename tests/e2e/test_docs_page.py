"""A model's page in a real browser: read, filled in, sent; below a path prefix too."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import needs
from tests.support.served import Served, make_registry, settings


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = needs("playwright.sync_api")
    found = shutil.which("chromium")
    if found is None:
        reason = "needs chromium"
        if os.environ.get("GATEWAY_TEST_ALL"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("docs")
    with Served(settings(directory), make_registry(directory)) as running:
        yield running


@pytest.mark.parametrize("prefix", ["", "/ml"])
def test_a_model_is_tried_on_its_page(browser: Any, served: Served, prefix: str) -> None:
    origin = f"http://127.0.0.1:{served.port}"
    page = browser.new_page(viewport={"width": 400, "height": 800})
    problems: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))

    def strip(route: Any) -> None:
        """Acts as a proxy that serves the gateway below a prefix."""
        answer = route.fetch(url=route.request.url.replace(f"{origin}{prefix}/", f"{origin}/", 1))
        route.fulfill(response=answer)

    if prefix:
        page.route(f"{origin}{prefix}/**", strip)
    page.goto(f"{origin}{prefix}/docs")
    page.get_by_role("link", name="iris").click()
    page.wait_for_url("**/models/iris/docs")
    assert page.get_by_role("heading", level=1).inner_text() == "iris"
    assert page.get_by_role("cell", name="sl").count() == 1
    for form in ("JSON: dataframe_split", "JSON: inputs", "CSV"):
        page.get_by_label("Form of the body").select_option(label=form)
        page.get_by_role("button", name="Send").click()
        page.get_by_text("Status 200").wait_for()
        assert '"predictions"' in page.locator("#answer").inner_text()
    page.get_by_label("Body", exact=True).fill("{}")
    page.get_by_label("Form of the body").select_option(label="JSON: inputs")
    page.get_by_label("Body", exact=True).fill("{}")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("Status 400").wait_for()
    assert "MALFORMED_BODY" in page.locator("#answer").inner_text()
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 400
    assert all(url.startswith(f"{origin}{prefix}/") for url in asked)
    assert [text for text in problems if "400" not in text] == []
    page.close()
