"""No request keeps the event loop waiting: hostile bodies, large answers, a thousand models."""

import gzip
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from live_server import LiveServer, live_server
from live_server import weights as weights
from support import hostile
from support.attack_driver import LONGEST_STALL_MS, Hostile, attack

KEY = "k" * 32
ADMIN = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def server(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(weights, tmp_path_factory.mktemp("server"), env={"IMAGO_ADMIN_KEY": KEY}, watched=True) as server:
        yield server


def test_the_driver_measures_a_server(server: LiveServer) -> None:
    seen = attack(server, [Hostile("GET", "/models")] * 3 + [Hostile("GET", "/no-such-path")], clients=2)
    assert seen.statuses == {200: 3, 404: 1}
    assert seen.stall_ms < LONGEST_STALL_MS
    assert seen.peak_mb > 100


@pytest.mark.abuse("A302")
def test_the_openapi_document_is_ready(server: LiveServer) -> None:
    assert attack(server, [Hostile("GET", "/openapi.json")]).stall_ms < LONGEST_STALL_MS


INFER = "/v2/models/insects/infer"
ZIPPED = {"Content-Type": "application/json", "Content-Encoding": "gzip"}


def inferences(size: int) -> list[Hostile]:
    bodies = hostile.infer_bodies(size)
    return [Hostile("POST", INFER, gzip.compress(body, 1), ZIPPED, name) for name, body in bodies]


def worst(server: LiveServer, requests: list[Hostile]) -> list[str]:
    """The requests that stalled the event loop for too long or got a 5xx, each sent alone."""
    found = []
    for request in requests:
        seen = attack(server, [request])
        if seen.stall_ms > LONGEST_STALL_MS or any(status == 0 or status >= 500 for status in seen.statuses):
            found.append(f"{request}: {seen.stall_ms:.0f} ms, {dict(seen.statuses)}")
    return found


@pytest.mark.abuse("A301")
@pytest.mark.parametrize("name", ["data of UINT8: empty lists", "data of FP32: lists of one", "unknown: keys"])
def test_8_kb_of_gzip_do_not_stop_the_event_loop(server: LiveServer, name: str) -> None:
    [body] = [body for found, body in hostile.infer_bodies(2**23 - 2**12) if found == name]
    seen = attack(server, [Hostile("POST", INFER, gzip.compress(body), ZIPPED)])
    assert seen.statuses == {400: 1}
    assert seen.stall_ms < LONGEST_STALL_MS


@pytest.mark.soak
@pytest.mark.abuse("A301")
def test_no_json_for_v2_stops_the_event_loop(server: LiveServer) -> None:
    assert worst(server, inferences(2**23 - 2**12)) == []


def requests_of(server: LiveServer, size: int) -> list[Hostile]:
    return [*hostile.requests(httpx.get(server.url + "/openapi.json").json(), ADMIN, size)]


@pytest.mark.abuse("A302")
def test_some_hostile_requests_of_every_kind(server: LiveServer) -> None:
    some = [*requests_of(server, 2**16 - 2**10)[::23], *inferences(2**16)[::7]]
    seen = attack(server, some)
    assert seen.stall_ms < LONGEST_STALL_MS
    assert not [status for status in seen.statuses if status == 0 or status >= 500]


@pytest.mark.soak
@pytest.mark.abuse("A302")
@pytest.mark.parametrize("size", [2**16 - 2**10, 2**20 - 2**12])
def test_no_hostile_request_to_any_route_stops_the_event_loop(server: LiveServer, size: int) -> None:
    assert worst(server, requests_of(server, size)) == []
