"""The same bytes through our protocol, in process on a transport without a socket, and through h11: where each sees requests end."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.server import ServerState

from service.http.connection.guarded_protocol import GuardedProtocol
from service.http.connection.guards import Guards
from service.settings import Settings


@dataclass
class Request:
    """A request as a parser saw it. `body` is None where nobody read it."""

    method: bytes
    target: bytes
    body: bytes | None


@dataclass
class Outcome:
    """The requests that came to their end, and what became of the connection."""

    requests: list[Request] = field(default_factory=list)
    refused: int | None = None  # the status of an answer that belongs to no whole request
    answers: list[int] = field(default_factory=list)
    closed: bool = False


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.closed = self.paused = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def write_eof(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True


class Recorder:
    """An ASGI application that notes each request, and answers those whose number is in `early` without reading the body."""

    def __init__(self, early: Sequence[int] = ()) -> None:
        self.early = early
        self.seen: list[Request] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reads = len(self.seen) not in self.early
        query = b"?" + scope["query_string"] if scope["query_string"] else b""
        request = Request(scope["method"].encode(), scope["raw_path"] + query, b"" if reads else None)
        self.seen.append(request)
        while request.body is not None:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            request.body += message["body"]
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


async def through_ours(pieces: Iterable[bytes], early: Sequence[int] = ()) -> Outcome:
    """Sends pieces one after another, each once the one before is dealt with; stops where the connection closes."""
    app, state, transport = Recorder(early), ServerState(), Transport()
    config = Config(app, loop="asyncio", ws="none", lifespan="off", log_config=None, access_log=False)
    guards = Guards.of(Settings(data=Path("none"), weights=Path("none")), 1024)
    protocol = GuardedProtocol(config, state, {}, asyncio.get_running_loop(), guards=guards)
    protocol.connection_made(transport)
    for piece in pieces:
        await settled(protocol, transport)
        if transport.closed or protocol._refused:
            break
        protocol.data_received(piece)
    await settled(protocol, transport)
    cut = app.seen and not protocol._in_head
    statuses = [
        int(line.split()[1]) for line in bytes(transport.written).split(b"\r\n") if line.startswith(b"HTTP/1.1 ")
    ]
    answers = [status for status in statuses if status != 100]
    refused = answers[-1] if protocol._refused and answers and answers[-1] != 200 else None
    closed = transport.closed or protocol._refused
    protocol.connection_lost(None)
    if state.tasks:
        await asyncio.wait(state.tasks)
    return Outcome(app.seen[:-1] if cut else app.seen, refused, answers, closed)


async def settled(protocol: GuardedProtocol, transport: Transport) -> None:
    """Lets the loop run until every whole request that came is answered."""
    for _ in range(10_000):
        await asyncio.sleep(0)
        if transport.closed or not (protocol._waiting or transport.paused or (protocol._in_head and protocol._owed)):
            return


def through_h11(data: bytes) -> Outcome:
    """Reads requests with h11's parser for servers, one after another, until it refuses one or one is not whole. Line ends before a
    request are skipped, which h11 does not (RFC 9112, 2.2)."""
    outcome = Outcome()
    while not outcome.closed:
        connection = h11.Connection(h11.SERVER)
        connection.receive_data(data.lstrip(b"\r\n"))
        try:
            request = connection.next_event()
            if not isinstance(request, h11.Request):
                return outcome
            body = b""
            while isinstance(event := connection.next_event(), h11.Data):
                body += event.data
        except h11.RemoteProtocolError as error:
            outcome.refused = error.error_status_hint
            return outcome
        if not isinstance(event, h11.EndOfMessage):
            return outcome
        outcome.requests.append(Request(request.method, request.target, body))
        tokens = b",".join(value.lower() for name, value in request.headers if name == b"connection").split(b",")
        outcome.closed = request.http_version < b"1.1" or b"close" in [token.strip() for token in tokens]
        data = connection.trailing_data[0]
    return outcome
