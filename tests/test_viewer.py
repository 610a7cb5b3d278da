"""The viewer at `/docs` in a real Chromium: it shows every route, sends a request, and asks no other host."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from support.live_server import live_server
from support.live_server import weights as weights
from support.page_server import PATIENCE_S, QUIET, chromium

pytestmark = pytest.mark.timeout(3 * PATIENCE_S)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with live_server(weights, tmp_path_factory.mktemp("server")) as server:
        yield server.url


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    page = browser.new_page(base_url=url)
    page.set_default_timeout(1000 * PATIENCE_S)
    asked, said = list[str](), list[str]()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(f"Uncaught {error}"))
    yield page
    page.close()
    assert not [address for address in asked if not address.startswith((f"{url}/", "blob:", "data:"))]
    assert said == []


@pytest.mark.abuse("A1202")
def test_the_viewer_shows_the_routes_and_asks_no_other_host(page: Page) -> None:
    page.goto("/docs")
    expect(page.locator(".opblock").first).to_be_visible()
    assert page.locator(".opblock").count() > 40
    assert page.evaluate("document.querySelectorAll('script[src^=http], link[href^=http]').length") == 0


@pytest.mark.abuse("A1202")
def test_a_request_from_the_viewer(page: Page) -> None:
    page.goto("/docs")
    route = page.locator("#operations-models-list_models")
    route.locator("button.opblock-summary-control").click()
    route.get_by_role("button", name="Try it out").click()
    with page.expect_response("**/models") as answered:
        route.get_by_role("button", name="Execute").click()
    assert answered.value.status == 200


@pytest.mark.abuse("A1202")
def test_no_document_of_another_host_is_shown(page: Page) -> None:
    page.goto("/docs?url=https://evil.example/openapi.json&configUrl=https://evil.example/config.json")
    expect(page.locator(".opblock").first).to_be_visible()
