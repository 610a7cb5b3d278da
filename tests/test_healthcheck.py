"""The container's health check, and the command line: neither goes through a proxy to this machine."""

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from support.service_fakes import ADMIN_KEY

from service.cli import main
from service.cli.jobs import connect
from service.diagnostics.load_generator import LoadPlan, request_head
from service.system import healthcheck

DEAD = "http://127.0.0.1:9"
VARIABLES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY")
PROXIES = {
    "http_proxy": {"http_proxy": DEAD, "HTTP_PROXY": DEAD},
    "all": {"ALL_PROXY": DEAD, "all_proxy": DEAD},
    "all but others": {"http_proxy": DEAD, "no_proxy": "example.com", "NO_PROXY": "example.com"},
    "socks": {"ALL_PROXY": "socks5://127.0.0.1:9"},
    "no scheme": {"http_proxy": "127.0.0.1:9"},
}


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers every path with the server's status, as an Imago without jobs."""

    def do_GET(self) -> None:
        body = b'{"data": [], "models": []}'
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.status = 200  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(params=PROXIES)
def _dead_proxy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in PROXIES[request.param].items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("_dead_proxy")
def test_neither_uses_a_proxy(server: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMAGO_PORT", str(server.server_port))
    monkeypatch.setenv("IMAGO_ADMIN_KEY", ADMIN_KEY)
    assert healthcheck.main() == 0
    for host in ("127.0.0.1", "localhost"):
        url = f"http://{host}:{server.server_port}"
        answer = CliRunner().invoke(main, ["jobs", "--url", url, "list", "--json"])
        assert (answer.exit_code, answer.stdout.strip()) == (0, "[]"), answer.output


def test_a_server_elsewhere_is_reached_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", DEAD)
    with connect("http://192.0.2.1:8000", {"admin_key": ADMIN_KEY}) as client:
        assert isinstance(client._transport_for_url(httpx.URL("http://192.0.2.1:8000")), httpx.HTTPTransport)
        assert client._transport_for_url(httpx.URL("http://192.0.2.1:8000")) is not client._transport


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "foo://x"])
def test_a_proxy_that_cannot_be_used_is_one_line(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALL_PROXY", proxy)
    answer = CliRunner().invoke(main, ["jobs", "--url", "http://192.0.2.1", "--admin-key", ADMIN_KEY, "list"])
    assert (answer.exit_code, answer.output.count("\n")) == (1, 1)
    assert "the proxy in https_proxy, http_proxy or ALL_PROXY cannot be used" in answer.output


def test_the_address_of_a_load_test_may_have_a_prefix() -> None:
    head = request_head(LoadPlan("http://photos.example/imago/"), None, 3)
    assert head.startswith(b"POST /imago/predict HTTP/1.1\r\nHost: photos.example\r\n")


@pytest.mark.parametrize(
    ("host", "port", "address"),
    [
        pytest.param("0.0.0.0", "9000", "http://127.0.0.1:9000/health/ready", id="image"),
        pytest.param("", "", "http://127.0.0.1:8000/health/ready", id="defaults"),
        pytest.param("::", "tcp://10.96.0.12:8000", "http://[::1]:8000/health/ready", id="service link"),
        pytest.param("fd00::2", "80", "http://[fd00::2]:80/health/ready", id="IPv6"),
    ],
)
def test_it_asks_where_the_server_listens(monkeypatch: pytest.MonkeyPatch, host: str, port: str, address: str) -> None:
    monkeypatch.setenv("IMAGO_HOST", host)
    monkeypatch.setenv("IMAGO_PORT", port)
    assert healthcheck.address() == address


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (421, 1)])
def test_its_exit_code(server: http.server.HTTPServer, status: int, code: int) -> None:
    server.status = status  # type: ignore[attr-defined]
    environment = {**os.environ, "IMAGO_PORT": str(server.server_port), "IMAGO_HOST": "127.0.0.1", "http_proxy": DEAD}
    command = [sys.executable, "-m", "service.system.healthcheck"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == code
    assert (f"{status}" in ended.stderr) == bool(code)


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("IMAGO_PORT", "9")
    assert healthcheck.main() == 1
    assert "Connection refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "cause"), [(413, "client_max_body_size"), (504, "proxy_read_timeout"), (500, "not an answer of Imago")]
)
def test_what_a_proxy_answers_itself_is_explained(server: http.server.HTTPServer, status: int, cause: str) -> None:
    server.status = status  # type: ignore[attr-defined]
    url = f"http://127.0.0.1:{server.server_port}/imago"
    answer = CliRunner().invoke(main, ["jobs", "--url", url, "--admin-key", ADMIN_KEY, "list"])
    assert (answer.exit_code, cause in answer.output) == (1, True)
