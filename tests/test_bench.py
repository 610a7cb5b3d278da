"""The load generator, against a small server that answers as it is told."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest

from service.diagnostics.load_generator import Connection, LoadPlan, percentiles, plan, read_images, run

pytestmark = pytest.mark.system

Seen = list[tuple[str, bytes]]  # path, body


@contextmanager
def server(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[tuple[str, Seen]]:
    """Yields the address of a server that reads each request and then does what `answer` says, and what it has seen."""
    seen: Seen = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            seen.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            answer(self)

        def log_message(self, format: str, *args: object) -> None: ...

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    thread = threading.Thread(target=lambda: listening.serve_forever(poll_interval=0.01))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}", seen
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


def ok(handler: BaseHTTPRequestHandler) -> None:
    status(200)(handler)


def status(code: int) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        handler.send_header("Content-Length", "2")
        handler.end_headers()
        handler.wfile.write(b"{}")

    return answer


def test_run_sends_as_many_requests_as_asked() -> None:
    with server(ok) as (url, seen):
        report = run(LoadPlan(url, concurrency=3, duration_s=None, requests=20), [b"a", b"bb"])
    assert report.requests == report.ok == len(seen) == 20
    assert report.statuses == {"200": 20}
    assert not report.errors
    assert {body for _, body in seen} == {b"a", b"bb"}


def test_run_stops_after_its_duration() -> None:
    with server(ok) as (url, _):
        report = run(LoadPlan(url, concurrency=2, duration_s=0.2), [b"a"])
    assert 0.2 <= report.seconds < 2
    assert report.ok > 0


def test_run_keeps_its_connections() -> None:
    ports: set[int] = set()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        ports.add(handler.client_address[1])
        ok(handler)

    with server(answer) as (url, _):
        run(LoadPlan(url, concurrency=4, duration_s=None, requests=40), [b"a"])
    assert len(ports) <= 4


def test_models_are_taken_in_turn() -> None:
    with server(ok) as (url, seen):
        run(LoadPlan(url, models=("a", "b"), concurrency=1, duration_s=None, requests=4), [b"x"])
    assert [path for path, _ in seen] == ["/predict?model=a", "/predict?model=b"] * 2


@pytest.mark.parametrize("code", [pytest.param(429, id="queue full"), pytest.param(500, id="internal")])
def test_failures_are_counted_by_status_and_have_no_latency(code: int) -> None:
    with server(status(code)) as (url, _):
        report = run(LoadPlan(url, concurrency=1, duration_s=None, requests=3), [b"a"])
    assert report.statuses == {str(code): 3}
    assert (report.ok, report.latency_ms, report.images_per_second) == (0, {}, 0)


def test_a_server_that_hangs_up_is_an_error_of_that_request_alone() -> None:
    answers = iter([True, False, True, True])

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if next(answers):
            ok(handler)
        else:
            handler.close_connection = True

    with server(answer) as (url, _):
        report = run(LoadPlan(url, concurrency=1, duration_s=None, requests=4), [b"a"])
    assert report.statuses == {"200": 3}
    assert report.errors == {"ConnectionResetError": 1}


def test_a_server_that_closes_after_each_answer_is_connected_to_again() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    with server(answer) as (url, _):
        report = run(LoadPlan(url, concurrency=1, duration_s=None, requests=3), [b"a"])
    assert (report.ok, report.errors) == (3, {})


def test_an_answer_that_does_not_come_is_a_timeout() -> None:
    with server(lambda handler: time.sleep(0.5)) as (url, _):
        report = run(LoadPlan(url, concurrency=1, duration_s=None, requests=1, timeout_s=0.05), [b"a"])
    assert report.errors == {"TimeoutError": 1}


def test_no_server_is_an_error() -> None:
    with server(ok) as (url, _):
        pass
    with pytest.raises(OSError, match=r"refused|connect"):
        run(LoadPlan(url, requests=1), [b"a"])


def test_latency_is_measured() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.03)
        ok(handler)

    with server(answer) as (url, _):
        report = run(LoadPlan(url, concurrency=1, duration_s=None, requests=3), [b"a"])
    assert 30 <= report.latency_ms["p50"] <= report.latency_ms["max"] < 1000


@pytest.mark.parametrize(
    ("received", "whole"),
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Le", False, id="half a head"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab", False, id="half a body"),
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc", True, id="body"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", False, id="half chunked"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", True, id="chunked"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7\r\n0\r\n\r\n", False, id="looks like an end"
        ),
        pytest.param(b"HTTP/1.1 204 No Content\r\nServer: x\r\n\r\n", True, id="no body"),
    ],
)
async def test_an_answer_is_whole_however_it_is_framed(received: bytes, whole: bool) -> None:
    """And however it is cut: here into single bytes."""
    connection = Connection()
    connection.connection_made(mock.create_autospec(asyncio.Transport, is_closing=lambda: False))
    answer = asyncio.create_task(connection.exchange(b"head", b"body"))
    await asyncio.sleep(0)
    for byte in received:
        connection.data_received(bytes([byte]))
    await asyncio.sleep(0)
    assert answer.done() is whole
    answer.cancel()


def test_an_answer_that_is_not_http_is_an_error_of_that_request() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"SSH-2.0-OpenSSH\r\n")

    with server(answer) as (url, _):
        report = run(LoadPlan(url, concurrency=1, duration_s=None, requests=1), [b"a"])
    assert report.errors == {"ConnectionError": 1}


def test_percentiles_of_a_hundred() -> None:
    found = percentiles([n / 1000 for n in range(100)])
    assert found == {"p50": 50, "p90": 90, "p99": 99, "max": 99}


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"duration_s": None}, id="no end"),
        pytest.param({"concurrency": 0}, id="nobody"),
        pytest.param({"url": "localhost:8000"}, id="no scheme"),
    ],
)
def test_a_load_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        LoadPlan(**wrong)  # type: ignore[arg-type]


def test_the_key_is_sent() -> None:
    head, _ = next(plan(LoadPlan(api_key="secret"), [b"a"]))
    assert b"\r\nAuthorization: Bearer secret\r\n" in head


def test_read_images_takes_images_alone(tmp_path: Path) -> None:
    (tmp_path / "b.JPEG").write_bytes(b"b")
    (tmp_path / "notes.txt").write_bytes(b"no")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(b"a")
    assert read_images(tmp_path) == [b"b", b"a"]
    with pytest.raises(FileNotFoundError, match="no image files"):
        read_images(tmp_path / "nowhere")
