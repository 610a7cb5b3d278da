"""Imago under a path of its own: behind a real nginx that strips it or not, with and without settings."""

import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest
from support.service_fakes import ADMIN, GOOD
from test_proxies import path_of, proxy
from test_routes_finetune import BODY, Training
from test_server import port_of, serving, small, talk, url_of

from service.settings import Settings, SettingsError
from service.system.prefix import OWN, forwarded, no_such_path, prefix_of, without

pytestmark = pytest.mark.anyio

CONFIG = """
daemon off; pid nginx.pid; error_log error.log; worker_processes 1; user root;
events { worker_connections 64; }
http {
  access_log off;
  client_body_temp_path b; proxy_temp_path p; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
  server { listen 127.0.0.1:PROXY; LOCATION }
}
"""
HEADER = "proxy_set_header X-Forwarded-Prefix /imago;"
STRIPS = "location /imago/ { proxy_pass http://127.0.0.1:SERVER/; %s }"
KEEPS = "location /imago { proxy_pass http://127.0.0.1:SERVER; %s }"
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "strips": (STRIPS % "", {}),
    "strips, header": (STRIPS % HEADER, {"trusted_proxies": "127.0.0.1"}),
    "strips, setting": (STRIPS % "", {"root_path": "/imago"}),
    "keeps, header": (KEEPS % HEADER, {"trusted_proxies": "127.0.0.1"}),
    "keeps, setting": (KEEPS % "", {"root_path": "/imago/"}),
}
HOSTILE = [
    "//evil.com",
    "/a/../b",
    "/..",
    "/./a",
    "/a\r\nX: y",
    "/é",
    "/a b",
    "/a?b",
    "/a#b",
    "/<b>",
    "/a%2fb",
    "imago",
]
HOSTILE += ["https://evil.com", "/\\evil.com", "/" + "x" * 256, "/models", "/v2/x", "/a//b", "/a//"]


def links_of(page: str) -> list[str]:
    return [link for link in re.findall(r"(?:src|href)=\"([^\"#]+)\"", page) if not link.startswith("data:")]


@pytest.mark.parametrize("way", WAYS)
async def test_everything_is_found_under_a_prefix(tmp_path: Path, way: str) -> None:
    location, settings = WAYS[way]
    service = Training(tmp_path, port=0, **settings)
    config = CONFIG.replace("LOCATION", location)
    async with (
        serving(service) as server,
        proxy("nginx", server, tmp_path, config) as port,
        httpx.AsyncClient(headers=ADMIN, trust_env=False, timeout=60) as http,
    ):
        base = f"http://127.0.0.1:{port}/imago/"
        job = await http.post(base + "finetune", json=BODY)
        assert (job.status_code, job.is_redirect) == (202, False)
        assert job.headers["location"] in (f"finetune/{job.json()['id']}", f"/imago/finetune/{job.json()['id']}")
        shown = await http.get(urljoin(str(job.request.url), job.headers["location"]))
        assert shown.json()["id"] == job.json()["id"]
        document = (await http.get(base + "openapi.json")).json()
        assert {urljoin(base + "openapi.json", one["url"]).rstrip("/") for one in document["servers"]} == {base[:-1]}
        for name in ("", "docs"):
            page = await http.get(base + name)
            found = [(await http.get(urljoin(base + name, link))).status_code for link in links_of(page.text)]
            assert found
            assert set(found) == {200}
        answer = await http.post(base + "predict", content=GOOD, headers={"Content-Type": "image/jpeg"})
        assert answer.status_code == 200
        bare = await http.get(base[:-1])  # by nginx where it strips
        assert (bare.status_code in (301, 308), urljoin(base[:-1], bare.headers["location"])) == (True, base)


async def test_with_the_setting_both_paths_are_answered(tmp_path: Path) -> None:
    async with (
        serving(small(tmp_path, root_path="/imago")) as server,
        httpx.AsyncClient(trust_env=False, timeout=60) as http,
    ):
        paths = ["/predict", "/imago/predict", "/imagoes/predict", "/imago/imago/predict", "/imago//predict"]
        answers = [await http.post(url_of(server) + path, content=GOOD) for path in paths]
        v2 = await http.get(url_of(server) + "/imago/v2/models/none")
        missing = await http.get(url_of(server) + "/imago/nothing")
    assert [answer.status_code for answer in answers] == [200, 200, 404, 200, 404]
    assert v2.json().keys() == {"error"}
    assert "/imago/docs" in missing.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "prefix", "remedy"),
    [
        pytest.param("/nothing", "", "/docs lists the paths, below the proxy's prefix", id="unknown prefix"),
        pytest.param("/nothing", "/imago", "/imago/docs lists the paths", id="known prefix"),
        pytest.param("/imago/predict", "", "IMAGO_ROOT_PATH=/imago", id="prefix without the setting"),
        pytest.param("/a/b/models/x/activate", "", "IMAGO_ROOT_PATH=/a/b", id="of two segments"),
        pytest.param("/predict/", "", "remove the slash", id="slash at its end"),
        pytest.param("//predict", "", "/docs lists", id="two slashes"),
        pytest.param("/a b\r\n/predict", "", "/docs lists", id="no prefix"),
        pytest.param("", "", "/docs lists", id="empty"),
    ],
)
def test_a_404_says_what_helps(path: str, prefix: str, remedy: str) -> None:
    assert remedy in no_such_path(path, prefix)


