"""The server on a real socket: guards against slow and oversized clients, draining, exit codes."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.service_fakes import GOOD, Service

import service.server as server_module
from service.errors import NotReady
from service.http.connection import guarded_protocol
from service.http.connection.guards import Guards
from service.server import Server, make_server, process_age_s
from service.settings import Settings

pytestmark = [pytest.mark.system, pytest.mark.anyio]
PATIENCE_S = 20  # for what takes milliseconds on a machine that has nothing else to do
OK = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


@asynccontextmanager
async def serving(service: Service) -> AsyncIterator[Server]:
    server = make_server(service.settings, service.app, service.engine, service.traffic)
    running = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    yield server
    server.should_exit = True
    await asyncio.wait_for(running, PATIENCE_S)


async def until(happened: Callable[[], object]) -> None:
    """For what has no event to wait for."""
    async with asyncio.timeout(PATIENCE_S):
        while not happened():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def port_of(server: Server) -> int:
    port: int = server.servers[0].sockets[0].getsockname()[1]
    return port


def url_of(server: Server) -> str:
    return f"http://127.0.0.1:{port_of(server)}"


def small(tmp_path: Path, **settings: Any) -> Service:
    return Service(tmp_path, **{"port": 0, "max_body_mb": 1, **settings})


async def talk(server: Server, *pieces: bytes, timeout_s: float = PATIENCE_S) -> tuple[int, Any]:
    """Sends, and reads until the server closes: status and the error's body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
    for piece in pieces:
        writer.write(piece)
    answer = await asyncio.wait_for(reader.read(), timeout_s)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"] if body else {}


HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"


