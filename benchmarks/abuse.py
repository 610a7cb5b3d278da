"""What slow clients and floods do to good traffic.

    python -m benchmarks.abuse [--quick] [--rounds N] [--seconds S]

`slow`: the p99 of two callers while 500 connections are idle, or send a head or a body byte by byte, over the p99 without them; both take
turns. `flood`: arrivals at ten times the capacity that was measured just before, whether or not there are answers. Of the accepted, their
latency against the deadline; of the refused, how soon, and how right `Retry-After` is: what it says, over the time in which as many
images as may wait were answered from then on (at least 1 s, the least it can say). Memory before and at its most; and the time from the
last arrival to an answer as quick as before.

Slow clients stand beside LeNet-5, whose answers take so little that any hold-up shows; the flood meets ResNet-18 on one thread, so that
this process can send ten times what it can take.
"""

import asyncio
import bisect
import multiprocessing
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from benchmarks import rig
from service.diagnostics.load_generator import Connection, LoadPlan, connect, percentiles, request_head, run

HEAVY, LIGHT = "resnet18", "lenet5"  # the first is the default model
SLOW, TIMES_CAPACITY = 500, 10
QUEUE, DEADLINE_MS = 16, 10_000  # images, milliseconds
FLAGS = (
    *(
        "--engine",
        "torch",
        "--precision",
        "float32",
        "--memory-format",
        "contiguous",
        "--threads",
        "1",
        "--max-batch",
        "8",
    ),
    *("--max-queue-images", str(QUEUE), "--timeout-ms", str(DEADLINE_MS)),
)
SIDE = 224  # pixels of the image that is sent
DRIP_S = 2.0  # between two bytes of a slow client, which is sent away after 10 s, or 60 s in a body, and comes again


@contextmanager
def server_of(root: Path) -> Iterator[rig.Server]:
    with rig.serving(rig.imago(root, *FLAGS), "/health/ready", root / "serve.log") as server:
        server.load([rig.noise(SIDE)], 2, 1.0, (HEAVY, LIGHT))  # warm
        yield server


# Slow clients

HALF_A_HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
HALF_A_BODY = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"
MANNERS = (b"", HALF_A_HEAD, HALF_A_BODY)
ADDRESSES = 4  # the server closes what comes beyond 256 connections from one


async def dawdle(url: str, opening: bytes, source: str) -> None:
    """One slow client for ever: it comes again when the server has sent it away."""
    address = urlsplit(url)
    while True:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection(address.hostname, address.port, local_addr=(source, 0))
            writer.write(opening)
            while not reader.at_eof():
                if opening:
                    writer.write(b"x")
                with suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(1000), DRIP_S)
            writer.close()


def dawdlers(url: str, count: int) -> None:
    """A process of slow clients, until it is ended."""

    async def main() -> None:
        sources = (f"127.0.0.{2 + i % ADDRESSES}" for i in range(count))
        await asyncio.gather(*(dawdle(url, MANNERS[i % len(MANNERS)], source) for i, source in enumerate(sources)))

    asyncio.run(main())


@contextmanager
def slow_clients(server: rig.Server, count: int) -> Iterator[None]:
    """So many are connected within."""
    process = multiprocessing.get_context("spawn").Process(target=dawdlers, args=(server.url, count), daemon=True)
    process.start()
    try:
        while connected(server) < count:
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.join()


def connected(server: rig.Server) -> int:
    return len([c for c in psutil.Process(server.pid).net_connections("tcp") if c.status == "ESTABLISHED"])


class Pulse(threading.Thread):
    """Asks for the server's health five times a second, and counts what it hears."""

    def __init__(self, server: rig.Server) -> None:
        super().__init__(daemon=True)
        self.url, self.heard = server.url + "/health/ready", Counter[str]()
        self._over = threading.Event()

    def run(self) -> None:
        with httpx.Client(timeout=10) as http:
            while not self._over.wait(0.2):
                try:
                    self.heard[str(http.get(self.url).status_code)] += 1
                except httpx.HTTPError as error:
                    self.heard[type(error).__name__] += 1

    def stop(self) -> dict[str, int]:
        self._over.set()
        self.join()
        return dict(self.heard)


def p99_ms(server: rig.Server, body: list[bytes], seconds: float, health: Counter[str]) -> float:
    """Of two callers, while the server's health is asked for; what that says is added to `health`."""
    pulse = Pulse(server)
    pulse.start()
    try:
        return server.load(body, 2, seconds, [LIGHT]).latency_ms["p99"]
    finally:
        health.update(pulse.stop())


def measure_slow(server: rig.Server, rounds: int, seconds: float, clients: int = SLOW) -> dict[str, Any]:
    body, without, beside, health = [rig.noise(SIDE)], list[float](), list[float](), Counter[str]()
    for _ in range(rounds):
        without.append(p99_ms(server, body, seconds, Counter()))
        with slow_clients(server, clients):
            beside.append(p99_ms(server, body, seconds, health))
    figures = {"p99_ms_without": rig.series(without), "p99_ms_beside": rig.series(beside)}
    return {"clients": clients, **figures, "ratio": rig.ratio(beside, without), "health": dict(health)}


# A flood


