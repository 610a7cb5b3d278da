"""Sends hostile requests to a live server, and measures what they do to everybody else.

    with live_server(weights, root, watched=True) as server:
        seen = attack(server, [Hostile("POST", "/predict", b"...")])
    assert seen.stall_ms < LONGEST_STALL_MS

`make attack` runs every test of a row A... of abuse.tsv and prints these figures for each (attack_report.py).
"""

import http.client
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from support.live_server import LiveServer

LONGEST_STALL_MS = 100.0  # that any request may cause
PATIENCE_S = 60.0
ATTACKS: "list[Seen]" = []  # `make attack` reads those of each test


@dataclass(frozen=True)
class Hostile:
    """A request, and what to call it."""

    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    name: str = ""

    def __str__(self) -> str:
        return f"{self.method} {self.path[:80]} {self.name}".strip()

    def send(self, port: int) -> tuple[int, bytes]:
        """Status and body of the answer; status 0 where the server closed the connection without one."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        try:
            connection.request(self.method, self.path, self.body or None, dict(self.headers))
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (ConnectionError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()


@dataclass(frozen=True)
class Seen:
    """What some requests did."""

    stall_ms: float  # the longest that the event loop could not run; see pulse.py
    health_ms: float  # the longest wait for /health/live, by the wall clock
    peak_mb: float  # resident memory
    seconds: float
    statuses: Counter[int]
    answer_bytes: int  # of the largest answer


class Health(threading.Thread):
    """Asks for /health/live all the time, over one connection, and keeps the longest wait."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port, self.longest_ms, self._over = port, 0.0, threading.Event()

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        while not self._over.wait(0.01):
            started = time.monotonic()
            connection.request("GET", "/health/live")
            connection.getresponse().read()
            self.longest_ms = max(self.longest_ms, 1000 * (time.monotonic() - started))
        connection.close()

    def stop(self) -> None:
        self._over.set()
        self.join()


def attack(server: LiveServer, requests: Iterable[Hostile], clients: int = 1) -> Seen:
    """Sends all of them, `clients` at a time."""
    health, started = Health(server.port), time.monotonic()
    server.pulse.reset()
    health.start()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda request: request.send(server.port), requests))
    health.stop()
    seen = Seen(
        stall_ms=server.pulse.longest_ms,
        health_ms=health.longest_ms,
        peak_mb=server.peak_mb(),
        seconds=time.monotonic() - started,
        statuses=Counter(status for status, _ in answers),
        answer_bytes=max((len(body) for _, body in answers), default=0),
    )
    ATTACKS.append(seen)
    return seen
