"""Hostile HTTP to a server in a process of its own, by raw sockets and by the clients that people use."""

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from support.image_files import save, solid
from support.live_server import LiveServer, live_server
from support.live_server import weights as weights

PATIENCE_S = 20
IMAGE = save(solid())


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server's temporary files would be."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def server(weights: Path, scratch: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    root = tmp_path_factory.mktemp("server")
    with live_server(weights, root, "--access-log", "--max-body-mb", "1", env={"TMPDIR": str(scratch)}) as server:
        yield server
        assert " ERROR " not in server.log.read_text()


def talk(server: LiveServer, *pieces: bytes) -> bytes:
    """Sends, whether or not the server still reads, and returns all that it says until it closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        with suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
        answer = b""
        with suppress(ConnectionError):
            while data := connection.recv(65536):
                answer += data
    return answer


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


HEAD = b"GET /health/live HTTP/1.1\r\nHost: x\r\n"


CHUNKED = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
MANY = b"a: b\r\n" * 2**17


@pytest.mark.abuse("H1")
@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([HEAD, MANY, b"\r\n"], id="130,000 headers"),
        pytest.param([HEAD, b"a: ", *[b"b" * 2**20] * 20], id="20 MB of one header"),
        pytest.param([CHUNKED, *[MANY] * 20, b"\r\n"], id="16 MB of trailers"),
    ],
)
def test_endless_heads_cost_no_memory(server: LiveServer, pieces: list[bytes]) -> None:
    talk(server, HEAD + b"Connection: close\r\n\r\n")
    before = server.peak_mb()
    assert statuses(talk(server, *pieces)) == [431]
    assert server.peak_mb() - before < 10


def by_requests(url: str, data: bytes) -> int:
    requests = pytest.importorskip("requests")
    return int(requests.post(url, data=data, headers={"Content-Type": "image/png"}, timeout=PATIENCE_S).status_code)


def by_httpx(url: str, data: bytes) -> int:
    return httpx.post(url, content=data, headers={"Content-Type": "image/png"}, timeout=PATIENCE_S).status_code


def by_curl(url: str, data: bytes, *options: str) -> int:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    command = ["curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}", "--data-binary", "@-"]
    run = subprocess.run([*command, "-H", "Content-Type: image/png", *options, url], input=data, capture_output=True)
    return int(run.stdout)


def by_curl_at_once(url: str, data: bytes) -> int:
    return by_curl(url, data, "-H", "Expect:")


def by_curl_in_chunks(url: str, data: bytes) -> int:
    return by_curl(url, data, "-H", "Expect:", "-H", "Transfer-Encoding: chunked")


@pytest.mark.abuse("H7")
@pytest.mark.parametrize("megabytes", [2, 20])
@pytest.mark.parametrize("send", [by_requests, by_httpx, by_curl, by_curl_at_once, by_curl_in_chunks])
def test_real_clients_read_the_413(server: LiveServer, send: Callable[[str, bytes], int], megabytes: int) -> None:
    assert send(server.url + "/predict", bytes(megabytes * 2**20)) == 413


@pytest.mark.abuse("H10")
def test_a_client_that_leaves_in_the_middle_leaves_nothing_behind(server: LiveServer, scratch: Path) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\nContent-Type: multipart/form-data; boundary=b\r\n\r\n"
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head + part + bytes(2**22))
    ends = time.monotonic() + PATIENCE_S
    while 'status="499"' not in httpx.get(server.url + "/metrics").text:
        assert time.monotonic() < ends
        time.sleep(0.05)
    assert list(scratch.iterdir()) == []


@pytest.mark.abuse("H15")
@pytest.mark.parametrize("name", ["unknown", "../x", "n" * 10_000, "ü\U0001f431", "insects/../insects", "\0"])
def test_no_model_of_such_a_name(server: LiveServer, name: str) -> None:
    answer = httpx.post(server.url + "/predict", params={"model": name}, content=IMAGE)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert len(answer.text) < 1000


@pytest.mark.abuse("H16")
@pytest.mark.parametrize(
    ("head", "allowed"),
    [
        pytest.param(b"GET /health/live HTTP/1.1\r\nHost: evil.example\r\n", {200}, id="another host"),
        pytest.param(b"GET /health/live HTTP/1.1\r\nHost: @evil/\r\n", {200, 400}, id="no host"),
        pytest.param(b"GET /health/live HTTP/1.1\r\nHost: a\r\nHost: b\r\n", {200, 400}, id="two hosts"),
        pytest.param(b"GET /health/live HTTP/1.1\r\n", {200, 400}, id="none"),
        pytest.param(b"GET http://evil.example/health/live HTTP/1.1\r\nHost: x\r\n", {200}, id="absolute"),
        pytest.param(b"GET http://x/health/live HTTP/1.1\r\nHost: x?\r\n", {200, 400}, id="odd host, absolute"),
        pytest.param(
            b"POST http://x/health/live@/models/sync HTTP/1.1\r\nHost: x\r\n", {401, 404, 405}, id="hidden path"
        ),
        pytest.param(b"POST /models/sync HTTP/1.1\r\nHost: x/health/live?\r\n", {401}, id="host with a path"),
        pytest.param(b"GET //evil/health/live HTTP/1.1\r\nHost: x\r\n", {404}, id="two slashes"),
        pytest.param(b"CONNECT evil:443 HTTP/1.1\r\nHost: x\r\n", {400, 404, 405}, id="CONNECT"),
        pytest.param(b"OPTIONS * HTTP/1.1\r\nHost: x\r\n", {200, 400, 404, 405}, id="asterisk"),
    ],
)
def test_decisions_are_made_by_the_path_alone(server: LiveServer, head: bytes, allowed: set[int]) -> None:
    assert statuses(talk(server, head + b"Connection: close\r\n\r\n"))[0] in allowed


@pytest.mark.abuse("H22")
def test_methods_and_pipelines(server: LiveServer) -> None:
    methods = (b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"PATCH", b"DELETE", b"PROPFIND", b"M-SEARCH")
    answers = [
        talk(server, method + b" /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") for method in methods
    ]
    assert [statuses(answer) for answer in answers] == [[405]] * len(methods)
    piped = talk(server, (HEAD + b"\r\n") * 50 + HEAD + b"Connection: close\r\n\r\n")
    assert statuses(piped) == [200] * 51


@pytest.mark.abuse("H20")
def test_no_request_writes_a_line_of_its_own_into_the_log(server: LiveServer) -> None:
    before = len(server.log.read_text().splitlines())
    paths = [b"/%0a%1b[31mforged", b"/" + b"%1b" * 8000, b"/" + b"%c3%bc" * 900, b"/x?%0aforged=%0a", b'/"' * 300]
    head = b" HTTP/1.1\r\nHost: x\r\nUser-Agent: " + b"u" * 4000 + b'\r\nX-Request-ID: a\xe2\x80\xa8"x\r\n'
    for path in paths:
        talk(server, b"GET " + path + head + b"Connection: close\r\n\r\n")
    lines = server.log.read_text().splitlines()[before:]
    logged = [line[line.index("{") :] for line in lines]
    assert [json.loads(entry)["status"] for entry in logged] == [404] * len(paths)
    assert all(line.isprintable() and line.isascii() for line in lines)
    assert max(map(len, logged)) <= 512


@pytest.mark.abuse("H20")
def test_what_is_not_http_shows_nothing_of_itself_in_the_log(server: LiveServer) -> None:
    before = len(server.log.read_text().splitlines())
    for head in (
        b"\x1b[31mGET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nforged: \x1b[31m\x00\r\n\r\n",
        b"forged\nforged\n\n",
    ):
        assert statuses(talk(server, head)) == [400]
    lines = server.log.read_text().splitlines()[before:]
    assert not [line for line in lines if "forged" in line or not line.isprintable()]