@dataclass(frozen=True)
class Outcome:
    """One request of the flood. Times are those of `time.perf_counter`, in seconds."""

    sent_at: float
    ended_at: float
    status: int  # 0: no answer
    retry_after_s: int

    @property
    def seconds(self) -> float:
        return self.ended_at - self.sent_at


class Flood:
    """Requests at a fixed rate over as many connections as that needs."""

    def __init__(self, url: str, body: bytes) -> None:
        self.load, self.body = LoadPlan(url), body
        self.head = request_head(self.load, None, len(body))
        self.outcomes: list[Outcome] = []
        self._idle: list[Connection] = []

    async def send(self, rate: float, seconds: float) -> None:
        began, tasks = time.perf_counter(), set[asyncio.Task[None]]()
        for number in range(int(rate * seconds)):
            if (wait := began + number / rate - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.add(asyncio.create_task(self._one()))
        await asyncio.gather(*tasks)
        for connection in self._idle:
            connection.close()

    async def _one(self) -> None:
        sent_at, status, retry = time.perf_counter(), 0, 0
        with suppress(OSError):
            connection = await self._connection()
            async with asyncio.timeout(self.load.timeout_s):
                status = await connection.exchange(self.head, self.body)
            retry = int(connection.headers.get(b"retry-after", 0))
            if connection.open:
                self._idle.append(connection)
        self.outcomes.append(Outcome(sent_at, time.perf_counter(), status, retry))

    async def _connection(self) -> Connection:
        while self._idle:
            if (connection := self._idle.pop()).open:  # the server closes those that were idle for 5 s
                return connection
        return await connect(self.load)


def honesty(outcomes: list[Outcome]) -> list[float]:
    """For each refusal what `Retry-After` said, over the seconds in which a full queue was answered from then on."""
    answered = sorted(outcome.ended_at for outcome in outcomes if outcome.status == 200)
    found = []
    for refused in (outcome for outcome in outcomes if outcome.status == 429):
        last = bisect.bisect(answered, refused.ended_at) + QUEUE - 1
        if last < len(answered):
            found.append(refused.retry_after_s / max(1.0, answered[last] - refused.ended_at))
    return found


class Memory(threading.Thread):
    """Watches the server's memory, in megabytes."""

    def __init__(self, server: rig.Server) -> None:
        super().__init__(daemon=True)
        self.server, self.before = server, server.memory_mb()
        self.most = self.before
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.5):
            self.most = max(self.most, self.server.memory_mb())

    def stop(self) -> dict[str, float]:
        self._over.set()
        self.join()
        return {
            "before": round(self.before, 1),
            "most": round(self.most, 1),
            "ratio": round(self.most / self.before, 3),
        }


def recovery_s(server: rig.Server, body: bytes, usual_ms: float) -> float:
    """Seconds until an answer comes as quickly as usual, within a factor of two."""
    began = time.perf_counter()
    while True:
        report = run(LoadPlan(server.url, concurrency=1, duration_s=None, requests=1), [body])
        if report.ok and report.latency_ms["max"] < 2 * usual_ms:
            return time.perf_counter() - began


def measure_flood(server: rig.Server, seconds: float, calibrate_s: float) -> dict[str, Any]:
    body = rig.noise(SIDE)
    usual_ms = server.load([body], 1, calibrate_s).latency_ms["p99"]
    capacity = server.load([body], 8, calibrate_s).images_per_second  # one client may have 12 of the 16 places
    asyncio.run(
        Flood(server.url, body).send(TIMES_CAPACITY * capacity, calibrate_s)
    )  # what is touched once stays in memory
    flood, memory = Flood(server.url, body), Memory(server)
    memory.start()
    last_arrival = time.perf_counter() + seconds
    asyncio.run(flood.send(TIMES_CAPACITY * capacity, seconds))
    recovered_s = time.perf_counter() - last_arrival + recovery_s(server, body, usual_ms)
    return {
        "capacity_per_s": capacity,
        "arrivals_per_s": round(len(flood.outcomes) / seconds, 1),
        "statuses": dict(Counter(str(outcome.status) for outcome in flood.outcomes)),
        "accepted_ms": percentiles([outcome.seconds for outcome in flood.outcomes if outcome.status == 200]),
        "deadline_ms": DEADLINE_MS,
        "refused_ms": percentiles([outcome.seconds for outcome in flood.outcomes if outcome.status == 429]),
        "retry_after": spread(honesty(flood.outcomes)),
        "memory_mb": memory.stop(),
        "recovered_s": round(recovered_s, 2),
    }


def spread(ratios: list[float]) -> dict[str, float]:
    """Of what is 1 when it is right: the median, and the share that is right within a factor of two."""
    near = [ratio for ratio in ratios if 0.5 <= ratio <= 2]
    return {"median": round(statistics.median(ratios), 2), "within_2": round(len(near) / len(ratios), 3)}


def main() -> None:
    args = rig.arguments(__doc__).parse_args()
    machine, quick = rig.machine(), args.quick
    with rig.store_of(HEAVY, LIGHT) as root, server_of(root) as server:
        slow = measure_slow(server, args.rounds or (1 if quick else 5), args.seconds or (2 if quick else 10))
        rig.say(f"slow: {slow}")
        flood = measure_flood(server, args.seconds or (5 if quick else 60), 2 if quick else 10)
    rig.finish({"benchmark": "abuse", "machine": machine, "slow": slow, "flood": flood})


if __name__ == "__main__":
    main()
