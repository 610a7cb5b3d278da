"""What a connection may hold: requests that wait, answers that nobody reads, the connection itself."""

import asyncio
import contextlib
import socket
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Response
from support.framing import Request, Transport, through_ours
from support.service_fakes import GOOD, Service
from test_server import HEAD, OK, PATIENCE_S, port_of, serving, small, talk, until, url_of
from uvicorn.config import Config
from uvicorn.server import ServerState

from service.http.connection import guarded_protocol as protocol
from service.http.connection.guarded_protocol import GuardedProtocol
from service.http.connection.guards import Guards
from service.http.connection.held_bytes import HeldBytes
from service.server import Server
from service.settings import Settings

pytestmark = pytest.mark.anyio
LARGE = 30 * 2**20  # bytes of an answer: more than the kernel takes
GET = b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"


# Requests that wait


@pytest.mark.abuse("A502")
async def test_pipelined_requests_wait_as_the_bytes_that_came() -> None:
    gate = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await gate.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    config = Config(app, loop="asyncio", ws="none", lifespan="off", log_config=None)
    guards = Guards.of(Settings(data=Path("none"), weights=Path("none")), 1024)
    state, stream = ServerState(), GET * (250_000 // len(GET))
    tracemalloc.start()
    protocols = [GuardedProtocol(config, state, {}, asyncio.get_running_loop(), guards=guards) for _ in range(20)]
    transports = [Transport() for _ in protocols]
    for one, transport in zip(protocols, transports, strict=True):
        one.connection_made(transport)
        one.data_received(bytes(bytearray(stream)))  # bytes of its own, as from a socket
        assert transport.paused
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * 2**20
    assert len(state.tasks) == 20  # one request of each connection
    assert 20 * 240_000 < guards.held.total < 20 * 260_000
    for one in protocols:
        one.connection_lost(None)
    gate.set()
    await asyncio.wait(state.tasks)
    assert guards.held.total == 0


@pytest.mark.abuse("A502")
async def test_pipelined_requests_are_all_answered_in_order() -> None:
    stream = b"".join(b"POST /%d HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab\r\n" % i for i in range(400))
    outcome = await through_ours([stream])
    assert outcome.requests == [Request(b"POST", b"/%d" % i, b"ab") for i in range(400)]
    assert outcome.answers == [200] * 400


async def test_a_chunked_body_of_single_bytes_costs_little() -> None:
    """A quarter of a megabyte, which is one read, in pieces of a byte: the loop must not stop for it."""
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    began = time.process_time()
    outcome = await through_ours([head + b"1\r\nx\r\n" * 40_000 + b"0\r\n\r\n"])
    assert outcome.requests == [Request(b"POST", b"/", b"x" * 40_000)]
    assert time.process_time() - began < 0.5


@pytest.mark.abuse("A206")
@pytest.mark.parametrize("endless", [b"0\r\nX: ", b"1;a="])
async def test_endless_trailers_and_chunk_extensions_are_refused(endless: bytes) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    outcome = await through_ours([head + endless, *[b"y" * 8192] * 20])
    assert (outcome.answers, outcome.closed) == ([431], True)


async def test_a_length_of_thousands_of_digits_is_refused_by_its_head(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Python converts no number of more than 4,300 digits; the parser reads zeros in front for ever."""
    async with serving(small(tmp_path)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        writer.write(HEAD + b"Content-Length: " + b"0" * 6000 + b"3\r\n\r\nabc")
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"digits" in answer
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_blanks_around_values_are_no_part_of_them(tmp_path: Path) -> None:
    async with serving(small(tmp_path)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        head = (
            HEAD.replace(b"Host: x", b"Host:\tlocalhost:80 \t")
            + b"Connection: close \r\nContent-Length:\t10\t \r\n\r\n"
        )
        writer.write(head + GOOD)
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()
    assert answer.startswith(b"HTTP/1.1 200 OK")


# Oddities of one connection


@pytest.mark.abuse("A1641")
@pytest.mark.parametrize("behind", [b"\r\n", b"GET /health/live HT"])
async def test_the_timer_of_the_next_head_starts_when_the_answer_is_out(tmp_path: Path, behind: bytes) -> None:
    service = small(tmp_path, head_timeout_s=0.3)
    service.engine.gate = asyncio.Event()
    async with serving(service) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        writer.write(HEAD + b"Content-Length: 10\r\n\r\n" + GOOD + behind)
        await asyncio.sleep(0.8)
        service.engine.gate.set()
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
        writer.close()
    assert answer.startswith(b"HTTP/1.1 200 OK")


@pytest.mark.abuse("A1642")
@pytest.mark.parametrize("pause_s", [0.0, 1.0])
async def test_a_sender_that_ends_its_side_gets_its_answer(tmp_path: Path, pause_s: float) -> None:
    service = small(tmp_path)
    service.engine.gate = asyncio.Event()
    async with serving(service) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        writer.write(HEAD + b"Content-Length: 10\r\n\r\n" + GOOD + OK)
        writer.write_eof()
        await asyncio.sleep(pause_s)  # meanwhile the server sends the answer's first bytes
        service.engine.gate.set()
        answers = await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()
    assert answers.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answers.count(b"HTTP/1.1 200 OK\r\n") == 2


@pytest.mark.abuse("A1643")
async def test_a_good_request_and_garbage_in_one_packet(tmp_path: Path) -> None:
    async with serving(small(tmp_path)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        writer.write(OK + b"GARBAGE\r\n\r\n")
        answers = await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()
    assert [part.split()[0] for part in answers.split(b"HTTP/1.1 ")[1:]] == [b"200", b"400"]


@pytest.mark.abuse("A1644")
@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", 400, "bad_request", id="two hosts"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", 400, "bad_request", id="no host"),
        pytest.param(
            HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501, "transfer_coding_unknown", id="coding"
        ),
        pytest.param(
            b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "bad_request", id="1.0, chunked"
        ),
    ],
)
async def test_heads_that_can_be_read_in_two_ways(tmp_path: Path, head: bytes, status: int, code: str) -> None:
    async with serving(small(tmp_path)) as server:
        answered, error = await talk(server, head, OK)
    assert (answered, error["code"]) == (status, code)


@pytest.mark.abuse("A1645")
async def test_head_of_the_page(tmp_path: Path) -> None:
    async with serving(small(tmp_path)) as server, httpx.AsyncClient(base_url=url_of(server)) as http:
        answer = await http.head("/")
    assert (answer.status_code, answer.content) == (200, b"")


async def test_a_body_that_stops_after_an_early_answer_gets_no_second_one() -> None:
    """A second answer would be taken for that of the next request on a proxy's connection."""
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    outcome = await through_ours([head, b"zz\r\n"], early=[0])
    assert (outcome.answers, outcome.closed) == ([200], True)


# Answers that nobody reads


def with_large_answers(tmp_path: Path, **settings: Any) -> Service:
    service = small(tmp_path, **settings)
    service.app.add_api_route("/large", lambda: Response(b"x" * LARGE), methods=["GET"])
    return service


@contextlib.contextmanager
def asking(server: Server, close: bool = False) -> Iterator[socket.socket]:
    """A connection that has asked for a large answer, and has little room for it."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.connect(("127.0.0.1", port_of(server)))
        ending = b"Connection: close\r\n" if close else b""
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n" + ending + b"\r\n")
        connection.setblocking(False)
        yield connection


def guards_of(server: Server) -> Guards:
    protocol: Any = server.config.http
    guards: Guards = protocol.keywords["guards"]
    return guards


@pytest.mark.abuse("A503")
@pytest.mark.parametrize("close", [False, True])
async def test_an_answer_that_nobody_reads_is_dropped(tmp_path: Path, close: bool) -> None:
    async with serving(with_large_answers(tmp_path, write_timeout_s=0.3)) as server:
        held = guards_of(server).held
        with asking(server, close):
            await until(lambda: held.total > LARGE / 2)
            await until(lambda: not server.server_state.connections)
        assert held.total == 0


@pytest.mark.abuse("A503")
async def test_an_answer_that_is_read_slowly_is_read_whole(tmp_path: Path) -> None:
    async with serving(with_large_answers(tmp_path, write_timeout_s=0.5)) as server:
        loop = asyncio.get_running_loop()
        with asking(server) as connection:
            size, began = 0, loop.time()
            while size < LARGE:
                data = await loop.sock_recv(connection, 2**20)
                assert data
                size += len(data)
                if loop.time() - began < 1.5:  # three spans
                    await asyncio.sleep(0.05)


@pytest.mark.abuse("A503")
async def test_unread_answers_are_bounded_per_address(tmp_path: Path) -> None:
    async with serving(with_large_answers(tmp_path, max_held_mb=120)) as server:
        held = guards_of(server).held
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(asking(server))
            await until(lambda: server.server_state.total_requests == 4)
            await until(lambda: len(server.server_state.connections) < 4)
            assert 0 < held.total <= 60 * 2**20


@pytest.mark.abuse("A504")
async def test_a_shutdown_does_not_wait_for_clients_that_do_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "LINGER_S", 0.3)
    service = with_large_answers(tmp_path, write_timeout_s=600, drain_seconds=600)
    async with serving(service) as server:
        with asking(server):
            await until(lambda: guards_of(server).held.total)
            server.stop()
            await until(lambda: server.should_exit and not server.server_state.connections)
    assert server.exit_code == 0


@pytest.mark.abuse("H7")
@pytest.mark.parametrize(("pieces", "pause_s"), [pytest.param(40, 0, id="at once"), pytest.param(4, 0.8, id="slowly")])
async def test_a_client_that_reads_after_it_has_sent_all_still_reads_the_413(
    tmp_path: Path, pieces: int, pause_s: float
) -> None:
    """Java's HttpClient: of 40 MB it got "fixed content-length: 140, bytes received: 0" instead of the answer."""

    def send_then_read(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (pieces * 2**20))
            for _ in range(pieces):
                time.sleep(pause_s)
                connection.sendall(bytes(2**20))
            return b"".join(iter(lambda: connection.recv(2**16), b""))

    async with serving(small(tmp_path)) as server:
        answer = await asyncio.to_thread(send_then_read, port_of(server))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"payload_too_large" in answer


# Connections


async def test_an_idle_connection_stays_open_as_long_as_the_setting_says(tmp_path: Path) -> None:
    assert Settings(data=tmp_path).keep_alive_s > 60  # a proxy's own
    async with serving(small(tmp_path, keep_alive_s=1)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        writer.write(OK + b"\r\n")
        await reader.readuntil(b"\r\n\r\n")
        began = time.monotonic()
        await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()
    assert time.monotonic() - began > 0.9


@pytest.mark.abuse("A1501")
async def test_at_the_limit_another_address_is_answered(tmp_path: Path) -> None:
    async with serving(small(tmp_path, max_connections=6)) as server:
        address = ("127.0.0.1", port_of(server))
        idle = [socket.create_connection(address, source_address=(f"127.0.0.{n}", 0)) for n in (2, 3) for _ in range(3)]
        await until(lambda: len(server.server_state.connections) == 6)
        transport = httpx.AsyncHTTPTransport(local_address="127.0.0.4")
        async with httpx.AsyncClient(base_url=url_of(server), transport=transport) as http:
            assert (await http.get("/health/live")).status_code == 200
        for one in idle:
            one.close()


def test_ipv6_connections_count_by_their_network(tmp_path: Path) -> None:
    guards = Guards.of(Settings(data=tmp_path, max_client_connections=2), 9)
    for last in range(3):
        guards.joined(f"2001:db8::{last}")
    assert not guards.lets_in("2001:db8::ffff")
    guards.joined("2001:db8:0:1::1")
    assert guards.lets_in("2001:db8:0:1::1")


def test_held_bytes_are_bounded_for_each_and_for_all() -> None:
    held = HeldBytes(100, 60)
    assert held.take("a", 60)
    assert not held.take("a", 1)
    assert not held.take("b", 41)
    assert held.take(None, 40)
    held.give("a", 60)
    assert (held.total, held.take("b", 60)) == (40, True)