async def test_an_upload_under_the_prefix_may_take_its_time(tmp_path: Path) -> None:
    """As one without: the limit on the seconds of a body does not hold, and its size is that of datasets."""
    head = b"POST /imago/datasets?name=x HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: 3000000\r\n\r\n"
    async with serving(small(tmp_path, root_path="/imago", body_timeout_s=60, max_dataset_mb=2)) as server:
        status, error = await talk(server, head % ADMIN["Authorization"][7:].encode())
    assert (status, error["message"]) == (413, "the request body is larger than 2 MB")


def nginx_of_the_docs(folder: Path) -> str:
    """The example of docs/guide/proxies.md as it stands, but for its ports and the certificate's place."""
    page = (Path(__file__).parents[1] / "docs" / "guide" / "proxies.md").read_text()
    (example,) = re.findall(r"```nginx\n(.*?)```", page, re.DOTALL)
    example = example.replace("listen 443 ", "listen 127.0.0.1:PROXY ").replace("127.0.0.1:8000", "127.0.0.1:SERVER")
    return CONFIG.replace("server { listen 127.0.0.1:PROXY; LOCATION }", example.replace("/etc/ssl", str(folder)))


def make_certificate(folder: Path) -> None:
    options = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=photos.example",
    ]
    files = ["-keyout", str(folder / "photos.example.key"), "-out", str(folder / "photos.example.pem")]
    subprocess.run([path_of("openssl"), "req", "-x509", *options, *files], check=True, capture_output=True)


async def test_the_nginx_of_the_docs(tmp_path: Path) -> None:
    make_certificate(tmp_path)
    settings = {"root_path": "/imago", "trusted_proxies": "127.0.0.1", "allowed_hosts": "photos.example"}
    async with (
        serving(Training(tmp_path, port=0, **settings)) as server,
        proxy("nginx", server, tmp_path, nginx_of_the_docs(tmp_path)) as port,
        httpx.AsyncClient(
            headers={**ADMIN, "Host": "photos.example"}, verify=False, trust_env=False, timeout=60
        ) as http,
    ):
        base = f"https://127.0.0.1:{port}/imago"
        large = await http.post(f"{base}/predict", content=GOOD * 200_000)  # 2 MB
        upload = await http.post(
            f"{base}/datasets?name=x", content=b"no zip" * 12_000_000
        )  # 72 MB: more than images may have
        job = await http.post(f"{base}/finetune", json=BODY)
        shown = await http.get(f"https://127.0.0.1:{port}{job.headers['location']}")
        async with http.stream("GET", f"{shown.url}/events", headers={"Accept": "text/event-stream"}) as events:
            first = await anext(events.aiter_lines())
        bare = await http.get(base)
    assert [answer.status_code for answer in (large, upload, job, shown, bare)] == [200, 422, 202, 200, 308]
    assert "nginx" not in upload.text
    assert first.startswith('data: {"seq": 1,')
    assert bare.headers["location"] == f"https://photos.example:{port}/imago/"


@pytest.mark.parametrize("trusted", ["127.0.0.1", "192.0.2.1", ""])
async def test_only_a_trusted_proxy_names_a_prefix(tmp_path: Path, trusted: str) -> None:
    async with (
        serving(small(tmp_path, trusted_proxies=trusted)) as server,
        httpx.AsyncClient(trust_env=False, timeout=60) as http,
    ):
        url = f"http://127.0.0.1:{port_of(server)}"
        answer = await http.get(url + "/openapi.json", headers={"X-Forwarded-Prefix": "/imago"})
        below = await http.get(url + "/imago/models", headers={"X-Forwarded-Prefix": "/imago"})
    is_trusted = trusted == "127.0.0.1"
    assert answer.json()["servers"] == [{"url": "/imago"}] * is_trusted + [{"url": "."}]
    assert below.status_code == (200 if is_trusted else 404)


@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_prefix_is_refused_as_a_setting_and_ignored_as_a_header(value: str) -> None:
    with pytest.raises(SettingsError, match=r"^IMAGO_ROOT_PATH: (a prefix looks like /imago|/\w+ is a path of Imago)"):
        Settings.load(root_path=value)
    assert forwarded([(b"x-forwarded-prefix", value.encode())]) == ""


def test_several_proxies_each_add_theirs() -> None:
    assert forwarded([(b"x-forwarded-prefix", b"/a, /b/"), (b"host", b"x"), (b"x-forwarded-prefix", b"/c")]) == "/a/b/c"
    assert forwarded([(b"x-forwarded-prefix", b"/a, //evil.com")]) == ""
    assert forwarded([]) == ""
    assert [prefix_of(value) for value in ("/", "", "/user/me@x/proxy/", "/a.b")] == [
        "",
        "",
        "/user/me@x/proxy",
        "/a.b",
    ]


def test_a_prefix_is_taken_off_whole() -> None:
    paths = ["/imago", "/imago/", "/imago/a", "/imago/imago/a", "/imagoes", "/a", "/"]
    assert [without("/imago", path) for path in paths] == ["/", "/", "/a", "/a", "/imagoes", "/a", "/"]
    assert [without("", path) for path in paths] == paths


def test_no_path_of_imago_can_be_a_prefix(tmp_path: Path) -> None:
    routes = {path.split("/")[1] for path in small(tmp_path).app.openapi()["paths"]}
    assert routes | {"docs", "web", "openapi.json"} == OWN
