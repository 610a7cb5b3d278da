"""The page's files: what a browser may do with them, how heavy they are, and that they are all there."""

import re
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from support.service_fakes import API_KEY, Service, client_of

from service.routes.page import WEB

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(WEB).as_posix() for path in WEB.rglob("*") if path.is_file())
SERVED = [f"/web/{name}" for name in FILES if name != "index.html"]
VENDORED = ("vendor/", "viewer/swagger-ui", "viewer/LICENSES")
OWN = [name for name in FILES if not name.startswith(VENDORED)]
MOST_BYTES = 165_000  # of the page
MOST_VIEWER_BYTES = 2_000_000


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(Service(tmp_path, api_key=API_KEY)) as client:
        yield client


@pytest.mark.parametrize("path", ["/", "/docs", *SERVED])
async def test_every_file_is_served_with_its_policy(http: httpx.AsyncClient, path: str) -> None:
    answer = await http.get(path)
    directives = answer.headers["content-security-policy"].split("; ")
    assert (answer.status_code, answer.headers["x-content-type-options"]) == (200, "nosniff")
    assert {"default-src 'self'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"} <= set(directives)
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-cache"


async def test_types_by_which_a_browser_runs_them(http: httpx.AsyncClient) -> None:
    paths = ["/", "/web/app.js", "/web/style.css", "/web/icon.svg"]
    types = [(await http.get(path)).headers["content-type"].partition(";")[0] for path in paths]
    assert types == ["text/html", "text/javascript", "text/css", "image/svg+xml"]


async def test_a_file_that_is_known_is_not_sent_again(http: httpx.AsyncClient) -> None:
    etag = (await http.get("/web/app.js")).headers["etag"]
    assert (await http.get("/web/app.js", headers={"If-None-Match": etag})).status_code == 304


@pytest.mark.parametrize(
    "path", ["/web", "/web/", "/web/none.js", "/web/%2e%2e/app.py", "/web/..%2fapp.py", "/web//etc/passwd"]
)
async def test_nothing_else_is_served(http: httpx.AsyncClient, path: str) -> None:
    answer = await http.get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_it_is_light() -> None:
    sizes = {name: (WEB / name).stat().st_size for name in FILES}
    viewer = sum(size for name, size in sizes.items() if name.startswith("viewer/"))
    assert sum(sizes.values()) - viewer < MOST_BYTES
    assert viewer < MOST_VIEWER_BYTES


@pytest.mark.parametrize("name", [name for name in FILES if name in OWN or name.startswith("vendor/")])
def test_no_other_host_is_asked(name: str) -> None:
    """Addresses stand there as names of namespaces, of licences and of the libraries' own homes alone."""
    text = (WEB / name).read_text()
    hosts = set(re.findall(r"(?:https?:)?//([\w-]+(?:\.[\w-]+)+)", text))
    assert hosts <= ({"www.w3.org", "github.com"} if name.startswith("vendor/") or name == "icon.svg" else set())
    assert not re.search(r"npmjs|unpkg|jsdelivr|registry", text)


@pytest.mark.parametrize("name", ["index.html", "viewer/index.html"])
def test_nothing_is_inline(name: str) -> None:
    text = (WEB / name).read_text()
    assert not re.search(r"<style|style=|\son\w+=|javascript:", text)
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", text))


@pytest.mark.parametrize("name", [name for name in OWN if name.endswith(".js")])
def test_no_way_around_the_frameworks_escaping(name: str) -> None:
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function", (WEB / name).read_text()
    )


def test_the_key_is_kept_in_the_tab_alone() -> None:
    texts = "".join((WEB / name).read_text() for name in OWN)
    assert "localStorage" not in texts
    assert "document.cookie" not in texts


def test_the_wheel_has_it(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    [wheel] = tmp_path.glob("*.whl")
    assert {f"service/web/{name}" for name in FILES} <= set(zipfile.ZipFile(wheel).namelist())