@pytest.mark.abuse("H1", "H6", "H9", "H16", "H22")
@pytest.mark.parametrize(
    ("pieces", "status", "code"),
    [
        pytest.param([], 408, "request_timeout", id="nothing"),
        pytest.param([b"POST /predict HTTP/1.1\r\nHo"], 408, "request_timeout", id="half a head"),
        pytest.param([HEAD + b"Content-Length: 9\r\n\r\nhalf"], 408, "request_timeout", id="half a body"),
        pytest.param([HEAD + b"X: " + b"y" * 40_000 + b"\r\n\r\n"], 431, "headers_too_large", id="large header"),
        pytest.param([HEAD + b"X: " + b"y" * 500_000], 431, "headers_too_large", id="endless header"),
        pytest.param([HEAD + b"x: y\r\n" * 9000 + b"\r\n"], 431, "headers_too_large", id="many headers"),
        pytest.param([b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\n\r\n"], 431, "headers_too_large", id="long path"),
        pytest.param([HEAD + b"Content-Length: -1\r\n\r\n"], 400, "bad_request", id="negative length"),
        pytest.param([HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nx"], 400, "bad_request", id="two lengths"),
        pytest.param(
            [HEAD + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"], 400, "bad_request", id="both"
        ),
        pytest.param([b"GET /" + b"x" * 2**20 + b" HTTP/1.1\r\n\r\n"], 431, "headers_too_large", id="path of 1 MB"),
        pytest.param([b"GET @evil/ HTTP/1.1\r\nHost: x\r\n\r\n"], 400, "bad_request", id="odd target"),
        pytest.param([b"\x16\x03\x01\x02\x00\x01\x00"], 400, "bad_request", id="TLS"),
    ],
)
async def test_what_is_slow_or_malformed_is_answered_and_closed(
    tmp_path: Path, pieces: list[bytes], status: int, code: str
) -> None:
    limit_s = 0.3 if status == 408 else 2 * PATIENCE_S
    async with serving(small(tmp_path, head_timeout_s=limit_s, body_timeout_s=limit_s)) as server:
        answered, error = await talk(server, *pieces)
    assert (answered, error["code"]) == (status, code)


async def test_under_v2_the_guards_speak_its_protocol(tmp_path: Path) -> None:
    head = b"POST /v2/models/pets/infer?x HTTP/1.1\r\n"
    async with serving(small(tmp_path, head_timeout_s=0.3, max_multipart_mb=1)) as server:
        late = await talk(server, head + b"Ho")
        large = await talk(server, head + b"Host: x\r\nContent-Length: 99999999\r\n\r\n")
    assert late == (408, "the request head did not arrive within 0.3 s")
    assert large == (413, "the request body is larger than 1 MB")


@pytest.mark.abuse("H5", "H8")
async def test_a_declared_size_is_refused_at_once_without_100_continue(tmp_path: Path) -> None:
    async with serving(small(tmp_path, body_timeout_s=60)) as server:
        started = time.monotonic()
        status, error = await talk(server, HEAD + b"Content-Length: 99999999999\r\nExpect: 100-continue\r\n\r\n")
    assert (status, error["code"]) == (413, "payload_too_large")
    assert time.monotonic() - started < PATIENCE_S  # it lingers for 2 s


@pytest.mark.abuse("H7")
async def test_a_client_that_sends_first_and_reads_later_still_reads_the_413(tmp_path: Path) -> None:
    async with serving(small(tmp_path)) as server:
        answer = await asyncio.to_thread(
            httpx.post, url_of(server) + "/predict", content=b"x" * (2 * 2**20), headers={"Content-Type": "image/png"}
        )
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")


async def test_requests_follow_each_other_on_one_connection(tmp_path: Path) -> None:
    service = small(tmp_path, head_timeout_s=1)
    async with serving(service) as server, httpx.AsyncClient(base_url=url_of(server)) as http:
        statuses = []
        for _ in range(3):
            statuses.append((await http.post("/predict", content=GOOD)).status_code)
            await asyncio.sleep(0.6)  # together longer than the head's deadline: it must not run between requests
    assert statuses == [200, 200, 200]


@pytest.mark.abuse("H22")
async def test_pipelined_requests_and_http_1_0(tmp_path: Path) -> None:
    async with serving(small(tmp_path)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        writer.write(OK + OK + b"GET /health/live HTTP/1.0\r\n\r\n")
        answers = await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()
    assert answers.count(b"HTTP/1.1 200 OK") == 3


@pytest.mark.abuse("H22")
async def test_an_answer_to_head_has_no_body(tmp_path: Path) -> None:
    service = small(tmp_path)
    async with serving(service) as server:
        ready = await talk(server, b"HEAD /health/ready HTTP/1.0\r\n\r\n")
        service.engine.is_ready = False
        not_ready = await talk(server, b"HEAD /health/ready HTTP/1.0\r\n\r\n")
    assert (ready, not_ready) == ((200, {}), (503, {}))


@pytest.mark.abuse("H4")
async def test_a_chunked_body(tmp_path: Path) -> None:
    async with serving(small(tmp_path)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        chunked = (
            b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n4\r\ngood\r\n6\r\n image\r\n0\r\nX-T: 1\r\n\r\n"
        )
        writer.write(HEAD + chunked)
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()
    assert answer.startswith(b"HTTP/1.1 200 OK")


@pytest.mark.abuse("H9")
@pytest.mark.parametrize(("pieces", "status"), [(8, 200), (3, 408)])
async def test_a_body_must_come_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int, status: int) -> None:
    """Two bytes of sixteen each fifth of a second, for as many times; ten bytes a second are asked."""
    monkeypatch.setattr(guarded_protocol, "BODY_SPAN_S", 0.8)
    monkeypatch.setattr(guarded_protocol, "BODY_RATE", 5)
    async with serving(small(tmp_path, body_timeout_s=PATIENCE_S)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        writer.write(HEAD + b"Connection: close\r\nContent-Length: 16\r\n\r\n")
        for _ in range(pieces):
            await asyncio.sleep(0.2)
            writer.write(b"xx")
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()
    assert int(answer.split()[1]) == status


@pytest.mark.abuse("H9")
async def test_beyond_so_many_connections_further_ones_are_closed(tmp_path: Path) -> None:
    async with serving(small(tmp_path, max_client_connections=2)) as server:
        open_ones = [await asyncio.open_connection("127.0.0.1", port_of(server)) for _ in range(2)]
        await asyncio.sleep(0.1)
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
        writer.close()
        for _, one in open_ones:
            one.close()
            await one.wait_closed()
        async with httpx.AsyncClient(base_url=url_of(server)) as http:
            assert (await http.get("/health/ready")).status_code == 200


@pytest.mark.parametrize(
    ("address", "let_in"),
    [
        pytest.param("10.0.0.1", False, id="its third connection"),
        pytest.param("10.0.0.2", True, id="its first"),
        pytest.param("10.0.1.9", True, id="a proxy's third"),
    ],
)
def test_who_is_let_in(tmp_path: Path, address: str, let_in: bool) -> None:
    limits = {"max_connections": 9, "max_client_connections": 2, "trusted_proxies": "10.0.1.0/24"}
    guards = Guards.of(Settings.load(weights=tmp_path, data=tmp_path, **limits), 9)
    guards.connected.update({"10.0.0.1": 3, "10.0.0.2": 1, "10.0.1.9": 3})
    assert guards.lets_in(address) is let_in
    guards.connected.update({"10.0.0.3": 4})
    assert not guards.lets_in("10.0.0.3")


async def test_slow_clients_do_not_hold_up_others(tmp_path: Path) -> None:
    async with serving(small(tmp_path, head_timeout_s=2 * PATIENCE_S)) as server:
        idle = [await asyncio.open_connection("127.0.0.1", port_of(server)) for _ in range(200)]
        for _, writer in idle:
            writer.write(b"GET / HTTP/1.1\r\nHo")
        async with httpx.AsyncClient(base_url=url_of(server)) as http:
            answer = await http.get("/health/ready", timeout=PATIENCE_S)
        for _, writer in idle:
            writer.close()
    assert answer.status_code == 200


@pytest.mark.abuse("H11")
async def test_a_client_that_closes_while_waiting_is_dropped(tmp_path: Path) -> None:
    service = small(tmp_path)
    service.engine.gate = asyncio.Event()
    async with serving(service) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        writer.write(HEAD + b"Content-Length: 1\r\n\r\nx")
        await service.engine.waiting.wait()
        writer.close()
        await asyncio.wait_for(service.engine.idle.wait(), PATIENCE_S)
    assert service.engine.cancelled


@pytest.mark.abuse("G11")
async def test_a_drain_finishes_what_is_under_way_and_refuses_the_rest(tmp_path: Path) -> None:
    service = small(tmp_path)
    service.engine.gate = asyncio.Event()
    async with serving(service) as server, httpx.AsyncClient(base_url=url_of(server)) as http:
        under_way = asyncio.create_task(http.post("/predict", content=GOOD))
        await service.engine.waiting.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: service.engine.draining)
        ready, refused = await http.get("/health/ready"), await http.post("/predict", content=GOOD)
        service.engine.gate.set()
        assert (await under_way).status_code == 200
    assert (ready.status_code, refused.status_code) == (503, 503)
    assert (refused.headers["retry-after"], refused.headers["connection"]) == ("30", "close")
    assert server.exit_code == 0


@asynccontextmanager
async def half_an_upload(
    service: Service, server: Server
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that has sent `good` of `good image`, to a server that has been told to stop since."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
    writer.write(HEAD + b"Content-Length: 10\r\n\r\ngood")
    await until(lambda: service.traffic.under_way)
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: service.engine.draining)
    yield reader, writer
    writer.close()


async def test_a_drain_waits_for_an_upload_that_had_begun(tmp_path: Path) -> None:
    service = small(tmp_path)
    async with serving(service) as server, half_an_upload(service, server) as (reader, writer):
        await asyncio.sleep(0.5)  # five ticks: a server that did not wait would be leaving
        assert not server.should_exit
        writer.write(b" image")
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert (service.engine.asked["files"], server.exit_code) == ([GOOD], 0)


async def test_when_the_grace_time_is_over_an_upload_gets_503(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    service = small(tmp_path, drain_seconds=0.2)
    async with serving(service) as server, half_an_upload(service, server) as (reader, _):
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert (head.split()[1], json.loads(body)["error"]["code"], server.exit_code) == (b"503", "draining", 1)
    assert "Exception in ASGI application" not in caplog.text


async def test_when_the_grace_time_is_over_requests_get_503(tmp_path: Path) -> None:
    service = small(tmp_path, drain_seconds=0.2)
    service.engine.gate = asyncio.Event()
    async with serving(service) as server, httpx.AsyncClient(base_url=url_of(server)) as http:
        under_way = asyncio.create_task(http.post("/predict", content=GOOD))
        await service.engine.waiting.wait()
        server.stop()
        assert (await under_way).status_code == 503
    assert server.exit_code == 1


@pytest.mark.abuse("G11")
async def test_told_twice_it_leaves_at_once(tmp_path: Path) -> None:
    service = small(tmp_path)
    service.engine.gate = asyncio.Event()
    async with serving(service) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        writer.write(HEAD + b"Content-Length: 1\r\n\r\nx")
        await service.engine.waiting.wait()
        server.stop()
        server.stop()
        writer.close()
    assert (server.exit_code, server.force_exit) == (1, True)


@pytest.mark.abuse("G6")
async def test_a_lost_device_ends_the_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    service = small(tmp_path)
    async with serving(service) as server:
        service.engine.is_live = False
        await until(lambda: server.exit_code)  # it looks once a second
    assert server.exit_code == 4
    assert "a device is lost" in caplog.text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        pytest.param(SystemExit(3), 3, id="uvicorn could not start"),
        pytest.param(RuntimeError("a bug"), 1, id="bug"),
        pytest.param(None, 4, id="ended"),
    ],
)
def test_the_exit_code_is_known_however_the_server_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, code: int
) -> None:
    """So that the process always ends by os._exit: the engine's device threads are alive."""
    service = small(tmp_path)
    server = make_server(service.settings, service.app, service.engine, service.traffic)

    def run() -> None:
        server.exit_code = 4
        if error is not None:
            raise error

    monkeypatch.setattr(server, "run", run)
    assert server_module.exit_code_of(server) == code


async def test_the_log_says_where_it_listens_and_what_is_ready(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with serving(small(tmp_path)) as server:
        port = port_of(server)
        await until(lambda: "s: pets" in caplog.text)
    assert f"listening on http://127.0.0.1:{port}" in caplog.text
    assert "s: pets" in caplog.text


async def test_a_server_that_becomes_ready_later_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(server_module, "LOOK_S", 0.01)
    service = small(tmp_path)

    async def wait_ready(timeout_s: float | None = None) -> None:
        raise NotReady("the GPU has no memory left; tried again in 5 s")

    monkeypatch.setattr(service.engine, "wait_ready", wait_ready)
    service.engine.is_ready = False
    async with serving(service):
        await until(lambda: "not ready: the GPU" in caplog.text)
        assert "s: pets" not in caplog.text
        service.engine.is_ready = True
        await until(lambda: "s: pets" in caplog.text)


def test_the_age_of_the_process_counts_from_before_any_import() -> None:
    began = time.monotonic() - process_age_s()
    assert began < server_module._IMPORTED_AT
