"""Memory that bodies take: no more than arrived, a share for each client, and back to the system afterwards."""

import asyncio
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from support.image_files import photo, save
from support.live_server import LiveServer, live_server, weights  # noqa: F401  (a fixture)
from support.service_fakes import Service, client_of

from service.http.memory_trimming import MOST_PAUSE_S, PERIOD_S, WORTH_IT, Trimmer
from service.http.middleware import BODY_SHARE, Traffic
from service.http.uploads.body import BLOCK, MOST_SPARE, SMALL, BodyBuffer
from service.inference.backbone_queue import Shares

MB = 2**20
JPEG = {"Content-Type": "image/jpeg"}


@pytest.mark.parametrize("size", [0, 1, SMALL, SMALL + 1, BLOCK, 3 * BLOCK, 3 * BLOCK + 5])
@pytest.mark.parametrize("step", [1000, 70_001, 5 * MB])
def test_a_body_is_what_was_added(size: int, step: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    bodies = BodyBuffer(), BodyBuffer()
    for body in bodies:
        for start in range(0, size, step):
            body.add(memoryview(data)[start : min(start + step, size)])
    assert bodies[0].take() == data[:size] == bytes(bodies[1].take_array())
    assert bodies[0].take() == b""


GROW = """
import runpy
from service.http.uploads.body import BodyBuffer
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
runpy.run_path("models/runtime/allocator.py")["tune_allocator"]()
bodies = [BodyBuffer() for _ in range(30)]
before, piece = resident(), b"x" * 65536
for _ in range(4 * 16):
    for body in bodies:
        body.add(piece)
grown = resident() - before
for body in bodies:
    body.close()
print(grown, resident() - before)
"""


@pytest.mark.abuse("A501")
def test_bodies_side_by_side_take_what_has_arrived_and_give_it_back() -> None:
    """30 bodies of 4 MB, by 64 KB in turn, under the allocator as the server sets it."""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", GROW], check=True, capture_output=True, text=True, cwd=root)
    grown, left = map(int, done.stdout.split())
    assert 115 < grown < 140
    assert left < 16 + MOST_SPARE


@pytest.mark.abuse("A512")
def test_slow_bodies_of_one_client_leave_room_for_others() -> None:
    bodies = Shares(512 * MB, BODY_SHARE)
    for _ in range(240):
        for request in range(34):
            if bodies.fits("flood", request, 65536):
                bodies.take("flood", request, 65536)
    assert 230 * MB < bodies.total <= 256 * MB
    assert bodies.fits("another", 0, 64 * MB)
    assert bodies.fits("flood", 34, MB)  # a small request of the same address


@pytest.mark.abuse("A512")
async def test_a_client_is_refused_for_its_own_bodies_alone(tmp_path: Path) -> None:
    service = Service(tmp_path, max_body_mb=1, max_queue_mb=2)
    service.engine.gate = asyncio.Event()
    async with client_of(service) as http:
        first = asyncio.create_task(http.post("/predict", content=b"x" * 900_000))
        await service.engine.waiting.wait()
        second = await http.post("/predict", content=b"x" * 900_000)
        small = asyncio.create_task(http.post("/predict", content=b"x" * 10_000))
        transport = httpx.ASGITransport(http._transport.app, client=("192.0.2.7", 1))  # type: ignore[attr-defined]
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as other:
            another = asyncio.create_task(other.post("/predict", content=b"x" * 200_000, headers=JPEG))
            await asyncio.sleep(0.05)
            service.engine.gate.set()
            answers = [await first, second, await small, await another]
    assert [answer.status_code for answer in answers] == [200, 429, 200, 200]
    assert "your share" in second.json()["error"]["message"]


class Memory:
    """Resident memory and traffic as a test says; a trim frees what is not in use."""

    def __init__(self) -> None:
        self.resident = self.used = 1000 * MB
        self.traffic = Traffic()
        self.trims = 0
        self.trimmer = Trimmer(self.traffic, lambda: self.resident, self._trim)

    def _trim(self) -> None:
        self.trims += 1
        self.resident = self.used

    def pass_s(self, seconds: float, now: float) -> float:
        for _ in range(int(seconds / PERIOD_S)):
            now += PERIOD_S
            if self.trimmer.due(now):
                self.trimmer.trim()
        return now


@pytest.mark.abuse("A513")
def test_memory_is_given_back_when_a_burst_is_over() -> None:
    memory = Memory()
    now = memory.pass_s(100, 1000.0)
    memory.resident += 500 * MB
    memory.traffic.held = 400 * MB
    now = memory.pass_s(20, now)
    assert memory.trims == 0  # the burst is under way
    memory.traffic.held = 0
    now = memory.pass_s(6, now)
    assert (memory.trims, memory.resident) == (1, 1000 * MB)
    memory.pass_s(100, now)
    assert memory.trims == 1


def test_memory_that_is_in_use_is_not_asked_for_again() -> None:
    memory = Memory()
    memory.used += 900 * MB  # a model was loaded
    memory.resident = memory.used
    memory.pass_s(1000, 1000.0)
    assert memory.trims == 1


def test_memory_that_is_soon_taken_again_is_trimmed_ever_less_often() -> None:
    memory, now = Memory(), 1000.0
    memory.traffic.begin()
    for _ in range(3600):
        memory.resident = memory.used + 2 * WORTH_IT
        now = memory.pass_s(PERIOD_S, now)
        if memory.trims:
            memory.trimmer._last = memory.resident  # it grew at once and has been steady since
    assert memory.trims < 7200 / MOST_PAUSE_S + 10


@pytest.mark.abuse("A513")
async def test_after_many_bursts_memory_is_given_back_once_nothing_is_asked() -> None:
    memory, now = Memory(), 1000.0
    for trims in range(1, 8):
        memory.traffic.begin()
        memory.resident = memory.used + 2 * WORTH_IT
        now = memory.pass_s(6, now)
        memory.traffic.end()
        now = memory.pass_s(14, now)
        assert (memory.trims, memory.resident) == (trims, memory.used)


def trickle(port: int, stop: threading.Event) -> None:
    """15 of 16 MB, then 9 KB a second; again when the connection breaks."""
    while not stop.is_set():
        try:
            with socket.create_connection(("127.0.0.1", port), 5) as connection:
                connection.sendall(
                    b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 16777216\r\n\r\n"
                )
                for _ in range(240):
                    connection.sendall(b"x" * 65536)
                while not stop.wait(1):
                    connection.sendall(b"y" * 9000)
        except OSError:
            stop.wait(0.2)


def attack(server: LiveServer, image: bytes, seconds: float) -> tuple[list[int], float]:
    """The statuses of another request of the same address meanwhile, and the most memory, MB."""
    stop = threading.Event()
    threads = [threading.Thread(target=trickle, args=(server.port, stop)) for _ in range(34)]
    for thread in threads:
        thread.start()
    time.sleep(3)
    statuses, most, ends = [], 0.0, time.monotonic() + seconds
    while time.monotonic() < ends:
        statuses.append(httpx.post(server.url + "/predict", content=image, headers=JPEG, timeout=30).status_code)
        most = max(most, server.memory_mb())
        time.sleep(0.1)
    stop.set()
    for thread in threads:
        thread.join()
    return statuses, most


@pytest.mark.soak
@pytest.mark.abuse("A501", "A512", "A513")
def test_a_server_under_slow_bodies(weights: Path, tmp_path: Path) -> None:  # noqa: F811
    image = save(photo(640, 480), "JPEG")
    with live_server(weights, tmp_path) as server:
        httpx.post(server.url + "/predict", content=image, headers=JPEG).raise_for_status()
        before = server.memory_mb()
        statuses, most = attack(server, image, 10)
        time.sleep(8)
        after = server.memory_mb()
    assert set(statuses) == {200}
    assert most - before < 512
    assert after - before < 100
