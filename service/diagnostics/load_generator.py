"""A closed-loop load generator: a number of connections, each of which sends its next image when the last answer has arrived.

    bodies, models --plan--> (head, body) --Connection.exchange--> status        one task per connection, keep-alive
    statuses, latencies --Tally.report--> LoadReport

It often shares its cores with the measured server, so it does as little as it can: requests are built beforehand, bodies are sent without
a copy, and of answers only the head is read. Its own CPU time is part of the report.
"""

import asyncio
import itertools
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast
from urllib.parse import quote, urlsplit

from httptools import HttpParserError, HttpResponseParser

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
TICK_S = 1.0  # how often `on_tick` hears of progress
RECONNECT_S = 0.1  # a refused connection is tried again after this, not at once

Request = tuple[bytes, bytes]  # head, body


@dataclass(frozen=True)
class LoadPlan:
    """What to send. It ends after `duration_s` or after `requests`, whichever comes first; one of the two is needed."""

    url: str = "http://127.0.0.1:8000"
    path: str = "/predict"
    models: tuple[str, ...] = ()  # taken in turn, one a request; none: the server's default model
    concurrency: int = 32
    duration_s: float | None = 10.0
    requests: int | None = None
    api_key: str | None = None
    timeout_s: float = 30.0
    content_type: str = "application/octet-stream"

    def __post_init__(self) -> None:
        if self.duration_s is None and self.requests is None:
            raise ValueError("a load needs an end: a duration, a number of requests, or both")
        if self.concurrency < 1:
            raise ValueError(f"concurrency is at least 1, not {self.concurrency}")
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise ValueError(f"{self.url!r} is no address of a server; one looks like http://127.0.0.1:8000")


@dataclass(frozen=True)
class LoadReport:
    """The result. Latencies are of answers with a 2xx status, in milliseconds, from the first byte sent to the last received."""

    url: str
    models: tuple[str, ...]
    concurrency: int
    seconds: float
    requests: int
    ok: int
    statuses: dict[str, int]
    errors: dict[str, int]  # requests that got no answer, by cause
    images_per_second: float
    latency_ms: dict[str, float] = field(default_factory=dict)  # p50, p90, p99, max; empty when nothing succeeded
    client_cpu_seconds: float = 0.0

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


class Tally:
    """Counts while the load runs."""

    def __init__(self) -> None:
        self.latencies: list[float] = []  # seconds, of 2xx answers
        self.statuses: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    def answered(self, status: int, seconds: float) -> None:
        self.statuses[str(status)] += 1
        if 200 <= status < 300:
            self.latencies.append(seconds)

    @property
    def requests(self) -> int:
        return self.statuses.total() + self.errors.total()

    def report(self, load: LoadPlan, seconds: float, cpu_seconds: float) -> LoadReport:
        return LoadReport(
            url=load.url,
            models=load.models,
            concurrency=load.concurrency,
            seconds=round(seconds, 3),
            requests=self.requests,
            ok=len(self.latencies),
            statuses=dict(sorted(self.statuses.items())),
            errors=dict(self.errors),
            images_per_second=round(len(self.latencies) / seconds, 2),
            latency_ms=percentiles(self.latencies),
            client_cpu_seconds=round(cpu_seconds, 3),
        )


