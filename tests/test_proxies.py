"""Uploads that offer an upgrade, as real clients and proxies send them: Java's HttpClient, curl, nginx, HAProxy."""

import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.service_fakes import GOOD
from test_server import PATIENCE_S, port_of, serving, small, until, url_of

from service.server import Server

pytestmark = pytest.mark.anyio

NGINX = """
daemon off; pid nginx.pid; error_log error.log; worker_processes 1;
events { worker_connections 64; }
http {
  access_log off;
  client_body_temp_path b; proxy_temp_path p; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
  map $http_upgrade $connection_upgrade { default upgrade; '' ''; }
  upstream imago { server 127.0.0.1:SERVER; keepalive 1; }
  server {
    listen 127.0.0.1:PROXY; proxy_request_buffering off;
    location / {
      proxy_pass http://imago; proxy_http_version 1.1;
      proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $connection_upgrade;
    }
  }
}
"""
HAPROXY = """
defaults
  mode http
  timeout connect 5s
  timeout client 20s
  timeout server 20s
  timeout http-keep-alive 20s
frontend in
  bind 127.0.0.1:PROXY
  default_backend imago
backend imago
  http-reuse always
  server one 127.0.0.1:SERVER
"""
PROXIES = {
    "nginx": (NGINX, ["nginx", "-e", "error.log", "-p", ".", "-c"]),
    "haproxy": (HAPROXY, ["haproxy", "-db", "-f"]),
}
JAVA = """
import java.net.URI;
import java.net.http.*;
class Offers {
    public static void main(String[] a) throws Exception {
        var client = HttpClient.newHttpClient();
        byte[] image = a[1].getBytes();
        for (var body : new HttpRequest.BodyPublisher[] {
                HttpRequest.BodyPublishers.ofByteArray(image),
                HttpRequest.BodyPublishers.ofInputStream(() -> new java.io.ByteArrayInputStream(image))})
            for (int round = 0; round < 2; round++) {
                var request = HttpRequest.newBuilder(URI.create(a[0])).header("Content-Type", "image/jpeg").POST(body).build();
                System.out.println(client.send(request, HttpResponse.BodyHandlers.ofString()).statusCode());
            }
    }
}
"""


def path_of(program: str) -> str:
    """The program's path; without one the test skips, and fails in CI."""
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin")
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{program} is not installed")
        raise AssertionError
    return path


def accepts(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@asynccontextmanager
async def proxy(name: str, server: Server, folder: Path, config_text: str | None = None) -> AsyncIterator[int]:
    """Runs a proxy before the server, by default with the configuration above; yields its port."""
    text, (program, *flags) = PROXIES[name]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    config = folder / f"{name}.conf"
    config.write_text((config_text or text).replace("SERVER", str(port_of(server))).replace("PROXY", str(port)))
    process = await asyncio.create_subprocess_exec(
        path_of(program), *flags, str(config), cwd=folder, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        await until(lambda: process.returncode is not None or accepts(port))
        assert process.returncode is None
        yield port
    finally:
        process.terminate()
        await process.wait()


async def ask(port: int, *pieces: bytes) -> bytes:
    """Sends pieces, each after a pause, and reads until the proxy closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0.1)
    answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
    writer.close()
    return answer


@pytest.mark.abuse("A202")
@pytest.mark.parametrize("name", PROXIES)
@pytest.mark.parametrize("chunked", [False, True])
async def test_nothing_is_smuggled_through_a_proxy(tmp_path: Path, name: str, chunked: bool) -> None:
    """The attacker's answer is held back until its body has come, so that the proxy sends all of it to us; then a victim asks."""
    smuggled = b"GET /models/nobody HTTP/1.1\r\nHost: x\r\nX: "
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(smuggled)
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: %s\r\nContent-Type: image/jpeg\r\n%s\r\n\r\n"
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(smuggled), smuggled) if chunked else smuggled
    victim = b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    service = small(tmp_path)
    async with serving(service) as server, proxy(name, server, tmp_path) as port:
        for upgrade in (b"h2c", b"websocket", b"x"):
            service.engine.gate = asyncio.Event()
            service.engine.waiting.clear()
            attack = asyncio.create_task(ask(port, head % (upgrade, framing), body, victim))
            await asyncio.wait_for(service.engine.waiting.wait(), PATIENCE_S)
            service.engine.gate.set()
            answers = await attack
            assert service.engine.asked["files"] == [smuggled]
            assert [part[:3] for part in answers.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200"]
            for _ in range(3):
                answer = await ask(port, victim)
                assert answer.startswith(b"HTTP/1.1 200")
                assert b"model" not in answer


@pytest.mark.abuse("A203")
async def test_curl_that_offers_h2c(tmp_path: Path) -> None:
    service = small(tmp_path)
    async with serving(service) as server:
        for chunked in ([], ["-H", "Transfer-Encoding: chunked"]):
            url = url_of(server) + "/predict"
            options = ["-s", "--http2", "--data-binary", GOOD.decode(), "-H", "Content-Type: image/jpeg", *chunked]
            told = ["-w", "%{http_code} ", "-o", "/dev/null"]
            process = await asyncio.create_subprocess_exec(
                path_of("curl"), *options, *told, url, "--next", *options, *told, url, stdout=subprocess.PIPE
            )
            assert (await process.communicate())[0].split() == [b"200", b"200"]
            assert service.engine.asked["files"] == [GOOD]


@pytest.mark.abuse("A203")
async def test_javas_http_client_as_it_comes(tmp_path: Path) -> None:
    service = small(tmp_path)
    source = tmp_path / "Offers.java"
    source.write_text(JAVA)
    flags = ["-XX:TieredStopAtLevel=1", "-Xshare:auto"]
    async with serving(service) as server:
        process = await asyncio.create_subprocess_exec(
            path_of("java"), *flags, str(source), url_of(server) + "/predict", GOOD.decode(), stdout=subprocess.PIPE
        )
        assert (await process.communicate())[0].split() == [b"200"] * 4
    assert service.engine.asked["files"] == [GOOD]