class Connection(asyncio.Protocol):
    """One keep-alive HTTP/1.1 connection with at most one request under way."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.answer: asyncio.Future[int] | None = None
        self.parser = HttpResponseParser(self)
        self.headers: dict[bytes, bytes] = {}  # of the last answer, names in lower case

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    @property
    def open(self) -> bool:
        return self.transport is not None and not self.transport.is_closing()

    async def exchange(self, head: bytes, body: bytes) -> int:
        """Sends a request and waits for the whole answer. Returns its status; ConnectionError if the server hangs up."""
        if self.transport is None:
            raise RuntimeError("exchange on a connection that was never made")
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.writelines((head, body))
        return await self.answer

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except HttpParserError as error:
            self._fail(ConnectionError(f"the server's answer is not valid HTTP: {error}"))

    def on_message_begin(self) -> None:
        self.headers = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_message_complete(self) -> None:
        """Is called by the parser at the end of an answer."""
        if not self.parser.should_keep_alive():
            self.close()
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(self.parser.get_status_code())

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(ConnectionResetError("the server closed the connection before it answered"))

    def _fail(self, error: ConnectionError) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(error)
        self.close()

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Returns p50, p90, p99 and max in milliseconds: for each the smallest latency that so many percent of the answers did not exceed."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    ranks = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    last = len(ordered) - 1
    return {name: round(ordered[min(last, int(rank * len(ordered)))] * 1000, 3) for name, rank in ranks.items()}


def read_images(folder: Path) -> list[bytes]:
    """Reads the image files under a folder, sorted by name, or a single file. Raises FileNotFoundError if there is none."""
    paths = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"no image files under {folder}")
    return [path.read_bytes() for path in paths]


def plan(load: LoadPlan, bodies: Sequence[bytes]) -> Iterator[Request]:
    """Yields requests without end; takes models and images in turn."""
    for model, body in zip(itertools.cycle(load.models or (None,)), itertools.cycle(bodies), strict=False):
        yield request_head(load, model, len(body)), body


def request_head(load: LoadPlan, model: str | None, length: int) -> bytes:
    path = urlsplit(load.url).path.rstrip("/") + load.path  # a proxy may serve Imago under a path of its own
    target = f"{path}?model={quote(model)}" if model else path
    key = f"Authorization: Bearer {load.api_key}\r\n" if load.api_key else ""
    return (
        f"POST {target} HTTP/1.1\r\nHost: {urlsplit(load.url).netloc}\r\n{key}"
        f"Content-Type: {load.content_type}\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


async def connect(load: LoadPlan) -> Connection:
    address = urlsplit(load.url)
    secure = address.scheme == "https"
    _, connection = await asyncio.get_running_loop().create_connection(
        Connection,
        str(address.hostname),
        address.port or (443 if secure else 80),
        ssl=ssl.create_default_context() if secure else None,
    )
    return connection


async def caller(load: LoadPlan, requests: Iterator[Request], tally: Tally) -> None:
    """Runs one of the load's connections: sends, waits, counts, until there are no requests left."""
    connection: Connection | None = None
    for head, body in requests:
        began = time.perf_counter()
        try:
            if connection is None or not connection.open:
                connection = await connect(load)
                began = time.perf_counter()
            async with asyncio.timeout(load.timeout_s):
                status = await connection.exchange(head, body)
        except OSError as error:  # TimeoutError among them
            tally.errors[type(error).__name__] += 1
            if connection is not None:
                connection.close()
            await asyncio.sleep(RECONNECT_S)
        else:
            tally.answered(status, time.perf_counter() - began)
    if connection is not None:
        connection.close()


def until(requests: Iterator[Request], load: LoadPlan) -> Iterator[Request]:
    """Yields the same requests, up to the load's end."""
    deadline = time.perf_counter() + load.duration_s if load.duration_s is not None else float("inf")
    for request in itertools.islice(requests, load.requests):
        if time.perf_counter() >= deadline:
            return
        yield request


async def _progress(tally: Tally, began: float, on_tick: Callable[[float, int], None]) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        on_tick(time.perf_counter() - began, tally.requests)


async def _run(load: LoadPlan, bodies: Sequence[bytes], on_tick: Callable[[float, int], None] | None) -> LoadReport:
    try:
        (await connect(load)).close()
    except OSError as error:  # an error, not a report of failures
        raise ConnectionError(f"no server answers at {load.url}: {error}") from error
    tally = Tally()
    cpu, began = time.process_time(), time.perf_counter()
    ticker = asyncio.create_task(_progress(tally, began, on_tick)) if on_tick else None
    requests = until(plan(load, bodies), load)  # shared: each caller takes the next one
    await asyncio.gather(*(caller(load, requests, tally) for _ in range(load.concurrency)))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    if ticker:
        ticker.cancel()
    return tally.report(load, seconds, cpu)


def run(load: LoadPlan, bodies: Sequence[bytes], on_tick: Callable[[float, int], None] | None = None) -> LoadReport:
    """Sends the load and waits for every answer. Calls `on_tick(seconds, requests)` about once a second.

    Raises ConnectionError (an OSError) if there is no server at that address, ValueError if there are no bodies.
    """
    if not bodies:
        raise ValueError("a load needs at least one image")
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        return runner.run(_run(load, bodies, on_tick))


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # Windows has none
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
